"""Memory of losses over a big vocabulary: temporaries of the compiled loss with its gradient, plain against fused with the head.

    python -m benchmarks.distill_memory --batch=8 --time=512 --width=512 --vocabulary=131072 --out=distill_memory.json

Nothing is run: both forms are compiled for abstract heads, hidden [batch, time, width] and a kernel [width, vocabulary] (with
--tied, the transpose of a table), and XLA says what they need beside arguments and results (`temp_size_in_bytes`). The gradient
is by the student's hidden, kernel and bias. Wanted: at most an eighth of the plain form's.
"""

import argparse
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import rich.console
import rich.table

from bmjax import distill, losses

WANTED = 1 / 8
LOSSES = ("kd", "soft_cross_entropy", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "dkd")
LOSSES += ("logit_standardized_kd", "cross_entropy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="examples")
    parser.add_argument("--time", type=int, default=512, help="tokens of an example")
    parser.add_argument("--width", type=int, default=512, help="of student and teacher")
    parser.add_argument("--vocabulary", type=int, default=131072, help="classes")
    parser.add_argument("--tokens", type=int, default=losses.Chunks().tokens, help="of a tile")
    parser.add_argument("--classes", type=int, default=losses.Chunks().classes, help="of a tile")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of hidden, kernel and bias")
    parser.add_argument("--tied", action="store_true", help="the kernel is the transpose of a table [vocabulary, width]")
    parser.add_argument("--losses", default=",".join(LOSSES), help="comma-separated")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    arguments = parser.parse_args()
    names = arguments.losses.split(",")
    if unknown := sorted({*names} - {*LOSSES}):
        parser.error(f"there is no loss {unknown[0]!r}; there are {', '.join(LOSSES)}")
    found = {name: measure(name, arguments) for name in names}
    show(found)
    if arguments.out:
        sizes = {key: value for key, value in vars(arguments).items() if key not in ("out", "losses")}
        arguments.out.write_text(json.dumps({"sizes": sizes, "device": jax.devices()[0].device_kind, "bytes": found}, indent=1))


def measure(name: str, sizes: argparse.Namespace) -> dict[str, int]:
    """Bytes of temporaries of both forms."""
    shape = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.dtype(sizes.dtype))
    kernel = (sizes.vocabulary, sizes.width) if sizes.tied else (sizes.width, sizes.vocabulary)
    head = (shape(sizes.batch, sizes.time, sizes.width), shape(*kernel), shape(sizes.vocabulary))
    targets = jax.ShapeDtypeStruct((sizes.batch, sizes.time), jnp.int32)
    chunks = losses.Chunks(sizes.tokens, sizes.classes)
    forms = {"plain": plain(name), "fused": fused(name, chunks)}
    return {form: temporaries(fn, sizes.tied, head, targets) for form, fn in forms.items()}


def plain(name: str) -> Callable[..., jax.Array]:
    """(student's head, teacher's head, targets) -> values [batch, time], from whole logits."""
    logits = lambda hidden, kernel, bias: hidden @ kernel + bias
    if name == "cross_entropy":
        return lambda student, teacher, targets: losses.cross_entropy(logits(*student), targets)
    fn = getattr(distill, name)
    return lambda student, teacher, targets: fn(logits(*student), logits(*teacher), **labels(name, targets))


def fused(name: str, chunks: losses.Chunks) -> Callable[..., jax.Array]:
    """The same in tiles."""
    if name == "cross_entropy":
        return lambda student, teacher, targets: losses.head_cross_entropy(student, targets, chunks=chunks)
    fn = getattr(distill.vocabulary, name)
    return lambda student, teacher, targets: fn(student, teacher, **labels(name, targets), chunks=chunks)


def labels(name: str, targets: jax.Array) -> dict[str, jax.Array]:
    """For the loss that takes them."""
    return {"labels": targets} if name == "dkd" else {}


def temporaries(fn: Callable[..., jax.Array], tied: bool, head: Any, targets: Any) -> int:
    """Bytes that the compiled loss with its gradient needs beside its arguments and results."""
    turned = lambda head: (head[0], head[1].T, head[2]) if tied else head

    def loss(student: Any, teacher: Any, targets: jax.Array) -> jax.Array:
        return fn(turned(student), jax.lax.stop_gradient(turned(teacher)), targets).mean()

    compiled = jax.jit(jax.value_and_grad(loss)).lower(head, head, targets).compile()
    return int(compiled.memory_analysis().temp_size_in_bytes)


def show(found: dict[str, dict[str, int]]) -> None:
    """Prints the table."""
    table = rich.table.Table(
        "loss", "plain, MiB", "fused, MiB", "fused / plain", title="temporaries of the loss with its gradient"
    )
    for name, one in found.items():
        ratio = one["fused"] / max(one["plain"], 1)
        verdict = f"1/{1 / ratio:.1f}{'' if ratio <= WANTED else ' (wanted: 1/8)'}" if ratio else "0"
        table.add_row(name, f"{one['plain'] / 2**20:,.0f}", f"{one['fused'] / 2**20:,.0f}", verdict)
    rich.console.Console().print(table)


if __name__ == "__main__":
    main()
