"""Test accuracy of pruned residual networks, method by method, on CIFAR-10 or any folder or parquet file of images.

    python -m benchmarks.prune_cifar --source=images:<train.parquet>                # half an hour of 2 CPU cores
    python -m benchmarks.prune_cifar --preset=gpu --source=images:<folder with train.parquet and test.parquet>
    python -m benchmarks.prune_cifar --source=images:<train.parquet> --images=500 --epochs=1 --methods=magnitude --out=runs/small

preset=cpu: 10,000 images of all splits together at 16 pixels, ResNet-8, 20 epochs, 90%. preset=gpu: all images at their own
size, ResNet-20, 160 epochs, all methods at 80, 90 and 95%. Both have three seeds; every setting is a flag of its own. A source
without splits is cut as `bmjax.data` does, the same rows always, into test (--test, a fifth), 1% that nobody looks at, and
training; a folder with a test file keeps that one. The test split is measured once, after the last step.

All methods have the same budget: the same number of steps of the same step, the same batches in the same order for a seed (crops
after padding by an eighth, flips), SGD with Nesterov momentum 0.9, warm-up over 5% of the steps to 0.1, cosine decay to 0,
decoupled decay of kernels. Gradual methods follow a cubic schedule from 20 to 70% of the steps; SET and RigL change until 75%, at
first 30% of the weights; AC/DC has phases of 5% between 10 and 80%. The convolutions are pruned, the first one and the
projections with them; head and norms stay dense. "-erk" spreads the sparsity by Erdos-Renyi-kernel, "-global" (and "global", by
magnitude) by one threshold for all layers, every other name has the same sparsity in each layer.

Each run is one JSON file in --out. Stop it when you like: the same command goes on with the runs that are missing.
"""

import argparse
import functools
import itertools
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import Any

import rich.console
import rich.table

from benchmarks import resumable, sources, stepping

METHODS = (
    "dense",
    "random",
    "magnitude",
    "magnitude-erk",
    "global",
    "saliency",
    "movement",
    "fisher",
    "taylor",
    "straight-through",
    "straight-through-global",
    "straight-through-erk",
    "static",
    "static-erk",
    "set",
    "set-erk",
    "rigl",
    "rigl-erk",
    "ac-dc",
)
PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {
        "methods": "dense,magnitude,global,straight-through,rigl",
        "sparsities": "0.9",
        "epochs": 20,
        "images": 10000,
        "pixels": 16,
        "depth": 8,
        "threads": 0,
    },
    "gpu": {
        "methods": ",".join(METHODS),
        "sparsities": "0.8,0.9,0.95",
        "epochs": 160,
        "images": 0,
        "pixels": 0,
        "depth": 20,
        "threads": 4,
    },
}


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="images:<file.parquet or folder>")
    parser.add_argument("--methods", help=f"some of {', '.join(METHODS)}")
    parser.add_argument("--sparsities", help="fractions that are dropped, separated by commas")
    parser.add_argument("--seeds", type=int, default=3, help="how many; of weights, batches and random masks")
    parser.add_argument("--epochs", type=int, help="passes over the training images")
    parser.add_argument("--images", type=int, help="of all splits together; 0 is all")
    parser.add_argument("--pixels", type=int, help="height and width; 0 keeps the images' own")
    parser.add_argument("--depth", type=int, help="layers of the network, 6n + 2")
    parser.add_argument("--width", type=int, default=16, help="channels of its first stage")
    parser.add_argument("--batch", type=int, default=128, help="images a step")
    parser.add_argument("--learning-rate", type=float, default=0.1, help="its peak")
    parser.add_argument("--weight-decay", type=float, default=2e-3, help="decoupled, times the learning rate")
    parser.add_argument("--test", type=float, default=0.2, help="fraction held out where the source has no test split")
    parser.add_argument("--compute-dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--mesh", default="data=-1", help="devices; with fsdp the executor is the partitioned one")
    parser.add_argument("--executor", default="auto", help="who runs the gradient, as in bmjax.train")
    parser.add_argument("--threads", type=int, help="that prepare batches")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/prune_cifar"), help="folder of the runs")
    arguments = resumable.parse(parser, PRESETS)
    resumable.check_whole(arguments, seeds=1, epochs=1, images=0, pixels=0, threads=0)
    return arguments


