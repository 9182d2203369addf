import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bmjax import prune
from bmjax.types import Group, Member


def small_params(seed=0):
    rng = np.random.default_rng(seed)
    leaf = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {
        "embed": {"kernel": leaf(5, 8)},
        "layers": {
            "up": {"kernel": leaf(2, 8, 6), "bias": leaf(2, 6)},
            "down": {"kernel": leaf(2, 6, 8)},
            "norm": {"scale": leaf(2, 8)},
        },
        "head": {"kernel": leaf(8, 3), "bias": leaf(3)},
    }


def gradients(params, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)


def run(tx, params, steps, state=None, seed=0):
    """(params, state, [params after each step])."""

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params) if state is None else state
    history = []
    for i in range(steps):
        params, state = step(params, state, gradients(params, 100 * seed + i))
        history.append(params)
    return params, state, history


def smallest(x, count):
    """Flat positions of the `count` smallest magnitudes: of equal ones the last come first."""
    flat = np.abs(np.asarray(x, np.float64)).ravel()
    return np.lexsort((-np.arange(flat.size), flat))[:count]


def zeros(leaf):
    return int((np.asarray(leaf) == 0).sum())


UP, DOWN = "layers/up/kernel", "layers/down/kernel"
NEURONS = Group(
    "neurons",
    6,
    2,
    (
        Member(UP, 2, np.arange(6)[:, None]),
        Member("layers/up/bias", 1, np.arange(6)[:, None]),
        Member(DOWN, 1, np.arange(6)[:, None]),
    ),
)
LAYERS = Group(
    "layers",
    2,
    0,
    tuple(Member(path, 0, np.arange(2)[:, None]) for path in (UP, "layers/up/bias", DOWN, "layers/norm/scale")),
)


def test_first_update_drops_the_smallest_weights():
    params = small_params()
    tx = optax.chain(optax.sgd(0.1), prune.sparsify(sparsity=0.7))
    after, state, _ = run(tx, params, 1)
    grads = gradients(params, 0)
    for name in ("up", "down"):
        dense = np.asarray(params["layers"][name]["kernel"] - 0.1 * grads["layers"][name]["kernel"])
        before = np.asarray(params["layers"][name]["kernel"])
        expected = np.ones(before.size, bool)
        expected[smallest(before, round(0.7 * before.size))] = False
        np.testing.assert_array_equal(np.asarray(prune.masks(state)["layers"][name]["kernel"]).ravel(), expected)
        np.testing.assert_allclose(after["layers"][name]["kernel"], np.where(expected.reshape(dense.shape), dense, 0), rtol=1e-6)
    for path in ("embed", "head"):  # left out by the default rule
        assert zeros(after[path]["kernel"]) == 0
        assert prune.masks(state)[path]["kernel"].ndim == 0


def test_adam_with_weight_decay_keeps_every_zero_for_200_steps():
    params = small_params()
    tx = optax.chain(optax.adamw(0.05, weight_decay=0.1), prune.sparsify(sparsity=0.5, schedule=prune.cubic(20, 90), every=7))
    _, state, history = run(tx, params, 200)
    dropped = [np.asarray(p["layers"]["up"]["kernel"]) == 0 for p in history]
    for before, now in itertools.pairwise(dropped):
        assert (now[before]).all()
    assert dropped[90].sum() == dropped[-1].sum() == 48  # half of 96, exactly, and no kept weight is zero
    np.testing.assert_array_equal(prune.masks(state)["layers"]["up"]["kernel"], ~dropped[-1])


def test_a_kept_weight_takes_its_update_unchanged():
    params, updates = small_params(), gradients(small_params(), 1)
    tx = prune.sparsify(sparsity=0.5)
    got, state = tx.update(updates, tx.init(params), params)
    same = jax.tree.map(
        lambda u, new, mask: np.where(mask, np.asarray(u) == np.asarray(new), True).all(), updates, got, prune.masks(state)
    )
    assert all(jax.tree.leaves(same))


def test_nan_update_under_the_mask_still_gives_zero():
    params = small_params()
    tx = prune.sparsify(sparsity=0.5)
    state = tx.init(params)
    _, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    mask = prune.masks(state)["layers"]["up"]["kernel"]
    updates = jax.tree.map(jnp.zeros_like, params)
    updates["layers"]["up"]["kernel"] = jnp.where(mask, 0.0, jnp.nan)
    updates, state = tx.update(updates, state, params)
    after = optax.apply_updates(params, updates)["layers"]["up"]["kernel"]
    np.testing.assert_array_equal(after, np.where(mask, params["layers"]["up"]["kernel"], 0))


