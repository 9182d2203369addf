"""What pruning adds to a training step: the amortised time of ten steps, one of which makes masks, beside the plain optax step.

    python -m benchmarks.prune_overhead --tokens=8x64 --out=prune_overhead.json
    python -m benchmarks.prune_overhead --tokens=1x64 --jaxpruner=<folder that holds its package>

A decoder of 7.4M parameters with adamw, float32. All methods are trained in turn in one process, ten steps at a time, each step
waited for; figures are medians over rounds of the ratio to the plain step of the same round. "between" is a step that makes no
masks. JaxPruner is no longer developed: names that JAX has dropped since are given back to it here, nothing else.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time

import rich.console
import rich.table

EVERY, SPARSITY = 10, 0.8
LIMITS = {  # wanted at most, at 8x64 and at 1x64
    "magnitude": (1.03, 1.12),
    "global": (1.03, 1.12),
    "2:4": (1.03, 1.10),
    "RigL": (1.08, 1.35),
    "SET": (1.08, 1.35),
    "straight-through": (1.12, 1.6),
    "straight-through 2:4": (1.12, 1.6),
}


def ours(axes):
    """{name: (optimiser, view or None)}; axes: {kernel: the axis that it contracts}."""
    import optax

    from bmjax import prune

    adamw = optax.adamw(1e-3)
    how = {"schedule": prune.cubic(0, 10**6), "every": EVERY}
    forever = {"end": 10**6, "every": EVERY, "sparsity": SPARSITY}
    straight = lambda **more: prune.straight_through(schedule=prune.periodic(), every=EVERY, **more)
    masks, pairs = straight(sparsity=SPARSITY), straight(pattern=prune.n_m(2, 4, axes))
    again = {**how, "schedule": prune.periodic(0, 10**6)}
    return {
        "plain": (adamw, None),
        "magnitude": (optax.chain(adamw, prune.sparsify(sparsity=SPARSITY, **how)), None),
        "magnitude, packed": (optax.chain(adamw, prune.sparsify(sparsity=SPARSITY, packed=True, **how)), None),
        "global": (optax.chain(adamw, prune.sparsify(sparsity=SPARSITY, allocation=prune.global_threshold(), **how)), None),
        "2:4": (optax.chain(adamw, prune.sparsify(pattern=prune.n_m(2, 4, axes), **again)), None),
        "saliency": (prune.around(adamw, prune.saliency(), sparsity=SPARSITY, **how), None),
        "RigL": (prune.rigl(adamw, **forever), None),
        "SET": (prune.sparse_evolution(adamw, **forever), None),
        "straight-through": (optax.chain(adamw, masks.tx), masks.view),
        "straight-through 2:4": (optax.chain(adamw, pairs.tx), pairs.view),
    }


def theirs(folder: pathlib.Path):
    """{name: JaxPruner's updater}; called "jaxpruner <name>"."""
    import jax
    import ml_collections

    def tree_map(fn, tree, *rest, is_leaf=None):
        own = is_leaf or (lambda x: False)
        one = lambda x, *others: None if x is None and not own(x) else fn(x, *others)
        return jax.tree.map(one, tree, *rest, is_leaf=lambda x: x is None or own(x))

    jax.tree_map = tree_map  # as it was: None in the first tree stands for anything in the others
    for name in ("tree_leaves", "tree_flatten", "tree_unflatten", "tree_structure"):
        if not hasattr(jax, name):
            setattr(jax, name, getattr(jax.tree_util, name))
    sys.path.insert(0, str(folder))
    import jaxpruner

    kinds = {
        "magnitude": ("magnitude", ""),
        "global": ("global_magnitude", ""),
        "2:4": ("magnitude", "nm_2,4"),
        "RigL": ("rigl", ""),
        "SET": ("set", ""),
        "straight-through": ("magnitude_ste", ""),
        "straight-through 2:4": ("magnitude_ste", "nm_2,4"),
    }
    found = {}
    for name, (algorithm, kind) in kinds.items():
        config = ml_collections.ConfigDict(
            {
                "algorithm": algorithm,
                "dist_type": "uniform",
                "sparsity": 0.5 if "2:4" in name else SPARSITY,
                "update_freq": EVERY,
                "update_start_step": 0,
                "update_end_step": 10**6,
                **({"sparsity_type": kind} if kind else {}),
            }
        )
        found[name] = jaxpruner.create_updater_from_config(config)
    return found


def trainers(rows: int, length: int, only: list[str], jaxpruner: pathlib.Path | None):
    """{name: a function that runs ten steps and returns their seconds, the making of masks first}."""
    import jax
    import numpy as np
    import optax

    from bmjax import trace, trees
    from bmjax.models import Decoder

    model = Decoder(layers=8, width=256, heads=4, kv_heads=4, neurons=1024, mlp="gelu").build((length,), 4096)
    tokens = np.random.default_rng(0).integers(0, 4096, (rows, length + 1)).astype(np.int32)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    batch = {**batch, "weights": np.ones((rows, length), np.float32), "id": np.arange(rows, dtype=np.int32)}
    batch = jax.device_put(batch)
    params, _ = jax.jit(model.init)(jax.random.key(0), batch)
    print(f"{trees.size(params):,} parameters, {rows} x {length} tokens a step")

    def loss(params):
        logits = model.apply(params, {}, batch, train=True)[0].logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()

    def trainer(step, state):
        held = [state]

        def ten():
            seconds = []
            for _ in range(EVERY):
                start = time.perf_counter()
                held[0], value = step(held[0])
                float(value)
                seconds.append(time.perf_counter() - start)
            return seconds

        return ten

    def stepper(tx, view):
        def step(state):
            params, opt_state = state
            seen = trace.where_used(lambda p: loss(view(p, opt_state))) if view else loss
            value, grads = jax.value_and_grad(seen)(params)
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), value

        return step

    def stepper_of(updater, tx):
        def step(state):
            params, opt_state = state
            shown = updater.pre_forward_update(params, opt_state)
            value, grads = jax.value_and_grad(loss)(shown)
            updates, opt_state = tx.update(grads, opt_state, params)
            return (updater.post_gradient_update(optax.apply_updates(params, updates), opt_state), opt_state), value

        return step

    copy = lambda: jax.tree.map(lambda p: p.copy(), params)
    found = {}
    axes = trace.contracting(lambda p, b: model.apply(p, {}, b)[0].logits, params, batch)
    for name, (tx, view) in ours(axes).items():
        if name == "plain" or not only or name in only:
            step = jax.jit(stepper(tx, view), donate_argnums=0)
            found[name] = trainer(step, (copy(), jax.jit(tx.init)(params)))
    for name, updater in (theirs(jaxpruner) if jaxpruner else {}).items():
        if not only or name in only:
            tx = updater.wrap_optax(optax.adamw(1e-3))
            step = jax.jit(stepper_of(updater, tx), donate_argnums=0)
            found[f"jaxpruner {name}"] = trainer(step, (copy(), tx.init(params)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="8x64", help="rows x length of a step")
    parser.add_argument("--rounds", type=int, default=15, help="of ten steps of each method")
    parser.add_argument("--only", default="", help="methods, separated by semicolons")
    parser.add_argument("--jaxpruner", type=pathlib.Path, help="folder that holds the package jaxpruner, to run it too")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    arguments = parser.parse_args()
    rows, length = map(int, arguments.tokens.split("x"))
    found = trainers(rows, length, [name for name in arguments.only.split(";") if name], arguments.jaxpruner)
    for ten in found.values():
        ten()
    rounds = [{name: ten() for name, ten in found.items()} for _ in range(arguments.rounds)]
    figures = {}
    for name in found:
        total = [sum(times[name]) / sum(times["plain"]) for times in rounds]
        between = [statistics.median(times[name][1:]) / statistics.median(times["plain"][1:]) for times in rounds]
        figures[name] = {
            "amortised": statistics.median(total),
            "between": statistics.median(between),
            "step_ms": 1e3 * statistics.median(sum(times[name]) / EVERY for times in rounds),
            "masks_ms": 1e3 * statistics.median(times[name][0] - statistics.median(times[name][1:]) for times in rounds),
        }
    show(figures, arguments.tokens)
    if arguments.out:
        arguments.out.write_text(json.dumps({"tokens": arguments.tokens, "rounds": arguments.rounds, **figures}, indent=1))


def show(figures, tokens: str) -> None:
    table = rich.table.Table(f"{tokens} tokens", "amortised", "wanted", "between masks", "ms a step", "ms to make masks")
    for name, row in figures.items():
        limit = LIMITS.get(name, ())
        wanted = f"{limit[('8x64', '1x64').index(tokens)]:.2f}" if limit and tokens in ("8x64", "1x64") else ""
        cells = (f"{row['amortised']:.3f}", wanted, f"{row['between']:.3f}", f"{row['step_ms']:.1f}", f"{row['masks_ms']:.1f}")
        table.add_row(name, *cells)
    rich.console.Console().print(table)


if __name__ == "__main__":
    main()
