"""The host side, around a step that is a few lines of NumPy and writes down what is asked of it."""

import contextlib
import os
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.train import loop
from bmjax.train.profile import Profile
from bmjax.train.throughput import Meter
from bmjax.types import TrainState


class Scalar:
    """A metric that writes down when the host fetches it."""

    ready = False

    def __init__(self, value, events, name):
        self.value, self.events, self.name = value, events, name

    def __array__(self, dtype=None, copy=None):
        self.events.append(("fetch", self.name))
        return np.asarray(self.value, np.float32)

    def __float__(self):
        return float(self.__array__())

    def is_ready(self):
        return self.ready


class Log:
    def __init__(self):
        self.rows, self.shown = [], []

    def scalars(self, step, values, prefix=""):
        self.rows.append((step, prefix, dict(values)))

    @contextlib.contextmanager
    def progress(self, total, start=0, title="train"):
        yield lambda step, loss=None: self.shown.append((step, loss))


class Checkpoints:
    def __init__(self):
        self.saved, self.metrics, self.pending = [], [], None

    def save(self, step, state, *, metric=None, metadata=None):
        self.wait()
        assert int(state.step) == step
        self.pending = step
        self.metrics.append(metric)

    def wait(self):
        if self.pending is not None:
            self.saved.append(self.pending)
        self.pending = None

    def steps(self):
        return self.saved


def fresh(step=0):
    return TrainState(jnp.int32(step), {"model": {"w": jnp.ones(2)}, "loss": {}}, {}, (), {}, jax.random.key(0))


class Fit:
    """One call of `loop.fit`; `losses` and `params` are by update, counted from 1."""

    def __init__(self, steps, start=0, losses=None, params=None, during=None, every=None, evaluate=None, save=True, **more):
        self.events, self.log, self.checkpoints = [], Log(), Checkpoints() if save else None
        self.losses, self.params, self.during = losses or {}, params or {}, during or {}
        self.call = lambda **late: loop.fit(
            self.step,
            fresh(start),
            "frozen",
            iter(range(start, 10**6)),
            steps,
            log=self.log,
            name="run",
            every=every or loop.Every(log=0, evaluate=0, save=0),
            evaluate=evaluate,
            checkpoints=self.checkpoints,
            **more,
            **late,
        )

    def step(self, state, frozen, batch):
        n = int(jax.device_get(state.step)) + 1
        assert (frozen, batch) == ("frozen", n - 1)
        self.events.append(("dispatch", n))
        self.during.get(n, lambda: None)()
        loss = self.losses.get(n, 1 / n)
        weights = jax.device_put(np.full(2, self.params.get(n, 1.0), np.float32))
        state = state._replace(step=jax.device_put(np.int32(n)), params={"model": {"w": weights}, "loss": {}})
        return state, {"loss": Scalar(loss, self.events, n), "ce": np.float32(loss), "kd": np.float32(0.5)}


def test_metrics_are_read_one_step_late():
    fit = Fit(steps=4)
    assert int(fit.call().step) == 4
    order = [("dispatch", 1), ("dispatch", 2), ("fetch", 1), ("dispatch", 3), ("fetch", 2), ("dispatch", 4), ("fetch", 3)]
    assert fit.events[:7] == order
    assert set(fit.events[7:]) == {("fetch", 4)}
    np.testing.assert_allclose([loss for _, loss in fit.log.shown], [1, 1 / 2, 1 / 3, 1 / 4], rtol=1e-6)
    assert [step for step, _ in fit.log.shown] == [1, 2, 3, 4]


def test_what_happens_when():
    fit = Fit(steps=7, every=loop.Every(log=2, evaluate=3, save=5), evaluate=lambda state: {"accuracy": float(state.step) / 10})
    fit.call()
    rows = [(step, sorted(values)) for step, prefix, values in fit.log.rows]
    terms = ["ce", "kd", "loss"]
    assert rows == [
        (2, terms),
        (3, ["valid_accuracy"]),
        (4, terms),
        (6, terms),
        (6, ["valid_accuracy"]),
        (7, terms),
        (7, ["valid_accuracy"]),
    ]
    assert {prefix for _, prefix, _ in fit.log.rows} == {"run"}
    assert (fit.checkpoints.saved, fit.checkpoints.metrics) == ([5, 7], [None, 0.7])


