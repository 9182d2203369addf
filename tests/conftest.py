"""Every test sees 8 simulated devices and shares one compile cache."""

import os
import pathlib

import pytest

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("NPROC", "32")  # see bmjax.parallel.launch
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# Most of the tests' time is spent in LLVM on programs that run once; XLA's own passes, the partitioner among them, stay on.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """What a file has compiled goes when it is done: kept, it would take 8 GB by the end."""
    yield
    import jax

    jax.clear_caches()
