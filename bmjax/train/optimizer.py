"""The optimiser as config: rule, schedule, clipping, what decay leaves out, learning rates by parameter, or one of your own."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from bmjax import config, trees
from bmjax.config import above, at_least, field, within

DECAYING = ("adamw", "nadamw", "lion", "lamb", "sgdw", "adafactor", "muon")
WITH_MOMENTUM = ("sgd", "sgdw", "rmsprop")
RULES = ("adamw", "adam", "nadamw", "sgd", "sgdw", "lion", "adafactor", "muon", "lamb", "rmsprop")


def _check_rates(rates: dict[str, float]) -> None:
    for pattern, factor in rates.items():
        if factor < 0:
            raise ValueError(f"the factor of {pattern!r} is {factor}; expected 0 (frozen) or more")
        _compiled(pattern)


@dataclasses.dataclass
class Optimizer:
    """An optax chain: clip, the rule with its learning-rate schedule, factors by parameter.

    Rules are optax's own with its defaults, except for what the fields say. Decay is decoupled and scaled by the learning rate in
    every rule that has it. "muon" orthogonalises the momentum of kernels that are matrices within their layer (attention
    projections count as width x all heads) and updates the rest, embedding and head with them, by NAdamW (Jordan et al. 2024);
    its updates have the size of Adam's (Liu et al. 2025), so that both take the same learning rate.
    """

    name: str = field("adamw", "the update rule", choices=RULES)
    learning_rate: float = field(1e-3, "peak learning rate", check=above(0))
    warmup: float = field(0.05, "fraction of the steps with a rising learning rate", check=within(0, 1, open_high=True))
    decay: str = field(
        "cosine",
        "what follows the warm-up; wsd is stable, rsqrt falls as 1/sqrt(step), both until the cool-down",
        choices=("cosine", "linear", "constant", "rsqrt", "wsd"),
    )
    end: float = field(0.0, "fraction of the peak reached after the last step; constant stays at the peak", check=within(0, 1))
    cooldown: float = field(0.2, "fraction of the steps in which wsd and rsqrt fall linearly to the end", check=within(0, 1))
    weight_decay: float | None = field(
        None,
        f"decoupled decay of kernels, not norms and vectors; none is 1e-4 for {', '.join(DECAYING)}, the only ones with it",
        check=at_least(0),
    )
    no_decay: str = field("", "regex of more parameters to leave out of decay; all that are no kernels are left out anyway")
    momentum: float | None = field(
        None, f"none is 0.9 for {', '.join(WITH_MOMENTUM)}, the only ones with it", check=within(0, 1, open_high=True)
    )
    nesterov: bool = field(False, f"Nesterov's momentum for {', '.join(WITH_MOMENTUM)}")
    b1: float = field(0.9, "decay of the first moment (adam and its kin, lion)", check=within(0, 1, open_high=True))
    b2: float | None = field(
        None, "decay of the second moment; none is 0.999 for adam and its kin, 0.99 for lion", check=within(0, 1, open_high=True)
    )
    clip: float = field(0.0, "largest global norm of the gradient; 0 does not clip", check=at_least(0))
    rates: dict[str, float] = field(
        {}, "factors of the learning rate by regex of the parameter's path, the first match counts; 0 freezes", check=_check_rates
    )
    layer_decay: float = field(
        1.0, "factor of the learning rate from each layer of the scanned stack to the one below it", check=within(0, 1)
    )
    custom: Callable[..., Any] | None = field(None, "steps -> optax transform of your own, in place of the rule and its schedule")

    def validate(self) -> None:
        """Raises ValueError on a regex that is none, or on a setting that the rule does not have."""
        _compiled(self.no_decay)
        for what, value, rules in (("weight_decay", self.weight_decay, DECAYING), ("momentum", self.momentum, WITH_MOMENTUM)):
            if value and self.name not in rules and self.custom is None:
                raise ValueError(
                    f"{what} is {value:g}, and the rule {self.name} has none; leave it out, or take {', '.join(rules)}"
                )
        if self.nesterov and (self.name not in WITH_MOMENTUM or not self._momentum):
            raise ValueError(f"nesterov needs momentum, and {self.name} with momentum {self._momentum:g} has none to look ahead")

    def schedule(self, steps: int) -> optax.Schedule:
        """step -> learning rate over `steps` updates; exactly `end` of the peak at step `steps`."""
        warm = int(self.warmup * steps)
        rest = max(steps - warm, 1)
        peak, end = self.learning_rate, self.end * self.learning_rate
        cool = min(max(round(self.cooldown * steps), 1), rest)
        after = {
            "cosine": optax.cosine_decay_schedule(peak, rest, alpha=self.end),
            "linear": optax.linear_schedule(peak, end, rest),
            "constant": optax.constant_schedule(peak),
            "wsd": _then_down(lambda step: peak, rest - cool, cool, end),
            # In steps since the start of training this is peak * sqrt(warm / step) (Vaswani et al. 2017, section 5.3).
            "rsqrt": _then_down(lambda step: peak / jnp.sqrt(1 + step / max(warm, 1)), rest - cool, cool, end),
        }[self.decay]
        if not warm:
            return after
        # The first update is not thrown away: the rise starts one step above 0.
        rise = optax.linear_schedule(peak / warm, peak, warm)
        return optax.join_schedules([rise, after], [warm])

    def build(self, steps: int) -> optax.GradientTransformation:
        """The optimiser of a run of `steps` updates.

        Raises:
            ValueError: a field is out of range (NaN and infinite rates among them), or `custom` returns no optax transform. Its
                `init` raises ValueError where a regex of `rates` matches no parameter, or `layer_decay` finds no stack.
        """
        config.validate(self, "optimizer")
        parts = [optax.clip_by_global_norm(self.clip)] if self.clip else []
        parts += [self._rule(self.schedule(steps)) if self.custom is None else self._own(steps)]
        if self.rates or self.layer_decay != 1:
            parts += [scale_by_parameter(lambda params: factors(params, self.rates, self.layer_decay))]
        return parts[0] if len(parts) == 1 else optax.chain(*parts)

    def build_for_terms(self, steps: int) -> optax.GradientTransformation:
        """The optimiser of parameters that loss terms own: the rule without decay, and without what goes by the model's paths."""
        return dataclasses.replace(self, weight_decay=0.0, no_decay="", rates={}, layer_decay=1.0, custom=None).build(steps)

    def _own(self, steps: int) -> optax.GradientTransformation:
        assert self.custom is not None
        found = self.custom(steps)
        if not (hasattr(found, "init") and hasattr(found, "update")):
            raise ValueError(
                f"optimizer.custom returned {type(found).__name__}; expected an optax transform with init and update"
            )
        return found

    def _rule(self, rate: optax.Schedule) -> optax.GradientTransformation:
        decay, mask = 1e-4 if self.weight_decay is None else self.weight_decay, self._decays
        betas = {"b1": self.b1, "b2": self._b2}
        momentum: dict[str, Any] = {"momentum": self._momentum or None, "nesterov": self.nesterov}
        own: optax.GradientTransformation = {
            "adamw": lambda: optax.adamw(rate, **betas, weight_decay=decay, mask=mask),
            "adam": lambda: optax.adam(rate, **betas),
            "nadamw": lambda: optax.nadamw(rate, **betas, weight_decay=decay, mask=mask),
            "lion": lambda: optax.lion(rate, **betas, weight_decay=decay, mask=mask),
            "lamb": lambda: optax.lamb(rate, **betas, weight_decay=decay, mask=mask),
            "sgd": lambda: optax.sgd(rate, **momentum),
            "sgdw": lambda: optax.sgd(rate, **momentum),
            "rmsprop": lambda: optax.rmsprop(rate, **momentum),
            "adafactor": lambda: optax.adafactor(rate),
            "muon": lambda: self._muon(rate),
        }[self.name]()
        if self.name in ("sgdw", "adafactor", "muon") and decay:
            # Optax has no decay in the first, one without the learning rate in the second, one without a mask in the third.
            return optax.chain(own, optax.add_decayed_weights(lambda step: -decay * rate(step), mask))
        return own

    def _muon(self, rate: optax.Schedule) -> optax.GradientTransformation:
        return optax.contrib.muon(
            rate, adam_b1=self.b1, adam_b2=self._b2, muon_weight_dimension_numbers=matrices, consistent_rms=0.2
        )

    @property
    def _momentum(self) -> float:
        if self.momentum is not None:
            return self.momentum
        return 0.9 if self.name in WITH_MOMENTUM else 0.0

    @property
    def _b2(self) -> float:
        return self.b2 if self.b2 is not None else 0.99 if self.name == "lion" else 0.999

    def _decays(self, params: Any) -> Any:
        if not self.no_decay:
            return decayed(params)
        regex = _compiled(self.no_decay)
        if not any(regex.search(path) for path in trees.paths(params)):
            raise ValueError(
                f"no_decay is {self.no_decay!r}, which is found in no parameter's path; correct it or leave it empty"
            )
        named = trees.map_with_path(lambda path, _: bool(regex.search(path)), params)
        return jax.tree.map(lambda kernel, left_out: kernel and not left_out, decayed(params), named)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None


