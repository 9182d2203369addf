"""A language model's figures against NumPy float64, on 1 and 8 devices, with ragged batches and uneven masks."""

import dataclasses
import functools
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bmjax import data, measure, parallel
from bmjax.jobs.train import _bigram
from bmjax.measure import evaluation
from bmjax.train import run

VOCABULARY, LENGTH = 11, 7
jitted = jax.jit(measure.tally_tokens, static_argnames="bins")


def text(rows, seed=0, vocabulary=VOCABULARY):
    """Logits that favour the target, targets, masks of every length from 0 on, a teacher's logits."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(rows, LENGTH, vocabulary)).astype(np.float32) * 2
    targets = rng.integers(0, vocabulary, (rows, LENGTH)).astype(np.int32)
    np.put_along_axis(logits, targets[..., None], np.take_along_axis(logits, targets[..., None], -1) + 2, -1)
    weights = (np.arange(LENGTH) < rng.integers(0, LENGTH + 1, rows)[:, None]).astype(np.float32)
    return logits, targets, weights, (logits + rng.normal(size=logits.shape)).astype(np.float32)


def batches(logits, targets, weights, teacher, size, devices):
    """Shuffled, the last one short, or on 8 devices filled up with sequences of weight 0 that hold nonsense."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    order = np.random.default_rng(7).permutation(len(targets))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        index = np.concatenate([chosen, np.zeros(-len(chosen) % devices, int)])
        real = np.arange(len(index)) < len(chosen)
        mask = weights[index] * real[:, None]
        batch = {
            "inputs": np.where(mask[..., None] > 0, logits[index], np.nan),
            "teacher": teacher[index],
            "targets": np.where(mask > 0, targets[index], -1).astype(np.int32),
            "weights": mask,
            "id": np.where(real, index, -1).astype(np.int32),
        }
        yield batch if devices == 1 else jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))


@functools.partial(jax.jit, static_argnames="name")
def read(batch, name):
    return batch[name] * 1.0


def by_hand(logits, targets, weights):
    """(nll, hit, confidence) of the tokens that count, float64, and the mask."""
    logits, kept = logits.astype(np.float64), weights > 0
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    nll = -np.log(np.take_along_axis(probabilities, targets[..., None], -1)[..., 0])
    return nll, logits.argmax(-1) == targets, probabilities.max(-1), kept


def expected_ece(confidence, hit, bins=15):
    total = 0.0
    for low, high in itertools.pairwise(np.linspace(0, 1, bins + 1)):
        chosen = (confidence > low) & (confidence <= high)
        if chosen.any():
            total += chosen.mean() * abs(hit[chosen].mean() - confidence[chosen].mean())
    return total


@pytest.mark.parametrize("devices", [1, 8])
def test_evaluate_is_exact_over_shards_ragged_batches_and_masks(devices):
    logits, targets, weights, teacher = text(43)
    found = measure.evaluate(
        lambda batch: read(batch, "inputs"),
        batches(logits, targets, weights, teacher, 16, devices),
        classes=VOCABULARY,
        teacher_logits_fn=lambda batch: read(batch, "teacher"),
        kind="tokens",
        text_bytes=1234,
    )
    nll, hit, confidence, kept = by_hand(logits, targets, weights)
    summary = found.summary
    assert summary["count"] == kept.sum() != kept.size
    assert summary["sequences"] == kept.any(1).sum() < len(targets)
    assert summary["nll"] == pytest.approx(nll[kept].mean(), rel=1e-6)
    assert summary["bits_per_token"] == pytest.approx(nll[kept].mean() / np.log(2), rel=1e-6)
    assert summary["bits_per_byte"] == pytest.approx(nll[kept].sum() / np.log(2) / 1234, rel=1e-6)
    assert summary["text_bytes"] == 1234
    assert summary["perplexity"] == pytest.approx(np.exp(nll[kept].mean()), rel=1e-6)
    assert summary["accuracy"] == hit[kept].mean()
    assert summary["ece"] == pytest.approx(expected_ece(confidence[kept], hit[kept]), abs=1e-6)
    assert summary["teacher_agreement"] == (logits.argmax(-1) == teacher.argmax(-1))[kept].mean()
    json.dumps(summary, allow_nan=False)

    some = kept.any(1)
    np.testing.assert_array_equal(found.ids, np.flatnonzero(some))
    np.testing.assert_array_equal(found.tokens, kept.sum(1)[some])
    np.testing.assert_array_equal(found.hits, (hit & kept).sum(1)[some])
    np.testing.assert_allclose(found.nll, (nll * kept).sum(1)[some], rtol=1e-6)
    np.testing.assert_allclose(found.bits, (nll * kept).sum(1)[some] / kept.sum(1)[some] / np.log(2), rtol=1e-6)


