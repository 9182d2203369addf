"""Steps per second of bmjax beside a hand-written JAX loop, interleaved in one process.

    python -m benchmarks.step_overhead --devices=1 --out=overhead_1.json

"loop": the 128-64-32 classifier, batch 256, Adam, the whole loop with data, logging and NaN watch against a loop of ten lines
around a jitted step. "vit", "decoder", "resnet": a composed step of at least 20 ms with two loss terms, a teacher and sparsify
between two mask updates against the same mathematics written out. Each figure is the median over pairs of segments, run in turn.
"""

import argparse
import contextlib
import functools
import json
import os
import pathlib
import statistics
import tempfile
import time

import rich.console
import rich.table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1, help="CPU devices to simulate")
    parser.add_argument("--pairs", type=int, default=15, help="interleaved pairs of segments")
    parser.add_argument("--steps", type=int, default=1000, help="steps in a segment of the small classifier")
    parser.add_argument("--only", choices=("loop", "vit", "decoder", "resnet"), help="one comparison")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    arguments = parser.parse_args()
    from bmjax import parallel

    parallel.simulate(arguments.devices)
    composed_steps = {name: functools.partial(composed, name) for name in ("vit", "decoder", "resnet")}
    kinds = {"loop": functools.partial(classifier, arguments.steps), **composed_steps}
    results = {}
    for name in [arguments.only] if arguments.only else kinds:
        with kinds[name](arguments.devices) as (ours, by_hand, steps):
            results[name] = compare(ours, by_hand, steps, arguments.pairs)
    show(results, arguments.devices)
    if arguments.out:
        arguments.out.write_text(json.dumps({"devices": arguments.devices, "cores": os.cpu_count(), **results}, indent=1))


def compare(ours, by_hand, steps: int, pairs: int) -> dict[str, float]:
    """Medians of steps/s, and of the ratio ours / by hand taken pair by pair; the order changes with each pair."""
    for segment in (ours, by_hand):
        segment()
    rates: dict[str, list[float]] = {"ours": [], "by hand": []}
    for pair in range(pairs):
        both = [("ours", ours), ("by hand", by_hand)]
        for name, segment in both if pair % 2 else both[::-1]:
            start = time.perf_counter()
            segment()
            rates[name].append(steps / (time.perf_counter() - start))
    ratios = sorted(a / b for a, b in zip(rates["ours"], rates["by hand"]))
    quarter = len(ratios) // 4
    return {
        "ours": statistics.median(rates["ours"]),
        "by_hand": statistics.median(rates["by hand"]),
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[quarter],
        "ratio_high": ratios[-1 - quarter],
        "pairs": pairs,
    }


def show(results: dict[str, dict[str, float]], devices: int) -> None:
    table = rich.table.Table(f"{devices} device(s)", "bmjax, steps/s", "by hand, steps/s", "ratio", "middle half")
    for name, row in results.items():
        middle = f"{row['ratio_low']:.3f} to {row['ratio_high']:.3f}"
        table.add_row(name, f"{row['ours']:.4g}", f"{row['by_hand']:.4g}", f"{row['ratio']:.3f}", middle)
    rich.console.Console().print(table)


def spread(gradients, devices: int):
    """The hand-written data parallelism: each device its rows, gradients by pmean."""
    import jax
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    if devices == 1:
        return gradients, lambda batch: batch
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))

    def body(params, *batch):
        params = jax.tree.map(lambda p: jax.lax.pcast(p, "data", to="varying"), params)
        return jax.lax.pmean(gradients(params, *batch), "data")

    def mapped(params, *batch):
        return jax.shard_map(body, mesh=mesh, in_specs=(P(), *(P("data") for _ in batch)), out_specs=P())(params, *batch)

    return mapped, functools.partial(jax.device_put, device=NamedSharding(mesh, P("data")))


def examples(n: int, shape: tuple[int, ...]):
    import numpy as np

    from bmjax.data import Split

    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(n, *shape)).astype(np.float32)
    return Split(inputs, rng.integers(0, 10, n).astype(np.int32), np.arange(n, dtype=np.int32))


