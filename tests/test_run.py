"""One training run from its config: it can be cut anywhere, and the same call goes on as if nothing had happened."""

import functools
import os
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bmjax import config, data, distill, losses, parallel, prune, trees
from bmjax.data.dataset import build, stratified
from bmjax.models import Decoder
from bmjax.models.linen import LinenModel
from bmjax.models.mlp import PlainMLP, ResidualMLP
from bmjax.train import Problem, loop, run
from bmjax.train import log as logs
from bmjax.train.optimizer import Optimizer
from bmjax.types import Mean, Term

STUDENT = LinenModel(ResidualMLP(layers=2, width=8, neurons=12, classes=3, dropout=0.2))
DECODER = Decoder(layers=1, width=4, heads=1, neurons=4).build((3,), 7)
TEACHER = LinenModel(PlainMLP((10,), classes=3))
STEPS = 20
QUIET = loop.Every(log=0, evaluate=0, save=0)


@functools.cache
def dataset():
    rng = np.random.default_rng(0)
    targets = np.arange(100, dtype=np.int32) % 3
    inputs = rng.normal(size=(100, 6)).astype(np.float32) + np.eye(3, 6)[targets]
    return build("blobs", inputs, targets, stratified(targets), class_names="abc")


@pytest.fixture
def bench(tmp_path, request):
    """A new one each time it is called, as after a restart."""
    opened = []

    def make(devices=1, folder="run"):
        mesh = parallel.make_mesh(f"data={devices}", jax.devices()[:devices])
        log = logs.Log(tmp_path / folder, tensorboard=False, progress=False)
        opened.append(log)
        return run.Bench(mesh, dataset(), data.Data(batch=8), tmp_path / folder, log, seed=5)

    yield make
    for log in opened:
        log.close()


def distilled_and_pruned():
    """Dropout, a teacher, a term with parameters, and masks that grow before, at and after step 10."""
    pruned = prune.sparsify(sparsity=0.6, schedule=prune.cubic(3, 17), every=4)
    terms = {
        "ce": (0.5, losses.cross_entropy_term()),
        "kd": (0.5, losses.on_logits(distill.kd, temperature=2.0)),
        "hint": (0.1, losses.on_features(distill.hint, {"final": "hidden_0"}, project="linear")),
    }
    tx = optax.chain(Optimizer(learning_rate=0.01).build(STEPS), pruned)
    return Problem(STUDENT, terms, tx, teacher=TEACHER, loss_tx=Optimizer().build_for_terms(STEPS))


def frozen(mesh):
    params, _ = jax.jit(TEACHER.init)(jax.random.key(1), {"inputs": np.zeros((1, 6), np.float32)})
    return jax.device_put({"params": params, "model_state": {}}, parallel.replicated(mesh))


def train(bench, steps, every=QUIET, name="student", problem=None, params=None):
    problem = problem or distilled_and_pruned()
    teacher = frozen(bench.mesh) if problem.teacher else None
    return run.fit(
        bench, name, problem, run.Run(steps=steps, every=every, augment=data.Augment(noise=0.1)), frozen=teacher, params=params
    )


def leaves(state):
    return trees.paths(jax.device_get(state))


def assert_same_bits(one, other):
    one, other = leaves(one), leaves(other)
    assert set(one) == set(other)
    for path in one:
        np.testing.assert_array_equal(one[path], other[path], err_msg=path)


