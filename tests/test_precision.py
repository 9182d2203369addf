"""bfloat16 is for the forward and backward pass; what is kept and summed stays float32."""

import re
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bmjax import distill, losses, parallel
from bmjax.models.linen import LinenModel
from bmjax.models.mlp import PlainMLP
from bmjax.parallel import collectives
from bmjax.train import Problem, init_state, make_step
from bmjax.train.precision import check_compute_dtype
from bmjax.types import Mean, Outputs

MODEL = LinenModel(PlainMLP((32, 32), classes=4))
TERMS = {"ce": (0.5, losses.cross_entropy_term()), "kd": (0.5, losses.on_logits(distill.kd))}
ONE = ("data=1", "partitioned")
PLACES = [("data=8", "replicated"), ("data=8", "pmap"), ("data=4,fsdp=2", "hybrid")]
B = 16


def make_batch():
    rng = np.random.default_rng(0)
    return {
        "inputs": rng.normal(size=(B, 8)).astype(np.float32),
        "targets": rng.integers(0, 4, B).astype(np.int32),
        "weights": rng.uniform(0.1, 1, B).astype(np.float32),
        "id": np.arange(B, dtype=np.int32),
    }


def frozen():
    params, _ = jax.jit(MODEL.init)(jax.random.key(7), make_batch())
    return {"params": params, "model_state": {}}


def start(place, dtype="bfloat16", terms=TERMS, model=MODEL, tx=None, teacher=MODEL, batch=None):
    mesh, batch = parallel.make_mesh(place[0], jax.devices()[:1] if place is ONE else None), batch or make_batch()
    problem = Problem(model, terms, tx or optax.sgd(0.1), teacher=teacher, compute_dtype=dtype)
    partner = jax.device_put(frozen(), parallel.replicated(mesh)) if teacher else None
    state = init_state(problem, mesh, model.rules, jax.random.key(0), batch, frozen=partner)
    return state, make_step(problem, mesh, state, place[1]), partner, parallel.put_batch(batch, mesh)


