"""Test accuracy of students, distillation loss by distillation loss, at an equal budget: the same steps, batches and teacher.

    python -m benchmarks.distill_quality                                              # digits, all losses
    python -m benchmarks.distill_quality --preset=cifar --source=images:<train.parquet>   # about an hour of 2 CPU cores
    python -m benchmarks.distill_quality --preset=gpu --source=images:<folder with train.parquet and test.parquet>

preset=digits: a residual network of 8 layers teaches one of an eighth of its width, and for the losses on attention a vision
transformer of 4 layers one of 2. preset=cifar: 10,000 images of all splits together at 16 pixels, a wide ResNet-8 teaches a
narrow one, 20 epochs. preset=gpu: all images, ResNet-56 teaches ResNet-20, 160 epochs, all losses. Every setting is a flag.

One teacher is trained and kept in --out; each student has its own seed for weights and batches, the same one for all losses. SGD
with Nesterov momentum 0.9 (AdamW for the transformers), warm-up over 5% of the steps, cosine decay to 0. Losses have the weights
that `benchmarks/distill_losses.py` lists, those of the papers where one scale fits all; nothing was tuned on these data. The test
split is measured once, after the last step.

Each run is one JSON file in --out. Stop it when you like: the same command goes on with the runs that are missing.
"""

import argparse
import functools
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import rich.console
import rich.table

from benchmarks import distill_losses, resumable, sources, stepping

PRESETS: dict[str, dict[str, Any]] = {
    "digits": {
        "test": 0.4,
        "source": "digits",
        "losses": "alone,all",
        "epochs": 40,
        "images": 0,
        "pixels": 0,
        "depth": 8,
        "width": 16,
        "student_depth": 8,
        "student_width": 2,
        "batch": 64,
        "learning_rate": 0.05,
        "augmented": False,
        "threads": 0,
    },
    "cifar": {
        "test": 0.2,
        "losses": "alone,kd,dkd,similarity,rkd,hint",
        "epochs": 20,
        "images": 10000,
        "pixels": 16,
        "depth": 8,
        "width": 48,
        "student_depth": 8,
        "student_width": 8,
        "batch": 128,
        "learning_rate": 0.1,
        "augmented": True,
        "threads": 0,
    },
    "gpu": {
        "test": 0.2,
        "losses": "alone,all",
        "epochs": 160,
        "images": 0,
        "pixels": 0,
        "depth": 56,
        "width": 16,
        "student_depth": 20,
        "student_width": 16,
        "batch": 128,
        "learning_rate": 0.1,
        "augmented": True,
        "threads": 4,
    },
}
ALONE = {"residual": "alone", "transformer": "transformer alone"}  # the baselines


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="digits, or images:<file.parquet or folder>")
    parser.add_argument("--losses", help=f"alone, all, or some of {', '.join(distill_losses.LOSSES)}")
    parser.add_argument("--seeds", type=int, default=3, help="how many; of weights and batches")
    parser.add_argument("--epochs", type=int, help="passes over the training images")
    parser.add_argument("--images", type=int, help="of all splits together; 0 is all")
    parser.add_argument("--pixels", type=int, help="height and width; 0 keeps the images' own")
    parser.add_argument("--depth", type=int, help="layers of the teacher, 6n + 2")
    parser.add_argument("--width", type=int, help="channels of the teacher's first stage")
    parser.add_argument("--student-depth", type=int, help="layers of the student")
    parser.add_argument("--student-width", type=int, help="channels of the student's first stage")
    parser.add_argument("--batch", type=int, help="images a step")
    parser.add_argument("--learning-rate", type=float, help="its peak")
    parser.add_argument("--weight-decay", type=float, default=2e-3, help="decoupled, times the learning rate")
    parser.add_argument("--test", type=float, help="fraction held out where the source has no test split")
    parser.add_argument("--augmented", action=argparse.BooleanOptionalAction, help="crops after padding by an eighth, and flips")
    parser.add_argument("--mesh", default="data=-1", help="devices")
    parser.add_argument("--threads", type=int, help="that prepare batches")
    parser.add_argument("--out", type=pathlib.Path, help="folder of the runs; runs/distill_<preset> if not given")
    arguments = resumable.parse(parser, PRESETS, "digits")
    arguments.out = arguments.out or pathlib.Path(f"runs/distill_{arguments.preset}")
    if not arguments.source:
        raise ValueError(f"--preset={arguments.preset} needs images; give --source=images:<file.parquet or folder>")
    resumable.check_whole(arguments, seeds=1, epochs=1, images=0, pixels=0, threads=0)
    return arguments


class Family(NamedTuple):
    """A teacher and a student of one kind.

    Attributes:
        teacher, student: models.
        optimizer: the config of both.
        pair: what losses look at.
    """

    teacher: Any
    student: Any
    optimizer: Any
    pair: distill_losses.Pair