def test_the_last_step_alone_where_every_is_0():
    fit = Fit(steps=3, evaluate=lambda state: {"accuracy": 0.25})
    fit.call()
    assert [step for step, _, _ in fit.log.rows] == [3, 3]
    assert fit.log.rows[0][2] == pytest.approx({"loss": 1 / 3, "ce": 1 / 3, "kd": 0.5})
    assert (fit.checkpoints.saved, fit.checkpoints.metrics) == ([3], [0.25])


def test_it_starts_at_the_states_step_and_does_nothing_when_done():
    fit = Fit(steps=5, start=3)
    assert int(fit.call().step) == 5
    assert [event for event in fit.events if event[0] == "dispatch"] == [("dispatch", 4), ("dispatch", 5)]
    done = Fit(steps=5, start=5)
    assert int(done.call().step) == 5
    assert (done.events, done.log.rows, done.checkpoints.saved) == ([], [], [])


@pytest.mark.parametrize(("bad", "word"), [(np.nan, "nan"), (np.inf, "inf")])
def test_a_loss_that_is_not_finite_stops_with_one_line_and_is_not_saved(bad, word):
    fit = Fit(steps=20, losses={7: bad}, every=loop.Every(log=0, evaluate=0, save=3))
    with pytest.raises(
        ValueError, match=rf"the loss is {word} at step 7 \(ce {word}, kd 0.5\); the last good checkpoint is step 6;"
    ) as e:
        fit.call()
    assert "\n" not in str(e.value)
    assert fit.checkpoints.saved == [3, 6]
    assert ("dispatch", 9) not in fit.events


@pytest.mark.parametrize("save", [1, 7])
def test_the_state_of_a_bad_step_itself_is_not_saved_or_logged(save):
    fit = Fit(
        steps=20, losses={7: np.nan}, every=loop.Every(log=1, evaluate=1, save=save), evaluate=lambda state: {"accuracy": 0}
    )
    with pytest.raises(ValueError, match="the loss is nan at step 7"):
        fit.call()
    assert fit.checkpoints.saved == list(range(save, 7, save))
    assert max(step for step, _, _ in fit.log.rows) == 6


def test_the_last_step_is_looked_at_too():
    for save in (True, False):
        with pytest.raises(ValueError, match=r"the loss is nan at step 3 .*; nothing was saved;"):
            Fit(steps=3, losses={3: np.nan}, save=save).call()


@pytest.mark.parametrize(("step", "save"), [(6, 3), (5, 0)])
def test_parameters_that_are_not_finite_are_not_saved_though_the_loss_is(step, save):
    """The loss is of the parameters before the update, so the update's own NaN shows a step too late to save."""
    fit = Fit(steps=step if not save else 20, params={step: np.nan}, every=loop.Every(log=0, evaluate=0, save=save))
    kept = "the last good checkpoint is step 3" if save else "nothing was saved"
    with pytest.raises(ValueError, match=rf"model/w is not finite after step {step} \(ce .*\); {kept};"):
        fit.call()
    assert fit.checkpoints.saved == ([3] if save else [])


def interrupt():
    """A real SIGINT, sent by another thread; waits until the process has taken it."""
    assert threading.current_thread() is threading.main_thread()
    before = time.monotonic()
    threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT)).start()
    while time.monotonic() < before + 0.2:
        time.sleep(0.01)


def test_ctrl_c_finishes_the_step_saves_and_stops():
    handler = signal.getsignal(signal.SIGINT)
    fit = Fit(steps=20, during={4: interrupt}, evaluate=lambda state: {"accuracy": 0.5})
    with pytest.raises(loop.Stop):
        fit.call()
    assert [event for event in fit.events if event[0] == "dispatch"][-1] == ("dispatch", 4)
    assert (fit.checkpoints.saved, fit.checkpoints.pending, fit.checkpoints.metrics) == ([4], None, [0.5])
    assert issubclass(loop.Stop, KeyboardInterrupt)
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_in_the_last_step_is_not_forgotten():
    """A job of several runs must not go on with the next one."""
    for at in ("step", "evaluate"):
        during = {3: interrupt} if at == "step" else {}
        evaluate = lambda state, at=at: interrupt() if at == "evaluate" else None
        fit = Fit(steps=3, during=during, evaluate=lambda state, evaluate=evaluate: evaluate(state) or {"accuracy": 1.0})
        with pytest.raises(loop.Stop):
            fit.call()
        assert fit.checkpoints.saved == [3]


