"""Attention: grouped queries, rotary positions, packed rows, cuDNN where it runs, a cache of keys and values."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

_CUDNN_DTYPES = (jnp.bfloat16, jnp.float16)

CAPTURED = ("query", "key", "value", "scores")  # what `Attention` can return beside its output


def rope(positions: jax.Array, head_dim: int, base: float = 10000.0) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotary angles position * base^(-2i / head_dim) (Su et al. 2021, RoFormer).

    Args:
        positions: [B, T] int.
        head_dim: even.
        base: of the geometric series of frequencies.

    Returns:
        Two float32 arrays [B, T, 1, head_dim / 2].
    """
    frequencies = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_bthk: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Each head turned by its position; element i is paired with element i + head_dim / 2, as in GPT-NeoX and LLaMA."""
    cos, sin = rotation
    first, second = jnp.split(x_bthk, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_bthk.dtype)


def segment_mask(segments: jax.Array) -> jax.Array:
    """[B, 1, T, T] bool: which tokens of packed rows may see which; `segments` are [B, T] int."""
    return segments[:, None, :, None] == segments[:, None, None, :]


def segment_positions(segments: jax.Array) -> jax.Array:
    """[B, T] int: how far each token is from the first one of its segment, whose tokens stand side by side."""
    index = jnp.arange(segments.shape[1])[None]
    starts = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def scores(q_bthk: jax.Array, k_bshk: jax.Array, mask: jax.Array | None, causal: bool) -> jax.Array:
    """What attention takes the softmax of: q k' / sqrt(head_dim), and -inf where the query may not see the key.

    Args:
        q_bthk: [B, T, heads, head_dim].
        k_bshk: [B, S, kv_heads, head_dim]; heads / kv_heads queries share one.
        mask: bool, broadcasts to [B, heads, T, S], or None.
        causal: no query sees a later key.

    Returns:
        float32 [B, heads, T, S].
    """
    b, t, heads, head_dim = q_bthk.shape
    grouped = q_bthk.reshape(b, t, k_bshk.shape[2], -1, head_dim)
    products = jnp.einsum("btkgd,bskd->bkgts", grouped, k_bshk, preferred_element_type=jnp.float32)
    found = products.reshape(b, heads, t, -1) * head_dim**-0.5
    seen = jnp.ones((), bool) if mask is None else mask
    if causal:
        seen &= jnp.tril(jnp.ones(found.shape[-2:], bool))
    return jnp.where(seen, found, -jnp.inf)


def check_cudnn(dtype: jnp.dtype, head_dim: int) -> None:
    """Raises ValueError unless cuDNN's fused attention can run: an NVIDIA GPU, bfloat16 or float16, and heads that fit."""
    platform = jax.default_backend()
    if platform not in ("gpu", "cuda"):
        raise ValueError(f"attention is 'cudnn', which needs an NVIDIA GPU; this is a {platform}: set attention to 'xla'")
    if dtype not in _CUDNN_DTYPES:
        raise ValueError(f"attention is 'cudnn', which needs bfloat16 or float16; got {dtype}: cast parameters, or take 'xla'")
    if head_dim % 8 or head_dim > 256:
        raise ValueError(f"attention is 'cudnn', which needs heads of a multiple of 8, 256 at most; got {head_dim}: take 'xla'")


class Attention(nn.Module):
    """Multi-head attention with one kernel each for query, key, value and out; the softmax runs in float32.

    A Linen collection "cache" with "key" and "value" [B, slots, kv_heads, head_dim] turns it into a step of decoding: what it
    is given goes to the slots that `positions` name, and each token sees the slots up to its own. Several tokens at once
    start a row, at position 0.

    Attributes:
        heads: query heads.
        head_dim: size of each.
        kv_heads: heads of keys and values, each shared by heads / kv_heads queries; None for as many as `heads`.
        bias: whether all four projections have one.
        qk_norm: RMSNorm over each head's query and key (Dehghani et al. 2023).
        causal: no token sees a later one.
        implementation: "xla", or "cudnn" on NVIDIA.
    """

    heads: int
    head_dim: int
    kv_heads: int | None = None
    bias: bool = True
    qk_norm: bool = False
    causal: bool = False
    implementation: str = "xla"

    @nn.compact
    def __call__(
        self,
        x_btd: jax.Array,
        mask: jax.Array | None = None,
        rotation: tuple[jax.Array, jax.Array] | None = None,
        positions: jax.Array | None = None,
        capture: tuple[str, ...] = (),
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """[B, T, width] -> [B, T, width], and what is captured.

        Args:
            x_btd: what queries, keys and values are made of.
            mask: bool, broadcasts to [B, heads, T, T]: True where the query (third axis) may see the key.
            rotation: from `rope`.
            positions: [B, T] int; needed with a cache.
            capture: some of `CAPTURED`. "query" [B, T, heads, head_dim], "key" and "value" [B, T, kv_heads, head_dim] are as
                they enter the products; "scores" [B, heads, T, T] float32, queries before keys, are what the softmax is taken
                of: scaled by head_dim^-1/2, -inf where a query may not see a key. Scores are computed for the capture alone,
                beside a fused implementation, which has none to show.

        Raises:
            ValueError: "cudnn" where it cannot run.
        """
        kv_heads = self.kv_heads or self.heads
        q_bthk, k_bshk, v_bshk = (
            nn.DenseGeneral((heads, self.head_dim), use_bias=self.bias, name=name)(x_btd)
            for name, heads in (("query", self.heads), ("key", kv_heads), ("value", kv_heads))
        )
        if self.qk_norm:
            q_bthk, k_bshk = nn.RMSNorm(name="query_norm")(q_bthk), nn.RMSNorm(name="key_norm")(k_bshk)
        if rotation is not None:
            q_bthk, k_bshk = rotate(q_bthk, rotation), rotate(k_bshk, rotation)
        causal, implementation = self.causal, self.implementation
        if self.has_variable("cache", "key") and positions is not None:
            keys, values = self._store("key", k_bshk, positions), self._store("value", v_bshk, positions)
            if x_btd.shape[1] == 1:
                k_bshk, v_bshk, causal, implementation = keys, values, False, "xla"
                mask = (jnp.arange(keys.shape[1]) <= positions[..., None])[:, None]
        if implementation == "cudnn":
            check_cudnn(q_bthk.dtype, self.head_dim)
        out_bthk = jax.nn.dot_product_attention(
            q_bthk, k_bshk, v_bshk, mask=mask, is_causal=causal, implementation="cudnn" if implementation == "cudnn" else "xla"
        )
        found = {"query": q_bthk, "key": k_bshk, "value": v_bshk}
        if "scores" in capture:
            found["scores"] = scores(q_bthk, k_bshk, mask, causal)
        out_btd = nn.DenseGeneral(x_btd.shape[-1], axis=(-2, -1), use_bias=self.bias, name="out")(out_bthk)
        return out_btd, {name: found[name] for name in capture}

    def _store(self, name: str, new: jax.Array, positions: jax.Array) -> jax.Array:
        """The cache [B, slots, ...] with `new` [B, T, ...] at each row's own positions."""
        held: jax.Array = self.get_variable("cache", name)
        held = jax.vmap(lambda row, at, put: row.at[at].set(put))(held, positions, new.astype(held.dtype))
        self.put_variable("cache", name, held)
        return held