@pytest.mark.parametrize("devices", [1, 2])
def test_ten_steps_a_restart_and_ten_more_are_twenty(bench, devices):
    straight = train(bench(devices, "straight"), STEPS, every=loop.Every(log=1, evaluate=0, save=0))
    half = train(bench(devices), STEPS // 2, every=loop.Every(log=1, evaluate=0, save=0))
    zeros = [int((~np.asarray(mask)).sum()) for mask in jax.tree.leaves(prune.masks(half.opt_state["model"])) if mask.ndim]
    resumed_in = bench(devices)
    resumed = train(resumed_in, STEPS, every=loop.Every(log=1, evaluate=0, save=0))
    assert_same_bits(straight, resumed)

    masks = trees.paths(jax.device_get(prune.masks(resumed.opt_state["model"])))
    kernels = trees.paths(jax.device_get(resumed.params["model"]))
    pruned = [path for path, mask in masks.items() if mask.ndim]
    assert pruned
    for path in pruned:
        assert (kernels[path][~masks[path]] == 0).all()
        assert (~masks[path]).sum() == round(0.6 * masks[path].size)
    assert 0 < sum(zeros) < sum((~masks[path]).sum() for path in pruned)  # the cut fell while masks grew
    assert set(resumed.params["loss"]) == {"hint"}

    log = {folder: logs.read(resumed_in.directory.parent / folder)["student"] for folder in ("straight", "run")}
    speed = {"steps_per_s", "examples_per_s", "data_wait"}
    lines = {folder: [row for row in rows if "loss" in row] for folder, rows in log.items()}
    assert any(speed <= set(row) for row in lines["run"])
    steps = {folder: [{k: v for k, v in row.items() if k not in speed} for row in rows] for folder, rows in lines.items()}
    assert [row["step"] for row in steps["run"]] == list(range(1, STEPS + 1))
    assert steps["run"] == steps["straight"]  # every term's value too, so the data went on where they were
    for row in steps["run"]:
        assert {name for name in row if not name.startswith("sparsity/")} == {"step", "loss", "ce", "kd", "hint", "nan_scores"}
        assert row["loss"] == pytest.approx(0.5 * row["ce"] + 0.5 * row["kd"] + 0.1 * row["hint"], rel=1e-5)
    last = steps["run"][-1]
    for path in pruned:
        assert last[f"sparsity/{path}"] == pytest.approx((~masks[path]).mean())
    assert [row for row in log["run"] if "valid_accuracy" in row][-1] == log["straight"][-1]


def simple(term=None, steps=STEPS, tx=None):
    terms = {"ce": (1.0, losses.cross_entropy_term())} | ({"extra": (1.0, term)} if term else {})
    return Problem(TEACHER, terms, tx or Optimizer("sgd", 0.05, momentum=0.5).build(steps))


def nan_at(step, where):
    """A term whose value, or whose gradient alone, is NaN in one update."""

    def apply(ctx, student, teacher, batch):
        now = ctx.step == step - 1
        zero = 0.0 * jnp.sum(student.logits**2, -1)
        value = zero + jnp.where(now, jnp.nan, 0.0) if where == "value" else jnp.sqrt(jnp.where(now, zero, 1.0))
        return Mean.of(value, batch["weights"])

    return Term(lambda key, student, teacher: ({}, {}), apply)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("value", r"the loss is nan at step 8 \(ce [\d.]+, extra nan\); the last good checkpoint is step 6; "),
        ("gradient", r"model/head/bias is not finite after step 8 \(ce [\d.]+, extra 0\); the last good checkpoint is step 6; "),
    ],
    ids=["value", "gradient"],
)
def test_nan_stops_the_run_and_never_reaches_the_disk(bench, devices, where, words):
    every = loop.Every(log=0, evaluate=0, save=2)
    here = bench(devices)
    with pytest.raises(ValueError, match=words) as error:
        train(here, STEPS, every, problem=simple(nan_at(8, where)))
    assert "\n" not in str(error.value)
    folder = here.directory / "checkpoints" / "student"
    assert sorted(path.name for path in folder.iterdir()) == ["00000004", "00000006"]
    good = train(bench(devices), 6, every, problem=simple())
    assert all(np.isfinite(leaf).all() for leaf in leaves(good).values() if leaf.dtype == np.float32)
    again = train(bench(devices), STEPS, every, problem=simple())  # without the fault it goes on from there
    assert int(again.step) == STEPS


def interrupt():
    threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT)).start()
    time.sleep(0.2)


@pytest.mark.parametrize("devices", [1, 2])
def test_after_ctrl_c_the_same_call_goes_on(bench, devices, monkeypatch):
    straight = train(bench(devices, "straight"), STEPS, problem=simple())
    here, every = bench(devices), loop.Every(log=1, evaluate=0, save=0)
    write = here.log.scalars
    monkeypatch.setattr(here.log, "scalars", lambda step, *args: (write(step, *args), step == 7 and interrupt()))
    with pytest.raises(loop.Stop):
        train(here, STEPS, every, problem=simple())
    saved = [path.name for path in (here.directory / "checkpoints" / "student").iterdir()]
    assert saved == ["00000008"]  # the flag is looked at once a step
    assert_same_bits(straight, train(bench(devices), STEPS, every, problem=simple()))


def test_a_finished_run_is_not_trained_again(bench):
    done = train(bench(), 4, problem=simple())
    rows = (bench().directory / logs.FILE).read_text()
    assert_same_bits(done, train(bench(), 4, problem=simple()))
    assert (bench().directory / logs.FILE).read_text() == rows


def test_runs_of_two_names_have_their_own_checkpoints_and_start(bench):
    given = jax.tree.map(lambda x: x + 1.0, jax.device_get(frozen(bench().mesh)["params"]))
    still = simple(tx=optax.sgd(0.0))
    started = train(bench(), 2, name="a", problem=still, params=given)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(started.params["model"]), given)
    other = jax.tree.map(lambda x: x + 1.0, given)  # a run that was saved goes on, wherever it is told to start
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get(train(bench(), 4, name="a", problem=still, params=other).params["model"]),
        given,
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get(train(bench(), 2, name="b", problem=still, params=other).params["model"]),
        other,
    )