def test_a_weight_of_a_sequence_holds_for_its_tokens():
    logits, targets, _, _ = text(4)
    weights = np.array([1, 0, 1, 1], np.float32)
    found = measure.summary_of_tokens(jax.device_get(jitted(logits, targets, weights)))
    nll, hit, _, _ = by_hand(logits, targets, weights)
    assert found["nll"] == pytest.approx(nll[weights > 0].mean(), rel=1e-6)
    assert found["accuracy"] == hit[weights > 0].mean()
    assert (found["count"], found["sequences"]) == (3 * LENGTH, 3)
    assert found["bits_per_byte"] is found["teacher_agreement"] is None


def test_a_uniform_model_needs_log2_of_the_vocabulary():
    found = measure.summary_of_tokens(
        jax.device_get(jitted(np.zeros((3, 5, 256), np.float32), np.full((3, 5), 9), np.ones((3, 5)))), text_bytes=15
    )
    assert found["bits_per_byte"] == pytest.approx(found["bits_per_token"], rel=1e-12) == pytest.approx(8.0, rel=1e-6)
    assert found["perplexity"] == pytest.approx(256.0, rel=1e-5)


def test_a_large_vocabulary_makes_no_matrix_of_its_square():
    vocabulary = 50_000
    shapes = [jax.ShapeDtypeStruct((2, 4, vocabulary), "float32"), jax.ShapeDtypeStruct((2, 4), "int32")]
    program = jax.make_jaxpr(measure.tally_tokens)(*shapes, jax.ShapeDtypeStruct((2, 4), "float32"))
    sizes = [math.prod(var.aval.shape) for eqn in program.jaxpr.eqns for var in eqn.outvars]
    assert max(sizes) == 2 * 4 * vocabulary
    logits, targets, weights, _ = text(3, vocabulary=evaluation.CONFUSION + 1)
    batch = {"inputs": logits, "targets": targets, "weights": weights, "id": np.arange(3)}
    assert isinstance(
        measure.evaluate(lambda b: read(b, "inputs"), [batch], classes=evaluation.CONFUSION + 1), measure.TokenEvaluation
    )
    batch["inputs"], batch["targets"] = logits[..., : evaluation.CONFUSION], np.minimum(targets, evaluation.CONFUSION - 1)
    few = measure.evaluate(lambda b: read(b, "inputs"), [batch], classes=evaluation.CONFUSION)
    assert isinstance(few, measure.Evaluation)


def test_totals_are_float64():
    """A million sequences of which float32 sums would lose the last ones."""
    rows = 1_000_000
    zeros, ones = np.zeros(rows, np.int32), np.ones(rows, np.int32)
    nll = np.full(rows, 1.1, np.float32)
    tally = measure.TokenTally(nll, ones, zeros, zeros, None, zeros[:, None], zeros[:, None], nll[:, None] * 0)
    assert measure.summary_of_tokens(tally)["nll"] == pytest.approx(float(np.float32(1.1)), rel=1e-12)


def test_a_perplexity_beyond_float64_is_infinite():
    logits = np.zeros((1, 2, 3), np.float32)
    logits[..., 0] = 2000
    found = measure.summary_of_tokens(jax.device_get(jitted(logits, np.ones((1, 2), int), np.ones((1, 2)))))
    assert (found["nll"], found["perplexity"]) == (2000.0, math.inf)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": np.zeros((2, 3))}, "the evaluation split is empty: no token"),
        ({"targets": np.array([[0, 1, -1], [4, 7, 1]])}, "2 of 6 targets are no token of the model"),
        ({"logits": np.full((2, 3, 5), np.nan)}, "logits hold NaN"),
    ],
)
def test_what_cannot_be_summed_up(change, message):
    good = {"logits": np.zeros((2, 3, 5)), "targets": np.zeros((2, 3), int), "weights": np.ones((2, 3))}
    tally = jitted(**{name: jnp.asarray(value) for name, value in (good | change).items()})
    with pytest.raises(ValueError, match=message):
        measure.summary_of_tokens(jax.device_get(tally))


def test_evaluate_refuses_what_does_not_fit():
    batch = {"inputs": np.zeros((2, 4)), "targets": np.zeros(2, int), "weights": np.ones(2), "id": np.arange(2)}
    with pytest.raises(ValueError, match=r"targets have shape \[2\]; expected \[B, T\] for tokens"):
        measure.evaluate(lambda b: read(b, "inputs"), [batch], classes=4, kind="tokens")
    with pytest.raises(ValueError, match="kind of data is 'words'; expected one of classes, tokens"):
        measure.evaluate(lambda b: read(b, "inputs"), [batch], classes=4, kind="words")
    with pytest.raises(ValueError, match="it gave no batch"):
        measure.evaluate(lambda b: read(b, "inputs"), [], classes=4, kind="tokens")


