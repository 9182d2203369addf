"""What scanning over layers is worth to the compiler: its time at few and at many layers, and temporaries with and without remat.

    python -m benchmarks.scan_compile --layers=4,24 --out=scan_compile.json

A training step (loss and gradients) of a language model is compiled for each number of layers, without the compile cache, in
turn; the figure is the median, and wanted is a ratio of at most 1.3. Temporaries are the compiler's own count.
"""

import argparse
import json
import pathlib
import statistics
import time

import rich.console
import rich.table

POLICIES = ("none", "dots_no_batch", "full")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="4,24", help="few and many")
    parser.add_argument("--width", type=int, default=256, help="embedding width; FFN neurons are four times as many")
    parser.add_argument("--length", type=int, default=256, help="tokens in a row")
    parser.add_argument("--batch", type=int, default=8, help="rows")
    parser.add_argument("--repeats", type=int, default=5, help="compilations of each")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    arguments = parser.parse_args()
    import jax

    jax.config.update("jax_enable_compilation_cache", False)
    few, many = (int(layers) for layers in arguments.layers.split(","))
    seconds = compile_times(arguments, few, many)
    results = {
        "layers": [few, many],
        "seconds": [seconds[few], seconds[many]],
        "ratio": seconds[many] / seconds[few],
        "temporary_bytes": {policy: temporaries(arguments, many, policy) for policy in POLICIES},
        "settings": {name: getattr(arguments, name) for name in ("width", "length", "batch", "repeats")},
    }
    show(results)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1))


def lowered(arguments: argparse.Namespace, layers: int, remat: str):
    """Loss and gradients on abstract arrays, lowered for the compiler."""
    import jax
    import jax.numpy as jnp

    from bmjax.losses import cross_entropy
    from bmjax.models import Decoder

    width, shape = arguments.width, (arguments.batch, arguments.length)
    model = Decoder(layers=layers, width=width, heads=width // 64 or 1, neurons=4 * width, remat=remat).build(shape[1:], 1024)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    params, _ = jax.eval_shape(model.init, jax.random.key(0), {"inputs": jnp.zeros(shape, jnp.int32)})

    def loss(params, inputs, targets):
        return cross_entropy(model.apply(params, {}, {"inputs": inputs})[0].logits, targets).mean()

    return jax.jit(jax.value_and_grad(loss)).lower(params, tokens, tokens)


def compile_times(arguments: argparse.Namespace, few: int, many: int) -> dict[int, float]:
    """{layers: median seconds}, compiled in turn after one of each that does not count."""
    found: dict[int, list[float]] = {few: [], many: []}
    for repeat in range(arguments.repeats + 1):
        for layers, seconds in found.items():
            program = lowered(arguments, layers, "none")
            start = time.perf_counter()
            program.compile()
            if repeat:
                seconds.append(time.perf_counter() - start)
    return {layers: statistics.median(seconds) for layers, seconds in found.items()}


def temporaries(arguments: argparse.Namespace, layers: int, remat: str) -> int:
    """Bytes that the compiled step needs beside its arguments and results."""
    return lowered(arguments, layers, remat).compile().memory_analysis().temp_size_in_bytes


def show(results: dict) -> None:
    few, many = results["layers"]
    console = rich.console.Console()
    table = rich.table.Table("compilation", f"{few} layers, s", f"{many} layers, s", "ratio", "wanted")
    table.add_row("loss and gradients", *(f"{x:.2f}" for x in results["seconds"]), f"{results['ratio']:.2f}", "<= 1.3")
    console.print(table)
    table = rich.table.Table(f"remat, {many} layers", "temporaries, MiB", "of none")
    for policy, size in results["temporary_bytes"].items():
        table.add_row(policy, f"{size / 2**20:.1f}", f"{size / results['temporary_bytes']['none']:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