def _then_down(stable: Callable[[Any], Any], start: int, length: int, end: float) -> optax.Schedule:
    """A schedule until `start`, then a straight line from where it stands to `end`, reached `length` steps later."""

    def schedule(step: Any) -> jax.Array:
        t = jnp.clip((step - start) / length, 0, 1)
        return stable(jnp.minimum(step, start)) * (1 - t) + end * t

    return schedule


def decayed(params: Any) -> Any:
    """True for the parameters that weight decay acts on: those of two axes or more, where a stack of layers counts as none.

    Norm scales and biases under a scan have two axes as well, so kernels are told by name where there are names.
    """
    has_kernels = any(path.rsplit("/", 1)[-1] == "kernel" for path in trees.paths(params))
    if has_kernels:
        return trees.map_with_path(lambda path, _: path.rsplit("/", 1)[-1] == "kernel", params)
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def _stacked(path: str) -> bool:
    """Whether a parameter's first axis is that of a scanned stack of layers."""
    return "layers" in path.split("/")


def matrices(params: Any) -> Any:
    """For each parameter `optax.contrib.MuonDimensionNumbers` if it is a matrix within its layer, else None.

    Query, key and value project to (heads, head size), "out" from them; convolutions, embedding and head are no matrices here.
    """

    def of(path: str, leaf: Any) -> Any:
        *parents, name = path.split("/")
        if name != "kernel" or not parents or {"embed", "head"} & set(parents):
            return None
        inputs = 2 if parents[-1] == "out" else 1
        outputs = 2 if parents[-1] in ("query", "key", "value") else 1
        first = int(_stacked(path))
        if leaf.ndim != first + inputs + outputs and leaf.ndim == first + 2:
            inputs = outputs = 1  # a projection that keeps heads and their size in one axis
        if leaf.ndim != first + inputs + outputs:
            return None
        axes = tuple(range(first, leaf.ndim))
        return optax.contrib.MuonDimensionNumbers(axes[:inputs], axes[inputs:])

    return trees.map_with_path(of, params)