def test_another_model_does_not_take_the_checkpoint(bench):
    train(bench(), 2, problem=simple())
    wider = Problem(LinenModel(PlainMLP((11,), classes=3)), simple().terms, simple().tx)
    with pytest.raises(
        ValueError, match=r"does not fit the model: params/model/head/kernel has shape \[10, 3\], expected \[11, 3\]"
    ):
        train(bench(), 4, problem=wider)


def test_a_batch_that_does_not_divide_is_refused_before_anything_runs(bench):
    odd = Problem(TEACHER, simple().terms, simple().tx, accumulate=3)
    with pytest.raises(ValueError, match="a batch of 8 does not divide over 2 devices x 3 microbatches; take a multiple of 6"):
        train(bench(2), 2, problem=odd)


def test_evaluation_counts_every_example_once_on_any_mesh(bench):
    params = jax.device_get(frozen(bench().mesh)["params"])
    split = dataset().test
    hidden = np.maximum(split.inputs.astype(np.float64) @ params["hidden_0"]["kernel"] + params["hidden_0"]["bias"], 0)
    logits = hidden @ params["head"]["kernel"] + params["head"]["bias"]
    right = logits.argmax(-1) == split.targets
    nll = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(split)), split.targets]
    for devices in (1, 8):
        here = bench(devices)
        on_mesh = frozen(here.mesh)["params"]
        found = run.evaluate(here, lambda batch, p=on_mesh: run.predictor(TEACHER)(p, {}, batch), split)
        assert found.summary["accuracy"] == pytest.approx(right.mean())
        assert found.summary["nll"] == pytest.approx(nll.mean(), rel=1e-5)
        np.testing.assert_array_equal(found.correct, right)
    assert run.predictor(TEACHER) is run.predictor(LinenModel(PlainMLP((10,), classes=3)))


def test_costs_have_their_closed_form():
    params = jax.eval_shape(TEACHER.init, jax.random.key(0), {"inputs": np.zeros((1, 6), np.float32)})[0]
    assert run.forward_flops(TEACHER, params, {}, (6,)) == 2 * (6 * 10 + 10 * 3)
    ids = jax.eval_shape(DECODER.init, jax.random.key(0), {"inputs": np.zeros((1, 3), np.int32)})[0]
    assert run.forward_flops(DECODER, ids, {}, (3,), "int32") > 2 * 3 * (4 * 7)  # at least the head, for each token
    assert run.step_flops(student=100, teacher=7, batch=4) == 4 * (3 * 100 + 7)


def test_a_run_says_how_the_step_is_computed(bench):
    """Every field reaches the problem; the values of one update show which."""
    settings = run.Run(steps=3, executor="partitioned", compute_dtype="bfloat16", ema=0.5, clip_per_example=0.1, norms=True)
    assert settings.how["gradient"].per_example
    plain = run.Run()
    assert (plain.how["ema"], plain.how["compute_dtype"], plain.how["gradient"].per_example) == (None, "float32", False)
    problem = Problem(TEACHER, simple().terms, optax.sgd(1.0), **settings.how)
    here = bench(2)
    state = run.fit(here, "model", problem, settings)
    (row,) = [row for row in logs.read(here.directory)["model"] if "loss" in row]
    assert 0 < row["grad_norm"] <= 0.1 + 1e-3  # of examples that are clipped, so is their mean
    assert row["update_norm"] == pytest.approx(row["grad_norm"], rel=1e-3)
    assert set(state.extra) == {"ema"}
    average = state.extra["ema"]["head"]["kernel"]
    np.testing.assert_array_equal(run.outcome(state.params["model"], state.extra)["head"]["kernel"], average)


def test_what_a_run_is_scored_by_is_its_average_with_pruned_weights_left_out():
    now, average = {"a": jnp.array([0.0, 2.0, -1.0])}, {"a": jnp.array([0.5, 1.0, 3.0])}
    assert run.outcome(now, {}) is now
    np.testing.assert_array_equal(run.outcome(now, {"ema": average})["a"], [0.0, 1.0, 3.0])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"executor": "ddp"}, "executor is 'ddp'; expected one of auto, replicated, partitioned, pmap, hybrid"),
        ({"compute_dtype": "float16"}, "compute_dtype is 'float16'; expected one of float32, bfloat16"),
        ({"ema": 1.0}, "ema is 1.0; expected a finite number in"),
        ({"clip_per_example": -1.0}, "clip_per_example is -1.0; expected a finite number of at least 0"),
    ],
)
def test_a_setting_out_of_range_is_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        config.validate(run.Run(**wrong))