class Bench:
    """Data, devices and networks of all runs. Raises ValueError where source, sizes, batch and devices do not fit each other."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from bmjax import data

        self.arguments = arguments
        self.dataset, self.mesh = sources.images(arguments)
        self.steps = max(1, arguments.epochs * len(self.dataset.train) // arguments.batch)
        crop = max(1, self.dataset.shape[0] // 8)
        self.augment = data.Augment(crop=crop, flip=0.5) if arguments.augmented else None
        self.teachers: dict[str, Any] = {}

    def batches(self, seed: int) -> Any:
        from bmjax import data

        return data.train_batches(self.dataset.train, self.arguments.batch, seed, self.augment)

    @functools.cached_property
    def residual(self) -> Family:
        from bmjax import config
        from bmjax.models import ResNet
        from bmjax.train.optimizer import Optimizer

        given, found = self.arguments, list[Any]()
        for depth, width in ((given.depth, given.width), (given.student_depth, given.student_width)):
            network = ResNet(depth=depth, width=width)
            config.validate(network, "network")
            found.append(network.build(self.dataset.shape, self.dataset.classes))
        last = lambda depth, stage: f"stage_{stage}/block_{(depth - 2) // 6 - 1}"
        stages = {last(given.student_depth, i): last(given.depth, i) for i in range(3)}
        rule: dict[str, Any] = {"name": "sgdw", "momentum": 0.9, "nesterov": True, "weight_decay": given.weight_decay}
        optimizer = Optimizer(learning_rate=given.learning_rate, warmup=0.05, **rule)
        pair = distill_losses.Pair(stages, {"final": "final"}, {}, self.dataset.train.id, given.batch)
        return Family(*found, optimizer, pair)

    @functools.cached_property
    def transformer(self) -> Family:
        from bmjax.models import Transformer
        from bmjax.train.optimizer import Optimizer

        patch = max(self.dataset.shape[0] // 4, 1)
        big, small = (
            Transformer(patch=patch, layers=layers, width=width, heads=4, neurons=4 * width).build(
                self.dataset.shape, self.dataset.classes
            )
            for layers, width in ((4, 64), (2, 16))
        )
        layers = {f"layers/{i}": f"layers/{2 * i + 1}" for i in range(2)}
        attention = {f"{mine}/attention": f"{theirs}/attention" for mine, theirs in layers.items()}
        pair = distill_losses.Pair(layers, {"final": "final"}, attention, self.dataset.train.id, self.arguments.batch)
        return Family(big, small, Optimizer(learning_rate=2e-3, weight_decay=1e-2, warmup=0.05), pair)

    def family(self, kind: str) -> Family:
        return getattr(self, kind)


def problem(bench: Bench, kind: str, loss: str) -> Any:
    """What a student is trained on."""
    from bmjax.train import Problem

    family = bench.family(kind)
    terms = distill_losses.terms(loss, family.pair)
    teacher = None if loss == "alone" else family.teacher
    own = family.optimizer.build_for_terms(bench.steps)
    return Problem(family.student, terms, family.optimizer.build(bench.steps), teacher=teacher, loss_tx=own)


def teacher(bench: Bench, kind: str) -> dict[str, Any]:
    """Trains a teacher and keeps it in the folder."""
    import jax
    import numpy as np

    from bmjax import losses, trees
    from bmjax.train import Problem

    family = bench.family(kind)
    terms = {"ce": (1.0, losses.cross_entropy_term())}
    trained = Problem(family.teacher, terms, family.optimizer.build(bench.steps))
    state, times, lost = stepping.train(trained, bench.mesh, bench.batches(10**6), bench.steps, 10**6)
    if lost:
        sys.exit(f"distill_quality: the teacher's loss is not finite at step {lost}; give a lower --learning-rate")
    path = kept(bench, kind)
    arrays = {"params": state.params["model"], "model_state": state.model_state}
    np.savez(path.with_suffix(".partial.npz"), **trees.paths(jax.device_get(arrays)))
    path.with_suffix(".partial.npz").replace(path)
    scores = tested(bench, family.teacher, state.params["model"], state.model_state)
    return {"loss": "teacher", "kind": kind, "parameters": trees.size(state.params["model"]), **scores, **times}


def kept(bench: Bench, kind: str) -> pathlib.Path:
    return bench.arguments.out / f"teacher_{kind}.npz"


def frozen(bench: Bench, kind: str) -> Any:
    """The teacher's arrays, on the devices."""
    import jax
    import numpy as np

    from bmjax import parallel, trees

    if kind not in bench.teachers:
        with np.load(kept(bench, kind)) as file:
            arrays = {"model_state": {}, **trees.nested(dict(file))}
        bench.teachers[kind] = jax.device_put(arrays, parallel.replicated(bench.mesh))
    return bench.teachers[kind]


