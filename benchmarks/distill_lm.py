"""Bits per byte of small language models, alone and taught by a larger one, at an equal budget: the same steps and batches.

    python -m benchmarks.distill_lm                                   # the source of Python's own library
    python -m benchmarks.distill_lm --source=text:<file or folder>    # another text
    python -m benchmarks.distill_lm --preset=gpu --compute-dtype=bfloat16

One teacher is trained and kept in --out. "alone" learns from the bytes; the others from bytes and teacher, half and half: "kd",
"reverse_kl" and "jsd" on all logits, "cached" (KL) on the --k largest and the tail, packed and unpacked as a cache holds them,
"hidden" on the bytes and on the hidden states of each layer through a trained projection. Nothing was tuned on these data. Bits
per byte are of --test-rows rows spread over the test split, after the last step.

Each run is one JSON file in --out. Stop it when you like: the same command goes on with the runs that are missing.
"""

import argparse
import functools
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import Any

import rich.console
import rich.table

from benchmarks import resumable, sources, stepping

LOSSES = ("alone", "kd", "reverse_kl", "jsd", "cached", "hidden")
PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {"steps": 400, "teacher_steps": 1200, "layers": 4, "width": 128, "batch": 8, "length": 128},
    "gpu": {"steps": 5000, "teacher_steps": 20000, "layers": 12, "width": 768, "batch": 64, "length": 512},
}


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="text:", help="text:<file or folder>; text: alone is Python's own library")
    parser.add_argument("--losses", default=",".join(LOSSES), help=f"some of {', '.join(LOSSES)}")
    parser.add_argument("--seeds", type=int, default=3, help="how many students; of weights and batches")
    parser.add_argument("--steps", type=int, help="of a student")
    parser.add_argument("--teacher-steps", type=int, help="of the teacher")
    parser.add_argument("--layers", type=int, help="of the teacher; the student has half as many")
    parser.add_argument("--width", type=int, help="of the teacher; the student has half of it")
    parser.add_argument("--batch", type=int, help="rows a step")
    parser.add_argument("--length", type=int, help="bytes a row")
    parser.add_argument("--k", type=int, default=16, help="log-probabilities of a byte that are cached")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="its peak")
    parser.add_argument("--test-rows", type=int, default=512, help="rows of the test split that are scored; 0 is all")
    parser.add_argument("--compute-dtype", choices=("float32", "bfloat16"), default="float32", help="of training")
    parser.add_argument("--mesh", default="data=-1", help="devices")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/distill_lm"), help="folder of the runs")
    arguments = resumable.parse(parser, PRESETS)
    resumable.check_whole(arguments, seeds=1, steps=1, teacher_steps=1, layers=2, batch=1, length=1, k=1, test_rows=0)
    if arguments.layers % 2 or arguments.width % 16:
        raise ValueError(f"--layers={arguments.layers} --width={arguments.width}; expected an even number, and a multiple of 16")
    return arguments


