import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bmjax import trees
from bmjax.train import checkpoint
from bmjax.train.checkpoint import Checkpoints
from bmjax.types import TrainState


def make_mesh(count):
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])


def shard(tree, mesh):
    """Rows over the mesh where there are two axes, else replicated."""

    def put(leaf):
        spec = PartitionSpec("data") if leaf.ndim == 2 and leaf.shape[0] % mesh.size == 0 else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(put, tree)


def make_state(seed=0, width=8):
    rng = np.random.default_rng(seed)
    model = {"up": {"kernel": rng.normal(size=(width, 3)), "bias": rng.normal(size=3)}, "half": rng.normal(size=(8, 2))}
    model = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), model)
    model["half"] = model["half"].astype(jnp.bfloat16)
    params = {"model": model, "loss": {}}
    mask = {"mask": jnp.asarray(rng.random((8, 3)) > 0.5), "nothing": jnp.zeros((0, 3)), "none": None}
    return TrainState(jnp.int32(7), params, {}, (optax.adam(1e-3).init(params), mask), {}, jax.random.key(seed))


def bits(tree):
    """Every leaf's raw bytes."""
    plain = jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, tree)
    return {path: (str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()) for path, leaf in trees.paths(plain).items()}


@pytest.mark.parametrize(("before", "after"), [(1, 1), (8, 8), (8, 2), (1, 8)])
def test_a_restored_state_is_bit_exact_on_any_mesh(tmp_path, before, after):
    state = shard(make_state(), make_mesh(before))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state, metadata={"seed": 3})
    template = trees.abstract(shard(make_state(seed=1), make_mesh(after)))
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(template)
    assert (restored.step, restored.metadata) == (7, {"seed": 3})
    assert bits(restored.state) == bits(state)
    assert isinstance(restored.state, TrainState)
    for path, leaf in trees.paths(template).items():
        assert trees.paths(restored.state)[path].sharding.is_equivalent_to(leaf.sharding, leaf.ndim), path
    assert int(jax.random.bits(restored.state.rng)) == int(jax.random.bits(state.rng))


def test_a_save_holds_the_state_before_a_donating_step(tmp_path):
    state = shard({"w": jnp.arange(4096.0).reshape(64, 64)}, make_mesh(8))
    step = jax.jit(lambda tree: jax.tree.map(lambda x: -x - 1, tree), donate_argnums=0)
    template = trees.abstract(state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        state = jax.block_until_ready(step(state))
        np.testing.assert_array_equal(checkpoints.restore(template).state["w"], np.arange(4096.0).reshape(64, 64))


def test_the_last_and_the_best_are_kept(tmp_path):
    state = {"w": jnp.zeros(3)}
    template = trees.abstract(state)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.restore(template) is None
        for step, metric in ((1, 0.3), (2, 0.9), (3, 0.5), (4, float("nan")), (5, None)):
            checkpoints.save(step, {"w": jnp.full(3, float(step))}, metric=metric)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 4, 5]
        assert checkpoints.restore(template).step == 5
        best = checkpoints.restore(template, best=True)
        assert best.step == 2
        np.testing.assert_array_equal(best.state["w"], 2.0)
        checkpoints.save(5, {"w": jnp.full(3, 50.0)}, metric=1.0)
        assert checkpoints.restore(template, best=True).state["w"][0] == 50.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: make_state(width=16), r"params/model/up/kernel has shape \[8, 3\], expected \[16, 3\]"),
        (lambda s: s._replace(step=jnp.float32(7)), "step is int32, expected float32"),
        (lambda s: s._replace(rng=jax.random.key(0, impl="rbg")), r"rng is key<fry>, expected key<rbg>"),
        (lambda s: s._replace(extra={"ema": jnp.zeros(2)}), "extra/ema is missing"),
        (lambda s: s._replace(opt_state=()), "opt_state/0/0/count is not expected"),
    ],
)
def test_a_checkpoint_that_does_not_fit_names_the_first_leaf(tmp_path, change, message):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, make_state())
        with pytest.raises(ValueError, match="does not fit the model: " + message):
            checkpoints.restore(trees.abstract(change(make_state())))
        assert checkpoints.steps() == [7]


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@dataclasses.dataclass
class Damage:
    name: str
    apply: object
    message: str


@pytest.mark.parametrize(
    "damage",
    [
        Damage("flipped", flip, "was altered"),
        Damage("truncated", lambda file: file.write_bytes(file.read_bytes()[:-1]), "bytes, but the manifest says"),
        Damage("missing", lambda file: file.unlink(), "is missing"),
    ],
    ids=lambda damage: damage.name,
)
def test_a_damaged_step_is_set_aside_loudly(tmp_path, damage, monkeypatch):
    errors = []
    monkeypatch.setattr(checkpoint.logging, "error", lambda message, *values: errors.append(message % values))
    template = trees.abstract({"w": jnp.zeros((64, 64))})
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"w": jnp.full((64, 64), float(step))})
        checkpoints.wait()
        damage.apply(max((tmp_path / "00000002").rglob("*/d/*"), key=lambda file: file.stat().st_size))
        restored = checkpoints.restore(template)
        assert restored.step == 1
        np.testing.assert_array_equal(restored.state["w"], 1.0)
        assert len(errors) == 1
        assert damage.message in errors[0]
        assert checkpoints.steps() == [1]
        (tmp_path / "00000001" / "manifest.json").write_text("{")
        with pytest.raises(ValueError, match="no intact checkpoint is left"):
            checkpoints.restore(template)


def test_an_uncommitted_step_does_not_count(tmp_path):
    template = trees.abstract({"w": jnp.zeros(3)})
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"w": jnp.full(3, float(step))})
    (tmp_path / "00000002" / "manifest.json").unlink()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(template).step == 1
        checkpoints.save(2, {"w": jnp.full(3, 20.0)})
        assert checkpoints.restore(template).state["w"][0] == 20.0
    (tmp_path / "00000002" / "manifest.json").unlink()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, {"w": jnp.zeros(3)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000001", "00000003"]


def test_an_error_of_writing_comes_up(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint.manifest, "write", full)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jnp.zeros(3)})
        with pytest.raises(OSError, match="No space left"):
            checkpoints.wait()
        assert checkpoints.steps() == []


def test_keep_is_at_least_one(tmp_path):
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpoints(tmp_path, keep=0)


def test_saving_is_quiet(tmp_path):
    code = f"""
from absl import flags, logging
flags.FLAGS(["program"])
logging.use_absl_handler()
logging.set_verbosity(logging.INFO)
import jax.numpy as jnp
from bmjax import trees
from bmjax.train.checkpoint import Checkpoints
with Checkpoints({str(tmp_path)!r}) as checkpoints:
    checkpoints.save(1, {{"w": jnp.zeros(3)}})
    checkpoints.restore(trees.abstract({{"w": jnp.zeros(3)}}))
logging.info("still heard")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    )
    assert done.returncode == 0
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "still heard" in done.stderr
