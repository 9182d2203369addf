"""Figures against scikit-learn and NumPy float64, on 1 and 8 devices, with padding and ragged batches."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sklearn import metrics as sk

from bmjax import measure
from bmjax.measure import metrics

CLASSES = 5
jitted = jax.jit(metrics.tally, static_argnames="bins")


def items(n, seed=0, classes=CLASSES, predicted=None):
    """Random logits and targets; the last class is never a target."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, classes)).astype(np.float32) * 2
    targets = rng.integers(0, classes - 1, n)
    logits[np.arange(n), targets] += 1.5
    return logits, targets.astype(np.int32), (logits + rng.normal(size=logits.shape)).astype(np.float32)


def batches(logits, targets, teacher, size, shards=1):
    """Ragged batches, the last one padded with nonsense of weight 0; ids come shuffled."""
    order = np.random.default_rng(7).permutation(len(targets))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        padding = -len(chosen) % shards + (size - len(chosen) if shards > 1 else 0) // shards * shards
        index = np.concatenate([chosen, np.zeros(padding, int)])
        weights = np.concatenate([np.ones(len(chosen)), np.zeros(padding)]).astype(np.float32)
        yield {
            "inputs": logits[index],
            "teacher": teacher[index],
            "targets": np.where(weights > 0, targets[index], -1).astype(np.int32),
            "weights": weights,
            "id": index.astype(np.int32),
        }


def expected_ece(logits, targets, bins=15):
    probabilities = np.exp(logits.astype(np.float64))
    probabilities /= probabilities.sum(-1, keepdims=True)
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == targets
    edges = np.linspace(0, 1, bins + 1)
    ece = 0.0
    for low, high in itertools.pairwise(edges):
        chosen = (confidence > low) & (confidence <= high)
        if chosen.any():
            ece += chosen.mean() * abs(right[chosen].mean() - confidence[chosen].mean())
    return ece


def check_summary(found, logits, targets, teacher):
    predictions = logits.argmax(-1)
    assert found["count"] == len(targets)
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(targets, predictions), abs=1e-12)
    scores = {"precision": sk.precision_score, "recall": sk.recall_score, "f1": sk.f1_score}
    labels = range(logits.shape[-1])
    for name, score in scores.items():
        for average in ("macro", "micro", "weighted"):
            assert found[name][average] == pytest.approx(score(targets, predictions, average=average, zero_division=0), abs=1e-12)
        by_class = score(targets, predictions, average=None, labels=labels, zero_division=0)
        assert [row[name] for row in found["per_class"]] == pytest.approx(by_class.tolist(), abs=1e-12)
    assert found["confusion"] == sk.confusion_matrix(targets, predictions, labels=labels).tolist()
    probabilities = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum(-1, keepdims=True)
    assert found["nll"] == pytest.approx(sk.log_loss(targets, probabilities, labels=labels), rel=1e-6)
    assert found["ece"] == pytest.approx(expected_ece(logits, targets), abs=1e-6)
    assert found["teacher_agreement"] == pytest.approx(np.mean(predictions == teacher.argmax(-1)), abs=1e-12)
    json.dumps(found, allow_nan=False)


def place(batch, devices):
    if devices == 1:
        return batch
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:devices]), ("data",)), PartitionSpec("data"))
    return jax.device_put(batch, sharding)


@functools.partial(jax.jit, static_argnames="name")
def read(batch, name):
    return batch[name] * 1.0


@pytest.mark.parametrize("devices", [1, 8])
def test_evaluate_is_exact_over_shards_and_ragged_batches(devices):
    logits, targets, teacher = items(205)
    result = measure.evaluate(
        lambda batch: read(batch, "inputs"),
        (place(batch, devices) for batch in batches(logits, targets, teacher, 32, devices)),
        classes=CLASSES,
        teacher_logits_fn=lambda batch: read(batch, "teacher"),
    )
    check_summary(result.summary, logits, targets, teacher)
    np.testing.assert_array_equal(result.ids, np.arange(205))
    np.testing.assert_array_equal(result.targets, targets)
    np.testing.assert_array_equal(result.predictions, logits.argmax(-1))
    np.testing.assert_array_equal(result.correct, logits.argmax(-1) == targets)


