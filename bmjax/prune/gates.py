"""Hard concrete gates: pruning of groups by a penalty on the expected number of elements that stay (L0).

Louizos, Welling and Kingma 2018, "Learning sparse neural networks through L0 regularization", arXiv 1712.01312. Every element
has a random gate in [0, 1], which is exactly 0 and exactly 1 with some probability, and how likely is learned.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from bmjax import trees
from bmjax.prune.carrying import Carriers, scaled
from bmjax.prune.patterns import Sparsity
from bmjax.types import Group, Params


@dataclasses.dataclass(frozen=True, eq=False)
class Gates:
    """Gates on the elements of groups, as pure functions for any loop; made by `hard_concrete`.

    Log alphas, and gates, are {group name: float32 [size], or [stack, size] for a stacked group}.

    Attributes:
        groups: what is gated.
        carriers: {group name: the members that its gates are multiplied into}.
        temperature, stretch, keep: as for `hard_concrete`.
    """

    groups: tuple[Group, ...]
    carriers: Carriers
    temperature: float
    stretch: tuple[float, float]
    keep: float

    def init(self) -> dict[str, jax.Array]:
        """Log alphas with which each gate is above 0 with the probability `keep`."""
        value = math.log(self.keep) - math.log1p(-self.keep) + self._threshold
        return {group.name: jnp.full(_shape(group), value, jnp.float32) for group in self.groups}

    def sample(self, log_alpha: Mapping[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
        """Random gates in [0, 1], differentiable in the log alphas (eq. 10 and 11); the same for the same key on any device."""
        self._check(log_alpha)
        found = {}
        for index, group in enumerate(self.groups):
            # The logit of uniform noise is logistic.
            noise = jax.random.logistic(jax.random.fold_in(key, index), _shape(group), jnp.float32)
            found[group.name] = self._stretched((noise + log_alpha[group.name].astype(jnp.float32)) / self.temperature)
        return found

    def expected(self, log_alpha: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """The gates in [0, 1] of evaluation, without noise (eq. 13)."""
        self._check(log_alpha)
        return {name: self._stretched(value.astype(jnp.float32)) for name, value in log_alpha.items()}

    def apply(self, params: Params, z: Mapping[str, jax.Array]) -> Params:
        """The parameters with each gate multiplied into its carriers.

        Raises:
            ValueError: `z` does not fit the groups, or a carrier is not in `params`.
        """
        self._check(z)
        return scaled(params, self.groups, self.carriers, z)

    def l0(self, log_alpha: Mapping[str, jax.Array], params: Params | None = None) -> jax.Array:
        """The expected number of elements whose gate is not 0 (eq. 12), float32 scalar.

        Args:
            log_alpha: of all groups.
            params: arrays or ShapeDtypeStructs; with them each element counts as the number of its parameters. One that belongs
                to elements of two groups counts with both.
        """
        self._check(log_alpha)
        total = jnp.float32(0)
        for group in self.groups:
            open_ = jax.nn.sigmoid(log_alpha[group.name].astype(jnp.float32) - self._threshold)
            total += jnp.sum(open_) * (1 if params is None else _parameters(group, params))
        return total

    def keeps(self, log_alpha: Mapping[str, jax.Array], sparsity: Sparsity | None = None) -> dict[str, jax.Array]:
        """What stays, {group name: bool [size] or [stack, size]}, as `bmjax.shrink` takes it.

        In every layer of a stacked group as many stay. At least one element does. Of equal log alphas the lower index is the
        larger.

        Args:
            log_alpha: of all groups.
            sparsity: None: all elements whose gate of evaluation is above 0 stay, and in a stacked group closed ones beside
                them, up to the number of the fullest layer. Else the fraction to drop, in [0, 1), or {group name: fraction};
                exactly `size - round(sparsity * size)` stay, those of the largest log alphas.

        Raises:
            ValueError: a sparsity outside [0, 1), or none given for a group.
        """
        wanted = {group.name: self._wanted(group, sparsity) for group in self.groups}
        found = {}
        for name, z in self.expected(log_alpha).items():
            stay = wanted[name]
            count = jnp.max(jnp.sum(z > 0, axis=-1)) if stay is None else jnp.int32(stay)
            ranks = jnp.argsort(jnp.argsort(log_alpha[name], axis=-1, descending=True), axis=-1)
            found[name] = ranks < jnp.maximum(count, 1)
        return found

    @property
    def _threshold(self) -> float:
        """The log alpha whose gate is 0 with probability 1/2."""
        low, high = self.stretch
        return self.temperature * math.log(-low / high)

    def _stretched(self, logits: jax.Array) -> jax.Array:
        low, high = self.stretch
        return jnp.clip(jax.nn.sigmoid(logits) * (high - low) + low, 0.0, 1.0)

    def _check(self, found: Mapping[str, jax.Array]) -> None:
        expected = {group.name: _shape(group) for group in self.groups}
        shapes = {name: tuple(value.shape) for name, value in found.items()}
        if shapes != expected:
            raise ValueError(f"gates of the shapes {shapes} are given; expected {expected}")

    def _wanted(self, group: Group, sparsity: Sparsity | None) -> int | None:
        if sparsity is None:
            return None
        if isinstance(sparsity, Mapping) and group.name not in sparsity:
            raise ValueError(f"no sparsity is given for the group {group.name!r}; there are {', '.join(sparsity) or 'none'}")
        fraction = sparsity[group.name] if isinstance(sparsity, Mapping) else sparsity
        if not 0 <= fraction < 1:
            raise ValueError(f"sparsity {fraction} is given for the group {group.name!r}; expected a fraction in [0, 1)")
        return group.size - round(fraction * group.size)


def hard_concrete(
    groups: Sequence[Group],
    carriers: Carriers,
    *,
    temperature: float = 2 / 3,
    stretch: tuple[float, float] = (-0.1, 1.1),
    keep: float = 0.9,
) -> Gates:
    """Gates that learn which elements of groups stay.

        gates = prune.hard_concrete(groups, prune.carriers(fn, params, batch, groups))
        loss = lambda params, log_alpha: task(gates.apply(params, gates.sample(log_alpha, key))) + 0.01 * gates.l0(log_alpha)

    Louizos et al. 2018, arXiv 1712.01312; in the train step use `gated`.

    Args:
        groups: from `trace.groups`.
        carriers: {group name: members}, from `prune.carriers`.
        temperature: above 0; the lower, the closer gates are to 0 and 1, and the rougher their gradients.
        stretch: (below 0, above 1): how far the concrete distribution is stretched before it is cut to [0, 1].
        keep: probability that a gate is above 0 in the beginning, inside (0, 1). With this temperature and stretch a trained
            model evaluates as before from 0.983 on: its gates are then 1.

    Raises:
        ValueError: no groups, two of one name, one without carriers, or a number out of its range.
    """
    names = [group.name for group in groups]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"gates are given the groups {names}; expected groups of different names")
    if missing := [name for name in names if not carriers.get(name)]:
        raise ValueError(f"nothing carries the gates of the group {missing[0]!r}; find its members with prune.carriers")
    if not 0 < temperature < math.inf:
        raise ValueError(f"the temperature of gates is {temperature}; expected a number above 0, such as 2/3")
    if not (-math.inf < stretch[0] < 0 and 1 < stretch[1] < math.inf):
        raise ValueError(f"gates are stretched to {tuple(stretch)}; expected (below 0, above 1), such as (-0.1, 1.1)")
    if not 0 < keep < 1:
        raise ValueError(f"keep is {keep}; expected a probability above 0 and below 1, such as 0.9")
    return Gates(tuple(groups), {name: tuple(carriers[name]) for name in names}, temperature, (stretch[0], stretch[1]), keep)


def _shape(group: Group) -> tuple[int, ...]:
    return (group.stack, group.size) if group.stack else (group.size,)


def _parameters(group: Group, params: Params) -> int:
    """How many parameters belong to one element."""
    leaves, total = trees.paths(params), 0
    for member in group.members:
        shape = leaves[member.path].shape
        rest = [size for axis, size in enumerate(shape) if axis != member.axis and not (group.stack and axis == 0)]
        total += np.asarray(member.index).shape[1] * math.prod(rest)
    return total