def test_nan_scores_are_dropped_first_and_counted():
    params = small_params()
    params["layers"]["up"]["kernel"] = params["layers"]["up"]["kernel"].at[0, 0, :3].set(jnp.nan)
    tx = prune.sparsify(sparsity=0.5)
    _, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert not np.asarray(prune.masks(state)["layers"]["up"]["kernel"])[0, 0, :3].any()
    assert prune.sparsity_report(params, state).nans == 3


@pytest.mark.parametrize("every", [1, 3, 50])
def test_cubic_lands_on_its_target_at_its_end(every):
    schedule = prune.cubic(2, 12)
    # Zhu and Gupta, equation 1, with s_i = 0 and s_f = 1: s_t = 1 - (1 - (t - t_0) / (n dt))^3.
    for step in range(20):
        t = min(max((step - 2) / 10, 0.0), 1.0)
        assert float(schedule(step)) == pytest.approx(1 - (1 - t) ** 3, abs=1e-6)
    tx = optax.chain(optax.sgd(0.01), prune.sparsify(sparsity=0.8, schedule=schedule, every=every))
    _, _, history = run(tx, small_params(), 16)
    dropped = [zeros(p["layers"]["up"]["kernel"]) for p in history]
    assert dropped[:2] == [0, 0]
    assert dropped[12:] == [77] * 4  # round(0.8 * 96)
    for step in range(2, 12):
        made = 2 + (step - 2) // every * every
        assert dropped[step] == int((1 - (1 - (made - 2) / 10) ** 3) * 77 + 1e-4)


def test_one_shot_prunes_at_its_step():
    tx = optax.chain(optax.sgd(0.01), prune.sparsify(sparsity=0.25, schedule=prune.one_shot(3), every=2))
    _, _, history = run(tx, small_params(), 6)
    assert [zeros(p["layers"]["down"]["kernel"]) for p in history] == [0, 0, 0, 24, 24, 24]


def test_global_threshold_ranks_all_weights_together():
    params = small_params()
    params["layers"]["up"]["kernel"] *= 0.2
    tx = prune.sparsify(sparsity=0.6, allocation=prune.global_threshold())
    _, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    # The tree's order: down comes before up.
    flat = np.concatenate([np.asarray(params["layers"][name]["kernel"]).ravel() for name in ("down", "up")])
    expected = np.ones(flat.size, bool)
    expected[smallest(flat, round(0.6 * flat.size))] = False
    got = np.concatenate([np.asarray(prune.masks(state)["layers"][name]["kernel"]).ravel() for name in ("down", "up")])
    np.testing.assert_array_equal(got, expected)


def test_sparsity_by_regex_and_where():
    params = small_params()
    tx = prune.sparsify(sparsity={"up": 0.5, "layers|head": 0.25}, where="kernel")
    _, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    masks = prune.masks(state)
    assert [zeros(masks["layers"]["up"]["kernel"]), zeros(masks["layers"]["down"]["kernel"]), zeros(masks["head"]["kernel"])] == [
        48,
        24,
        6,
    ]
    assert masks["embed"]["kernel"].ndim == 0


def test_plain_tree_without_names_prunes_all_with_two_axes():
    params = [jnp.ones((4, 4)), jnp.ones(4)]
    tx = prune.sparsify(sparsity=0.5)
    updates, _ = tx.update([jnp.zeros((4, 4)), jnp.zeros(4)], tx.init(params), params)
    after = optax.apply_updates(params, updates)
    # All equal: the lower index stays.
    np.testing.assert_array_equal(after[0].ravel(), np.arange(16) < 8)
    np.testing.assert_array_equal(after[1], np.ones(4))


def test_given_scores_decide():
    params = small_params()
    scores = gradients(params, 9)
    tx = prune.sparsify(prune.given(scores), sparsity=0.5)
    _, state = tx.update(params, tx.init(params), params)
    score = np.asarray(scores["layers"]["up"]["kernel"])
    np.testing.assert_array_equal(prune.masks(state)["layers"]["up"]["kernel"], score >= np.sort(score.ravel())[48])


