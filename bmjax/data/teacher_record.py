"""A teacher's outputs on one item, packed: the k largest log-probabilities, where they are, and what is left beside them."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

BATCH_KEY = "cached_teacher"  # of the records in a batch
VALUES = {"bfloat16": 16, "float32": 32}  # bits of a stored log-probability


@dataclasses.dataclass(frozen=True)
class RecordLayout:
    """How a teacher's outputs on an item (an example, or a token) are packed into int32 words.

    A record is, one after another and each filled up to whole words of 4 bytes, little-endian: the k largest log-probabilities
    from the largest down; for each temperature T the float32 log of the sum of exp(log p / T) over all other classes, -inf where
    there are none; and the k classes as a stream of `bits` bits each.

    The tail is a sum over the classes that were left out, not 1 minus the others, so it is right in its leading digits however
    small it is. A reader normalises what is stored, so that k classes and tail sum to 1 after the rounding too.

    Attributes:
        k: log-probabilities of an item.
        vocabulary: number of classes.
        values: "bfloat16" or "float32", what log-probabilities are rounded to.
        temperatures: those whose tail is stored, and at which the record can be read.
    """

    k: int
    vocabulary: int
    values: str = "bfloat16"
    temperatures: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        """Raises ValueError on what cannot be packed."""
        if not 1 <= self.k <= self.vocabulary:
            raise ValueError(f"k is {self.k}; expected 1 to {self.vocabulary}, the number of classes")
        if self.values not in VALUES:
            raise ValueError(f"values is {self.values!r}; expected one of {', '.join(VALUES)}")
        if not self.temperatures or len({*self.temperatures}) < len(self.temperatures):
            raise ValueError(f"temperatures is {self.temperatures}; expected one or more, each once")
        for temperature in self.temperatures:
            check_temperature(temperature)

    @property
    def bits(self) -> int:
        """Bits of a class: ceil(log2 vocabulary)."""
        return max(1, (self.vocabulary - 1).bit_length())

    @property
    def words(self) -> int:
        """int32 words of a record."""
        return self._value_words + len(self.temperatures) + -(-self.k * self.bits // 32)

    @property
    def _value_words(self) -> int:
        return -(-self.k * VALUES[self.values] // 32)

    def tail_of(self, temperature: float) -> int:
        """Place of a temperature's tail among those stored. Raises ValueError if it is not stored."""
        for place, stored in enumerate(self.temperatures):
            if math.isclose(stored, temperature, rel_tol=1e-6):
                return place
        there = ", ".join(f"{one:g}" for one in self.temperatures)
        raise ValueError(
            f"the temperature is {temperature:g} and the cached outputs have the tail of {there}; choose one of these, or cache "
            "with this one among the temperatures"
        )

    def pack(self, logits: jax.Array) -> jax.Array:
        """Records int32 [..., words] of logits [..., vocabulary]; to be jitted.

        Ties go to the lower class. A logit of -inf is a class of probability 0.

        Raises:
            ValueError: logits of another width.
        """
        if logits.shape[-1] != self.vocabulary:
            raise ValueError(f"the teacher has {logits.shape[-1]} classes and the records are of {self.vocabulary}")
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
        values, classes = jax.lax.top_k(log_p, self.k)
        rest = jnp.put_along_axis(log_p, classes, -jnp.inf, axis=-1, inplace=False)
        tails = jnp.stack([jax.nn.logsumexp(rest / temperature, axis=-1) for temperature in self.temperatures], axis=-1)
        if self.values == "bfloat16":
            values = jnp.pad(values.astype(jnp.bfloat16), [(0, 0)] * (values.ndim - 1) + [(0, self.k % 2)])
            values = values.reshape(*values.shape[:-1], -1, 2)
        return jnp.concatenate([_as_words(values), _as_words(tails), self._stream(classes)], axis=-1)

    def unpack(self, records: jax.Array, temperature: float = 1.0) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The teacher's distribution at a temperature over its k classes and one bucket of all others.

        Args:
            records: int32 [..., words].
            temperature: one of those stored.

        Returns:
            classes int32 [..., k], log-probabilities float32 [..., k] at the temperature, and that of the bucket [...], -inf
            where it is empty; the probabilities sum to 1.

        Raises:
            ValueError: records of another width, or a temperature that is not stored.
        """
        if records.shape[-1] != self.words:
            raise ValueError(f"the cached records are {records.shape[-1]} words wide; expected {self.words} at k = {self.k}")
        place, first = self.tail_of(temperature), self._value_words
        if self.values == "bfloat16":
            halves = jax.lax.bitcast_convert_type(records[..., :first], jnp.bfloat16)
            values = halves.reshape(*records.shape[:-1], -1)[..., : self.k].astype(jnp.float32)
        else:
            values = jax.lax.bitcast_convert_type(records[..., :first], jnp.float32)
        tail = jax.lax.bitcast_convert_type(records[..., first + place], jnp.float32)
        whole = jax.nn.log_softmax(jnp.concatenate([values / temperature, tail[..., None]], axis=-1))
        classes = self._classes(records[..., first + len(self.temperatures) :])
        return classes, whole[..., :-1], whole[..., -1]

    def _places(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each class of a record: the word that its lowest bit is in, the one of its highest, and the first bit's place."""
        starts = np.arange(self.k) * self.bits
        return starts // 32, (starts + self.bits - 1) // 32, (starts % 32).astype(np.uint32)

    def _stream(self, classes: jax.Array) -> jax.Array:
        low, high, shift = self._places()
        numbers = classes.astype(jnp.uint32)
        words = jnp.zeros((*classes.shape[:-1], -(-self.k * self.bits // 32)), jnp.uint32)
        words = words.at[..., low].add(numbers << shift)  # no two share a bit, so a sum is an or
        over = np.flatnonzero(high > low)
        words = words.at[..., high[over]].add(numbers[..., over] >> (32 - shift[over]))
        return jax.lax.bitcast_convert_type(words, jnp.int32)

    def _classes(self, stream: jax.Array) -> jax.Array:
        low, high, shift = self._places()
        words = jax.lax.bitcast_convert_type(stream, jnp.uint32)
        above = (words[..., high] << ((32 - shift) % 32)) * (high > low).astype(np.uint32)
        numbers = ((words[..., low] >> shift) | above) & np.uint32((1 << self.bits) - 1)
        return numbers.astype(jnp.int32)


def check_temperature(temperature: float) -> None:
    """Raises ValueError on a number that is not above 0 or not finite."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"the distillation temperature is {temperature}; expected a number above 0")


def _as_words(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)
