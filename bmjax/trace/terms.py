"""The size of an axis as a term, so that axes which must shrink together are found by unification.

An axis is an `Atom`, a `Sum` of axes laid end to end (concatenate), or a `Prod` of axes merged outer to inner (reshape). Atoms
are the only mutable things: two equal atoms are bound into one, and an atom that turns out to be composed is bound to a term.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias

import numpy as np


class Misfit(Exception):  # noqa: N818  # not an error for the user: the axes involved are frozen
    """Two terms cannot be the same axis, or a term cannot be divided there."""


class Atom:
    """An axis that is not made of others.

    Attributes:
        size: its length.
        bound: the term that it turned out to be, or None.
        frozen: why none of it may be removed, or "".
        notes: why removing differs from masking.
        whole: it must stay one atom (the layers of a scan).
    """

    __slots__ = ("bound", "frozen", "notes", "size", "whole")

    def __init__(self, size: int, frozen: str = "", whole: bool = False):
        self.size = int(size)
        self.bound: Term | None = None
        self.frozen = frozen
        self.notes: dict[str, None] = {}  # an ordered set
        self.whole = whole


class Sum:
    """Axes laid end to end."""

    __slots__ = ("parts", "size")

    def __init__(self, parts: Iterable[Term]):
        self.parts = tuple(parts)
        self.size: int = sum(part.size for part in self.parts)


class Prod:
    """Axes merged into one, outer to inner."""

    __slots__ = ("parts", "size")

    def __init__(self, parts: Iterable[Term]):
        self.parts = tuple(parts)
        self.size: int = math.prod(part.size for part in self.parts)


Term: TypeAlias = Atom | Sum | Prod
Axes: TypeAlias = list[Term]  # one term for each axis of a value

NOTHING = Sum(())
ONE = Prod(())


def fresh(shape: Iterable[int], frozen: str = "") -> Axes:
    """New atoms for the axes of a value."""
    return [Atom(size, frozen) for size in shape]


def resolve(term: Term) -> Term:
    """The term with its bindings followed and nested terms of one kind flattened; unit parts are dropped."""
    while isinstance(term, Atom):
        if term.bound is None:
            return term
        if isinstance(term.bound, Atom) and term.bound.bound is not None:
            term.bound = term.bound.bound
        term = term.bound
    kind, unit = (Sum, 0) if isinstance(term, Sum) else (Prod, 1)
    parts: list[Term] = []
    for part in map(resolve, term.parts):
        if isinstance(part, kind):
            parts.extend(part.parts)
        elif part.size != unit:
            parts.append(part)
    return parts[0] if len(parts) == 1 else kind(parts)


def atoms(term: Term) -> Iterator[Atom]:
    """All atoms that the term is made of; one that occurs twice comes twice."""
    term = resolve(term)
    if isinstance(term, Atom):
        yield term
    else:
        for part in term.parts:
            yield from atoms(part)


def freeze(term: Term, why: str) -> None:
    """None of the term may be removed. The first reason stays."""
    for atom in atoms(term):
        atom.frozen = atom.frozen or why


def note(term: Term, why: str) -> None:
    """Removing from the term changes more than zeros do."""
    for atom in atoms(term):
        atom.notes[why] = None


def bind(atom: Atom, term: Term) -> None:
    """From now on the atom is the term, of equal size, which inherits what was known of the atom.

    Raises:
        Misfit: the atom must stay whole and the term is composed.
    """
    if isinstance(term, Atom):
        term.whole = term.whole or atom.whole
    elif atom.whole:
        raise Misfit("the layers of a scan cannot be taken apart")
    for part in atoms(term):
        part.frozen = part.frozen or atom.frozen
        part.notes.update(atom.notes)
    atom.bound = term


def split(term: Term, inner: int) -> tuple[Term, Term]:
    """The (outer, inner) factors of a term, the second of the given size.

    Raises:
        Misfit: the term's blocks do not allow it.
    """
    term = resolve(term)
    if inner == 1:
        return term, ONE
    if inner == term.size:
        return ONE, term
    if term.size % inner:
        raise Misfit(f"{inner} does not divide an axis of {term.size}")
    if isinstance(term, Atom):
        factors = Atom(term.size // inner), Atom(inner)
        bind(term, Prod(factors))
        return factors
    if isinstance(term, Sum):
        pieces = [split(part, inner) for part in term.parts]
        for _, block in pieces[1:]:
            unify(pieces[0][1], block)
        return resolve(Sum(outer for outer, _ in pieces)), resolve(pieces[0][1])
    outers = list(term.parts)
    inners: list[Term] = []
    while inner > 1:
        last = outers.pop()
        size = min(last.size, inner)
        if last.size % size or inner % size:
            raise Misfit(f"a block of {last.size} does not fit into {inner}")
        outer, block = split(last, size)
        outers.append(outer)
        inners.insert(0, block)
        inner //= size
    return resolve(Prod(outers)), resolve(Prod(inners))


def cut(term: Term, length: int) -> tuple[Term, Term]:
    """The first `length` positions of a term, and the rest.

    Raises:
        Misfit: the cut goes through a block.
    """
    term = resolve(term)
    if length == 0:
        return NOTHING, term
    if length == term.size:
        return term, NOTHING
    if isinstance(term, Atom):
        pieces = Atom(length), Atom(term.size - length)
        bind(term, Sum(pieces))
        return pieces
    first, rest = term.parts[0], type(term)(term.parts[1:])
    if isinstance(term, Prod):
        if length % rest.size:
            raise Misfit(f"a cut at {length} goes through a block of {rest.size}")
        before, after = cut(first, length // rest.size)
        return resolve(Prod((before, rest))), resolve(Prod((after, rest)))
    if length <= first.size:
        before, after = cut(first, length)
        return before, resolve(Sum((after, rest)))
    before, after = cut(rest, length - first.size)
    return resolve(Sum((first, before))), after


def unify(x: Term, y: Term) -> None:
    """Both terms are one axis from now on.

    Raises:
        Misfit: they cannot be.
    """
    x, y = resolve(x), resolve(y)
    if x.size != y.size:
        raise Misfit(f"axes of {x.size} and {y.size} meet")
    if x is y or x.size <= 1:
        return
    if isinstance(x, Atom):
        bind(x, y)
    elif isinstance(y, Atom):
        bind(y, x)
    elif isinstance(x, Prod) and isinstance(y, Prod):
        inner = min(x.parts[-1].size, y.parts[-1].size)
        (x_outer, x_inner), (y_outer, y_inner) = split(x, inner), split(y, inner)
        unify(x_inner, y_inner)
        unify(x_outer, y_outer)
    else:
        length = min(term.parts[0].size for term in (x, y) if isinstance(term, Sum))
        (x_first, x_rest), (y_first, y_rest) = cut(x, length), cut(y, length)
        unify(x_first, y_first)
        unify(x_rest, y_rest)


def positions(term: Term, index: np.ndarray) -> Iterator[tuple[Atom, np.ndarray]]:
    """(atom, [size, block] positions of each of its elements) for all atoms; `index` [term.size, block] are the term's own."""
    term = resolve(term)
    if isinstance(term, Atom):
        yield term, index
    elif isinstance(term, Sum):
        start = 0
        for part in term.parts:
            yield from positions(part, index[start : start + part.size])
            start += part.size
    else:
        grid = index.reshape(*(part.size for part in term.parts), -1)
        for i, part in enumerate(term.parts):
            yield from positions(part, np.moveaxis(grid, i, 0).reshape(part.size, -1))


def kept(term: Term, counts: Mapping[Atom, int]) -> int:
    """The term's size when only `counts[atom]` elements of some atoms stay."""
    term = resolve(term)
    if isinstance(term, Atom):
        return counts.get(term, term.size)
    sizes = [kept(part, counts) for part in term.parts]
    return sum(sizes) if isinstance(term, Sum) else math.prod(sizes)


def kept_before(term: Term, length: int, counts: Mapping[Atom, int]) -> int:
    """How many of the term's first `length` positions stay, for a length at which the term was cut or that is frozen."""
    term = resolve(term)
    if length == term.size:
        return kept(term, counts)
    if isinstance(term, Atom) or length == 0:
        return length
    first, rest = term.parts[0], type(term)(term.parts[1:])
    if isinstance(term, Prod):
        outer, inner = divmod(length, rest.size)
        return kept_before(first, outer, counts) * kept(rest, counts) + kept_before(rest, inner, counts)
    if length <= first.size:
        return kept_before(first, length, counts)
    return kept(first, counts) + kept_before(rest, length - first.size, counts)