def test_groups_keep_the_largest_norms_in_each_layer():
    params = small_params()
    tx = prune.sparsify(sparsity={"neurons": 0.5}, pattern=prune.groups([NEURONS, LAYERS]))
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    up, bias, down = (
        np.asarray(x, np.float64)
        for x in (params["layers"]["up"]["kernel"], params["layers"]["up"]["bias"], params["layers"]["down"]["kernel"])
    )
    norms = (up**2).sum(1) + bias**2 + (down**2).sum(2)
    expected = norms >= np.sort(norms, axis=1)[:, 3:4]
    np.testing.assert_array_equal(prune.keeps(state)["neurons"], expected)
    assert set(prune.keeps(state)) == {"neurons"}  # a group that is not named is left whole
    after = optax.apply_updates(params, updates)["layers"]
    np.testing.assert_array_equal(after["up"]["kernel"], up * expected[:, None, :])
    np.testing.assert_array_equal(after["up"]["bias"], bias * expected)
    np.testing.assert_array_equal(after["down"]["kernel"], down * expected[:, :, None])
    np.testing.assert_array_equal(after["norm"]["scale"], params["layers"]["norm"]["scale"])


def test_groups_with_given_scores_and_different_sparsity():
    params = small_params()
    criterion = prune.given({"layers": np.array([0.1, 0.9])}, otherwise=prune.magnitude())
    pattern = prune.groups([NEURONS, LAYERS])
    tx = optax.chain(
        optax.adam(0.01),
        prune.sparsify(criterion, sparsity={"layers": 0.5, "neurons": 0.9}, pattern=pattern, schedule=prune.cubic(0, 4)),
    )
    after, state, _ = run(tx, params, 6)
    np.testing.assert_array_equal(prune.keeps(state)["layers"], [False, True])
    np.testing.assert_array_equal(prune.keeps(state)["neurons"].sum(1), [1, 1])  # 6 - round(5.4) = 1
    assert zeros(after["layers"]["up"]["kernel"][0]) == 48
    assert zeros(after["layers"]["up"]["kernel"][1]) == 40
    assert zeros(after["layers"]["norm"]["scale"]) == 8
    at_least_one = prune.sparsify(sparsity={"layers": 0.99}, pattern=pattern)
    _, state = at_least_one.update(params, at_least_one.init(params), params)
    assert prune.keeps(state)["layers"].sum() == 1


def test_around_shows_kept_gradients_only_to_clipping():
    params = small_params()
    tx = prune.around(optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(1.0)), sparsity=0.5)
    params, state, _ = run(tx, params, 1)
    masks, grads = prune.masks(state), gradients(params, 77)
    updates, _ = tx.update(grads, state, params)
    kept = jax.tree.map(lambda g, mask: np.asarray(g, np.float64) * np.asarray(mask), grads, masks)
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(kept)))
    for update, g, mask in zip(jax.tree.leaves(updates), jax.tree.leaves(kept), jax.tree.leaves(masks)):
        np.testing.assert_allclose(np.asarray(update) * np.asarray(mask), -g * 0.5 / norm, rtol=1e-5, atol=1e-8)


def labels(params):
    return jax.tree.map(lambda p: "big" if p.ndim > 1 else "small", params)


OPTIMIZERS = {
    "adam": lambda: optax.adam(0.01),
    "adamw": lambda: optax.adamw(0.01, weight_decay=0.1),
    "lion": lambda: optax.lion(0.01),
    "momentum": lambda: optax.sgd(0.01, momentum=0.9, nesterov=True),
    "masked": lambda: optax.masked(optax.adam(0.01), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(0.01), 2).gradient_transformation(),
    "inject": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.01),
    "partition": lambda: optax.partition({"big": optax.adam(0.01), "small": optax.sgd(0.1, momentum=0.5)}, labels),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_around_any_optimizer_resets_the_state_of_dropped_weights(name):
    params = small_params()
    tx = prune.around(OPTIMIZERS[name](), sparsity=0.5, schedule=prune.cubic(1, 5))
    after, state, _ = run(tx, params, 8)
    mask = np.asarray(prune.masks(state)["layers"]["up"]["kernel"])
    assert (~mask).sum() == 48
    np.testing.assert_array_equal(np.asarray(after["layers"]["up"]["kernel"]) != 0, mask)
    found = [leaf for leaf in jax.tree.leaves(state.inner) if leaf.shape == mask.shape]
    assert found
    for leaf in found:
        assert not np.asarray(leaf)[~mask].any()
    moments = [leaf for leaf in found if np.asarray(leaf)[mask].all()]
    assert moments  # kept weights have theirs


