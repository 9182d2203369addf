import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from bmjax import parallel, prune, trees
from bmjax.parallel import collectives, launch


@pytest.mark.parametrize(
    ("spec", "devices", "sizes"),
    [
        ("", 1, (1, 1, 1)),
        ("data=-1", 8, (8, 1, 1)),
        ("data=2,fsdp=4", 8, (2, 4, 1)),
        (" tensor=2 , data=-1 ,", 8, (4, 1, 2)),
        ("data=1,fsdp=1,tensor=1", 1, (1, 1, 1)),
        ("data=8,fsdp=-1", 8, (8, 1, 1)),
    ],
)
def test_a_mesh_from_a_string(spec, devices, sizes):
    assert parallel.parse_mesh(spec, devices) == dict(zip(("data", "fsdp", "tensor"), sizes))
    mesh = parallel.make_mesh(spec, jax.devices()[:devices])
    assert tuple(mesh.shape.values()) == sizes
    assert set(mesh.devices.flat) == set(jax.devices()[:devices])
    assert parallel.is_partitioned(mesh) == (sizes[1:] != (1, 1))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("model=2", "'model' is not one of data, fsdp, tensor"),
        ("data=2,data=4", "'data' appears twice"),
        ("data=two", "'data=two' has no whole number"),
        ("data", "'data' has no whole number"),
        ("data=0", "data is 0; expected a positive number"),
        ("data=-2", "data is -2; expected a positive number"),
        ("data=-1,fsdp=-1", "only one axis can be -1"),
        ("data=4", "it takes 4 devices, but there are 8"),
        ("data=16", "it takes 16 devices, but there are 8"),
        ("data=-1,fsdp=3", "3 does not divide the 8 devices"),
        ("", "it takes 1 devices, but there are 8"),
    ],
)
def test_a_mesh_that_cannot_be_is_one_clear_line(spec, words):
    with pytest.raises(ValueError, match=words) as error:
        parallel.make_mesh(spec)
    assert "\n" not in str(error.value)
    assert repr(spec) in str(error.value)