def test_classes_that_never_occur_leave_the_macro_average_alone():
    logits, targets, teacher = items(60)
    logits[:, -1] = -9.0  # the last class is neither a target nor predicted
    found = metrics.summary(jitted(logits, targets, np.ones(60), teacher))
    check_summary(found, logits, targets, teacher)
    assert found["per_class"][-1] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}


def test_tokens_count_one_by_one():
    logits, targets, teacher = items(24)
    weights = np.ones((6, 4), np.float32)
    weights[:, 3] = 0
    shaped = (logits.reshape(6, 4, CLASSES), targets.reshape(6, 4), weights, teacher.reshape(6, 4, CLASSES))
    kept = weights.reshape(-1) > 0
    check_summary(metrics.summary(jitted(*shaped)), logits[kept], targets[kept], teacher[kept])
    batch = {"inputs": shaped[0], "targets": shaped[1], "weights": weights, "id": np.arange(6)[::-1].astype(np.int32)}
    result = measure.evaluate(lambda batch: read(batch, "inputs"), [batch], classes=CLASSES)
    np.testing.assert_array_equal(result.ids, np.repeat(np.arange(6), 3))
    np.testing.assert_array_equal(result.targets, shaped[1][::-1, :3].reshape(-1))
    assert result.summary["teacher_agreement"] is None


def test_an_examples_weight_holds_for_its_tokens():
    logits, targets, teacher = items(24)
    weights = np.array([1, 0, 1, 1, 0, 1], np.float32)
    shaped = (logits.reshape(6, 4, CLASSES), targets.reshape(6, 4), weights, teacher.reshape(6, 4, CLASSES))
    kept = np.repeat(weights, 4) > 0
    check_summary(metrics.summary(jitted(*shaped)), logits[kept], targets[kept], teacher[kept])
    batch = {"inputs": shaped[0], "targets": shaped[1], "weights": weights, "id": np.arange(6)}
    result = measure.evaluate(lambda batch: read(batch, "inputs"), [batch], classes=CLASSES)
    np.testing.assert_array_equal(result.predictions, logits[kept].argmax(-1))


def test_host_totals_pass_the_limits_of_float32_and_int32():
    logits, targets, _ = items(8)
    one = jax.device_get(jitted(logits, targets, np.ones(8)))
    big = jax.tree.map(lambda x: x.astype(np.float64 if x.dtype.kind == "f" else np.int64) * 2**40, one)
    total = metrics.add(big, one)
    assert total.count == 8 * 2**40 + 8
    assert total.confusion.sum() == total.count
    assert total.nll == pytest.approx(float(one.nll) * (2**40 + 1), rel=1e-15)


def test_padding_cannot_be_seen():
    logits, targets, teacher = items(16)
    weights = np.ones(16, np.float32)
    weights[10:] = 0
    dirty = logits.copy()
    dirty[10:] = np.nan
    clean = metrics.summary(jitted(logits[:10], targets[:10], weights[:10], teacher[:10]))
    found = metrics.summary(jitted(dirty, np.where(weights > 0, targets, 99), weights, teacher))
    assert found["nll"] == pytest.approx(clean.pop("nll"), rel=1e-6)
    assert found["ece"] == pytest.approx(clean.pop("ece"), abs=1e-6)
    assert {name: value for name, value in found.items() if name in clean} == clean


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": np.zeros(4)}, "evaluation split is empty"),
        ({"targets": np.array([0, 1, -1, 7])}, "2 of 4 targets are no class"),
        ({"logits": np.full((4, CLASSES), np.nan)}, "hold NaN"),
    ],
)
def test_what_cannot_be_summed_up(change, message):
    good = {"logits": np.zeros((4, CLASSES)), "targets": np.zeros(4, int), "weights": np.ones(4)}
    with pytest.raises(ValueError, match=message):
        metrics.summary(jitted(**{name: jnp.asarray(value) for name, value in (good | change).items()}))


def test_evaluate_refuses_what_does_not_fit():
    logits, targets, teacher = items(8)
    read_inputs = lambda batch: read(batch, "inputs")
    with pytest.raises(ValueError, match="empty"):
        measure.evaluate(read_inputs, [], classes=CLASSES)
    with pytest.raises(ValueError, match="do the classes agree"):
        measure.evaluate(read_inputs, batches(logits, targets, teacher, 8), classes=CLASSES + 1)