def method(name: str, tx: Any, sparsity: float, steps: int, seed: int, stacked: str | None) -> tuple[Any, tuple[Any, ...]]:
    """(optimiser with the method in it, views) for a run of `steps` updates of the optimiser `tx`."""
    import optax

    from bmjax import prune

    kind = name.removesuffix("-erk").removesuffix("-global")
    spread = "-global" if name == "global" else name.removeprefix(kind)
    allocation = {"": prune.uniform, "-erk": prune.erdos_renyi_kernel, "-global": prune.global_threshold}[spread]()
    common: dict[str, Any] = {"sparsity": sparsity, "allocation": allocation, "stacked": stacked}
    every = max(1, min(100, steps // 60))
    gradual: dict[str, Any] = {**common, "schedule": prune.cubic(0.2, 0.7, steps=steps), "every": every}
    moving: dict[str, Any] = {**common, "end": max(1, round(0.75 * steps)), "every": every, "seed": seed}
    begin = round(0.1 * steps)
    phases: dict[str, Any] = {"begin": begin, "phase": max(1, round(0.05 * steps)), "end": max(begin + 1, round(0.8 * steps))}

    def straight() -> tuple[Any, tuple[Any, ...]]:
        st = prune.straight_through(**{**gradual, "every": min(every, 10)})
        return optax.chain(tx, st.tx), (st.view,)

    made: dict[str, Callable[[], tuple[Any, tuple[Any, ...]]]] = {
        "dense": lambda: (tx, ()),
        "random": lambda: (optax.chain(tx, prune.sparsify(prune.random(seed), **gradual)), ()),
        "magnitude": lambda: (optax.chain(tx, prune.sparsify(**gradual)), ()),
        "global": lambda: (optax.chain(tx, prune.sparsify(**gradual)), ()),
        "saliency": lambda: (prune.around(tx, prune.saliency(), **gradual), ()),
        "movement": lambda: (prune.around(tx, prune.movement(), **gradual), ()),
        "fisher": lambda: (prune.around(tx, prune.fisher(), **gradual), ()),
        "taylor": lambda: (prune.around(tx, prune.taylor(), **gradual), ()),
        "straight-through": straight,
        "static": lambda: (prune.static_sparse(tx, seed=seed, **common), ()),
        "set": lambda: (prune.sparse_evolution(tx, **moving), ()),
        "rigl": lambda: (prune.rigl(tx, **moving), ()),
        "ac-dc": lambda: (prune.ac_dc(tx, **common, **phases), ()),
    }
    return made[kind]()


def problem(arguments: argparse.Namespace, dataset: Any, name: str, sparsity: float, seed: int) -> tuple[Any, int]:
    """(what is trained, number of steps)."""
    from bmjax import config, losses
    from bmjax.models import ResNet
    from bmjax.train import Problem
    from bmjax.train.optimizer import Optimizer

    network = ResNet(depth=arguments.depth, width=arguments.width)
    config.validate(network, "network")
    steps = max(1, arguments.epochs * len(dataset.train) // arguments.batch)
    rule: dict[str, Any] = {"name": "sgdw", "momentum": 0.9, "nesterov": True}
    optimizer = Optimizer(learning_rate=arguments.learning_rate, weight_decay=arguments.weight_decay, warmup=0.05, **rule)
    stacked = "/rest/" if arguments.depth > 8 else None  # each scanned layer is an array of its own
    tx, views = method(name, optimizer.build(steps), sparsity, steps, seed, stacked)
    model = network.build(dataset.shape, dataset.classes)
    terms = {"ce": (1.0, losses.cross_entropy_term())}
    return Problem(model, terms, tx, views=views, compute_dtype=arguments.compute_dtype), steps


def run(arguments: argparse.Namespace, dataset: Any, mesh: Any, name: str, sparsity: float, seed: int) -> dict[str, Any]:
    """Trains and tests one network."""
    import jax

    from bmjax import data

    trained, steps = problem(arguments, dataset, name, sparsity, seed)
    augment = data.Augment(crop=max(1, dataset.shape[0] // 8), flip=0.5)
    batches = data.train_batches(dataset.train, arguments.batch, seed, augment)
    found = stepping.train(trained, mesh, batches, steps, seed, arguments.executor, arguments.threads)
    result = {
        "method": name,
        "asked": 0.0 if name == "dense" else sparsity,
        "seed": seed,
        "steps": steps,
        **found.times,
        "device": jax.devices()[0].device_kind,
        "diverged_at": found.diverged_at,
    }
    return {**result, **({} if found.diverged_at else tested(arguments, dataset, mesh, trained, found.state))}


def tested(arguments: argparse.Namespace, dataset: Any, mesh: Any, trained: Any, state: Any) -> dict[str, float]:
    """{"accuracy", "nll"} on the test split, and the "sparsity" of what is pruned, both as the forward pass sees the weights."""
    from bmjax import data, parallel, prune
    from bmjax.train import run as runs

    params = runs.result(trained, state)
    batches = (parallel.put_batch(batch, mesh) for batch in data.eval_batches(dataset.test, arguments.batch))
    logits = functools.partial(runs.predictor(trained.model), params, state.model_state)
    summary = runs.score(dataset, dataset.test, batches, logits).summary
    reached = 0.0
    if prune.prunes(state.opt_state["model"]):
        rows = [row for row in prune.sparsity_report(params, state.opt_state["model"]).rows if row.note == "pruned"]
        reached = sum(row.zeros for row in rows) / sum(row.size for row in rows)
    return {"accuracy": 100 * float(summary["accuracy"]), "nll": float(summary["nll"]), "sparsity": reached}


def show(console: rich.console.Console, results: list[dict[str, Any]], examples: int) -> None:
    columns = ("dropped", "test accuracy, %", "NLL", "sparsity", "seconds", "ms a step", "runs")
    title = f"{examples:,} test images; mean (spread over seeds)"
    table = rich.table.Table("method", *columns, title=title)
    order = {name: place for place, name in enumerate(METHODS)}
    keys = sorted({(result["asked"], result["method"]) for result in results}, key=lambda key: (key[0], order[key[1]]))
    before = None
    for asked, name in keys:
        every = [result for result in results if (result["asked"], result["method"]) == (asked, name)]
        good = [result for result in every if result["diverged_at"] is None]
        mean = lambda field, group: statistics.mean(result[field] for result in group)
        if before is not None and asked != before:
            table.add_section()
        before = asked
        scores = ("diverged", "", "")
        if good:
            accuracy = resumable.mean_and_spread([result["accuracy"] for result in good])
            scores = (accuracy, f"{mean('nll', good):.3f}", f"{mean('sparsity', good):.4f}")
        count = f"{len(every)}" if len(good) == len(every) else f"{len(good)} of {len(every)}"
        cells = (f"{mean('seconds', every):.0f}", f"{1e3 * mean('seconds_a_step', every):.1f}", count)
        table.add_row(name, f"{asked:.0%}" if asked else "", *scores, *cells)
    console.print(table)


def prepare(arguments: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """({name of a run: function that makes it}, dataset). Raises ValueError where one of them could not be run."""
    from bmjax import data

    chosen = resumable.names(arguments.methods, METHODS, "method")
    sparsities = resumable.fractions(arguments.sparsities, "--sparsities")
    dataset, mesh = sources.images(arguments)
    jobs: dict[str, Any] = {}
    example = data.train_batches(dataset.train, arguments.batch, 0)[0]
    for seed in range(arguments.seeds):  # outermost, so that there is a whole table early
        for sparsity, name in itertools.product(sparsities, chosen):
            trained, _ = problem(arguments, dataset, name, sparsity, seed)
            if seed == 0:
                stepping.check(trained, mesh, example, arguments.executor)
            key = f"dense_{seed}" if name == "dense" else f"{name}_{sparsity:g}_{seed}"
            jobs[key] = functools.partial(run, arguments, dataset, mesh, name, sparsity, seed)
    apart = ("methods", "sparsities", "seeds", "out", "preset", "threads")
    settings = {name: value for name, value in vars(arguments).items() if name not in apart}
    resumable.check_folder(arguments.out, {**settings, "data": dataset.fingerprint})
    return jobs, dataset


def main() -> None:
    try:
        arguments = flags()
        jobs, dataset = prepare(arguments)
    except ValueError as error:
        sys.exit(f"prune_cifar: {error}")
    console = rich.console.Console(width=120)
    console.print(f"{len(dataset.train):,} training images {list(dataset.shape)}, {len(jobs)} runs, in {arguments.out}")
    results = resumable.collect(arguments.out, jobs, console.print, describe)
    if results:
        show(console, list(results.values()), len(dataset.test))


def describe(result: dict[str, Any]) -> str:
    if result["diverged_at"]:
        return f"diverged at step {result['diverged_at']}"
    return f"{result['accuracy']:.2f}%, {result['sparsity']:.4f} sparse, {result['seconds']:.0f} s"


if __name__ == "__main__":
    main()