def factors(params: Any, rates: dict[str, float], layer_decay: float = 1.0) -> Any:
    """What each parameter's learning rate is multiplied by: a float, or one for each layer [L, 1, ...] of a scanned stack.

    With a layer decay d and L layers, layer i (from 0) has d^(L - i), what lies before the stack d^(L + 1), and what follows it
    (head and final_...) 1, as in Bao et al. 2022 (BEiT), appendix.

    Raises:
        ValueError: a regex matches no parameter, or there is a layer decay and no stack called "layers".
    """
    for pattern in rates:
        trees.select(params, pattern)
    depths = {leaf.shape[0] for path, leaf in trees.paths(params).items() if _stacked(path)}
    if layer_decay != 1 and len(depths) != 1:
        raise ValueError(
            f"layer_decay is {layer_decay:g}, but the model has "
            f"{'several stacks' if depths else 'no scanned stack'} called 'layers'; set it to 1, or give factors in rates"
        )
    depth = next(iter(depths), 0)

    def of(path: str, leaf: Any) -> Any:
        factor = next((factor for pattern, factor in rates.items() if re.search(pattern, path)), 1.0)
        if layer_decay == 1:
            return factor
        if not _stacked(path):
            after = re.match("head|final", path) is not None
            return factor * (1.0 if after else layer_decay ** (depth + 1))
        each = jnp.array([factor * layer_decay ** (depth - i) for i in range(depth)], jnp.float32)
        return each.reshape(depth, *[1] * (leaf.ndim - 1))

    return trees.map_with_path(of, params)


def scale_by_parameter(factors_of: Callable[[Any], Any]) -> optax.GradientTransformation:
    """Multiplies each parameter's update by its own factor.

    Args:
        factors_of: params (or anything of their shapes) -> tree of factors that broadcast against them.
    """

    def init(params: Any) -> optax.EmptyState:
        factors_of(params)  # raises here what is wrong, before anything is compiled
        return optax.EmptyState()

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        scaled = jax.tree.map(lambda u, f: u * jnp.asarray(f, u.dtype), updates, factors_of(updates))
        return scaled, state

    return optax.GradientTransformation(init, update)
