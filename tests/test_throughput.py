"""Speed on a simulated clock; FLOPs, learning rate and sparsity against closed forms; profiles that end."""

import math
import pathlib
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bmjax import config, data, losses, parallel, prune
from bmjax.data.dataset import build, stratified
from bmjax.models.linen import LinenModel
from bmjax.models.mlp import PlainMLP
from bmjax.train import Problem, loop, profile, run, throughput
from bmjax.train import log as logs
from bmjax.train.throughput import Meter
from bmjax.types import Mean, TrainState


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def device(kind, **stats):
    return types.SimpleNamespace(device_kind=kind, process_index=0, memory_stats=lambda: stats or None)


def slow(clock, seconds):
    """Batches that come after some seconds."""
    while True:
        clock.now += seconds
        yield "batch"


def test_a_line_speaks_of_the_steps_since_the_last_one():
    clock = Clock()
    meter, batches = Meter(32, "tokens", clock=clock), slow(clock, 0.5)
    clock.now += 1000  # compiling
    assert meter.next(batches) == "batch"
    assert not meter.running
    assert meter.line(11) == {}
    for _ in range(4):
        assert meter.running
        meter.next(batches)
        clock.now += 1.5
    assert meter.line(15) == pytest.approx({"steps_per_s": 0.5, "tokens_per_s": 16.0, "data_wait": 0.25})
    assert meter.line(15) == {}  # nothing was done since, so the time goes on counting
    clock.now += 1.0
    assert meter.line(15) == {}
    clock.now += 3.0
    assert meter.line(16) == pytest.approx({"steps_per_s": 0.25, "tokens_per_s": 8.0, "data_wait": 0.0})


def test_evaluating_is_not_training():
    clock = Clock()
    meter = Meter(1, clock=clock)
    meter.line(1)
    clock.now += 2.0
    with meter.paused():
        clock.now += 500.0
    assert meter.line(3) == pytest.approx({"steps_per_s": 1.0, "examples_per_s": 1.0, "data_wait": 0.0})


def test_mfu_is_of_the_peak_of_all_devices():
    clock = Clock()
    gpus = [
        device("NVIDIA H100 80GB HBM3", peak_bytes_in_use=3 * 2**30),
        device("NVIDIA H100 80GB HBM3", peak_bytes_in_use=2**31),
    ]
    meter = Meter(1, flops=int(989e12), devices=gpus, clock=clock)
    meter.line(0)
    clock.now += 4.0
    found = meter.line(4)  # one step a second, each as much as one device can do in a second
    assert (found["mfu"], found["memory_gib"]) == pytest.approx((0.5, 3.0))


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
    ],
)
def test_peaks_of_data_sheets(kind, tera):
    assert throughput.peak_flops([device(kind)] * 3) == pytest.approx(3 * tera * 1e12)


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090"])
def test_no_peak_is_made_up(kind):
    assert throughput.peak_flops([device("TPU v4"), device(kind)]) is None
    clock = Clock()
    meter = Meter(1, flops=10, devices=[device(kind)], clock=clock)
    meter.line(0)
    clock.now += 1
    assert set(meter.line(1)) == {"steps_per_s", "examples_per_s", "data_wait"}


def test_on_a_cpu_nothing_but_speed():
    assert throughput.peak_flops(jax.devices()) is None
    assert throughput.peak_memory(jax.devices()) is None
    assert throughput.peak_flops([]) is None


STUDENT, TEACHER = LinenModel(PlainMLP((10,), classes=3)), LinenModel(PlainMLP((20,), classes=3))
BATCH = {"inputs": np.zeros((8, 6), np.float32), "targets": np.zeros(8, np.int32), "weights": np.ones(8, np.float32)}


def problem(teacher=None, tx=None):
    return Problem(STUDENT, {"zero": (1.0, lambda *_: Mean(jnp.zeros(()), jnp.ones(())))}, tx or optax.sgd(0.1), teacher=teacher)


def state(tx=None, step=0, params=None):
    params = STUDENT.init(jax.random.key(0), BATCH)[0] if params is None else params
    return TrainState(
        jnp.int32(step), {"model": params, "loss": {}}, {}, {"model": (tx or optax.sgd(0.1)).init(params)}, {}, None
    )


def test_model_flops_have_their_closed_form():
    student, teacher = 2 * (6 * 10 + 10 * 3), 2 * (6 * 20 + 20 * 3)
    frozen = {"params": TEACHER.init(jax.random.key(0), BATCH)[0], "model_state": {}}
    assert throughput.model_flops(problem(), state(), None, BATCH) == 8 * 3 * student
    assert throughput.model_flops(problem(TEACHER), state(), frozen, BATCH) == 8 * (3 * student + teacher)


def test_the_meter_of_a_run():
    gpus, clock = [device("NVIDIA A100-SXM4-40GB")], time.perf_counter
    meter = Meter.of(problem(), state(), None, BATCH, iter(gpus), None)
    meter.line(0)
    before = clock()
    while clock() < before + 0.01:
        pass
    found = meter.line(1)
    assert found["examples_per_s"] == pytest.approx(8 * found["steps_per_s"])
    assert found["mfu"] == pytest.approx(found["steps_per_s"] * 8 * 3 * 180 / 312e12)
    tokens = Meter.of(problem(), state(), None, {**BATCH, "targets": np.zeros((8, 5), int)}, [device("cpu")], None)
    tokens.line(0)
    found = tokens.line(1)
    assert found["tokens_per_s"] == pytest.approx(40 * found["steps_per_s"])
    assert "mfu" not in found


