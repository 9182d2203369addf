"""Typed configuration: nested dataclasses, overridden by absl flags, validated, then frozen.

    @dataclasses.dataclass
    class Optimizer:
        learning_rate: float = field(1e-3, "peak learning rate", check=above(0))

A preset is a Python file whose `get_config()` returns such a dataclass; `launch` is the command line round it. The dataclasses
that the preset put in place define the flags: `--config.optimizer.learning_rate=3e-4`. A field with `kinds` takes another
dataclass by name: `--config.model=Residual --config.model.layers=2`.
"""

from bmjax.config.commandline import command, from_arguments, launch, launch_settings
from bmjax.config.load import load
from bmjax.config.record import (
    check_workdir,
    difference,
    fingerprint,
    from_dict,
    make_workdir,
    read_resolved,
    to_dict,
    write_resolved,
)
from bmjax.config.schema import above, at_least, elsewhere, field, freeze, groups, leaves, nearest, recorded, validate, within
from bmjax.config.tracebacks import misfit

__all__ = [
    "above",
    "at_least",
    "check_workdir",
    "command",
    "difference",
    "elsewhere",
    "field",
    "fingerprint",
    "freeze",
    "from_arguments",
    "from_dict",
    "groups",
    "launch",
    "launch_settings",
    "leaves",
    "load",
    "make_workdir",
    "misfit",
    "nearest",
    "read_resolved",
    "recorded",
    "to_dict",
    "validate",
    "within",
    "write_resolved",
]
