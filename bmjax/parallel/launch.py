"""Devices before JAX starts: simulated ones on a CPU."""

from __future__ import annotations

import contextlib
import os


def simulate(devices: int) -> None:
    """Makes the CPU look like this many devices. It must run before JAX is first used; 0 leaves everything as it is.

    Args:
        devices: how many; a JAX_NUM_CPU_DEVICES that is set in the environment wins.

    Raises:
        ValueError: JAX has already started with another number.
    """
    if devices < 0:
        raise ValueError(f"devices is {devices}; expected 0 (those that are there) or a number of CPU devices to simulate")
    if devices == 0:
        return
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(devices))
    wanted = int(os.environ["JAX_NUM_CPU_DEVICES"])
    # XLA's CPU client blocks a thread in each collective that waits for its peers. With as many threads as devices, two
    # independent collectives can hold all of them and never meet.
    if wanted > 1:
        os.environ.setdefault("NPROC", str(4 * wanted))
    import jax

    jax.config.update("jax_platforms", "cpu")
    with contextlib.suppress(RuntimeError):  # JAX has started: the count tells whether that matters
        jax.config.update("jax_num_cpu_devices", wanted)
    if jax.device_count() != wanted:
        raise ValueError(f"JAX has already started with {jax.device_count()} devices, so {wanted} cannot be simulated")
