"""bfloat16 for the forward and backward pass, float32 for everything that is kept and summed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from bmjax.types import Outputs

COMPUTE_DTYPES = ("float32", "bfloat16")


def check_compute_dtype(dtype: str, devices: Iterable[Any]) -> None:
    """Raises ValueError if one of the devices cannot multiply in this dtype; a device of an unknown kind passes.

    Args:
        dtype: one of `COMPUTE_DTYPES`.
        devices: as in `mesh.devices.flat`.
    """
    if dtype not in COMPUTE_DTYPES:
        raise ValueError(f"compute_dtype is {dtype!r}; expected {' or '.join(COMPUTE_DTYPES)}")
    if dtype != "bfloat16":
        return
    for device in devices:
        capability = str(getattr(device, "compute_capability", ""))
        number = capability.replace(".", "", 1)
        # An AMD GPU answers "gfx90a".
        if device.platform in ("gpu", "cuda") and number.isdecimal() and float(capability) < 8.0:
            raise ValueError(
                f"bfloat16 needs an NVIDIA GPU of compute capability 8.0 or above, but {device.device_kind} has {capability}; "
                "set compute_dtype to float32"
            )


def narrow(tree: Any, dtype: str) -> Any:
    """Floating leaves in the dtype that is computed in; float32 leaves everything as it is."""
    return tree if dtype == "float32" else _cast(tree, dtype)


def widen(outputs: Outputs) -> Outputs:
    """Logits and features in float32, for losses. The head stays: a loss fused with it multiplies in its dtype."""
    return outputs._replace(logits=_cast(outputs.logits, "float32"), features=_cast(outputs.features, "float32"))


def _cast(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)
