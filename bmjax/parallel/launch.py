"""What must be said before JAX starts: which processes work together, and how many devices a CPU is to simulate."""

from __future__ import annotations

import contextlib
import os
import socket
import time

from absl import logging

_CONNECT = 300  # seconds until the first process must answer
_LEAVE = 7 * 24 * 3600  # seconds that a process which is done waits for the others; one that died is noticed after 100


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
    if jax.local_device_count() != wanted:
        raise ValueError(f"JAX has already started with {jax.local_device_count()} devices, so {wanted} cannot be simulated")


def check_processes(coordinator: str, processes: int, process: int) -> None:
    """Raises ValueError on numbers or an address with which `join` cannot begin."""
    if processes < 1:
        raise ValueError(f"processes is {processes}; expected 1, or how many work together")
    if not 0 <= process < processes:
        raise ValueError(f"process is {process} and there are {processes} processes; expected 0 to {processes - 1}")
    if processes > 1 and not coordinator:
        raise ValueError(f"processes is {processes} and coordinator is empty; give the host:port of process 0, the same to all")
    if coordinator and processes == 1:
        raise ValueError(f"coordinator is {coordinator!r} and processes is 1; say how many processes there are, or leave it out")
    host, _, port = coordinator.rpartition(":")
    if coordinator and not (host and port.isdecimal() and 0 < int(port) < 1 << 16):
        raise ValueError(f"coordinator is {coordinator!r}; expected host:port of process 0, as in 10.0.0.1:8476")


def join(coordinator: str = "", processes: int = 1, process: int = 0) -> None:
    """Makes this process one of several that JAX knows, each with its own devices. It must run before JAX is first used.

    Args:
        coordinator: host:port of process 0, on a port that is free there; empty, with 1 process, leaves everything as it is.
        processes: how many there are.
        process: which one this is, from 0.

    Raises:
        ValueError: numbers or an address that cannot be, JAX has already started, or process 0 does not answer.
    """
    check_processes(coordinator, processes, process)
    if not coordinator:
        return
    logging.info("process %d of %d waits at %s for the others, %d seconds at most", process, processes, coordinator, _CONNECT)
    if process > 0:
        _await(coordinator, process)
    import jax

    try:
        jax.distributed.initialize(
            coordinator, processes, process, initialization_timeout=_CONNECT, shutdown_timeout_seconds=_LEAVE
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"process {process} of {processes} cannot join {coordinator}: {reason}") from None


def _await(coordinator: str, process: int) -> None:
    """Returns once process 0 listens: without it JAX would abort the program. Raises ValueError after `_CONNECT` seconds."""
    host, _, port = coordinator.rpartition(":")
    end = time.monotonic() + _CONNECT
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise ValueError(
                    f"process {process} finds no process 0 at {coordinator} within {_CONNECT} seconds "
                    f"({error.strerror or error}); start that one too, or correct the coordinator"
                ) from None
        time.sleep(0.2)
