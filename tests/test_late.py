import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

from bmjax import parallel, prune, trace
from bmjax.losses import cross_entropy_term
from bmjax.models import Decoder
from bmjax.train import Problem, init_state, make_step

LAYERS, WIDTH = 4, 8
_random = np.random.default_rng(0)
X = jnp.asarray(_random.normal(size=(6, WIDTH)), jnp.float32)
W = jnp.asarray(_random.normal(size=(LAYERS, WIDTH, WIDTH)) / 3, jnp.float32)
MASK = jnp.asarray(_random.random(W.shape) > 0.4)


@trace.late
def hidden(p, mask):
    return jnp.where(mask, p, jnp.zeros((), p.dtype))


def through_layers(w, x=X, wrap=lambda f: f, unroll=1):
    return jax.lax.scan(wrap(lambda h, w: (jnp.tanh(h @ w), h.sum())), x, w, unroll=unroll)


def twice(w):
    h, sums = through_layers(w)
    return (h @ w[-1]).sum() + jnp.square(sums).sum()


def in_float16(w):
    return through_layers(w.astype(jnp.float16), X.astype(jnp.float16))[0].astype(jnp.float32).sum()


def closed_over(w):
    return jax.lax.scan(lambda total, row: (total + through_layers(w, row)[0].sum(), None), 0.0, X)[0]


FUNCTIONS = {
    "used twice": twice,
    "in a jit": jax.jit(lambda w: through_layers(w)[0].sum()),
    "rematerialised": lambda w: through_layers(w, wrap=functools.partial(jax.checkpoint, prevent_cse=False))[0].sum(),
    "a scan rematerialised": jax.checkpoint(lambda w: through_layers(w)[0].sum()),
    "unrolled": lambda w: through_layers(w, unroll=2)[0].sum(),
    "backwards": lambda w: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), X, w, reverse=True)[0].sum(),
    "converted": in_float16,
    "in another scan": closed_over,
    "not in a scan": lambda w: jnp.tanh(X @ w[0]).sum(),
    "returned": lambda w: (w, jnp.sin(w)),
    "in a branch": lambda w: jax.lax.cond(X.sum() > 0, lambda w: through_layers(w)[0].sum(), jnp.sum, w),
}


FUNCTIONS["an effect in the body"] = lambda w: jax.lax.scan(
    lambda h, w: (
        jnp.tanh(h @ w) + jax.experimental.io_callback(lambda: np.float32(0), jax.ShapeDtypeStruct((), jnp.float32)),
        None,
    ),
    X,
    w,
)[0].sum()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients_are_those_of_the_plain_function(name):
    fn = lambda w: jax.tree.reduce(lambda total, x: total + jnp.sum(x), FUNCTIONS[name](hidden(w, MASK)), jnp.float32(0))
    wanted = jax.value_and_grad(fn)(W)
    late = trace.where_used(fn)
    for found in (jax.value_and_grad(late)(W), jax.jit(jax.value_and_grad(late))(W)):
        np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
        np.testing.assert_allclose(found[1], wanted[1], rtol=1e-4, atol=1e-6)
    assert jax.eval_shape(trace.where_used(FUNCTIONS[name]), W) == jax.eval_shape(FUNCTIONS[name], W)


def test_one_late_array_may_be_made_of_another():
    doubled = trace.late(lambda w: 2 * w)
    fn = lambda w: through_layers(doubled(hidden(doubled(w), MASK)))[0].sum()
    np.testing.assert_allclose(jax.grad(trace.where_used(fn))(W), jax.grad(fn)(W), rtol=1e-4, atol=1e-6)
    assert not _stacked_selects(jax.make_jaxpr(jax.grad(trace.where_used(fn)))(W))


@pytest.mark.parametrize("shape", [(1, WIDTH, 1), (WIDTH,), ()])
def test_what_layers_share_is_computed_before(shape):
    """Also where it is as long as there are layers."""
    scaled = trace.late(lambda w, scale: w * scale)
    fn = lambda w, scale: through_layers(scaled(w, scale))[0].sum()
    scale, square = (
        jnp.linspace(0.3, 0.7, WIDTH).reshape(-1)[: max(1, int(np.prod(shape)))].reshape(shape),
        W[:, :LAYERS, :LAYERS],
    )
    np.testing.assert_allclose(trace.where_used(fn)(W, scale), fn(W, scale), rtol=1e-5)
    narrow = lambda w, scale: through_layers(scaled(w, scale), X[:, :LAYERS])[0].sum()
    np.testing.assert_allclose(trace.where_used(narrow)(square, jnp.arange(4.0)), narrow(square, jnp.arange(4.0)), rtol=1e-5)


def test_numbers_words_and_functions_are_passed_on():
    def fn(w, x, activation, *, steps, how):
        assert (steps, how) == (2, "twice")
        h = x
        for _ in range(steps):
            h = jax.lax.scan(lambda h, w: (activation(h @ w), None), h, hidden(w, MASK))[0]
        return h.sum(), {"how": how, "steps": steps, "none": None, "h": h}

    total, rest = trace.where_used(fn)(W, X, jnp.tanh, steps=2, how="twice")
    want, _ = fn(W, X, jnp.tanh, steps=2, how="twice")
    np.testing.assert_allclose(total, want, rtol=1e-5)
    assert (rest["how"], rest["steps"], rest["none"], rest["h"].shape) == ("twice", 2, None, X.shape)


