"""Pruning of a language model without training: bits per byte on held-out text, method by method.

    python -m benchmarks.prune_lm                    # the source of Python's own library, 20 minutes of 2 CPU cores
    python -m benchmarks.prune_lm --source=text:<file or folder> --out=runs/prune_lm_text
    python -m benchmarks.prune_lm --preset=gpu --out=runs/prune_lm_gpu
    python -m benchmarks.prune_lm --steps=20 --seeds=1 --targets=2:4 --calibration=32 --test-rows=64 --out=runs/prune_lm_small

For each seed a byte decoder is trained (preset=cpu: 1.1 million parameters, 600 steps of 8 x 256 bytes; preset=gpu: 8 layers of
width 512, 5,000 steps of 32 x 512) by AdamW with warm-up and cosine decay, and kept. Then every method prunes a copy of it at
once, by `prune.layerwise` on 128 rows of the training split, to a sparsity or to 2:4: "magnitude" the smallest weights of each
layer, "wanda" output by output by weight times input norm, "owl-wanda" the same with OWL's sparsities by block, "sparsegpt" also
makes up for what goes in the weights that stay. All kernels of the blocks are pruned; embedding (the head's too) and norms stay
dense. Bits per byte are of --test-rows rows spread over the test split. Known: at 2:4 SparseGPT loses least, magnitude most.

"s a layer" is the time from one layer's end to the next one's: the calibration data are taken through the network too. It holds
compilation, most of which falls on the first layer of each shape. The peak of memory is the process's, so it covers training
unless the model was there already.

Each run is one JSON file in --out. Stop it when you like: the same command goes on with the runs that are missing.
"""

import argparse
import collections
import functools
import itertools
import pathlib
import re
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import rich.console
import rich.table

from benchmarks import resumable, sources, stepping

SIZES = ("layers", "width", "heads", "neurons")
METHODS = ("magnitude", "wanda", "owl-wanda", "sparsegpt")
PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {"steps": 600, "layers": 5, "width": 128, "heads": 4, "neurons": 384, "batch": 8, "length": 256},
    "gpu": {"steps": 5000, "layers": 8, "width": 512, "heads": 8, "neurons": 1536, "batch": 32, "length": 512},
}


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="text:", help="text:<file or folder>; text: alone is Python's own library")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"some of {', '.join(METHODS)}")
    parser.add_argument("--targets", default="0.5,2:4", help="sparsities and n:m patterns, separated by commas")
    parser.add_argument("--seeds", type=int, default=2, help="how many models; of weights, batches and calibration rows")
    parser.add_argument("--steps", type=int, help="of training")
    for name in SIZES:
        parser.add_argument(f"--{name}", type=int, help="of the decoder")
    parser.add_argument("--batch", type=int, help="rows a step")
    parser.add_argument("--length", type=int, help="bytes a row")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="its peak")
    parser.add_argument("--calibration", type=int, default=128, help="rows that the methods see")
    parser.add_argument("--test-rows", type=int, default=512, help="rows of the test split that are scored; 0 is all")
    parser.add_argument("--compute-dtype", choices=("float32", "bfloat16"), default="float32", help="of training")
    parser.add_argument("--mesh", default="data=-1", help="devices")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/prune_lm"), help="folder of the runs")
    arguments = resumable.parse(parser, PRESETS)
    resumable.check_whole(arguments, seeds=1, steps=1, batch=1, length=1, calibration=1, test_rows=0)
    return arguments


def targets(arguments: argparse.Namespace, owl: bool) -> dict[str, dict[str, Any]]:
    """{name: what `layerwise` takes} of "0.5,2:4". Raises ValueError for a part that is neither, or does not fit the sizes."""
    from bmjax import prune

    found: dict[str, dict[str, Any]] = {}
    for part in map(str.strip, arguments.targets.split(",")):
        if pattern := re.fullmatch(r"(\d+):(\d+)", part):
            n, m = map(int, pattern.groups())
            if not 0 < n < m or arguments.width % m or arguments.neurons % m:
                raise ValueError(f"--targets has {part}; expected n:m with n below m, which divides --width and --neurons")
            found[part] = {"n": n, "m": m}
        else:
            (sparsity,) = resumable.fractions(part, "--targets")
            found[f"{sparsity:g}"] = {"sparsity": sparsity}
            if owl:
                prune.owl().targets((), sparsity)  # raises where its spread leaves 0 to 1
    return found


