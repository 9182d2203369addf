"""Stacks of equal blocks under one scan: what their backward pass computes again, and their features by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from bmjax.config import field


def _is_convolution(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name == "conv_general_dilated"


def _and_convolutions(policy: Any) -> Any:
    """The policies of JAX take a convolution for something cheap, and it is the product that a residual network is made of."""
    return jax.checkpoint_policies.save_from_both_policies(policy, _is_convolution)


REMAT: Mapping[str, Any] = {  # what the backward pass need not compute again
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": _and_convolutions(jax.checkpoint_policies.dots_saveable),
    "dots_no_batch": _and_convolutions(jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
}


def remat_field() -> Any:
    """The field of a config that names a policy: "none", or a name in `REMAT`."""
    return field("none", "what is computed again: full, or all but products (without a batch axis)", choices=("none", *REMAT))


def rematerialised(block: Any, remat: str, *, scanned: bool) -> Any:
    """The Linen class `block`, its activations computed again in the backward pass as the policy says.

    Args:
        block: a module class.
        remat: "none", or a name in `REMAT`.
        scanned: it stands inside a scan, where nothing can be merged with the forward pass; the barrier that prevents it
            elsewhere would only cost.
    """
    return block if remat == "none" else nn.remat(block, prevent_cse=not scanned, policy=REMAT[remat])


def scanned(block: Any, layers: int, remat: str = "none") -> Any:
    """`layers` of the Linen class `block` under one scan; parameters, caches and statistics are stacked along axis 0.

    The block's first argument is carried, the others are the same for all; it returns (carry, {part: array}), and the arrays
    come back as [layers, ...].
    """
    return nn.scan(
        rematerialised(block, remat, scanned=True),
        variable_axes={"params": 0, "batch_stats": 0, "cache": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,
        length=layers,
    )


def layer_features(layers: int, parts: tuple[str, ...]) -> tuple[str, ...]:
    """Names of a stack's features: "layers/0", "layers/0/mlp", ..."""
    return tuple(f"layers/{i}{'/' + part if part else ''}" for i in range(layers) for part in ("", *parts))


def split_captured(stacked: Mapping[str, jax.Array], capture: tuple[str, ...]) -> dict[str, jax.Array]:
    """One entry a layer from what a scan stacked: {"mlp": [L, B, ...]} -> {"layers/3/mlp": [B, ...]}."""
    found = {}
    for name in capture:
        kind, _, rest = name.partition("/")
        if kind == "layers":
            index, _, part = rest.partition("/")
            found[name] = stacked[part][int(index)]
    return found


def captured_parts(capture: tuple[str, ...]) -> tuple[str, ...]:
    """The parts of a block that any captured name asks for: ("layers/3/mlp", "layers/0") -> ("", "mlp")."""
    return tuple(sorted({name.split("/", 2)[2] if name.count("/") > 1 else "" for name in capture if name.startswith("layers/")}))