def test_bigram_by_hand():
    """In 0 1 0 1 0 0 a 0 is followed by 1 twice and by 0 once, a 1 by 0 twice; 2 is never seen."""
    train, test = np.array([0, 1, 0, 1, 0, 0], np.uint8), np.array([0, 1, 0, 0, 2, 1])
    # p(1|0) = 3/6, p(0|1) = 3/5, p(0|0) = 2/6, p(2|0) = 1/6, p(1|2) = 1/3
    expected = -np.mean(np.log2([3 / 6, 3 / 5, 2 / 6, 1 / 6, 1 / 3]))
    assert measure.bigram_bits(train, test, 3) == pytest.approx(expected, rel=1e-12)
    half = -np.mean(np.log2([2.5 / 4.5, 2.5 / 3.5, 1.5 / 4.5, 0.5 / 4.5, 0.5 / 1.5]))
    assert measure.bigram_bits(train, test, 3, smoothing=0.5) == pytest.approx(half, rel=1e-12)


def test_bigram_does_not_cross_rows():
    rows = np.array([[0, 1, 1], [2, 2, 0]])
    # pairs 01 11 22 20: each context once or twice, never 12
    expected = -np.mean(np.log2([2 / 4, 2 / 4, 2 / 5, 2 / 5]))
    assert measure.bigram_bits(rows, rows, 3) == pytest.approx(expected, rel=1e-12)


def test_bigram_of_a_large_vocabulary_and_of_noise():
    tokens = np.random.default_rng(0).integers(0, 256, 400_000)
    assert measure.bigram_bits(tokens[:300_000], tokens[300_000:], 256) == pytest.approx(8.0, abs=0.15)
    assert measure.bigram_bits(np.arange(1000), np.arange(500), 10**7, 1e-9) == pytest.approx(np.log2(1 + 0.01), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 1], [0, 3], 3), "the test tokens go from 0 to 3; expected 0 to 2"),
        (([0, -1], [0, 1], 3), "the train tokens go from -1 to 0"),
        (([0], [0, 1], 3), r"the train tokens are int64 of shape \[1\]; expected integers"),
        (([0.5, 1.0], [0, 1], 3), "the train tokens are float64"),
        (([0, 1], [0, 1], 3, 0.0), "smoothing is 0.0; expected a number above 0"),
    ],
)
def test_bigram_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        measure.bigram_bits(*arguments)


@pytest.mark.parametrize("devices", [1, 8])
def test_a_run_evaluates_tokens_of_many_bytes_as_a_language_model(devices, tmp_path):
    """A table of which token follows which, as the model: its bits are the bigram baseline's, padding is no text."""
    rng = np.random.default_rng(0)
    streams = rng.integers(0, 256, (21, 9)).astype(np.uint8)
    weights = (np.arange(8) < rng.integers(1, 9, (21, 1))).astype(np.float32)
    sizes = rng.integers(0, 9, (21, 8)).astype(np.uint8)
    columns = (streams[:, :-1], streams[:, 1:], np.arange(21, dtype=np.int32), {"weights": weights})
    split = data.Split(*columns, target_bytes=sizes)
    dataset = data.Dataset("text", split, split, split, (), np.zeros(()), np.ones(()), "", kind="tokens", vocabulary=256)
    counts = np.ones((256, 256))
    kept = weights > 0
    np.add.at(counts, (split.inputs[kept], split.targets[kept]), 1)
    table = np.log(counts / counts.sum(1, keepdims=True)).astype(np.float32)
    bench = run.Bench(parallel.make_mesh("data=-1", jax.devices()[:devices]), dataset, data.Data(batch=8), tmp_path, None, 0)
    found = run.evaluate(bench, jax.jit(lambda batch: jnp.asarray(table)[batch["inputs"]]), split)
    assert (found.summary["count"], found.summary["sequences"]) == (kept.sum(), 21)
    nats = -table[split.inputs, split.targets].astype(np.float64)[kept].sum()
    assert found.summary["bits_per_byte"] == pytest.approx(nats / np.log(2) / sizes[kept].sum(), rel=1e-6)
    baseline = _bigram(dataset)
    assert baseline["bigram_bits"] == pytest.approx(found.summary["bits_per_token"], rel=1e-6)
    assert baseline["bigram_bits_per_byte"] == pytest.approx(found.summary["bits_per_byte"], rel=1e-6)
    for name, known in (("bytes", 1), ("unknown", None)):
        other = dataclasses.replace(split, target_bytes=known)
        again = run.evaluate(bench, jax.jit(lambda batch: jnp.asarray(table)[batch["inputs"]]), other).summary
        assert again["bits_per_byte"] == (None if name == "unknown" else pytest.approx(again["bits_per_token"], rel=1e-12))
