"""The arithmetic of networks in NumPy, in whatever precision it is given, and what tests of networks do with it."""

import jax
import numpy as np

from bmjax import parallel, trees


def random_like(shapes, scale=0.5, seed=1):
    """A tree of random float32 arrays: no zeros and no ones, so that every bias and scale counts."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (scale * rng.normal(size=x.shape)).astype(np.float32), shapes)


def random_params(model, batch):
    """The same, shaped like a model's parameters."""
    return random_like(jax.eval_shape(model.init, jax.random.key(0), batch)[0])


def wide(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def close(found, want, rtol=1e-5, floor=1e-3):
    """Within `rtol` of each number, and of the largest finite one or of `floor`."""
    largest = np.abs(np.asarray(want)[np.isfinite(want)]).max(initial=floor)
    np.testing.assert_allclose(found, want, rtol=rtol, atol=rtol * largest)


def per_layer(layers, size, kept, seed):
    """bool [layers, size]: `kept` elements in each layer, others in each."""
    order = np.random.default_rng(seed).permuted(np.tile(np.arange(size), (layers, 1)), axis=1)
    return order < kept


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def rmsnorm(x, p):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"]


def layernorm(x, p):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


NORMS = {"rmsnorm": rmsnorm, "layernorm": layernorm}


def project(x, p, formula):
    return np.einsum(formula, x, p["kernel"]) + p.get("bias", 0.0)


def dense(x, p):
    return project(x, p, "...i,io->...o")


def rotated(x, positions, base):
    """Pairs (i, i + d/2) as complex numbers, turned by position * base^(-2i/d)."""
    half = x.shape[-1] // 2
    angle = positions[..., None, None] * base ** (-2 * np.arange(half) / (2 * half))
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], -1)


def attention(x, p, mask, positions=None, rope_base=None, found=None):
    """mask is [B, T, T]; queries and keys are turned where there is a `rope_base`; its insides go into the dict `found`."""
    found = {} if found is None else found
    q, k, v = (project(x, p[name], "btd,dhk->bthk") for name in ("query", "key", "value"))
    if "query_norm" in p:
        q, k = rmsnorm(q, p["query_norm"]), rmsnorm(k, p["key_norm"])
    if rope_base is not None:
        q, k = rotated(q, positions, rope_base), rotated(k, positions, rope_base)
    found |= {"query": q, "key": k, "value": v}
    k, v = (np.repeat(y, q.shape[2] // y.shape[2], axis=2) for y in (k, v))
    scores = np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(q.shape[-1])
    scores = found["scores"] = np.where(mask[:, None], scores, -np.inf)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    out = np.einsum("bhts,bshk->bthk", scores / scores.sum(-1, keepdims=True), v)
    return project(out, p["out"], "bthk,hkd->btd")


def mlp(x, p, kind):
    up = dense(x, p["up"])
    if kind == "gelu":
        return dense(gelu(up), p["down"])
    gate = dense(x, p["gate"])
    return dense({"swiglu": gate / (1 + np.exp(-gate)), "geglu": gelu(gate)}[kind] * up, p["down"])


def layers_of(p):
    """The parameters of each layer of a stack."""
    count = jax.tree.leaves(p["layers"])[0].shape[0]
    return [jax.tree.map(lambda stacked, i=i: stacked[i], p["layers"]) for i in range(count)]


def transformer(p, x, norm, kind, *attend):
    """(end, features) of pre-norm blocks and the norm behind them; `attend` goes to `attention`."""
    norm, found = NORMS[norm], {}
    for i, layer in enumerate(layers_of(p)):
        inside = {}
        branch = attention(norm(x, layer["norm_attention"]), layer["attention"], *attend, found=inside)
        found |= {f"layers/{i}/attention": branch, **{f"layers/{i}/attention/{name}": value for name, value in inside.items()}}
        x = x + branch
        branch = found[f"layers/{i}/mlp"] = mlp(norm(x, layer["norm_mlp"]), layer, kind)
        x = found[f"layers/{i}"] = x + branch
    return norm(x, p["final_norm"]), found


def check_outputs(model, params, batch, spec, want):
    """Logits, every feature and the head on a mesh against `want`, (logits, features); a stateless model's."""
    logits, features = want
    assert set(model.features) == set(features)
    mesh = parallel.make_mesh(spec, jax.devices()[:1] if spec == "data=1" else None)
    params = jax.device_put(params, parallel.partition(params, model.rules, mesh))
    forward = jax.jit(lambda p, b: model.apply(p, {}, b, capture=model.features)[0])
    found = jax.device_get(forward(params, parallel.put_batch(batch, mesh)))
    close(found.logits, logits)
    assert set(found.features) == set(features)
    for feature in features:
        close(found.features[feature], features[feature])
    hidden, kernel, bias = found.head
    close(hidden @ kernel + (0 if bias is None else bias), logits)
    return found


def check_slopes(value, slopes, params, *, step, rtol, atol):
    """Gradients against finite differences of fourth order, along a random direction in each parameter.

    `value` is the loss in float64 as a function of `params`, `slopes` the gradients under test.
    """
    rng, slopes = np.random.default_rng(2), trees.paths(slopes)
    for path, leaf in trees.paths(params).items():
        direction = rng.normal(size=leaf.shape)
        at = lambda h, path=path, leaf=leaf, direction=direction: float(
            value(trees.replace(params, {path: leaf + h * direction}))
        )
        near, far = (at(h) - at(-h) for h in (step, 2 * step))
        slope = np.sum(np.asarray(slopes[path], np.float64) * direction)
        np.testing.assert_allclose(slope, (8 * near - far) / (12 * step), rtol=rtol, atol=atol, err_msg=path)


def cross_entropy(logits, targets):
    """The mean over all targets, in NumPy."""
    hit = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return np.mean(np.log(np.exp(logits).sum(-1)) - hit)