NESTINGS = {
    "chain": lambda tx: optax.chain(optax.adam(0.01), tx),
    "masked": lambda tx: optax.chain(optax.adam(0.01), optax.masked(tx, lambda p: jax.tree.map(lambda x: x.ndim > 1, p))),
    "multi_steps": lambda tx: optax.MultiSteps(optax.chain(optax.adam(0.01), tx), 2).gradient_transformation(),
    "inject": lambda tx: optax.inject_hyperparams(lambda rate: optax.chain(optax.adam(rate), tx))(rate=0.01),
    "partition": lambda tx: optax.partition({"big": optax.chain(optax.adam(0.01), tx), "small": optax.sgd(0.1)}, labels),
    "finite": lambda tx: optax.apply_if_finite(optax.chain(optax.adam(0.01), tx), 3),
    "around": lambda tx: prune.around(optax.adam(0.01), sparsity=0.5),
}


@pytest.mark.parametrize("name", NESTINGS)
def test_masks_are_found_in_any_nesting(name):
    after, state, _ = run(NESTINGS[name](prune.sparsify(sparsity=0.5)), small_params(), 6)
    mask = np.asarray(prune.masks(state)["layers"]["up"]["kernel"])
    np.testing.assert_array_equal(np.asarray(after["layers"]["up"]["kernel"]) != 0, mask)
    assert mask.sum() == 48


def test_masks_of_two_transforms_are_joined():
    big = optax.chain(optax.adam(0.01), prune.sparsify(sparsity=0.5))
    tx = optax.partition({"big": big, "small": prune.sparsify(sparsity=0.4, where="bias")}, labels)
    after, state, _ = run(tx, {"a": {"kernel": jnp.ones((4, 4)), "bias": jnp.arange(1.0, 6.0)}}, 2)
    masks = prune.masks(state)
    assert [zeros(masks["a"]["kernel"]), zeros(masks["a"]["bias"])] == [8, 2]
    jax.tree.map(lambda p, mask: np.testing.assert_array_equal(np.asarray(p) != 0, mask), after, masks)


def test_sparsity_report_says_what_is_zero_and_why_the_rest_is_not():
    params = small_params()
    after, state, _ = run(optax.chain(optax.sgd(0.1), prune.sparsify(sparsity=0.75, where="up/kernel")), params, 1)
    report = prune.sparsity_report(after, state)
    rows = {row.path: row for row in report.rows}
    assert rows["layers/up/kernel"] == prune.Row("layers/up/kernel", 96, 72, 0.75, "pruned")
    assert {path: row.note for path, row in rows.items() if path != "layers/up/kernel"} == {
        "embed/kernel": "embedding",
        "head/bias": "one axis",
        "head/kernel": "head",
        "layers/down/kernel": "not selected",
        "layers/norm/scale": "norm",
        "layers/up/bias": "not called kernel",
    }
    assert report.total == prune.Row("total", 40 + 96 + 12 + 96 + 16 + 24 + 3, 72, 72 / 287, "")
    assert report.nans == 0


@pytest.mark.parametrize("allocation", [prune.uniform, prune.global_threshold])
def test_partitioned_masks_equal_those_of_one_device_without_a_gather(allocation):
    rng = np.random.default_rng(5)
    # Rounded, so that many scores are equal and the ties cross the devices.
    params = {name: {"kernel": np.round(rng.normal(size=(16, 24)) * 4).astype(np.float32) / 4} for name in "ab"}
    tx = prune.sparsify(sparsity=0.7, allocation=allocation(), schedule=prune.cubic(0, 3))
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    specs = {"a": {"kernel": P("fsdp", "tensor")}, "b": {"kernel": P(None, ("fsdp", "tensor"))}}
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    whole = NamedSharding(mesh, P())
    state_shardings = prune.SparsifyState(whole, shardings, {}, whole, whole, ())
    state = jax.jit(tx.init, out_shardings=state_shardings)(jax.device_put(params, shardings))
    update = jax.jit(tx.update, in_shardings=(shardings, state_shardings, shardings), out_shardings=(shardings, state_shardings))
    compiled = update.lower(params, state, params).compile().as_text()
    assert "all-reduce" in compiled
    assert "all-gather" not in compiled
    alone, alone_state = jax.jit(tx.update), tx.init(params)
    for seed in range(4):
        grads = jax.tree.map(lambda g: np.round(np.asarray(g) * 2) / 4, gradients(params, seed))
        updates, state = update(jax.device_put(grads, shardings), state, jax.device_put(params, shardings))
        expected, alone_state = alone(grads, alone_state, params)
        jax.tree.map(np.testing.assert_array_equal, updates, expected)
        jax.tree.map(np.testing.assert_array_equal, prune.masks(state), prune.masks(alone_state))
        params = jax.tree.map(lambda p, u: np.asarray(p + u), params, expected)
    assert sum(zeros(mask) for mask in jax.tree.leaves(prune.masks(state))) == (2 * 269 if allocation is prune.uniform else 538)


