"""Model FLOPs utilisation of a decoder's train step, beside a plain PyTorch model of the same shape in the same run.

    python -m benchmarks.gpu_step --size=1b --attention=cudnn --peer --out=gpu.json    # one H200
    python -m benchmarks.gpu_step --size=toy                                          # anywhere, to see that it runs

Three figures: the plain step (AdamW, bfloat16 compute, float32 masters), the composed step (a teacher of the same size,
cross-entropy and kd, sparsify) against what its FLOPs predict from the plain one, and the peer (`torch.compile`, bfloat16
autocast, fused AdamW, SDPA). FLOPs are counted causally: half of the attention matrix. The embedding table is left out, and the
head is reported both ways.
"""

import argparse
import dataclasses
import importlib.util
import json
import pathlib
import statistics
import time

import rich.console
import rich.table

PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bfloat16 FLOP/s


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a pre-norm decoder: RMSNorm, RoPE, SwiGLU, grouped-query attention, untied head."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    neurons: int
    vocabulary: int
    length: int
    batch: int

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    def forward_flops(self, head: bool) -> float:
        """FLOPs of one token's forward pass, a multiply-add counted as 2."""
        attention = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        layer = 2 * (attention + 3 * self.width * self.neurons) + 2 * self.length * self.heads * self.head_dim
        return self.layers * layer + (2 * self.width * self.vocabulary if head else 0)


SHAPES = {
    "toy": Shape(2, 64, 4, 2, 128, 256, 64, 2),
    "1b": Shape(22, 2048, 32, 4, 5632, 32000, 2048, 8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="toy")
    parser.add_argument("--batch", type=int, help="sequences a step; the size's own if not given")
    parser.add_argument("--attention", choices=("xla", "cudnn"), default="xla")
    parser.add_argument("--remat", default="none", help="a remat policy by name, as in the decoder's config")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each model")
    parser.add_argument("--peer", action="store_true", help="time PyTorch too; it must be installed")
    parser.add_argument("--peak", type=float, help="FLOP/s of the device, where its name is not known here")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    arguments = parser.parse_args()
    if arguments.peer and importlib.util.find_spec("torch") is None:
        parser.exit(2, "error: --peer times PyTorch, which is not installed; install torch, or leave --peer out\n")
    shape = SHAPES[arguments.size]
    shape = dataclasses.replace(shape, batch=arguments.batch or shape.batch)
    rows = {
        "plain": ours(shape, arguments.attention, arguments.remat, arguments.steps, composed=False),
        "composed": ours(shape, arguments.attention, arguments.remat, arguments.steps, composed=True),
    }
    if arguments.peer:
        rows["PyTorch"] = peer(shape, arguments.steps)
    import jax

    kind = jax.devices()[0].device_kind
    peak = arguments.peak or next((value for name, value in PEAKS.items() if name in kind), None)
    results = {"device": kind, "shape": dataclasses.asdict(shape), "rows": report(rows, shape, peak)}
    show(results)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1))


def report(rows: dict[str, float], shape: Shape, peak: float | None) -> dict[str, dict[str, float | None]]:
    """Seconds a step, tokens/s and MFU of each model; the composed step's time against its FLOPs' prediction."""
    tokens = shape.batch * shape.length
    found = {}
    for name, seconds in rows.items():
        passes = 4 if name == "composed" else 3  # the teacher's forward pass is one more
        utilisation = {
            key: passes * tokens * shape.forward_flops(head) / seconds / peak if peak else None
            for key, head in (("mfu", True), ("mfu_without_head", False))
        }
        predicted = rows["plain"] * 4 / 3 if name == "composed" else None
        found[name] = {"seconds": seconds, "tokens_per_second": tokens / seconds, **utilisation, "predicted_seconds": predicted}
    return found


def show(results: dict) -> None:
    table = rich.table.Table(results["device"], "ms a step", "tokens/s", "MFU", "MFU without head", "ms by its FLOPs")
    percent = lambda value: "-" if value is None else f"{value:.1%}"
    for name, row in results["rows"].items():
        predicted = "-" if row["predicted_seconds"] is None else f"{1e3 * row['predicted_seconds']:.2f}"
        cells = (f"{1e3 * row['seconds']:.2f}", f"{row['tokens_per_second']:,.0f}")
        table.add_row(name, *cells, percent(row["mfu"]), percent(row["mfu_without_head"]), predicted)
    rich.console.Console().print(table)