@pytest.mark.parametrize("wrapped", ["no", "in a jit", "in a checkpoint"])
def test_a_view_is_found_where_it_is_made(wrapped):
    fn = lambda w: through_layers(hidden(w, MASK))[0].sum()
    fn = {"no": lambda fn: fn, "in a jit": jax.jit, "in a checkpoint": jax.checkpoint}[wrapped](fn)
    assert not _stacked_selects(jax.make_jaxpr(trace.where_used(fn))(W))


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.dots_saveable])
def test_what_is_rematerialised_stays_so(policy):
    """The forward scan keeps for the backward one what it would without late arrays."""
    remat = functools.partial(jax.checkpoint, prevent_cse=False, policy=policy)
    layer = lambda h, w: (jnp.sin(jnp.tanh(jnp.sin(h @ w))), None)
    fn = lambda w: jax.lax.scan(remat(layer), X, w)[0].sum()
    kept = []
    for one in (fn, lambda w: trace.where_used(lambda w: fn(hidden(w, MASK)))(w)):
        scan = next(eqn for eqn in jax.make_jaxpr(jax.grad(one))(W).jaxpr.eqns if eqn.primitive.name == "scan")
        kept.append(sorted(var.aval.shape for var in scan.outvars))
    assert kept[0] == kept[1]


def test_a_rule_may_spare_the_whole_array():
    seen = []

    def rows(eqn, inputs):
        seen.append(eqn.primitive.name)
        table, indices = inputs
        (values,) = table.args
        return [2 * trace.bind(eqn, [values, indices])[0]]

    table = jnp.arange(12.0).reshape(6, 2)
    fn = trace.where_used(lambda table: table[jnp.array([4, 1])], {"gather": rows})
    np.testing.assert_array_equal(fn(Partial(lambda x: 2 * x, table)), 2 * table[np.array([4, 1])])
    assert seen == ["gather"]
    declined = trace.where_used(lambda table: table[jnp.array([4, 1])], {"gather": lambda *_: None})
    np.testing.assert_array_equal(declined(Partial(lambda x: 2 * x, table)), 2 * table[np.array([4, 1])])


def _stacked_selects(closed):
    """Equations that choose between whole stacks, at any depth."""
    found, left = [], [closed.jaxpr]
    while left:
        for eqn in left.pop().eqns:
            if eqn.primitive.name == "select_n" and eqn.outvars[0].aval.shape == W.shape:
                found.append(eqn)
            left += [inner.jaxpr if hasattr(inner, "jaxpr") else inner for inner in eqn.params.values() if hasattr(inner, "eqns")]
    return found


def test_no_masked_stack_is_made_forward_or_backward():
    fn = lambda w: through_layers(hidden(w, MASK))[0].sum()
    assert _stacked_selects(jax.make_jaxpr(fn)(W))
    found = jax.make_jaxpr(jax.grad(trace.where_used(fn)))(W)
    assert not _stacked_selects(found)
    scans = [eqn for eqn in found.jaxpr.eqns if eqn.primitive.name == "scan"]
    kept = [var.aval.shape for var in scans[0].outvars]  # by the forward pass: activations, no kernels
    assert len(scans) == 2 and W.shape not in kept, kept


def _decoder_step(view, executor="auto", mesh="data=1"):
    model = Decoder(layers=6, width=64, heads=2, kv_heads=2, neurons=128).build((16,), 32)
    st = prune.straight_through(sparsity=0.5, every=2)
    problem = Problem(model, {"task": (1.0, cross_entropy_term())}, optax.chain(optax.sgd(0.1), st.tx), views=(view(st),))
    mesh = parallel.make_mesh(mesh, jax.devices() if "8" in mesh or "," in mesh else jax.devices()[:1])
    tokens = np.random.default_rng(1).integers(0, 32, (8, 17)).astype(np.int32)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((8, 16), np.float32)}
    batch |= {"id": np.arange(8, dtype=np.int32)}
    state = init_state(problem, mesh, model.rules, jax.random.key(0), batch)
    return make_step(problem, mesh, state, executor), state, batch


def _unmarked(st):
    """The same view, of which the step knows nothing."""
    return lambda params, opt_state, step: jax.tree.map(
        lambda p, mask: p if mask.ndim == 0 else p + jax.lax.stop_gradient(jnp.where(mask, 0.0, -p)),
        params,
        prune.masks(opt_state, params),
    )


def test_the_step_of_a_straight_through_run_holds_no_second_model():
    sizes = []
    for view in (lambda st: st.view, _unmarked):
        step, state, batch = _decoder_step(view)
        sizes.append(step.lower(state, None, batch).compile().memory_analysis().temp_size_in_bytes)
        kernels = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params["model"]["layers"]) if leaf.ndim > 2)
    assert sizes[0] < sizes[1] - 0.9 * kernels


@pytest.mark.parametrize(
    ("executor", "mesh"),
    [("pmap", "data=8"), ("replicated", "data=8"), ("partitioned", "data=2,fsdp=2,tensor=2"), ("hybrid", "data=2,fsdp=4")],
)
def test_the_step_is_the_same_with_whole_masked_kernels(executor, mesh):
    losses = []
    for view in (lambda st: st.view, _unmarked):
        step, state, batch = _decoder_step(view, executor, mesh)
        found = []
        for _ in range(5):
            state, metrics = step(state, None, batch)
            found.append(float(metrics["loss"]))
        losses.append(found)
    np.testing.assert_allclose(*losses, rtol=1e-5)