class Bench:
    """Data, devices and networks of all runs. Raises ValueError where source, sizes, batch and devices do not fit each other."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from bmjax import config
        from bmjax.models import Decoder

        self.arguments = arguments
        self.dataset, self.mesh = sources.texts(arguments)
        found = []
        for part in (1, 2):
            width = arguments.width // part
            network = Decoder(layers=arguments.layers // part, width=width, heads=4, neurons=3 * width)
            config.validate(network, "network")
            found.append(network.build(self.dataset.shape, self.dataset.classes))
        self.teacher, self.student = found

    def terms(self, loss: str) -> dict[str, tuple[float, Any]]:
        from bmjax import data, distill, losses

        task = losses.cross_entropy_term()
        if loss == "alone":
            return {"ce": (1.0, task)}
        if loss == "hidden":
            layers = distill.uniform()
            return {"ce": (1.0, task), loss: (0.1, losses.on_features(distill.hidden_states, layers, project="linear"))}
        if loss == "cached":
            layout = data.RecordLayout(min(self.arguments.k, self.dataset.classes), self.dataset.classes)

            def cached(s: Any, t: Any) -> Any:
                return distill.cached_kd(s, *layout.unpack(layout.pack(t)), temperature=1.0)

            return {"ce": (0.5, task), loss: (0.5, losses.on_logits(cached))}
        return {"ce": (0.5, task), loss: (0.5, losses.on_logits(getattr(distill, loss), temperature=1.0))}

    def problem(self, loss: str, teaches: bool = False) -> Any:
        from bmjax.train import Problem

        steps = self.arguments.teacher_steps if teaches else self.arguments.steps
        optimizer = sources.adamw(self.arguments.learning_rate)
        return Problem(
            self.teacher if teaches else self.student,
            self.terms(loss),
            optimizer.build(steps),
            teacher=None if loss == "alone" else self.teacher,
            loss_tx=optimizer.build_for_terms(steps),
            compute_dtype=self.arguments.compute_dtype,
        )

    def bits(self, model: Any, params: Any) -> float:
        """Bits per byte on the test split."""
        return sources.bits(self.arguments, self.dataset, self.mesh, model, params)

    @functools.cached_property
    def frozen(self) -> Any:
        """The teacher that `teach` kept, on the devices."""
        params = sources.kept(self.arguments.out / "teacher.npz", self.teacher, self.mesh)
        return {"params": params, "model_state": {}}


def teach(bench: Bench) -> dict[str, Any]:
    """Trains the teacher and keeps it in the folder."""
    from bmjax import data, trees

    seed = 10**6
    batches = data.train_batches(bench.dataset.train, bench.arguments.batch, seed)
    state, times, lost = stepping.train(
        bench.problem("alone", teaches=True), bench.mesh, batches, bench.arguments.teacher_steps, seed
    )
    if lost:
        sys.exit(f"distill_lm: the teacher's loss is not finite at step {lost}; give a lower --learning-rate")
    params = state.params["model"]
    sources.keep(bench.arguments.out / "teacher.npz", params)
    return {"loss": "teacher", "parameters": trees.size(params), "bits": bench.bits(bench.teacher, params), **times}


def student(bench: Bench, loss: str, seed: int) -> dict[str, Any]:
    """Trains and scores a student."""
    import jax

    from bmjax import data, trees

    batches = data.train_batches(bench.dataset.train, bench.arguments.batch, seed)
    frozen = None if loss == "alone" else bench.frozen
    state, times, lost = stepping.train(bench.problem(loss), bench.mesh, batches, bench.arguments.steps, seed, frozen=frozen)
    params = state.params["model"]
    found = {"loss": loss, "seed": seed, "parameters": trees.size(params), "diverged_at": lost, **times}
    found["device"] = jax.devices()[0].device_kind
    return found if lost else {**found, "bits": bench.bits(bench.student, params)}


def prepare(arguments: argparse.Namespace) -> tuple[Bench, dict[str, Callable[[], dict[str, Any]]]]:
    """(bench, {name of a run: function that makes it}). Raises ValueError where one of them could not be run."""
    chosen = resumable.names(arguments.losses, LOSSES, "loss")
    bench = Bench(arguments)
    for loss in chosen:
        bench.problem(loss)
    jobs: dict[str, Callable[[], dict[str, Any]]] = {"teacher": functools.partial(teach, bench)}
    for seed in range(arguments.seeds):
        jobs |= {f"{loss}_{seed}": functools.partial(student, bench, loss, seed) for loss in chosen}
    apart = ("losses", "seeds", "out", "preset")
    settings = {name: value for name, value in vars(arguments).items() if name not in apart}
    resumable.check_folder(arguments.out, {**settings, "data": bench.dataset.fingerprint})
    return bench, jobs


def show(console: rich.console.Console, results: list[dict[str, Any]]) -> None:
    columns = ("bits per byte", "below alone", "ms a step", "parameters", "runs")
    table = rich.table.Table("loss", *columns, title="mean (spread over seeds)")
    alone = {result["seed"]: result["bits"] for result in results if result["loss"] == "alone" and "bits" in result}
    for name in dict.fromkeys(result["loss"] for result in results):
        every = [result for result in results if result["loss"] == name]
        good = [result for result in every if "bits" in result]
        gains = [alone[result["seed"]] - result["bits"] for result in good if result.get("seed") in alone]
        bits = resumable.mean_and_spread([result["bits"] for result in good], 4) if good else "diverged"
        gain = resumable.mean_and_spread(gains, 4) if gains and name != "alone" else ""
        speed = f"{1e3 * statistics.mean(result['seconds_a_step'] for result in every):.1f}"
        table.add_row(name, bits, gain, speed, f"{every[0]['parameters']:,}", f"{len(good)} of {len(every)}")
    console.print(table)


def main() -> None:
    try:
        arguments = flags()
        bench, jobs = prepare(arguments)
    except ValueError as error:
        sys.exit(f"distill_lm: {error}")
    console = rich.console.Console(width=120)
    console.print(f"{len(bench.dataset.train):,} training rows of {arguments.length}, {len(jobs)} runs, in {arguments.out}")
    describe = lambda result: f"{result['bits']:.4f} bits per byte, {result['seconds']:.0f} s" if "bits" in result else "diverged"
    results = resumable.collect(arguments.out, jobs, console.print, describe)
    if results:
        show(console, list(results.values()))


if __name__ == "__main__":
    main()
