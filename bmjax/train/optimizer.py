"""The optimiser as config: name, schedule, warm-up, clipping, and what decay leaves out."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import optax

from bmjax import trees
from bmjax.config import above, at_least, field


@dataclasses.dataclass
class Optimizer:
    """An optax chain: clip, then the optimiser with its learning-rate schedule."""

    name: str = field("adamw", "the update rule", choices=("adamw", "adam", "sgd"))
    learning_rate: float = field(1e-3, "peak learning rate", check=above(0))
    warmup: float = field(0.05, "fraction of the steps with a rising learning rate", check=(lambda v: 0 <= v < 1, "in [0, 1)"))
    decay: str = field("cosine", "what follows the warm-up", choices=("cosine", "linear", "constant"))
    weight_decay: float = field(
        1e-4, "decoupled decay of kernels (adamw); norms, biases and vectors are left out", check=at_least(0)
    )
    momentum: float = field(0.9, "momentum of sgd", check=(lambda v: 0 <= v < 1, "in [0, 1)"))
    clip: float = field(0.0, "largest global norm of the gradient; 0 does not clip", check=at_least(0))

    def schedule(self, steps: int) -> optax.Schedule:
        """step -> learning rate over `steps` updates."""
        warm = int(self.warmup * steps)
        rest = max(steps - warm, 1)
        after = {
            "cosine": optax.cosine_decay_schedule(self.learning_rate, rest),
            "linear": optax.linear_schedule(self.learning_rate, 0.0, rest),
            "constant": optax.constant_schedule(self.learning_rate),
        }[self.decay]
        if not warm:
            return after
        # The first update is not thrown away: the rise starts one step above 0.
        rise = optax.linear_schedule(self.learning_rate / warm, self.learning_rate, warm)
        return optax.join_schedules([rise, after], [warm])

    def build(self, steps: int) -> optax.GradientTransformation:
        """The optimiser of a run of `steps` updates."""
        rate = self.schedule(steps)
        rule = {
            "adamw": lambda: optax.adamw(rate, weight_decay=self.weight_decay, mask=decayed),
            "adam": lambda: optax.adam(rate),
            "sgd": lambda: optax.sgd(rate, momentum=self.momentum or None),
        }[self.name]()
        return optax.chain(optax.clip_by_global_norm(self.clip), rule) if self.clip else rule

    def build_for_terms(self, steps: int) -> optax.GradientTransformation:
        """The optimiser of parameters that loss terms own: the same without decay."""
        return dataclasses.replace(self, weight_decay=0.0).build(steps)


def decayed(params: Any) -> Any:
    """True for the parameters that weight decay acts on: those of two axes or more, where a stack of layers counts as none.

    Norm scales and biases under a scan have two axes as well, so kernels are told by name where there are names.
    """
    has_kernels = any(path.rsplit("/", 1)[-1] == "kernel" for path in trees.paths(params))
    if has_kernels:
        return trees.map_with_path(lambda path, _: path.rsplit("/", 1)[-1] == "kernel", params)
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)