@pytest.mark.parametrize("spec", ["data=8", "data=2,fsdp=2,tensor=2"])
def test_each_device_gets_its_own_rows(spec):
    mesh = parallel.make_mesh(spec)
    batch = {"inputs": np.arange(32.0).reshape(16, 2), "id": np.arange(16)}
    placed = parallel.put_batch(batch, mesh)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = [tuple(np.asarray(shard.data)) for shard in placed["id"].addressable_shards]
    assert sorted(set(rows)) == [tuple(range(i, i + 16 // shards)) for i in range(0, 16, 16 // shards)]
    np.testing.assert_array_equal(placed["inputs"], batch["inputs"])


@pytest.mark.parametrize(
    ("batch", "accumulate", "words"),
    [
        (12, 1, "a batch of 12 does not divide over 8 devices; take a multiple of 8"),
        (8, 2, "a batch of 8 does not divide over 8 devices x 2 microbatches; take a multiple of 16"),
        (0, 1, "a batch of 0 does not divide"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(batch, accumulate, words):
    mesh = parallel.make_mesh("data=4,fsdp=2")
    with pytest.raises(ValueError, match=words):
        parallel.check_batch(batch, mesh, accumulate)
    parallel.check_batch(16, mesh, accumulate)


def params():
    return {
        "kernel": jnp.zeros((4, 8)),
        "a": {"kernel": jnp.zeros((8, 4)), "bias": jnp.zeros(4)},
        "stack": {"kernel": jnp.zeros((3, 8, 6)), "odd": jnp.zeros((3, 5))},
    }


RULES = (("a/kernel", ("fsdp", "tensor")), ("stack/", (None, "fsdp")), ("^kernel", ("tensor",)), (".*", ()))
SPECS = {
    "kernel": P("tensor"),
    "a/kernel": P("fsdp", "tensor"),
    "a/bias": P(),
    "stack/kernel": P(None, "fsdp"),
    "stack/odd": P(None, None),  # 5 columns do not split over 2 devices
}


def specs(shardings):
    return {path: leaf.spec for path, leaf in trees.paths(shardings).items()}


@pytest.fixture(scope="module")
def mesh():
    return parallel.make_mesh("data=2,fsdp=2,tensor=2")


def test_the_first_rule_that_matches_decides(mesh):
    assert specs(parallel.partition(params(), RULES, mesh)) == SPECS
    assert specs(parallel.partition(jax.eval_shape(params), [("a/", ()), *RULES], mesh)) == SPECS | {"a/kernel": P()}


def test_split_parameters_hold_a_part_on_each_device(mesh):
    placed = jax.device_put(params(), parallel.partition(params(), RULES, mesh))
    shards = {path: leaf.addressable_shards[0].data.shape for path, leaf in trees.paths(placed).items()}
    assert shards == {"kernel": (2, 8), "a/kernel": (4, 2), "a/bias": (4,), "stack/kernel": (3, 4, 6), "stack/odd": (3, 5)}


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (RULES[:-1], r"no partition rule covers a/bias \[4\]"),
        ([(".*", ("fsdp", "tensor"))], r"the rule for a/bias names 2 axes .* but the parameter has shape \[4\]"),
        ([(".*", ("model",))], "names the mesh axis 'model'; there are data, fsdp, tensor"),
    ],
)
def test_rules_that_do_not_fit_are_refused(rules, words, mesh):
    with pytest.raises(ValueError, match=words):
        parallel.partition(params(), rules, mesh)


KERNELS = functools.partial(trees.map_with_path, lambda path, _: path.endswith("kernel"))
LABELS = functools.partial(trees.map_with_path, lambda path, _: "decayed" if path.endswith("kernel") else "rest")


@pytest.mark.parametrize(
    ("tx", "copies"),
    [
        (optax.sgd(0.1, momentum=0.9), ("0/trace",)),
        (optax.adam(0.1), ("0/mu", "0/nu")),
        (optax.chain(optax.clip(1.0), optax.adamw(0.1, mask=KERNELS)), ("1/0/mu", "1/0/nu")),
        (optax.MultiSteps(optax.adam(0.1), 2), ("inner_opt_state/0/mu", "inner_opt_state/0/nu", "acc_grads")),
        (optax.apply_if_finite(optax.adam(0.1), 3), ("inner_state/0/mu", "inner_state/0/nu")),
    ],
)
def test_an_optimiser_state_is_split_like_its_parameters(tx, copies, mesh):
    tree = params()
    shardings = parallel.partition(tree, RULES, mesh)
    state = jax.eval_shape(tx.init, tree)
    found = specs(parallel.like_params(state, tree, shardings, mesh))
    assert len(found) == len(jax.tree.leaves(state))
    for copy in copies:
        assert {path: found.pop(f"{copy}/{path}") for path in SPECS} == SPECS
    assert set(found.values()) <= {P()}  # counters


def test_masked_partitioned_and_pruned_states_are_split_too(mesh):
    tree = params()
    shardings = parallel.partition(tree, RULES, mesh)
    tx = optax.chain(
        optax.partition({"decayed": optax.masked(optax.adam(0.1), KERNELS), "rest": optax.sgd(0.1, momentum=0.9)}, LABELS),
        prune.sparsify(sparsity=0.5, where="a/kernel|stack/kernel"),
    )
    state = jax.eval_shape(tx.init, tree)
    shapes = trees.paths(state)
    found = specs(parallel.like_params(state, tree, shardings, mesh))
    split = {path: spec for path, spec in found.items() if spec != P() and any(spec)}
    moments = [path for path in split if "/mu/" in path]
    assert {path.split("/mu/")[1]: split[path] for path in moments} == {p: SPECS[p] for p in SPECS if p.endswith("kernel")}
    masks = {path: found[path] for path in found if "/masks/" in path and shapes[path].ndim > 0}
    assert sorted(masks.values(), key=str) == sorted([SPECS["a/kernel"], SPECS["stack/kernel"]], key=str)


def test_a_leaf_of_another_shape_stays_whole(mesh):
    """Adafactor keeps one number a row and a column: under the parameter's path, but not of its shape."""
    tree = {"kernel": jnp.zeros((256, 128))}
    shardings = parallel.partition(tree, [(".*", ("fsdp", "tensor"))], mesh)
    state = jax.eval_shape(optax.adafactor(0.1).init, tree)
    shapes = trees.paths(state)
    found = specs(parallel.like_params(state, tree, shardings, mesh))
    factored = [path for path in found if path.endswith("kernel") and shapes[path].shape in ((256,), (128,))]
    assert len(factored) == 2
    assert all(found[path] == P() for path in factored)


def test_the_longest_path_wins_where_suffixes_collide(mesh):
    tree = {"kernel": jnp.zeros((4, 4)), "a": {"kernel": jnp.zeros((4, 4))}}
    shardings = parallel.partition(tree, [("^kernel", ("fsdp",)), ("a/kernel", (None, "tensor"))], mesh)
    found = specs(parallel.like_params({"mu": tree}, tree, shardings, mesh))
    assert found == {"mu/kernel": P("fsdp"), "mu/a/kernel": P(None, "tensor")}


def over_data(fn, in_specs, out_specs):
    def body(*args):
        with collectives.over("data"):
            return fn(*args)

    mesh = parallel.make_mesh("data=8")
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs))


X = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)


def test_sums_and_means_over_the_shards():
    fn = over_data(lambda x: (collectives.psum(x.sum(0)), collectives.pmean({"m": x.mean(0)})), P("data"), P())
    total, mean = fn(X)
    np.testing.assert_allclose(total, X.astype(np.float64).sum(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mean["m"], X.astype(np.float64).mean(0), rtol=1e-5, atol=1e-6)


def test_small_arrays_of_one_dtype_are_summed_as_one_vector():
    rng = np.random.default_rng(1)
    tree = {
        "w": rng.normal(size=(8, 3, 5)).astype(np.float32),
        "b": rng.normal(size=(8, 5)).astype(np.float32),
        "n": rng.integers(0, 9, (8, 2)).astype(np.int32),
        "half": jnp.asarray(rng.normal(size=(8, 4)), jnp.bfloat16),
        "big": rng.normal(size=(8, 256, 256)).astype(np.float32),
        "none": np.zeros((8, 0), np.float32),
    }
    fn = over_data(lambda t: collectives.psum(jax.tree.map(lambda x: x.sum(0), t)), P("data"), P())
    for name, found in fn(tree).items():
        assert found.dtype == tree[name].dtype
        wanted = np.asarray(tree[name], np.float64).sum(0)
        np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=1e-2 if name == "half" else 1e-5, atol=1e-5)
    compiled = fn.lower(tree).compile().as_text()
    assert "f32[65536]" not in compiled, "the big one is not copied"
    operands = "".join(re.findall(r" all-reduce\(([^)]*)\)", compiled))
    assert operands.count("%") == 3  # floats, whole numbers, the big one


def test_what_every_shard_holds_is_summed_once_for_each():
    found = over_data(lambda x: collectives.psum(x), P(), P())(np.float32(3))
    assert found == 24


def test_gathered_rows_keep_the_global_order_and_are_replicated():
    found = over_data(lambda x: collectives.all_gather({"x": x, "big": x > 0}), P("data"), P())(X)
    np.testing.assert_array_equal(found["x"], X)
    np.testing.assert_array_equal(found["big"], X > 0)


def test_vary_keeps_each_shards_own_gradient():
    """Without it autodiff sums the gradient of a replicated value, and a mean of that is 8 times too large."""

    def fn(w, x):
        grad = jax.grad(lambda w: jnp.sum(x * w))
        return collectives.pmean(grad(collectives.vary(w))), collectives.pmean(grad(w))

    right, wrong = over_data(fn, (P(), P("data")), P())(jnp.ones(3), X)
    np.testing.assert_allclose(right, X.sum(0) / 8, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(wrong, X.sum(0), rtol=1e-5, atol=1e-6)


def test_outside_a_shard_map_the_collectives_do_nothing():
    for fn in (collectives.psum, collectives.pmean, collectives.all_gather, collectives.vary, collectives.rows):
        assert fn(X) is X
    with collectives.over("data"), collectives.over(None):
        assert collectives.psum(X) is X


def test_moments_on_one_device():
    w = np.linspace(0, 1, 16).astype(np.float32)
    mean, var = jax.jit(collectives.moments)(X, w)
    wide, weights = X.astype(np.float64), w.astype(np.float64)
    want = np.average(wide, axis=0, weights=weights)
    np.testing.assert_allclose(mean, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(var, np.average((wide - want) ** 2, axis=0, weights=weights), rtol=1e-5)


@pytest.mark.parametrize(("devices", "words"), [(-1, "devices is -1; expected 0"), (3, "already started with 8 devices")])
def test_devices_that_cannot_be_simulated(devices, words, monkeypatch):
    jax.devices()  # JAX has started
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES")
    with pytest.raises(ValueError, match=words):
        parallel.simulate(devices)


def test_simulating_what_is_there_changes_nothing(monkeypatch):
    parallel.simulate(0)
    parallel.simulate(8)
    parallel.simulate(2)  # the environment says 8, and wins
    assert jax.device_count() == 8


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("localhost:8476", 2, 2), "process is 2 and there are 2 processes; expected 0 to 1"),
        (("localhost:8476", 2, -1), "process is -1 and there are 2 processes"),
        (("", 2, 1), "processes is 2 and coordinator is empty; give the host:port"),
        (("localhost:8476", 1, 0), "processes is 1; say how many"),
        (("", 0, 0), "processes is 0; expected 1"),
        (("localhost", 2, 0), "coordinator is 'localhost'; expected host:port"),
        (("localhost:99999", 2, 0), "expected host:port"),
        (("localhost:1", 2, 1), "process 1 finds no process 0 at localhost:1 within 0 seconds"),
    ],
)
def test_processes_that_cannot_join(given, words, monkeypatch):
    monkeypatch.setattr(launch, "_CONNECT", 0)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("it began"))
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        parallel.join(*given)
    assert "\n" not in str(error.value)


def test_joining_alone_changes_nothing_and_joining_late_is_refused():
    parallel.join()
    jax.devices()  # JAX has started
    with pytest.raises(ValueError, match=r"process 0 of 2 cannot join localhost:8476: .*must be called before any JAX calls"):
        parallel.join("localhost:8476", 2, 0)
    assert jax.process_count() == 1


def test_a_fresh_process_can_simulate_any_number():
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_NUM_CPU_DEVICES", "NPROC")}
    program = "from bmjax import parallel; parallel.simulate(3); import jax; print(jax.device_count())"
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout == "3\n"
