"""Anyone's model as a `Model`: a pair (init, apply), a Flax NNX module, a plain Flax Linen module.

Parameters become nested dicts of arrays whatever made them, so that rules, regexes, pruning, checkpoints and exports see them by
path. What an adapter promises holds for all three:

- The same numbers on 1 and on 8 devices. A model that draws random numbers in training runs example by example (`jax.vmap`), each
  with the step's key and its own id, so that dropout depends on neither the device nor the place in the batch.
- A state that is made of one device's rows only (batch statistics under `data` > 1) is refused and never averaged in silence.
- A feature that was asked for and not found is an error that names those that are there.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import InvalidRngError

from bmjax import trace, trees
from bmjax.models.adapted import Adapted, Pass, Resize, Result, RulesLike
from bmjax.types import Model, Params

if TYPE_CHECKING:
    from flax import nnx as flax_nnx

_WHOLE: RulesLike = ((".*", ()),)


def plain(
    init: Callable[..., Any],
    apply: Callable[..., Any],
    *,
    stateful: bool = False,
    axes: Mapping[str, tuple[str, int]] | None = None,
    rules: RulesLike = _WHOLE,
    features: tuple[str, ...] = (),
    resize: Resize | None = None,
) -> Adapted:
    """A pair of pure functions as a `Model`.

    Args:
        init: (key, inputs [B, ...]) -> params, any pytree of arrays whose places have names; (params, state) if `stateful`.
        apply: (params, inputs) -> logits [B, ..., classes], or (logits, {feature name: [B, ...]}). If `stateful`:
            (params, state, inputs) -> (logits, state) or (logits, features, state). Of the keywords train (bool), key (a PRNG
            key, None unless training) and capture (names) it gets those that its signature has.
        stateful: the model has a state beside its parameters, such as batch statistics.
        axes: {size name: (parameter path, axis)} that `resize` can change.
        rules: (path regex, mesh axis or None for each leading axis); every parameter stays whole without them.
        features: names that can be captured, so that others are refused before anything runs.
        resize: sizes -> Model, the same architecture in other sizes.

    Raises:
        ValueError: when it is used: what init or apply returns has another form.
    """
    wanted = _keywords(apply, ("train", "key", "capture"))

    def start(key: jax.Array, inputs: jax.Array) -> tuple[Params, Params]:
        params, state = _pair(init(key, inputs), stateful)
        return _as_dict(params), _as_dict(state)

    def forward(params: Params, state: Params, inputs: jax.Array, asked: Pass) -> Result:
        shape = jax.ShapeDtypeStruct(inputs.shape, inputs.dtype)
        like = _pair(jax.eval_shape(init, jax.random.key(0), shape), stateful)
        own = [_as_tree(tree, nested) for tree, nested in zip(like, (params, state))]
        options = {name: value for name, value in asked._asdict().items() if name in wanted}
        returned = apply(*own[: 1 + stateful], inputs, **options)
        logits, *rest = returned if isinstance(returned, tuple) else (returned,)
        if len(rest) not in ((1, 2) if stateful else (0, 1)):
            expected = "(logits, state) or (logits, features, state)" if stateful else "logits or (logits, features)"
            raise ValueError(f"apply returned {1 + len(rest)} values; expected {expected}")
        new = _as_dict(rest.pop()) if stateful else {}
        return Result(logits, rest[0] if rest else {}, new)

    return Adapted(start, forward, "key" in wanted, axes or {}, rules, tuple(features), resize)


def linen(
    module: nn.Module,
    *,
    rngs: tuple[str, ...] = (),
    axes: Mapping[str, tuple[str, int]] | None = None,
    rules: RulesLike = _WHOLE,
    features: tuple[str, ...] = (),
    resize: Resize | None = None,
) -> Adapted:
    """A Flax Linen module with `__call__(x) -> logits` as a `Model`.

    Features are the outputs of its submodules by path ("encoder/Dense_0") and what it sows in "intermediates". Collections other
    than params are the model's state and change in training.

    Args:
        module: its `__call__` takes inputs [B, ...]; if it has a keyword train, training or deterministic, that is set too.
        rngs: the streams it draws from in training, for example ("dropout",).
        axes, rules, features, resize: as for `plain`.

    Raises:
        ValueError: when it is used: the module draws from a stream that `rngs` does not name.
    """
    modes = _keywords(type(module).__call__, ("train", "training", "deterministic"))

    def mode(train: bool) -> dict[str, Any]:
        return {name: not train if name == "deterministic" else train for name in modes}

    def start(key: jax.Array, inputs: jax.Array) -> tuple[Params, Params]:
        keys = {"params": key, **{name: _stream(key, name) for name in rngs}}
        variables = nn.meta.unbox(dict(module.init(keys, inputs, **mode(False))))
        variables.pop("intermediates", None)
        return variables.pop("params", {}), variables

    def forward(params: Params, state: Params, inputs: jax.Array, asked: Pass) -> Result:
        changes = [*(state if asked.train else ()), *(["intermediates"] if asked.capture else ())]
        keys = {name: _stream(asked.key, name) for name in rngs} if asked.key is not None else None
        options: dict[str, Any] = {"mutable": changes, "capture_intermediates": bool(asked.capture), "rngs": keys}
        try:
            logits, changed = module.apply({"params": params, **state}, inputs, **mode(asked.train), **options)
        except InvalidRngError as error:
            what = str(error).partition(" (http")[0]
            raise ValueError(f"{what}; name the module's streams, as in adapters.linen(module, rngs=('dropout',))") from None
        changed = dict(changed)
        found = _named(_tuples(changed.pop("intermediates", {})))
        return Result(logits, found, {**state, **changed} if asked.train else state)

    return Adapted(start, forward, bool(rngs), axes or {}, rules, tuple(features), resize)


def nnx(
    make: Callable[[flax_nnx.Rngs], flax_nnx.Module],
    *,
    axes: Mapping[str, tuple[str, int]] | None = None,
    rules: RulesLike = _WHOLE,
    features: tuple[str, ...] = (),
    resize: Resize | None = None,
) -> Adapted:
    """A Flax NNX module as a `Model`; it is split and merged inside pure functions.

    Features are the outputs of its submodules by path ("layers/0") and what it sows as `nnx.Intermediate`. `nnx.Param`
    variables are the parameters, the others the state. Random streams are neither: each step seeds them anew, so nothing of
    them needs to be saved.

    Args:
        make: (nnx.Rngs) -> module whose `__call__` takes inputs [B, ...] and returns logits. It is called abstractly at once.
        axes, rules, features, resize: as for `plain`.
    """
    from flax import nnx as flax_nnx  # not needed by those who use Linen

    graph, whole = flax_nnx.split(flax_nnx.eval_shape(lambda: make(flax_nnx.Rngs(0))))
    variables = dict(flax_nnx.to_flat_state(whole))
    kinds = {path: _kind(flax_nnx, variable) for path, variable in variables.items()}

    def taken(module: flax_nnx.Module, kind: str) -> Params:
        flat = dict(flax_nnx.to_flat_state(flax_nnx.state(module)))
        return trees.nested({"/".join(map(str, path)): flat[path].get_value() for path in variables if kinds[path] == kind})

    def start(key: jax.Array, inputs: jax.Array) -> tuple[Params, Params]:
        module = make(flax_nnx.Rngs(key))
        return taken(module, "params"), taken(module, "state")

    def merged(params: Params, state: Params, key: jax.Array) -> flax_nnx.Module:
        values = {**trees.paths(params), **trees.paths(state)}

        def value(path: tuple[Any, ...], variable: Any) -> Any:
            name, abstract = "/".join(map(str, path)), variable.get_value()
            if kinds[path] == "key":
                return jax.random.split(_stream(key, name), abstract.shape) if abstract.shape else _stream(key, name)
            return jnp.zeros(abstract.shape, abstract.dtype) if kinds[path] == "count" else values[name]

        filled = [(path, variable.replace(value(path, variable))) for path, variable in variables.items()]
        return flax_nnx.merge(graph, flax_nnx.from_flat_state(filled))

    def forward(params: Params, state: Params, inputs: jax.Array, asked: Pass) -> Result:
        module = merged(params, state, jax.random.key(0) if asked.key is None else asked.key)
        module.train() if asked.train else module.eval()
        if not asked.capture:
            return Result(module(inputs), {}, taken(module, "state"))
        capturing = flax_nnx.capture(module, flax_nnx.Intermediate, method_outputs=flax_nnx.Intermediate)
        logits, captured = capturing(inputs)
        found = {"/".join(map(str, path)): variable.get_value() for path, variable in flax_nnx.to_flat_state(captured)}
        return Result(logits, _named(found), taken(module, "state"))

    return Adapted(start, forward, "key" in kinds.values(), axes or {}, rules, tuple(features), resize)


def replay(model: Model, params: Params, model_state: Params, inputs: Any, keeps: Mapping[str, Any]) -> Callable[..., jax.Array]:
    """The compact form of a model that has no `resize`, for inference and export.

    It is the traced forward pass of one example, run again at the sizes that are left and mapped over a batch of any size.
    `shrink.verify` proves that it equals the masked model.

    Args:
        model: any `Model`.
        params, model_state: at full size, arrays or shapes.
        inputs: [B, ...], array or shape.
        keeps: {group name: bool [size] or [stack, size]} of groups that `trace.groups` found.

    Returns:
        (compacted params, compacted model_state, inputs [B, ...]) -> logits [B, ..., classes].

    Raises:
        ValueError: a keep fits no group.
    """
    example = jax.ShapeDtypeStruct(inputs.shape[1:], inputs.dtype)
    alone = lambda params, state, row: model.apply(params, state, {"inputs": row[None]})[0].logits[0]
    small = trace.trace(alone, params, example, names=model.axes, state=model_state).replay(keeps)
    return jax.vmap(small, (None, None, 0))


def _keywords(fn: Callable[..., Any], names: tuple[str, ...]) -> tuple[str, ...]:
    parameters = inspect.signature(fn).parameters
    return tuple(name for name in names if name in parameters)


def _pair(made: Any, stateful: bool) -> tuple[Any, Any]:
    if not stateful:
        if isinstance(made, tuple) and len(made) == 2 and all(isinstance(part, Mapping) for part in made):
            raise ValueError("init returned a pair of dicts; if it is (params, state), give plain stateful=True")
        return made, {}
    if not isinstance(made, tuple) or len(made) != 2:
        raise ValueError(f"init of a stateful model returned {type(made).__name__}; expected (params, state)")
    return made


def _as_dict(tree: Any) -> dict[str, Any]:
    """Any pytree as a nested dict of its paths."""
    leaves = trees.paths(tree)
    if "" in leaves:
        raise ValueError("init returned one bare array; give it a name, as in {'kernel': array}")
    return trees.nested(leaves)


def _as_tree(like: Any, nested: Params) -> Any:
    """The pytree that `_as_dict` made the nested dict of."""
    leaves = trees.paths(nested)
    return trees.map_with_path(lambda path, _: leaves[path], like)


def _kind(flax_nnx: Any, variable: Any) -> str:
    kinds = ((flax_nnx.Param, "params"), (flax_nnx.RngKey, "key"), (flax_nnx.RngCount, "count"))
    return next((kind for cls, kind in kinds if isinstance(variable, cls)), "state")


def _stream(key: Any, name: str) -> jax.Array:
    """A stream's own key: two layers do not drop the same units."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def _tuples(tree: Any) -> dict[str, Any]:
    """{path: tuple} of a nested dict whose leaves are the tuples that sow collects."""
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, tuple))
    return {trees.path_str(path): leaf for path, leaf in flat}


def _named(collected: Mapping[str, Any]) -> dict[str, Any]:
    """Features by name from collected tuples: "mlp/__call__" is called mlp, and a second call of it "mlp:1"."""
    found: dict[str, Any] = {}
    for path, values in collected.items():
        name = path.removesuffix("__call__").removesuffix("/")
        for index, value in enumerate(values if isinstance(values, tuple) else (values,)):
            if name and isinstance(value, jax.Array):
                found[f"{name}:{index}" if index else name] = value
    return found