@contextlib.contextmanager
def classifier(steps: int, devices: int):
    """128-64-32 on 64 features, batch 256, Adam."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from bmjax import data, losses, parallel
    from bmjax.models import Plain
    from bmjax.train import Problem, init_state, loop, make_step
    from bmjax.train.log import Log
    from bmjax.train.throughput import Meter

    split, model, mesh = examples(4096, (64,)), Plain().build((64,), 10), parallel.make_mesh("data=-1")
    tx, batches = optax.adam(1e-3), data.train_batches(split, 256, 0)
    problem = Problem(model, {"ce": (1.0, losses.cross_entropy_term())}, tx)
    state = init_state(problem, mesh, model.rules, jax.random.key(0), batches[0])
    step = make_step(problem, mesh, state)
    params = jax.tree.map(jnp.copy, jax.device_get(state.params["model"]))

    def gradients(params, x, y):
        def loss(params):
            hidden = x
            for name in ("hidden_0", "hidden_1", "hidden_2"):
                hidden = jax.nn.relu(hidden @ params[name]["kernel"] + params[name]["bias"])
            logits = hidden @ params["head"]["kernel"] + params["head"]["bias"]
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        return jax.value_and_grad(loss)(params)

    gradients, place = spread(gradients, devices)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def by_hand_step(params, opt, x, y):
        loss, grads = gradients(params, x, y)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, loss

    held = [params, tx.init(params), 0]

    def by_hand() -> None:
        params, opt, done = held
        rng, previous = np.random.default_rng(done), None
        order = rng.permutation(len(split))
        for i in range(steps):
            rows = order[(i * 256) % 4096 :][:256]
            params, opt, loss = by_hand_step(params, opt, *place((split.inputs[rows], split.targets[rows])))
            if previous is not None:
                float(previous)
            previous = loss
        held[:] = params, opt, done + steps
        float(previous)

    with tempfile.TemporaryDirectory() as folder, Log(folder, progress=False) as log:
        run = [state]

        def ours() -> None:
            start = int(run[0].step)
            fed = parallel.feed((batches[i] for i in range(start, start + steps)), mesh)
            meter = Meter.of(problem, run[0], None, batches[0], mesh.devices.flat, None)
            every = loop.Every(log=50)
            run[0] = loop.fit(step, run[0], None, fed, start + steps, log=log, name="run", every=every, meter=meter)

        yield ours, by_hand, steps


def networks(name: str):
    """(model, batch) of a composed step: sizes at which one takes at least 20 ms."""
    import numpy as np

    from bmjax.models import Decoder, ResNet, Transformer

    rng = np.random.default_rng(0)
    if name == "decoder":
        model = Decoder(layers=4, width=128, heads=4, kv_heads=2, neurons=256).build((128,), 256)
        tokens = rng.integers(0, 256, (8, 129)).astype(np.int32)
        return model, {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((8, 128), np.float32)}
    if name == "resnet":
        model, n, shape = ResNet(depth=8, width=16).build((16, 16, 3), 10), 64, (16, 16, 3)
    else:
        model, n, shape = Transformer(layers=4, width=64, heads=4, neurons=256).build((8, 8, 1), 10), 32, (8, 8, 1)
    inputs, targets = rng.normal(size=(n, *shape)).astype(np.float32), rng.integers(0, 10, n).astype(np.int32)
    return model, {"inputs": inputs, "targets": targets, "weights": np.ones(n, np.float32)}


@contextlib.contextmanager
def composed(network: str, devices: int):
    """A network with a teacher of its size, cross-entropy and kd, adamw, and masks that stand still."""
    import jax
    import jax.numpy as jnp
    import optax

    from bmjax import distill, losses, parallel, prune
    from bmjax.train import Problem, init_state, make_step

    (model, batch), mesh, adamw, steps = networks(network), parallel.make_mesh("data=-1"), optax.adamw(1e-3), 10
    everywhere = lambda tree: jax.device_put(tree, parallel.replicated(mesh))
    sparse = prune.sparsify(sparsity=0.8, schedule=prune.one_shot(0))
    terms = {"ce": (0.5, losses.cross_entropy_term()), "kd": (0.5, losses.on_logits(distill.kd, temperature=2.0))}
    problem = Problem(model, terms, optax.chain(adamw, sparse), teacher=model)
    teacher, model_state = everywhere(jax.jit(model.init)(jax.random.key(1), batch))
    frozen = {"params": teacher, "model_state": model_state}
    state = init_state(problem, mesh, model.rules, jax.random.key(0), batch, frozen=frozen)
    step = make_step(problem, mesh, state)
    placed = parallel.put_batch(batch, mesh)
    state, _ = step(state, frozen, placed)  # the one update of the masks
    params, masks = jax.device_get((state.params["model"], prune.masks(state.opt_state["model"])))

    def gradients(held, x, y):
        params, model_state, frozen = held

        def loss(params):
            student, new = model.apply(params, model_state, {"inputs": x}, train=True)
            teacher = jax.lax.stop_gradient(model.apply(frozen["params"], frozen["model_state"], {"inputs": x})[0].logits)
            hard = optax.softmax_cross_entropy_with_integer_labels(student.logits, y).mean()
            p, q = jax.nn.log_softmax(teacher / 2.0), jax.nn.log_softmax(student.logits / 2.0)
            return 0.5 * hard + 0.5 * 4.0 * (jnp.exp(p) * (p - q)).sum(-1).mean(), new

        return jax.value_and_grad(loss, has_aux=True)(params)

    spread_gradients, place = spread(gradients, devices)

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def by_hand_step(params, model_state, opt, masks, frozen, x, y):
        (loss, model_state), grads = spread_gradients((params, model_state, frozen), x, y)
        updates, opt = adamw.update(grads, opt, params)
        params = jax.tree.map(lambda p, m: jnp.where(m, p, 0), optax.apply_updates(params, updates), masks)
        return params, model_state, opt, loss

    masks = everywhere(masks)
    held = [everywhere(params), everywhere(jax.device_get(model_state)), everywhere(adamw.init(params))]
    x, y = place((batch["inputs"], batch["targets"]))
    run = [state]

    def ours() -> None:
        for _ in range(steps):
            run[0], metrics = step(run[0], frozen, placed)
            float(metrics["loss"])

    def by_hand() -> None:
        for _ in range(steps):
            *held[:], loss = by_hand_step(*held, masks, frozen, x, y)
            float(loss)

    yield ours, by_hand, steps


if __name__ == "__main__":
    main()