class Bench:
    """Data, devices, model and training problem of all runs."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        """Raises ValueError where source, sizes, batch and devices do not fit each other."""
        from bmjax import config, data, losses
        from bmjax.models import Decoder
        from bmjax.train import Problem

        self.arguments = arguments
        self.dataset, self.mesh = sources.texts(arguments)
        data.train_batches(self.dataset.train, arguments.batch, 0)
        network = Decoder(**{name: getattr(arguments, name) for name in SIZES})
        config.validate(network, "network")
        self.model = network.build(self.dataset.shape, self.dataset.classes)
        tx = sources.adamw(arguments.learning_rate).build(arguments.steps)
        terms = {"ce": (1.0, losses.cross_entropy_term())}
        self.problem = Problem(self.model, terms, tx, compute_dtype=arguments.compute_dtype)

    def bits(self, params: Any) -> float:
        """Bits per byte on the test split."""
        return sources.bits(self.arguments, self.dataset, self.mesh, self.model, params)

    def calibration(self, seed: int) -> list[Any]:
        """Batches of training rows, the same for each method."""
        from bmjax import data, parallel
        from bmjax.train.run import stream

        batches = data.train_batches(self.dataset.train, self.arguments.batch, stream(seed, "calibration"))
        return [parallel.put_batch(batches[i], self.mesh) for i in range(-(-self.arguments.calibration // self.arguments.batch))]


def dense(bench: Bench, seed: int) -> dict[str, Any]:
    """Trains a model and keeps it in the folder."""
    import jax

    from bmjax import data, trees

    batches = data.train_batches(bench.dataset.train, bench.arguments.batch, seed)
    state, times, lost = stepping.train(bench.problem, bench.mesh, batches, bench.arguments.steps, seed)
    if lost:
        sys.exit(f"prune_lm: the loss of seed {seed} is not finite at step {lost}; give a lower --learning-rate")
    params = state.params["model"]
    sources.keep(bench.arguments.out / f"dense_{seed}.npz", params)
    found = {"method": "dense", "target": "", "seed": seed, "parameters": trees.size(params), "sparsity": 0.0, **times}
    return {**found, "bits": bench.bits(params), "peak_mib": stepping.peak(), "device": jax.devices()[0].device_kind}


def kept(bench: Bench, seed: int) -> Any:
    """The parameters that `dense` trained, on the devices."""
    return sources.kept(bench.arguments.out / f"dense_{seed}.npz", bench.model, bench.mesh)


def pruned(bench: Bench, seed: int, name: str, target: str, how: dict[str, Any]) -> dict[str, Any]:
    """Prunes the model of a seed at once, and scores it."""
    import jax

    from bmjax import prune

    methods = {"magnitude": prune.smallest, "wanda": prune.wanda, "owl-wanda": prune.wanda, "sparsegpt": prune.sparsegpt}
    allocation = prune.owl() if name == "owl-wanda" else None
    params, data, times = kept(bench, seed), bench.calibration(seed), [time.perf_counter()]
    method = clocked(methods[name](), times)
    found = prune.layerwise(bench.model, params, data, method, **how, allocation=allocation, samples=bench.arguments.calibration)
    jax.block_until_ready(found.params)
    seconds = time.perf_counter() - times[0]
    size = sum(row.size for row in found.rows)
    rows = [
        {"path": row.path, "layer": row.layer, "sparsity": row.sparsity, "error": row.error, "note": row.note, "seconds": spent}
        for row, spent in zip(found.rows, (after - before for before, after in itertools.pairwise(times)))
    ]
    return {
        "method": name,
        "target": target,
        "seed": seed,
        "sparsity": sum(row.sparsity * row.size for row in found.rows) / size,
        "pruned_weights": size,
        "bits": bench.bits(found.params),
        "seconds": seconds,
        "peak_mib": stepping.peak(),
        "device": jax.devices()[0].device_kind,
        "layers": rows,
    }


def clocked(method: Any, times: list[float]) -> Any:
    """The method, which notes when it is done with each layer."""
    import jax

    def apply(*arguments: Any) -> Any:
        found = jax.block_until_ready(method.apply(*arguments))
        times.append(time.perf_counter())
        return found

    return method._replace(apply=apply)


def show(console: rich.console.Console, results: list[dict[str, Any]]) -> None:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = collections.defaultdict(list)
    for result in results:
        groups[result["target"], result["method"]].append(result)
    columns = ("target", "bits per byte", "above dense", "sparsity", "seconds", "s a layer", "peak RSS, MiB", "runs")
    table = rich.table.Table("method", *columns, title="mean (spread over seeds)")
    base = {result["seed"]: result["bits"] for result in results if result["method"] == "dense"}
    before = ""
    for (target, name), group in groups.items():
        if target != before:
            table.add_section()
        before = target
        bits = resumable.mean_and_spread([result["bits"] for result in group], 3)
        above = statistics.mean(result["bits"] - base[result["seed"]] for result in group)
        seconds = statistics.mean(result["seconds"] for result in group)
        layers = [layer["seconds"] for result in group for layer in result.get("layers", ())]
        each = f"{statistics.mean(layers):.3f}" if layers else ""
        cells = (f"{statistics.mean(result['sparsity'] for result in group):.4f}", f"{seconds:.1f}", each)
        table.add_row(name, target, bits, f"{above:.3f}", *cells, f"{max(r['peak_mib'] for r in group):,.0f}", f"{len(group)}")
    console.print(table)
    show_layers(console, groups)
    if verdict := order(groups):
        console.print(verdict)


def show_layers(console: rich.console.Console, groups: dict[tuple[str, str], list[dict[str, Any]]]) -> None:
    """Seconds and output error of each kernel, in the order of the forward pass, over layers and seeds."""
    cells: dict[str, list[str]] = collections.defaultdict(list)
    headings = []
    for (target, name), group in groups.items():
        layers = [layer for result in group for layer in result.get("layers", ())]
        if not layers:
            continue
        headings.append(f"{name} {target}")
        for path in dict.fromkeys(layer["path"] for layer in layers):
            own = [layer for layer in layers if layer["path"] == path]
            seconds, error = (statistics.median(layer[field] for layer in own) for field in ("seconds", "error"))
            cells[path].append(f"{seconds:.3f} / {error:.3f}")
    if not headings:
        return
    table = rich.table.Table("seconds / error", *headings, title="median over layers and seeds; error is |X (W - W')|² / |X W|²")
    for path, row in cells.items():
        table.add_row(path.removeprefix("layers/").removesuffix("/kernel"), *row)
    console.print(table)


def order(groups: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
    """Whether the known order at 2:4 is there, seed by seed; "" where not all three methods ran."""
    expected = ("sparsegpt", "wanda", "magnitude")
    bits = [{result["seed"]: result["bits"] for result in groups.get(("2:4", name), ())} for name in expected]
    seeds = set.intersection(*map(set, bits))
    if not seeds:
        return ""
    held = sum(bits[0][seed] < bits[1][seed] < bits[2][seed] for seed in seeds)
    return f"2:4: sparsegpt < wanda < magnitude in bits per byte holds for {held} of {len(seeds)} seeds"


def prepare(arguments: argparse.Namespace) -> tuple[Bench, dict[str, Callable[[], dict[str, Any]]]]:
    """(bench, {name of a run: function that makes it}). Raises ValueError where one of them could not be run."""
    chosen = resumable.names(arguments.methods, METHODS, "method")
    wanted = targets(arguments, "owl-wanda" in chosen)
    bench = Bench(arguments)
    jobs: dict[str, Callable[[], dict[str, Any]]] = {}
    for seed in range(arguments.seeds):
        jobs[f"dense_{seed}"] = functools.partial(dense, bench, seed)
        for target, how in wanted.items():
            for name in chosen:
                if name == "owl-wanda" and "n" in how:
                    continue  # n:m is the same in every block
                jobs[f"{name}_{target.replace(':', 'of')}_{seed}"] = functools.partial(pruned, bench, seed, name, target, how)
    apart = ("methods", "targets", "seeds", "out", "preset")
    settings = {name: value for name, value in vars(arguments).items() if name not in apart}
    resumable.check_folder(arguments.out, {**settings, "data": bench.dataset.fingerprint})
    return bench, jobs


def main() -> None:
    try:
        arguments = flags()
        bench, jobs = prepare(arguments)
    except ValueError as error:
        sys.exit(f"prune_lm: {error}")
    console = rich.console.Console(width=140)
    rows = (len(bench.dataset.train), len(bench.dataset.test))
    console.print(f"{rows[0]:,} training and {rows[1]:,} test rows of {arguments.length}, {len(jobs)} runs, in {arguments.out}")
    describe = lambda result: f"{result['bits']:.4f} bits per byte, {result['seconds']:.1f} s"
    results = resumable.collect(arguments.out, jobs, console.print, describe)
    if results:
        show(console, list(results.values()))


if __name__ == "__main__":
    main()
