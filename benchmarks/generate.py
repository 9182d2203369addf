"""Tokens a second with the cache of keys and values, beside a forward pass over the whole row for each token.

    python -m benchmarks.generate --length=256 --out=generate.json

Both continue the same prompts to the same length, greedily, in one jitted scan, and must agree on the tokens. Each figure is the
median over runs taken in turn; wanted is 5 times the speed at length 256.
"""

import argparse
import json
import os
import pathlib
import statistics
import time

import rich.console
import rich.table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=256, help="tokens in a row when it is done")
    parser.add_argument("--prompt", type=int, default=16, help="tokens that are given")
    parser.add_argument("--batch", type=int, default=4, help="rows")
    parser.add_argument("--layers", type=int, default=4, help="of the model")
    parser.add_argument("--width", type=int, default=256, help="of the model")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    arguments = parser.parse_args()
    results = compare(arguments)
    show(results, arguments)
    if arguments.out:
        settings = {name: getattr(arguments, name) for name in ("length", "prompt", "batch", "layers", "width", "repeats")}
        arguments.out.write_text(json.dumps({"cores": os.cpu_count(), **results, "settings": settings}, indent=1))


def compare(arguments: argparse.Namespace) -> dict[str, float]:
    """Medians of generated tokens a second, and of the ratio taken run by run."""
    cached, uncached = samplers(arguments)
    same = (cached() == uncached()).mean()
    if same < 0.99:  # an argmax between two equal logits may fall either way
        raise ValueError(f"cached and uncached agree on {same:.1%} of the tokens only")
    tokens = arguments.batch * (arguments.length - arguments.prompt)
    rates: dict[str, list[float]] = {"cached": [], "uncached": []}
    for repeat in range(arguments.repeats):
        both = [("cached", cached), ("uncached", uncached)]
        for name, run in both if repeat % 2 else both[::-1]:
            start = time.perf_counter()
            run()
            rates[name].append(tokens / (time.perf_counter() - start))
    ratio = statistics.median(a / b for a, b in zip(rates["cached"], rates["uncached"]))
    return {**{name: statistics.median(values) for name, values in rates.items()}, "ratio": ratio, "agree": float(same)}


def samplers(arguments: argparse.Namespace):
    """Two functions that return the tokens generated, [batch, steps] on the host."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from bmjax.models import Decoder, generate

    width, length, start = arguments.width, arguments.length, arguments.prompt
    model = Decoder(layers=arguments.layers, width=width, heads=width // 32 or 1, neurons=3 * width).build((length,), 512)
    prompt = np.random.default_rng(0).integers(0, 512, (arguments.batch, start)).astype(np.int32)
    params, _ = jax.jit(model.init)(jax.random.key(0), {"inputs": prompt})
    # Fresh tables are small, and the likeliest tokens nearly equal: scaled up, rounding does not decide.
    params["embed"]["embedding"] *= 50

    @jax.jit
    def whole(params, prompt):
        def step(row, place):
            logits = model.apply(params, {}, {"inputs": row})[0].logits
            last = jax.lax.dynamic_index_in_dim(logits, place - 1, axis=1, keepdims=False)
            token = jnp.argmax(last, axis=-1).astype(jnp.int32)
            return jax.lax.dynamic_update_index_in_dim(row, token, place, axis=1), token

        row = jnp.pad(prompt, ((0, 0), (0, length - start)))
        return jax.lax.scan(step, row, jnp.arange(start, length))[1].T

    cached = lambda: np.asarray(generate(model, params, prompt, steps=length - start).tokens)
    return cached, lambda: np.asarray(whole(params, prompt))


def show(results: dict[str, float], arguments: argparse.Namespace) -> None:
    title = f"{arguments.batch} rows to {arguments.length} tokens"
    table = rich.table.Table(title, "cached, tokens/s", "uncached, tokens/s", "ratio", "wanted", "same tokens")
    rates = (f"{results[name]:.4g}" for name in ("cached", "uncached"))
    table.add_row("generate", *rates, f"{results['ratio']:.1f}", ">= 5", f"{results['agree']:.1%}")
    rich.console.Console().print(table)


if __name__ == "__main__":
    main()
