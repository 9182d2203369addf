"""What masks cost beside Adam, a byte a weight and packed at a bit a weight: memory, a quiet step, a step that makes masks.

    python -m benchmarks.packed_masks --millions=10 --out=packed_masks.json

Memory is bytes of the pruning's state a weight, and relative to float32 parameters and Adam's two moments. Figures of time are
medians over repeats, all measured in turn so that a busy machine slows them alike; "adam" is the optimiser without pruning. A
step is one update and its application, with donated parameters and state. Wanted: packed masks add at most 1.1%.
"""

import argparse
import json
import os
import pathlib
import statistics
import time
from typing import Any, NamedTuple

import rich.console
import rich.table

WANTED = 1.1  # percent of parameters and moments
EVERY = 2  # masks are made at every other step, so that either kind of step may be timed in turn


class Runner(NamedTuple):
    """A compiled step and what it goes on from.

    Attributes:
        step: (params, state, grads) -> (params, state), donated.
        held: [params, state] that the next step starts from.
    """

    step: Any
    held: list[Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, default=10, help="of float32 weights, about, in layers of 4 kernels")
    parser.add_argument("--width", type=int, default=1024, help="of a layer: kernels of width x 4 width and back, two square")
    parser.add_argument("--sparsity", type=float, default=0.8, help="fraction that the masks drop in the end")
    parser.add_argument("--repeats", type=int, default=15, help="of each figure")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    arguments = parser.parse_args()
    found = measure(weights(arguments.millions, arguments.width), arguments.sparsity, arguments.repeats)
    show(found)
    if arguments.out:
        arguments.out.write_text(json.dumps({"cores": os.cpu_count(), "load": os.getloadavg(), **found}, indent=1))


def weights(millions: int, width: int) -> Any:
    """Layers of a transformer's kernels, as many as make about so many weights."""
    import jax

    shapes = {"up": (width, 4 * width), "down": (4 * width, width), "query": (width, width), "output": (width, width)}
    layers = max(1, round(millions * 1e6 / sum(a * b for a, b in shapes.values())))
    keys = iter(jax.random.split(jax.random.key(0), layers * len(shapes)))
    layer = lambda: {name: {"kernel": jax.random.normal(next(keys), shape)} for name, shape in shapes.items()}
    return {f"layers_{i}": layer() for i in range(layers)}


def measure(params: Any, sparsity: float, repeats: int) -> dict[str, Any]:
    """{weights, bytes {kind: of the pruning's state}, percent {kind: of parameters and moments}, milliseconds {kind: {step}}}.

    Raises:
        RuntimeError: packed masks differ from plain ones.
    """
    import jax
    import numpy as np
    import optax

    from bmjax import prune, trees

    adam = optax.adam(1e-3)
    # It never ends, so that masks go on being made; what is dropped stays, and the same thresholds are found again.
    schedule = prune.periodic(0, 10**6)
    pruned = lambda packed: prune.around(adam, sparsity=sparsity, schedule=schedule, every=EVERY, packed=packed)
    kinds = {"adam": adam, "plain": pruned(False), "packed": pruned(True)}
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(1), p.shape), params)
    runners = {kind: runner(tx, params) for kind, tx in kinds.items()}
    states = {kind: run.held[1].pruning for kind, run in runners.items() if kind != "adam"}
    size, dense = trees.size(params), trees.nbytes(params) + trees.nbytes(adam.init(params))
    extra = {kind: trees.nbytes(state) for kind, state in states.items()}
    milliseconds = interleaved(runners, grads, repeats)
    masks = [jax.tree.leaves(prune.masks(runners[kind].held[1], params)) for kind in ("plain", "packed")]
    if not all(np.array_equal(one, other) for one, other in zip(*masks)):
        raise RuntimeError("packed masks differ from plain ones")
    percent = {kind: 100 * of / dense for kind, of in extra.items()}
    return {"weights": size, "dense_bytes": dense, "bytes": extra, "percent": percent, "milliseconds": milliseconds}


def runner(tx: Any, params: Any) -> Runner:
    """The compiled step of an optimiser, with parameters of its own."""
    import jax
    import optax

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    own = jax.tree.map(lambda p: p.copy(), params)
    state = jax.jit(tx.init)(own)
    return Runner(jax.jit(step, donate_argnums=(0, 1)).lower(own, state, params).compile(), [own, state])


def interleaved(runners: dict[str, Runner], grads: Any, repeats: int) -> dict[str, dict[str, float]]:
    """{kind: {"quiet", "masks": median milliseconds}}; two rounds before do not count."""
    import jax

    spent: dict[str, tuple[list[float], ...]] = {kind: ([], []) for kind in runners}
    for repeat in range(EVERY * (repeats + 2)):
        for kind, run in runners.items():
            start = time.perf_counter()
            run.held[:] = jax.block_until_ready(run.step(*run.held, grads))
            if repeat >= 2 * EVERY:
                spent[kind][repeat % EVERY].append(1e3 * (time.perf_counter() - start))
    medians = {kind: [statistics.median(turn) for turn in turns] for kind, turns in spent.items()}
    return {kind: {"masks": masks, "quiet": quiet} for kind, (masks, quiet) in medians.items()}


def show(found: dict[str, Any]) -> None:
    title = f"{found['weights'] / 1e6:.1f} million weights"
    table = rich.table.Table(title, "bytes", "bytes / weight", "% of parameters + Adam", "quiet, ms", "masks, ms")
    dense, spent = found["dense_bytes"], found["milliseconds"]
    adam = statistics.median(spent["adam"].values())
    table.add_row("adam alone", f"{dense:,}", f"{dense / found['weights']:.3f}", "100", f"{adam:.1f}", "")
    for kind, extra in found["bytes"].items():
        times = (f"{spent[kind][turn]:.1f}" for turn in ("quiet", "masks"))
        table.add_row(f"{kind} masks", f"{extra:,}", f"{extra / found['weights']:.4f}", f"{found['percent'][kind]:.2f}", *times)
    console = rich.console.Console(width=120)
    console.print(table)
    verdict = "as wanted" if found["percent"]["packed"] <= WANTED else "more than wanted"
    console.print(f"packed masks add {found['percent']['packed']:.2f}% (at most {WANTED}% wanted): {verdict}")


if __name__ == "__main__":
    main()