def test_student_and_teacher_compute_in_bfloat16_and_losses_in_float32():
    seen = {}

    class Watching(nn.Module):
        name_of: str
        features, axes, rules = ("hidden",), {}, ((".*", ()),)

        @nn.compact
        def __call__(self, batch, train=False, capture=()):
            x = nn.Dense(4, name="head")(batch["inputs"])
            seen[self.name_of] = (batch["inputs"].dtype, batch["weights"].dtype, x.dtype)
            return Outputs(x, dict.fromkeys(capture, x), (x, x, None))

    def term(student, teacher, batch):
        seen["term"] = (student.logits.dtype, teacher.logits.dtype, batch["inputs"].dtype, student.head[0].dtype)
        return Mean.of(jnp.square(student.logits - teacher.logits).mean(-1), batch["weights"])

    mesh, batch = parallel.make_mesh("data=8"), make_batch()
    model, teacher = LinenModel(Watching("student")), LinenModel(Watching("teacher"))
    partner = dict(zip(("params", "model_state"), teacher.init(jax.random.key(0), batch)))
    problem = Problem(model, {"x": (1.0, term)}, optax.adam(1e-3), teacher=teacher, compute_dtype="bfloat16")
    state = init_state(problem, mesh, model.rules, jax.random.key(0), batch, frozen=partner)
    after, metrics = jax.eval_shape(make_step(problem, mesh, state), state, partner, batch)
    half, single = jnp.bfloat16, jnp.float32
    assert seen == {"student": (half, single, half), "teacher": (half, single, half), "term": (single, single, single, half)}
    floats = [leaf.dtype for leaf in jax.tree.leaves((after, metrics)) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert set(floats) == {np.dtype("float32")}


@pytest.mark.parametrize("place", [ONE, *PLACES], ids="/".join)
def test_it_trains_as_float32_does_up_to_rounding(place):
    losses_by_dtype = {}
    for dtype, where in (("bfloat16", place), ("float32", ONE)):
        state, step, partner, batch = start(where, dtype)
        history = []
        for _ in range(5):
            state, metrics = step(state, partner, batch)
            history.append(float(metrics["loss"]))
        losses_by_dtype[dtype] = np.array(history)
    np.testing.assert_allclose(losses_by_dtype["bfloat16"], losses_by_dtype["float32"], rtol=0.02)
    assert np.abs(losses_by_dtype["bfloat16"] - losses_by_dtype["float32"]).max() > 1e-6
    assert losses_by_dtype["bfloat16"][-1] < losses_by_dtype["bfloat16"][0] - 0.02


def test_masters_keep_updates_that_bfloat16_would_lose():
    class Weight(nn.Module):
        features, axes, rules = (), {}, ((".*", ()),)

        @nn.compact
        def __call__(self, batch, train=False, capture=()):
            return Outputs(batch["inputs"] * self.param("w", nn.initializers.ones, ()), {})

    def term(student, teacher, batch):  # its gradient is 1 wherever the weight is
        return Mean.of(student.logits[:, 0], batch["weights"])

    batch = {**make_batch(), "inputs": np.ones((B, 1), np.float32), "weights": np.ones(B, np.float32)}
    state, step, _, placed = start(PLACES[0], terms={"x": (1.0, term)}, model=LinenModel(Weight()), tx=optax.sgd(1e-3),
                                   teacher=None, batch=batch)  # fmt: skip
    assert jnp.bfloat16(1) - jnp.bfloat16(1e-3) == 1
    for _ in range(4):
        state, _ = step(state, None, placed)
    np.testing.assert_allclose(state.params["model"]["w"], 0.996, rtol=1e-5)


@pytest.mark.parametrize("place", PLACES, ids="/".join)
def test_gradients_are_summed_over_data_in_float32(place):
    state, step, partner, batch = start(place)
    text = str(jax.make_jaxpr(step)(state, partner, batch))
    assert "bf16" in text
    sums = [line for line in text.splitlines() if re.search(r"= psum\w*\[|= all_reduce", line)]
    assert sums
    assert not any("bf16" in line.split("=")[0] for line in sums)
    if place[1] == "replicated":
        lines = step.lower(state, partner, batch).compile().as_text().splitlines()
        exchanged = [line for line in lines if re.search(r" all-reduce(-start)?\(", line)]
        assert len(exchanged) == 1 and re.search(r"= f32\[\d+\]", exchanged[0])  # one vector of everything


def test_batch_statistics_stay_float32():
    class Statistics(nn.Module):
        features, axes, rules = (), {}, ((".*", ()),)

        @nn.compact
        def __call__(self, batch, train=False, capture=()):
            mean = self.variable("batch_stats", "mean", jnp.zeros, (8,))
            if train:
                mean.value = collectives.moments(batch["inputs"], batch["weights"])[0].astype(batch["inputs"].dtype)
            return Outputs(nn.Dense(4)(batch["inputs"]), {})

    terms = {"ce": (1.0, losses.cross_entropy_term())}
    state, step, _, batch = start(PLACES[0], terms=terms, model=LinenModel(Statistics()), teacher=None)
    state, _ = step(state, None, batch)
    assert state.model_state["batch_stats"]["mean"].dtype == jnp.float32


def device(platform, kind, capability=None):
    more = {"compute_capability": capability} if capability else {}
    return types.SimpleNamespace(platform=platform, device_kind=kind, **more)


def test_old_gpus_are_named():
    with pytest.raises(ValueError, match=r"capability 8\.0 or above, but Tesla V100 has 7\.0; set compute_dtype to float32"):
        check_compute_dtype("bfloat16", [device("gpu", "A100", "8.0"), device("gpu", "Tesla V100", "7.0")])
    able = [device("gpu", "H100", "9.0"), device("gpu", "B200", "10.0"), device("gpu", "MI250", "gfx90a")]
    check_compute_dtype("bfloat16", [*able, device("tpu", "v4"), device("cpu", "cpu"), device("gpu", "unheard of")])
    check_compute_dtype("float32", [device("gpu", "Tesla V100", "7.0")])


def test_an_unknown_dtype_is_one_clear_line():
    with pytest.raises(ValueError, match="compute_dtype is 'float16'; expected float32 or bfloat16"):
        Problem(MODEL, TERMS, optax.sgd(0.1), compute_dtype="float16")
