"""Typed configuration: nested dataclasses, overridden by absl flags, validated, then frozen.

    @dataclasses.dataclass
    class Optimizer:
        learning_rate: float = field(1e-3, "peak learning rate", check=above(0))

A preset is a Python file whose `get_config()` returns such a dataclass; `launch` is the command line round it. The dataclasses
that the preset put in place define the flags: `--config.optimizer.learning_rate=3e-4`.
"""

from bmjax.config.commandline import launch
from bmjax.config.record import check_workdir, describe, fingerprint, to_dict, write_resolved
from bmjax.config.schema import above, at_least, field, freeze, leaves, nearest, validate, within

__all__ = [
    "above",
    "at_least",
    "check_workdir",
    "describe",
    "field",
    "fingerprint",
    "freeze",
    "launch",
    "leaves",
    "nearest",
    "to_dict",
    "validate",
    "within",
    "write_resolved",
]
