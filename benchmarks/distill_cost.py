"""What distillation adds to a step, interleaved in one process: online beside its parts timed alone, cached beside no teacher.

    python -m benchmarks.distill_cost --out=distill_cost.json

"online": the step of student and teacher against the student's own step plus the teacher's forward pass (limit 1.05). "cached":
the step that reads a cache of 64 log-probabilities an item from the disk against the step without a teacher, both with their data
(limit 1.10). "resnet": ResNet-8 of 16 channels and a teacher of 32, images of 16 pixels; "decoder": 4 layers of --width and a
teacher of 6 of half as much again, --rows x 128 tokens, --vocabulary ids. The loss touches every logit of both, the networks
width times as much, so that the narrower the network is the more the loss weighs. Each figure is the median over rounds of
segments, run in turn.
"""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import statistics
import tempfile
import time

import rich.console
import rich.table

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
LIMITS = {"online": 1.05, "cached": 1.10}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1, help="CPU devices to simulate; 0 takes those that are there")
    parser.add_argument("--pairs", type=int, default=15, help="interleaved rounds of segments")
    parser.add_argument("--only", choices=("resnet", "decoder"), help="one size")
    parser.add_argument("--vocabulary", type=int, default=8192, help="token ids of the decoder")
    parser.add_argument("--width", type=int, default=512, help="of the decoder")
    parser.add_argument("--rows", type=int, default=4, help="of tokens a step")
    parser.add_argument("--temperature", type=float, default=2.0, help="of the distillation")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu counts this process's CPU seconds: steadier beside other work, CPUs only",
    )
    parser.add_argument("--toy", action="store_true", help="small networks: shows that it runs, its figures mean nothing")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    arguments = parser.parse_args()
    from bmjax import parallel

    parallel.simulate(arguments.devices)
    results = {}
    for name in [arguments.only] if arguments.only else ("resnet", "decoder"):
        with segments(name, arguments) as (steps, found):
            times = alternate(found, arguments.pairs, CLOCKS[arguments.clock])
            results[name] = {"steps": steps, **figures(times, steps)}
    show(results, arguments.devices)
    if arguments.out:
        about = {
            name: getattr(arguments, name) for name in ("devices", "vocabulary", "width", "rows", "temperature", "clock", "toy")
        }
        about["cores"] = os.cpu_count()
        arguments.out.write_text(json.dumps({**about, **results}, indent=1))


def alternate(found, pairs: int, clock) -> dict[str, list[float]]:
    """Seconds of each segment in each round; who is first changes with the round."""
    for segment in found.values():
        segment()
    times = {name: [] for name in found}
    order = collections.deque(found)
    for _ in range(pairs):
        for name in order:
            start = clock()
            found[name]()
            times[name].append(clock() - start)
        order.rotate(1)
        if len(times[name]) % len(order) == 0:
            order.reverse()
    return times


def figures(times: dict[str, list[float]], steps: int) -> dict[str, object]:
    """Median ms a step of each segment, and both ratios, taken round by round, with their middle half."""
    rounds = [dict(zip(times, row)) for row in zip(*times.values())]
    ratios = {
        "online": sorted(row["online"] / (row["student"] + row["teacher"]) for row in rounds),
        "cached": sorted(row["cached"] / row["plain"] for row in rounds),
    }
    quarter = len(rounds) // 4
    return {
        "ms": {name: 1e3 * statistics.median(row) / steps for name, row in times.items()},
        "ratios": {
            name: {"median": statistics.median(row), "low": row[quarter], "high": row[-1 - quarter], "limit": LIMITS[name]}
            for name, row in ratios.items()
        },
    }


def show(results, devices: int) -> None:
    table = rich.table.Table(f"{devices} device(s)", "step", "beside", "ratio", "middle half", "limit")
    for name, row in results.items():
        ms, ratios = row["ms"], row["ratios"]
        parts = {
            "online": (f"{ms['online']:.1f} ms", f"{ms['student']:.1f} + {ms['teacher']:.1f} ms"),
            "cached": (f"{ms['cached']:.1f} ms", f"{ms['plain']:.1f} ms"),
        }
        for kind, (step, beside) in parts.items():
            found = ratios[kind]
            middle = f"{found['low']:.3f} to {found['high']:.3f}"
            table.add_row(f"{name}, {kind}", step, beside, f"{found['median']:.3f}", middle, f"{found['limit']:.2f}")
    rich.console.Console().print(table)


