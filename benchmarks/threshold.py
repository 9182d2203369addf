"""Time to find the k-th largest score and the mask of the largest, beside a sort and the floor that memory sets.

    python -m benchmarks.threshold --sizes=1,10,100 --out=threshold.json

Figures are medians over repeats, all measured in turn so that a busy machine slows them alike. "floor" is one `jnp.max`, and
"mask floor" one comparison with a known threshold: what reading the scores, and writing a mask, costs alone. "again" is the
mask once more, started from its own threshold. Wanted on 2 cores: the mask of 100 million in at most 0.25 s.
"""

import argparse
import json
import os
import pathlib
import statistics
import time

import rich.console
import rich.table

SORTED_UP_TO = 10  # million scores that are also sorted, unless asked for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1,10,100", help="millions of float32 scores")
    parser.add_argument("--columns", type=int, default=8000, help="of the matrix that the scores fill")
    parser.add_argument("--sparsity", type=float, default=0.8, help="fraction that the mask drops")
    parser.add_argument("--repeats", type=int, default=15, help="of each figure (of a sort, 3)")
    parser.add_argument("--sort", action="store_true", help=f"sort more than {SORTED_UP_TO} million too: a minute each")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    arguments = parser.parse_args()
    results = {}
    for millions in (int(size) for size in arguments.sizes.split(",")):
        sort = arguments.sort or millions <= SORTED_UP_TO
        results[millions] = measure(millions, arguments.columns, arguments.sparsity, arguments.repeats, sort)
    show(results)
    if arguments.out:
        arguments.out.write_text(
            json.dumps({"cores": os.cpu_count(), "milliseconds": results, "load": os.getloadavg()}, indent=1)
        )


def measure(millions: int, columns: int, sparsity: float, repeats: int, sort: bool) -> dict[str, float]:
    """{what: median milliseconds}, after a check that the mask is right."""
    import jax
    import jax.numpy as jnp

    from bmjax.prune import kth_largest, topk_mask
    from bmjax.prune.threshold import rank

    scores = jax.random.normal(jax.random.key(0), (millions * 1_000_000 // columns, columns))
    k = scores.size - round(sparsity * scores.size)
    kth = jax.jit(lambda x: kth_largest(x, k))
    mask = jax.jit(lambda x: topk_mask(x, sparsity))
    ranked = jax.jit(lambda x, near: rank([x], [k], near=near))
    cuts = ranked(scores, jnp.zeros(1, jnp.uint32)).cuts
    value = kth(scores)
    kept = mask(scores)
    if int(kept.sum()) != k or not bool(jnp.all(jnp.where(scores > value, kept, True) & jnp.where(scores < value, ~kept, True))):
        raise RuntimeError(f"the mask of {scores.size} scores is wrong")

    floor, mask_floor, by_sort = jax.jit(jnp.max), jax.jit(lambda x: x >= value), jax.jit(lambda x: jnp.sort(x, axis=None)[-k])
    timed = {
        "floor": lambda: floor(scores),
        "kth_largest": lambda: kth(scores),
        "mask floor": lambda: mask_floor(scores),
        "topk_mask": lambda: mask(scores),
        "again": lambda: ranked(scores, cuts),
    }
    found = interleaved(timed, repeats)
    if sort:
        if by_sort(scores) != value:
            raise RuntimeError(f"the {k}-th largest of {scores.size} scores is wrong")
        found |= interleaved({"sort": lambda: by_sort(scores)}, 3)
    return found


def interleaved(timed: dict, repeats: int) -> dict[str, float]:
    """{name: median milliseconds}; one turn before does not count."""
    import jax

    spent: dict[str, list[float]] = {name: [] for name in timed}
    for repeat in range(repeats + 1):
        for name, run in timed.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if repeat:
                spent[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(milliseconds) for name, milliseconds in spent.items()}


def show(results: dict[int, dict[str, float]]) -> None:
    columns = ("floor", "kth_largest", "sort", "mask floor", "topk_mask", "again")
    table = rich.table.Table("million scores, ms", *columns, "mask / floor")
    for millions, found in results.items():
        ratio = f"{found['topk_mask'] / found['floor']:.1f}"
        table.add_row(str(millions), *(f"{found[name]:.2f}" if name in found else "" for name in columns), ratio)
    rich.console.Console(width=120).print(table)


if __name__ == "__main__":
    main()
