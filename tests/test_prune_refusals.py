"""What pruning refuses: calibration data that says nothing, arguments of another kind, weights that are no floats, and NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bmjax import prune, trace
from bmjax.types import Group, Member

KERNEL = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
NAN = np.where(np.arange(32).reshape(8, 4) < 3, np.nan, KERNEL).astype(np.float32)


def line(call, message):
    """The call raises one line."""
    with pytest.raises(ValueError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


def layerwise(batches, method=None, **settings):
    """Of one kernel, on batches that are arrays or mappings with inputs. Nothing may be pruned where it raises."""
    fn = lambda p, batch: (batch["inputs"] if isinstance(batch, dict) else batch) @ p["kernel"]
    params = {"kernel": jnp.asarray(settings.pop("kernel", KERNEL))}
    return prune.layerwise(fn, params, batches, prune.wanda() if method is None else method, **{"sparsity": 0.5, **settings})


X = np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([np.zeros((0, 8), np.float32)], r"batch 0 has shape \[0, 8\]; expected 1 or more examples"),
        ([{"inputs": X}, {"inputs": X[:0]}], r"batch 1 has shape \[0, 8\]"),
        ([np.zeros((), np.float32)], r"batch 0 has shape \[\]"),
        (
            [{"inputs": X, "weights": np.zeros(4)}, {"inputs": X, "weights": np.zeros(4)}],
            "weights of all calibration batches are 0",
        ),
        ([{}], "batch 0 is a dict without arrays"),
        ([None], "batch 0 is None without arrays"),
        ([{"inputs": "some text"}], "batch 0 is a dict without arrays"),
        (None, "calibration data is None; expected several batches"),
        ({"inputs": X}, "calibration data is a dict; expected several batches: give a list"),
        ([X, X[:3]], r"must be alike: in batch 1, the batch has shape \[3, 8\]"),
        ([{"inputs": X}, {"inputs": X[:3]}], r"must be alike: in batch 1, inputs has shape \[3, 8\]"),
    ],
)
def test_calibration_data_that_says_nothing(batches, message):
    visited = []
    method = prune.Method(lambda kernel, inputs, target: visited.append(1) or (kernel, kernel == kernel, ""))
    line(lambda: layerwise(batches, method), message)
    assert not visited


def test_one_batch_of_padding_among_others_and_a_note_of_few_examples():
    full, padding = {"inputs": X, "weights": np.ones(4)}, {"inputs": 100 * X, "weights": np.zeros(4)}
    found = layerwise([full, padding])
    np.testing.assert_array_equal(found.masks["kernel"], layerwise([full], samples=4).masks["kernel"])
    assert found.note == "there are 8 examples, fewer than the 128 asked for"
    assert layerwise([full], samples=4).note == layerwise([full], samples=None).note == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": prune.wanda}, r"the method is the function wanda itself; call it: wanda\(\)"),
        ({"method": prune.magnitude()}, "magnitude is a criterion of training, so take prune.sparsify"),
        ({"method": "wanda"}, r"the method is 'wanda'; expected what one of these gives: wanda\(\)"),
        ({"allocation": "uniform"}, r"the allocation is 'uniform'; expected what one of these gives: uniform\(\)"),
        ({"sparsity": "0.5"}, "the sparsity is '0.5'; expected a number"),
        ({"sparsity": None, "n": 2.0, "m": 4}, "n of the pattern n:m is 2.0; expected an int"),
        ({"inputs": "sparse"}, "inputs is 'sparse'; expected 'pruned' or 'dense'"),
        ({"samples": 2.5}, "number of samples is 2.5; expected an int"),
        ({"kernel": KERNEL.astype(np.int32)}, "kernel is to be pruned and is int32; expected float32"),
        ({"kernel": KERNEL.astype(np.complex64)}, "kernel is to be pruned and is complex64; expected float32"),
        ({"kernel": NAN}, "3 of 32 weights of kernel are NaN"),
    ],
)
def test_calibration_of_another_kind(settings, message):
    line(lambda: layerwise([X], **settings), message)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"criterion": prune.wanda()}, "wanda works on calibration data, without training: use prune.layerwise"),
        ({"criterion": prune.magnitude}, r"the criterion is the function magnitude itself; call it: magnitude\(\)"),
        ({"criterion": "magnitude"}, r"the criterion is 'magnitude'; expected what one of these gives: magnitude\(\)"),
        ({"criterion": lambda params: params}, "the criterion is a function; expected"),
        ({"criterion": prune.cubic(0, 4)}, "the criterion is a Schedule; expected"),
        ({"pattern": "2:4"}, r"the pattern is '2:4'; expected what one of these gives: unstructured\(\), n_m\(2, 4\)"),
        ({"pattern": {"kernel": "4x4"}}, "the pattern is '4x4'"),
        ({"pattern": {}}, "the pattern is an empty mapping"),
        ({"allocation": "global"}, r"the allocation is 'global'; .*global_threshold\(\)"),
        ({"allocation": prune.owl}, r"call it: owl\(\)"),
        ({"schedule": "cubic"}, r"the schedule is 'cubic'; .*cubic\(begin, end\)"),
        ({"sparsity": "0.5"}, "the sparsity is '0.5'; expected a number"),
        ({"sparsity": {"kernel": "0.5"}}, "the sparsity of 'kernel' is '0.5'; expected a number"),
        ({"sparsity": [0.5]}, "the sparsity is a list; expected a number"),
        ({"every": 2.5}, "`every`, is 2.5; expected an int"),
    ],
)
@pytest.mark.parametrize("make", [prune.sparsify, lambda *args, **how: prune.around(optax.sgd(0.1), *args, **how)])
def test_choices_of_another_kind(make, settings, message):
    settings = {"sparsity": 0.5, **settings}
    line(lambda: make(settings.pop("criterion", None), **settings), message)


def test_settings_of_another_kind():
    for make, message in (
        (lambda: prune.from_sensitivity({"a": 1}), "from_sensitivity is given a dict; expected the curves of analyse"),
        (lambda: prune.by_layer(0.5), "the table of by_layer is 0.5"),
        (lambda: prune.by_layer({"a": "0.5"}), "the sparsity of 'a' is '0.5'"),
        (lambda: prune.global_threshold(floor="0.1"), "the floor of a global threshold is '0.1'; expected a number"),
        (lambda: prune.owl("5"), "the outlier of owl is '5'; expected a number"),
        (lambda: prune.fisher("0.9"), "the decay of a running mean is '0.9'; expected a number"),
        (lambda: prune.random(0.5), "the seed of random pruning is 0.5; expected an int"),
        (lambda: prune.topk_mask(KERNEL, "0.5"), "the sparsity is '0.5'; expected a number"),
        (lambda: prune.nm_mask(KERNEL, 2.0, 4), "n of the pattern n:m is 2.0; expected an int"),
        (lambda: prune.nm_mask(KERNEL, 2, 4.0), "m of the pattern n:m is 4.0; expected an int"),
    ):
        line(make, message)


def test_numbers_of_numpy_and_jax_are_numbers():
    tree = {"kernel": jnp.asarray(KERNEL)}
    for half in (np.float32(0.5), np.array(0.5), jnp.float32(0.5)):
        tx = prune.sparsify(sparsity=half, every=np.int64(1))
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, tree), tx.init(tree), tree)
        assert int((optax.apply_updates(tree, updates)["kernel"] == 0).sum()) == 16


@pytest.mark.parametrize("dtype", ["int32", "complex64"])
def test_weights_that_are_no_floats(dtype):
    tree = {"up": {"kernel": jnp.ones((8, 4))}, "table": {"kernel": jnp.ones((8, 4), dtype), "bias": jnp.ones(4, dtype)}}
    line(lambda: prune.sparsify(sparsity=0.5).init(tree), f"table/kernel is to be pruned and is {dtype}; expected float32")
    line(lambda: prune.analyse(lambda p: 0.0, tree), f"table/kernel is to be pruned and is {dtype}")
    prune.sparsify(sparsity=0.5, where="up").init(tree)
    group = Group("units", 4, 0, (Member("table/bias", 0, np.arange(4)[:, None]),))
    line(
        lambda: prune.sparsify(sparsity=0.5, pattern=prune.groups([group])).init(tree),
        f"table/bias is to be pruned and is {dtype}",
    )


ARRAYS = {
    "topk_mask": lambda x: prune.topk_mask({"a": jnp.ones(3), "b": x}, 0.5)["b"],
    "kth_largest": lambda x: prune.kth_largest(x, 2),
    "nm_mask": lambda x: prune.nm_mask(x, 2, 4),
    "block_mask": lambda x: prune.block_mask(x, 0.5, (2, 2)),
    "wanda_mask": lambda x: prune.wanda_mask(x, jnp.ones(8), sparsity=0.5),
    "wanda_mask of inputs": lambda x: prune.wanda_mask(jnp.asarray(KERNEL), x[:, 0], sparsity=0.5),
    "sparsegpt_update": lambda x: prune.sparsegpt_update(x, jnp.eye(8), sparsity=0.5)[1],
    "sparsegpt_update of a gram": lambda x: prune.sparsegpt_update(jnp.asarray(KERNEL), x @ x.T + jnp.eye(8), sparsity=0.5)[1],
}


@pytest.mark.parametrize("name", ARRAYS)
def test_nan_at_hand_is_refused(name):
    fn = ARRAYS[name]
    count = {"wanda_mask of inputs": r"1 of 8 mean squares", "sparsegpt_update of a gram": r"15 of 64 entries of the gram"}
    for x in (jnp.asarray(NAN), jnp.asarray(NAN, jnp.bfloat16)):
        line(lambda x=x: fn(x), count.get(name, "3 of 32 (scores|weights of the kernel) are NaN"))
    traced = jax.jit(fn)
    np.testing.assert_array_equal(traced(abs(jnp.asarray(KERNEL))), fn(abs(jnp.asarray(KERNEL))))
    traced(jnp.asarray(NAN))  # values are not known there


def test_nan_is_the_lowest_under_jit():
    for name in ("topk_mask", "nm_mask", "block_mask", "wanda_mask"):
        mask = np.asarray(jax.jit(ARRAYS[name])(jnp.asarray(NAN)))
        assert mask.any() and not mask[:1, :3].any(), name
    assert np.isnan(jax.jit(lambda x: prune.kth_largest(x, 32))(NAN))


def test_nan_of_a_constant_inside_jit_and_of_infinities():
    constant = jnp.asarray(NAN)
    with pytest.raises(ValueError, match="3 of 32 scores are NaN"):
        jax.jit(lambda: prune.topk_mask(constant, 0.5))()
    extremes = jnp.asarray([np.inf, -np.inf, 1.0, 0.0])
    np.testing.assert_array_equal(prune.topk_mask(extremes, 0.5), [True, False, True, False])
    np.testing.assert_array_equal(prune.topk_mask(jnp.arange(4), 0.5), [False, False, True, True])


def test_nan_quality_names_the_layer_and_the_sparsity():
    tree = {"up": {"kernel": jnp.asarray(KERNEL)}, "down": {"kernel": jnp.asarray(KERNEL.T)}}
    quality = lambda p: float("nan") if (p["up"]["kernel"] == 0).sum() > 16 else 1.0
    line(lambda: prune.analyse(quality, tree), r"the quality of up/kernel at sparsity 0\.688 is NaN")
    line(lambda: prune.analyse(lambda p: jnp.nan, tree), "the quality of the dense parameters is NaN")


def test_a_batch_without_a_path_has_a_name():
    found = trace.linears(lambda p, x: x @ p["kernel"], {"kernel": jnp.asarray(KERNEL)}, X)
    line(lambda: found.stream({"kernel": jnp.asarray(KERNEL)}, [X, X[:3]], lambda *_: None), "in batch 1, the batch has shape")


# ---- numbers and places ----


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: prune.n_m(2.0, 4), "n of the pattern n:m is 2.0; expected an int"),
        (lambda: prune.n_m(2, 4, -1.0), "axis of the pattern n:m is -1.0; expected an int"),
        (lambda: prune.block(2.0, 2), "the rows of a block is 2.0; expected an int"),
        (lambda: prune.channel(-1.0), "the axis of channels is -1.0; expected an int"),
        (lambda: prune.cubic(None, 10), "a schedule's begin or end is None; expected a number"),
        (lambda: prune.cubic(np.float32(0.2), np.float32(0.7)), "a fraction of the run; give its length too"),
        (lambda: prune.polynomial(0, 10, "3"), "the power is '3'; expected a number"),
        (lambda: prune.iterative(0, 10, 2.5), "the number of rounds is 2.5; expected an int"),
        (lambda: prune.rigl(optax.sgd(0.1), sparsity=0.5, end=50), "so masks would never change; give a smaller every"),
        (lambda: prune.rigl(optax.sgd(0.1), sparsity=0.5, end=0.75), "end of rigl, a step, is 0.75; expected an int"),
        (lambda: prune.sparse_evolution(optax.sgd(0.1), sparsity=0.5, end=500, drop="x"), "the drop fraction is 'x'"),
        (lambda: prune.ac_dc(optax.sgd(0.1), sparsity=0.5, phase=100, end=50), "so no dense phase would come"),
        (lambda: prune.ac_dc(optax.sgd(0.1), sparsity=0.5, phase=2.5, end=50), "phase of ac_dc, in steps, is 2.5"),
        (lambda: prune.around(0.1, sparsity=0.5), "the optimiser is 0.1; expected what one of these gives: optax.adamw"),
        (lambda: prune.around(optax.adam, sparsity=0.5), r"the optimiser is the function adam itself; call it: adam\("),
        (lambda: prune.straight_through(prune.saliency(), sparsity=0.5), "ranks weights after their update, and saliency"),
        (lambda: layerwise(X), "expected several batches: give a list of them"),
    ],
)
def test_numbers_of_another_kind(make, message):
    line(make, message)


def test_fractions_of_any_float_are_fractions():
    for kind in (float, np.float32, jnp.float32):
        schedule = prune.cubic(kind(0.25), kind(0.75), steps=8)
        assert (schedule.begin, schedule.end) == (2, 6)


def test_straight_through_that_is_not_last_is_refused():
    st, params = prune.straight_through(sparsity=0.5), {"kernel": jnp.ones((4, 4))}
    state = optax.chain(st.tx, optax.adam(0.1)).init(params)
    line(lambda: st.view(params, state), "straight_through's tx is followed by another transform; put it last")
    st.view(params, optax.chain(optax.adam(0.1), st.tx).init(params))
    st.view(params, optax.chain(optax.clip(1.0), optax.chain(optax.adam(0.1), st.tx)).init(params))


def test_masks_of_a_part_of_the_parameters_show_the_rest_whole():
    st, params = prune.straight_through(sparsity=0.5, every=1), {"a": {"kernel": KERNEL, "bias": jnp.ones(4)}}
    parts = {"kernels": optax.chain(optax.sgd(0.1), st.tx), "others": optax.sgd(0.1)}
    tx = optax.partition(parts, {"a": {"kernel": "kernels", "bias": "others"}})
    state = tx.init(params)
    _, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    shown = st.view(params, state)["a"]
    assert (np.asarray(shown["kernel"]) == 0).sum() == KERNEL.size // 2
    np.testing.assert_array_equal(shown["bias"], 1)
    assert prune.masks(state)["a"]["bias"].shape == ()