def test_the_learning_rate_is_that_of_the_last_update():
    schedule = optax.linear_schedule(1.0, 0.0, 10)
    meter = Meter(1, schedule=schedule)
    assert jax.device_get(meter.probe(state(step=4))) == {"learning_rate": pytest.approx(0.7)}
    assert Meter(1).probe(state(step=4)) == {}


def test_sparsity_by_array_and_by_layer():
    params = {
        "embed": {"kernel": jnp.ones((4, 4))},
        "layers": {
            "up": {"kernel": jnp.ones((3, 2, 4))},
            "down": {"kernel": jnp.arange(1.0, 13).reshape(3, 4, 1)},
            "bias": jnp.ones((3, 4)),
        },
        "out": {"kernel": jnp.arange(1.0, 11).reshape(2, 5)},
    }
    tx = optax.chain(optax.sgd(0.0), prune.sparsify(sparsity=0.5, schedule=prune.one_shot(0)))
    up = jnp.ones((3, 2, 4)).at[1].set(0.5).at[2, :, :2].set(0.5)  # all of layer 1 and half of layer 2
    params["layers"]["up"]["kernel"] = up
    _, opt_state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    full = state(tx, params=params)._replace(opt_state={"model": opt_state})
    found = jax.device_get(Meter(1).probe(full))
    assert found.pop("nan_scores") == 0
    assert found.pop("sparsity/layers/up/kernel") == pytest.approx(0.5)
    assert found.pop("sparsity/layers/down/kernel") == pytest.approx(0.5)
    assert found.pop("sparsity/out/kernel") == pytest.approx(0.5)
    assert found == pytest.approx({"sparsity/layers/0": 4 / 12, "sparsity/layers/1": 10 / 12, "sparsity/layers/2": 4 / 12})


def test_a_step_costs_two_clock_readings():
    readings = []

    def clock():
        readings.append(1)
        return float(len(readings))

    meter = Meter(1, clock=clock)
    meter.line(1)
    before = len(readings)
    for _ in range(100):
        meter.next(iter([0]))
        assert meter.running
    assert len(readings) - before == 200
    timed, batches, best = Meter(1), iter(range(10**6)), math.inf
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(20_000):
            timed.next(batches)
        best = min(best, (time.perf_counter() - start) / 20_000)
    assert best < 5e-6


@pytest.mark.parametrize("text", ["100", "10:5", "5:5", "a:b", "-1:4", "1:2:3", "1.5:3"])
def test_a_window_that_is_none(text):
    with pytest.raises(ValueError, match=f"profile is '{text}'; expected from:to with from below to, as in 100:110"):
        profile.check_window(text, 1000)


def test_a_window_is_inside_the_run():
    assert profile.parse("100:110") == (100, 110)
    assert profile.parse("") is None
    profile.check_window("90:100", 100)
    with pytest.raises(ValueError, match=r"profile is '100:110', but the run has 105 steps; expected .* to at most 105"):
        profile.check_window("100:110", 105)


def traces(folder: pathlib.Path):
    return list(folder.glob("plugins/profile/*/*.xplane.pb"))


def test_a_profile_holds_its_steps_and_ends(tmp_path):
    work = jax.jit(lambda x: x @ x)
    with profile.Profile("2:4", tmp_path / "a") as recording:
        active = []
        for done in range(6):
            with recording.step(done):
                result = work(jnp.ones((8, 8)))
            active.append(recording.due(done + 1, last=False))
            if active[-1]:
                recording.end(result)
    assert active == [False, False, False, True, False, False]
    (file,) = traces(tmp_path / "a")
    content = file.read_bytes()
    assert b"train" in content
    with pytest.raises(RuntimeError), profile.Profile("0:9", tmp_path / "b") as broken, broken.step(0):
        raise RuntimeError
    assert len(traces(tmp_path / "b")) == 1
    with profile.Profile("5:9", tmp_path / "c") as resumed, resumed.step(7):
        pass
    assert len(traces(tmp_path / "c")) == 1
    with profile.Profile("", tmp_path / "d") as nothing, nothing.step(0):
        assert not nothing.due(1, last=True)
    assert not (tmp_path / "d").exists()


def test_a_run_logs_and_records_what_it_is_asked_to(tmp_path):
    inputs, targets = np.random.default_rng(0).normal(size=(40, 6)), np.arange(40, dtype=np.int32) % 3
    dataset = build("blobs", inputs.astype(np.float32), targets, stratified(targets), class_names="abc")
    settings = run.Run(steps=6, every=loop.Every(log=2), profile="2:4")
    schedule = settings.optimizer.schedule(6)
    task = Problem(STUDENT, {"ce": (1.0, losses.cross_entropy_term())}, settings.optimizer.build(6))
    with logs.Log(tmp_path, tensorboard=False, progress=False) as log:
        bench = run.Bench(parallel.make_mesh("data=2", jax.devices()[:2]), dataset, data.Data(batch=8), tmp_path, log, seed=0)
        run.fit(bench, "big", task, settings, schedule=schedule)
    assert len(traces(tmp_path / "profile" / "big")) == 1
    rows = [row for row in logs.read(tmp_path)["big"] if "loss" in row]
    assert [row["learning_rate"] for row in rows] == pytest.approx([float(schedule(step)) for step in (1, 3, 5)])
    assert set(rows[1]) == {"step", "loss", "ce", "learning_rate", "steps_per_s", "examples_per_s", "data_wait"}
    assert rows[1]["examples_per_s"] == pytest.approx(8 * rows[1]["steps_per_s"])
    with pytest.raises(ValueError, match=r"config: profile is '2:7', but the run has 6 steps"):
        config.validate(run.Run(steps=6, profile="2:7"))