def test_partitioned_groups_choose_what_one_device_chooses():
    params = small_params()
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    split = lambda p: NamedSharding(mesh, P(None, "fsdp", "tensor") if p.ndim == 3 else P())
    tx = prune.around(optax.adam(0.01), sparsity={"neurons": 0.5}, pattern=prune.groups([NEURONS]))
    alone, alone_state, _ = run(tx, params, 2)
    after, state, _ = run(tx, jax.tree.map(lambda p: jax.device_put(p, split(p)), params), 2)
    np.testing.assert_array_equal(prune.keeps(state)["neurons"], prune.keeps(alone_state)["neurons"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), after, alone)
    assert zeros(after["layers"]["up"]["kernel"]) == 48


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "the sparsity is 1.0; expected a fraction"),
        ({"sparsity": float("nan")}, "the sparsity is nan"),
        ({"sparsity": {"up": -0.1}}, "the sparsity of 'up' is -0.1"),
        ({"sparsity": {}}, "empty mapping"),
        ({"sparsity": 0.5, "every": 0}, "every 0 steps"),
        ({"sparsity": 0.5, "where": "("}, "not a regular expression"),
        ({"sparsity": 0.5, "where": "convolution"}, "matches none of the parameters"),
        ({"sparsity": {"convolution": 0.5}}, "'convolution' matches none of the weights to prune"),
        ({"sparsity": {"up": 0.5}, "allocation": prune.global_threshold()}, "takes one sparsity"),
        (
            {"sparsity": 0.5, "pattern": prune.groups([NEURONS]), "allocation": prune.global_threshold()},
            "cannot compare elements",
        ),
        ({"sparsity": {"nuerons": 0.5}, "pattern": prune.groups([NEURONS])}, "'nuerons'; the groups are neurons"),
        ({"sparsity": 0.5, "pattern": prune.groups([NEURONS]), "where": "up"}, "leave it out"),
        ({"sparsity": 0.5, "criterion": prune.given({"w": np.ones(3)})}, "do not fit the parameters: embed/kernel is missing"),
        (
            {"sparsity": 0.5, "criterion": prune.given({"x": np.ones(6)}), "pattern": prune.groups([NEURONS])},
            "scores are given for 'x'; the groups are neurons",
        ),
        (
            {"sparsity": 0.5, "criterion": prune.given({"neurons": np.ones(6)}), "pattern": prune.groups([NEURONS])},
            r"shape \[6\], expected \[2, 6\]",
        ),
    ],
)
def test_bad_options_are_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        prune.sparsify(**options).init(small_params())
    assert "\n" not in str(error.value)


def test_other_bad_input_is_one_line():
    with pytest.raises(ValueError, match="begin 5 and end 5"):
        prune.cubic(5, 5)
    with pytest.raises(ValueError, match="step -1"):
        prune.one_shot(-1)
    with pytest.raises(ValueError, match="groups of different names"):
        prune.groups([NEURONS, NEURONS])
    with pytest.raises(ValueError, match="holds no masks"):
        prune.masks(optax.adam(0.1).init(small_params()))
    with pytest.raises(ValueError, match="no groups"):
        prune.keeps(prune.sparsify(sparsity=0.5).init(small_params()))
    with pytest.raises(ValueError, match="needs the parameters"):
        prune.sparsify(sparsity=0.5).update({}, prune.sparsify(sparsity=0.5).init(small_params()))
    with pytest.raises(ValueError, match="nothing to prune"):
        prune.sparsify(sparsity=0.5).init({"bias": jnp.ones(3)})