def networks(name: str, arguments):
    """(student, teacher, split, batch, k, steps of a segment)."""
    import numpy as np

    from bmjax.data import Split
    from bmjax.models import Decoder, ResNet

    rng, toy = np.random.default_rng(0), arguments.toy
    if name == "resnet":
        width, shape, classes, n, batch = 4 if toy else 16, (8, 8, 3) if toy else (16, 16, 3), 10, 256, 64
        student, teacher = (ResNet(depth=8, width=width * times).build(shape, classes) for times in (1, 2))
        inputs, targets = rng.normal(size=(n, *shape)).astype(np.float32), rng.integers(0, classes, n).astype(np.int32)
        return student, teacher, Split(inputs, targets, np.arange(n, dtype=np.int32)), batch, classes, 2 if toy else 10
    length, classes, batch, n = 16 if toy else 128, 256 if toy else arguments.vocabulary, arguments.rows, 32
    make = lambda layers, width: Decoder(layers=layers, width=width, heads=4, neurons=3 * width).build((length,), classes)
    student, teacher = (make(1, 16), make(1, 32)) if toy else (make(4, arguments.width), make(6, 3 * arguments.width // 2))
    tokens = rng.integers(0, classes, (n, length + 1)).astype(np.int32)
    return student, teacher, Split(tokens[:, :-1], tokens[:, 1:], np.arange(n, dtype=np.int32)), batch, 64, 2


@contextlib.contextmanager
def segments(name: str, arguments):
    """(steps, {segment: function}) of one size: online and its two parts on a batch that is there, cached and plain with data."""
    import jax
    import optax

    from bmjax import data, distill, losses, parallel
    from bmjax.train import run as runs

    student, teacher, split, size, k, steps = networks(name, arguments)
    mesh, temperature = parallel.make_mesh("data=-1"), arguments.temperature
    hard = losses.cross_entropy_term()
    plain = data.train_batches(split, size, 0)
    placed = parallel.put_batch(plain[0], mesh)
    params, model_state = jax.jit(teacher.init)(jax.random.key(1), plain[0])
    frozen = jax.device_put({"params": params, "model_state": model_state}, parallel.replicated(mesh))
    forward = runs.predictor(teacher)
    one = lambda batch: forward(frozen["params"], frozen["model_state"], batch)
    layout = data.RecordLayout(k, teacher_classes(one, plain[0]), temperatures=(1.0, temperature) if temperature != 1 else (1.0,))
    soft = losses.on_logits(distill.kd, temperature=temperature)
    cached = losses.on_cached(distill.cached_kd, layout, temperature=temperature)

    def stepper(batches, term, partner=None):
        """A segment of steps on the batches, which read each loss a step late."""
        terms = {"ce": (1.0, hard)} if term is None else {"ce": (0.1, hard), "kd": (0.9, term)}
        return driven(student, terms, optax.adamw(1e-3), mesh, batches, steps, partner and (teacher, frozen))

    def teach() -> None:
        """The teacher's forward passes, each waited for when the next one is on its way, as the steps' losses are."""
        late = None
        for _ in range(steps):
            found = one(placed)
            if late is not None:
                late.block_until_ready()
            late = found
        late.block_until_ready()

    with tempfile.TemporaryDirectory() as folder:
        beside = write(folder, split, layout, one, mesh, size)
        yield (
            steps,
            {
                "online": stepper(None, soft, partner=True)(placed),
                "student": stepper(None, None)(placed),
                "teacher": teach,
                "cached": stepper(data.train_batches(beside, size, 0), cached)(None),
                "plain": stepper(plain, None)(None),
            },
        )


def teacher_classes(one, batch) -> int:
    import jax

    return jax.eval_shape(one, dict(batch)).shape[-1]


def write(folder: str, split, layout, one, mesh, size: int):
    """The split beside a cache of the teacher, on the disk."""
    import jax
    import numpy as np

    from bmjax import data, parallel

    zero = np.zeros((), np.float32)
    kind = "tokens" if split.tokens else "classes"
    names = () if split.tokens else tuple(map(str, range(layout.vocabulary)))
    dataset = data.Dataset("made up", split, split, split, names, zero, zero + 1, "none", kind, layout.vocabulary)
    plan = data.plan_cache("made up", "none", dataset, data.Data(batch=size), layout)
    batches, pack = data.eval_batches(split, size), jax.jit(layout.pack)

    def records(first: int, last: int):
        for step in range(first // size, -(-last // size)):
            yield np.asarray(pack(one(parallel.put_batch(batches[step], mesh))))[: last - step * size]

    data.write_cache(folder, plan, split.id, records)
    return data.open_cache(folder).beside(split)


def driven(model, terms, tx, mesh, batches, steps: int, partner):
    """(placed batch or None) -> a function that trains for so many steps, going on from where the last call ended."""
    import jax

    from bmjax import parallel
    from bmjax.train import Problem, init_state, make_step
    from bmjax.train import run as runs

    teacher, frozen = partner or (None, None)
    problem = Problem(model, terms, tx, teacher=teacher)

    def make(placed):
        example = placed if batches is None else batches[0]
        held = [init_state(problem, mesh, runs.rules_of(model), jax.random.key(0), example, frozen=frozen), 0]
        step = make_step(problem, mesh, held[0])

        def segment() -> None:
            state, start = held
            made = (placed if batches is None else batches[i] for i in range(start, start + steps))
            late = None
            for batch in made if batches is None else parallel.feed(made, mesh):
                state, metrics = step(state, frozen, batch)
                if late is not None:
                    float(late)
                late = metrics["loss"]
            float(late)
            held[:] = state, start + steps

        return segment

    return make


if __name__ == "__main__":
    main()