def student(bench: Bench, kind: str, loss: str, seed: int) -> dict[str, Any]:
    """Trains and tests a student."""
    import jax

    from bmjax import trees

    trained = problem(bench, kind, loss)
    given = None if loss == "alone" else frozen(bench, kind)
    threads = bench.arguments.threads
    state, times, lost = stepping.train(
        trained, bench.mesh, bench.batches(seed), bench.steps, seed, threads=threads, frozen=given
    )
    params = state.params["model"]
    result = {
        "loss": ALONE[kind] if loss == "alone" else loss,
        "kind": kind,
        "seed": seed,
        "steps": bench.steps,
        "parameters": trees.size(params),
        "diverged_at": lost,
        "device": jax.devices()[0].device_kind,
        **times,
    }
    return {**result, **({} if lost else tested(bench, trained.model, params, state.model_state))}


def tested(bench: Bench, model: Any, params: Any, model_state: Any) -> dict[str, float]:
    """{"accuracy", "nll"} on the test split."""
    from bmjax import data, parallel
    from bmjax.train import run as runs

    batches = (parallel.put_batch(batch, bench.mesh) for batch in data.eval_batches(bench.dataset.test, bench.arguments.batch))
    logits = functools.partial(runs.predictor(model), params, model_state)
    summary = runs.score(bench.dataset, bench.dataset.test, batches, logits).summary
    return {"accuracy": 100 * float(summary["accuracy"]), "nll": float(summary["nll"])}


def prepare(arguments: argparse.Namespace) -> tuple[Bench, dict[str, Callable[[], dict[str, Any]]]]:
    """(bench, {name of a run: function that makes it}). Raises ValueError where one of them could not be run."""
    known = ("alone", "all", *distill_losses.LOSSES)
    asked = resumable.names(arguments.losses, known, "loss")
    chosen = [name for name in distill_losses.LOSSES if name in asked or "all" in asked]
    bench = Bench(arguments)
    kinds: dict[str, list[str]] = {"residual": [], "transformer": []}
    for name in chosen:
        kinds["transformer" if name in distill_losses.ON_TRANSFORMERS else "residual"].append(name)
    jobs: dict[str, Callable[[], dict[str, Any]]] = {}
    taught = [kind for kind, losses in kinds.items() if losses]
    for kind in taught:
        jobs[f"teacher_{kind}"] = functools.partial(teacher, bench, kind)
    for seed in range(arguments.seeds):  # outermost, so that there is a whole table early
        for kind in taught or ["residual"]:
            for name in (*(["alone"] if "alone" in asked else []), *kinds[kind]):
                problem(bench, kind, name)
                jobs[f"{kind}_{name}_{seed}"] = functools.partial(student, bench, kind, name, seed)
    apart = ("losses", "seeds", "out", "preset", "threads")
    settings = {name: value for name, value in vars(arguments).items() if name not in apart}
    resumable.check_folder(arguments.out, {**settings, "data": bench.dataset.fingerprint})
    return bench, jobs


def show(console: rich.console.Console, results: list[dict[str, Any]], examples: int) -> None:
    columns = ("test accuracy, %", "above alone, points", "NLL", "ms a step", "parameters", "runs")
    table = rich.table.Table("loss", *columns, title=f"{examples:,} test images; mean (spread over seeds)")
    alone = {(r["kind"], r["seed"]): r["accuracy"] for r in results if r["loss"] in ALONE.values() and "accuracy" in r}
    for kind in ALONE:
        for name in dict.fromkeys(result["loss"] for result in results if result["kind"] == kind):
            every = [result for result in results if (result["kind"], result["loss"]) == (kind, name)]
            good = [result for result in every if "accuracy" in result]
            mean = lambda field, group: statistics.mean(result[field] for result in group)
            gains = [r["accuracy"] - alone[kind, r["seed"]] for r in good if (kind, r.get("seed")) in alone]
            scores = ("diverged", "", "")
            if good:
                gain = "" if name in (*ALONE.values(), "teacher") or not gains else resumable.mean_and_spread(gains)
                scores = (resumable.mean_and_spread([r["accuracy"] for r in good]), gain, f"{mean('nll', good):.3f}")
            count = f"{len(every)}" if len(good) == len(every) else f"{len(good)} of {len(every)}"
            table.add_row(name, *scores, f"{1e3 * mean('seconds_a_step', every):.1f}", f"{every[0]['parameters']:,}", count)
        table.add_section()
    console.print(table)


def describe(result: dict[str, Any]) -> str:
    if result.get("diverged_at"):
        return f"diverged at step {result['diverged_at']}"
    return f"{result['accuracy']:.2f}%, {result['seconds']:.0f} s"


def main() -> None:
    try:
        arguments = flags()
        bench, jobs = prepare(arguments)
    except ValueError as error:
        sys.exit(f"distill_quality: {error}")
    console = rich.console.Console(width=120)
    console.print(
        f"{len(bench.dataset.train):,} training images {list(bench.dataset.shape)}, {bench.steps} steps, {len(jobs)} runs"
    )
    results = resumable.collect(arguments.out, jobs, console.print, describe)
    if results:
        show(console, list(results.values()), len(bench.dataset.test))


if __name__ == "__main__":
    main()