def ours(shape: Shape, attention: str, remat: str, steps: int, *, composed: bool) -> float:
    """Median seconds of a train step of bmjax."""
    import jax
    import numpy as np
    import optax

    from bmjax import distill, losses, parallel, prune
    from bmjax.models import Decoder
    from bmjax.train import Problem, init_state, make_step

    config = Decoder(
        layers=shape.layers,
        width=shape.width,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        neurons=shape.neurons,
        attention=attention,
        remat=remat,
    )
    model, mesh = config.build((shape.length,), shape.vocabulary), parallel.make_mesh("data=-1", jax.devices()[:1])
    tokens = np.random.default_rng(0).integers(0, shape.vocabulary, (shape.batch, shape.length + 1)).astype(np.int32)
    batch = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones((shape.batch, shape.length), np.float32),
        "id": np.arange(shape.batch, dtype=np.int32),
    }
    tx, terms, frozen = optax.adamw(1e-4), {"ce": (1.0, losses.cross_entropy_term())}, None
    if composed:
        tx = optax.chain(tx, prune.sparsify(sparsity=0.8, schedule=prune.one_shot(0)))
        terms = {"ce": (0.5, losses.cross_entropy_term()), "kd": (0.5, losses.on_logits(distill.kd, temperature=2.0))}
        narrow = lambda key: jax.tree.map(lambda p: p.astype("bfloat16"), model.init(key, batch)[0])
        frozen = {"params": jax.jit(narrow)(jax.random.key(1)), "model_state": {}}
    problem = Problem(model, terms, tx, teacher=model if composed else None, compute_dtype="bfloat16")
    state = init_state(problem, mesh, model.rules, jax.random.key(0), batch, frozen=frozen)
    step, placed = make_step(problem, mesh, state), parallel.put_batch(batch, mesh)

    def once() -> None:
        nonlocal state
        state, metrics = step(state, frozen, placed)
        metrics["loss"].block_until_ready()

    return timed(once, steps)


def timed(once, steps: int) -> float:
    """Median seconds of a call, after three that are not counted."""
    for _ in range(3):
        once()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def peer(shape: Shape, steps: int) -> float:
    """Median seconds of a train step of the same decoder written plainly in PyTorch."""
    import torch
    from torch import nn
    from torch.nn import functional

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def rotate(x, cos, sin):
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            kv = shape.kv_heads * shape.head_dim
            self.norm_attention, self.norm_mlp = nn.RMSNorm(shape.width), nn.RMSNorm(shape.width)
            self.query, self.out = (nn.Linear(shape.width, shape.width, bias=False) for _ in range(2))
            self.key, self.value = (nn.Linear(shape.width, kv, bias=False) for _ in range(2))
            self.gate, self.up = (nn.Linear(shape.width, shape.neurons, bias=False) for _ in range(2))
            self.down = nn.Linear(shape.neurons, shape.width, bias=False)

        def forward(self, x, cos, sin):
            y = self.norm_attention(x)
            q, k, v = (part(y).unflatten(-1, (-1, shape.head_dim)).transpose(1, 2) for part in (self.query, self.key, self.value))
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shape.heads != shape.kv_heads)
            x = x + self.out(y.transpose(1, 2).flatten(2))
            y = self.norm_mlp(x)
            return x + self.down(functional.silu(self.gate(y)) * self.up(y))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(shape.vocabulary, shape.width)
            self.blocks = nn.ModuleList(Block() for _ in range(shape.layers))
            self.norm, self.head = nn.RMSNorm(shape.width), nn.Linear(shape.width, shape.vocabulary, bias=False)
            frequency = 10000.0 ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
            angle = torch.outer(torch.arange(shape.length), frequency)
            self.register_buffer("cos", angle.cos())
            self.register_buffer("sin", angle.sin())

        def forward(self, tokens):
            x = self.embed(tokens)
            cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
            for block in self.blocks:
                x = block(x, cos, sin)
            return self.head(self.norm(x))

    model = Model().to(device)
    compiled = torch.compile(model) if device == "cuda" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")
    tokens = torch.randint(0, shape.vocabulary, (shape.batch, shape.length + 1), device=device)

    def once() -> None:
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = compiled(tokens[:, :-1])
            loss = functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return timed(once, steps)


if __name__ == "__main__":
    main()