def test_a_second_ctrl_c_interrupts_at_once():
    def twice():
        interrupt()
        interrupt()
        raise AssertionError("not reached")

    fit = Fit(steps=20, during={2: twice})
    with pytest.raises(KeyboardInterrupt) as error:
        fit.call()
    assert not isinstance(error.value, loop.Stop)
    assert fit.checkpoints.saved == []


def test_it_runs_in_a_thread_where_no_signals_are():
    fit, found = Fit(steps=3), []
    thread = threading.Thread(target=lambda: found.append(fit.call()))
    thread.start()
    thread.join()
    assert int(found[0].step) == 3


class Ticking(Meter):
    """A meter on a clock that a batch moves by 1 and a step by 3 seconds; it writes down what it is shown."""

    def __init__(self, fit):
        self.now, self.fit = 0.0, fit
        super().__init__(16, clock=lambda: self.now)

    def next(self, batches):
        return super().next(self.wait(batches))

    def wait(self, batches):
        self.now += 1
        yield next(batches)

    def probe(self, state):
        self.fit.events.append(("probe", int(jax.device_get(state.step))))
        return {"sparsity/w": np.float32(state.step) / 10}

    def tick(self):
        self.now += 3


def measured(**given):
    fit = Fit(during=dict.fromkeys(range(1, 100), lambda: fit.meter.tick()), **given)
    fit.meter = Ticking(fit)
    call = fit.call
    fit.call = lambda: call(meter=fit.meter)
    return fit


@pytest.mark.parametrize("inside", [True, False])
def test_lines_tell_the_speed_and_what_the_state_was(inside, monkeypatch):
    """The step of a line is read while the next one runs, so its state is looked at before that one takes it.

    A step takes its 3 seconds inside the call, as on a CPU, or not before it is waited for.
    """
    monkeypatch.setattr(Scalar, "ready", inside)
    fit = measured(steps=5, every=loop.Every(log=2, evaluate=0, save=0))
    fit.call()
    speed = {"steps_per_s": 1 / 4, "examples_per_s": 4.0, "data_wait": 1 / 4}
    rows = {step: values for step, _, values in fit.log.rows}
    assert list(rows) == [2, 4, 5]
    for step, values in rows.items():
        said = {"loss": 1 / step, "ce": 1 / step, "kd": 0.5, "sparsity/w": step / 10}
        # On this clock the fifth step is done when the fourth is looked at: no step, no speed.
        assert values == pytest.approx(said | (speed if step < 5 else {}))
    assert [event for event in fit.events if event[0] == "probe"] == [("probe", 0), ("probe", 2), ("probe", 4), ("probe", 5)]
    assert fit.events.index(("probe", 2)) < fit.events.index(("dispatch", 3)) < fit.events.index(("fetch", 2))


def test_speed_leaves_evaluation_out():
    fit = measured(steps=6, every=loop.Every(log=1, evaluate=1, save=0), evaluate=lambda state: fit.slow())
    fit.slow = lambda: setattr(fit.meter, "now", fit.meter.now + 1000) or {"accuracy": 0.5}
    fit.call()
    lines = [values for _, _, values in fit.log.rows if "loss" in values]
    assert "steps_per_s" not in lines[0]
    assert [values["steps_per_s"] for values in lines[1:]] == [0.25] * 5


def traces(folder):
    return list(folder.glob("plugins/profile/*/*.xplane.pb"))


def test_a_profile_ends_on_ctrl_c(tmp_path):
    fit = Fit(steps=20, during={4: interrupt}, profile=Profile("2:15", tmp_path))
    with pytest.raises(loop.Stop):
        fit.call()
    assert (len(traces(tmp_path)), fit.checkpoints.saved) == (1, [4])
    with jax.profiler.trace(tmp_path / "again"):  # none is left running
        pass


def test_a_profile_ends_where_it_is_told_and_where_a_run_breaks(tmp_path):
    seen = []
    fit = Fit(steps=6, during={5: lambda: seen.append(len(traces(tmp_path)))}, profile=Profile("2:4", tmp_path))
    fit.call()
    assert seen == [1]
    with pytest.raises(ValueError, match="the loss is nan at step 3"):
        Fit(steps=20, losses={3: np.nan}, profile=Profile("1:15", tmp_path / "broken")).call()
    assert len(traces(tmp_path / "broken")) == 1
