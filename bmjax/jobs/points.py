"""What a sweep tries: points of a grid, random draws, or both, as texts of config fields."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bmjax import config as configs

_RANGE = re.compile(r"(log|uniform)\(([^,()]+),([^,()]+)\)")
_BRACKETS = set("()[]")


def points(config: Any, grid: str, random: str, trials: int, seed: int) -> list[dict[str, str]]:
    """{field path: text} of every run: all combinations of the grid, each with every random draw.

    Fields are separated by ";", values by ",", or by "|" where the field itself is a list: "seed=0,1; hidden=64|64,32", which
    may also be "hidden=(64),(64,32)". A field, or a group of fields whose kind can be chosen ("model=Plain,Residual"), goes by
    the end of its path, as long as that is enough to tell. A random field also takes "log(1e-4,1e-1)" and "uniform(0,0.5)",
    whole numbers where the field is an int.

    Args:
        config: what the values are put into; not changed.
        grid, random: the fields, as above.
        trials: random draws.
        seed: of the draws; a greater number of trials begins with the same ones.

    Raises:
        ValueError: the text is not of this form, a field is unknown, ambiguous or given twice, or a range is none.
    """
    if not grid and not random:
        raise ValueError(
            'there is nothing to sweep; give --grid="learning_rate=1e-3,3e-3" or --random="learning_rate=log(1e-4,1e-1)"'
        )
    fixed, drawn = dict(_fields(config, grid)), dict(_fields(config, random))
    if twice := set(fixed) & set(drawn):
        raise ValueError(f"{sorted(twice)[0]} is in the grid and among the random fields; give it once")
    kinds = {leaf.path: leaf.type for leaf in _known(config)}
    lists = {path: _values(path, text, kinds[path]) for path, text in fixed.items()}
    combinations = [dict(zip(lists, values)) for values in itertools.product(*lists.values())]
    if not drawn:
        return combinations
    rng = np.random.default_rng(seed)
    draws = [{path: _draw(path, text, kinds[path], rng) for path, text in drawn.items()} for _ in range(trials)]
    return [{**combination, **draw} for draw in draws for combination in combinations]


def _fields(config: Any, text: str) -> Iterator[tuple[str, str]]:
    """(path, values as text) of each field in turn."""
    seen = set()
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, equals, values = part.partition("=")
        if not equals or not values.strip():
            raise ValueError(f"{part!r} is no field with values; write for example learning_rate=1e-3,3e-3")
        path = _path(config, name.strip())
        if path in seen:
            raise ValueError(f"{path} is given twice; put all of its values into one list")
        seen.add(path)
        yield path, values.strip()


def _known(config: Any) -> list[Any]:
    """Every leaf of the config, and every group whose kind can be chosen."""
    return [*configs.groups(config), *configs.leaves(config)]


def _path(config: Any, name: str) -> str:
    """The full path of a field that is named by the end of its path."""
    known = [leaf.path for leaf in _known(config)]
    fits = list(dict.fromkeys(path for path in known if path == name or path.endswith(f".{name}")))
    if not fits:
        hint = configs.elsewhere(config, name if name.startswith("config.") else f"config.{name}")
        raise ValueError(f"the config has no field {name}; the nearest is {configs.nearest(name, known)}{hint}")
    if len(fits) > 1 and name not in fits:
        raise ValueError(f"{name} may be any of {', '.join(fits)}; write more of the path")
    return name if name in fits else fits[0]


def _values(path: str, text: str, kind: Any) -> list[str]:
    """The values of a field that is swept, as the command line takes each."""
    several = "tuple" in str(kind) or "dict" in str(kind)
    if range_ := _RANGE.search(text.replace(" ", "")):
        why = "it takes several values" if several else "a grid takes single values"
        raise ValueError(f"the values of {path} are {text!r}: {why}; {range_[1]}(...) is for a field of one number in --random")
    found = _split(text, several)
    if several and len(found) == 1 and "," in text and not _BRACKETS & set(text):
        apart = text.replace(" ", "").replace(",", "|")
        raise ValueError(
            f"the values of {path} are {text!r}, which is one value; write {apart!r} for several, or '({text})' for this one"
        )
    if "" in found or len(set(found)) != len(found):
        raise ValueError(
            f"the values of {path} are {text!r}; expected different ones, separated by {'|' if several else 'commas'}"
        )
    return found


def _split(text: str, several: bool) -> list[str]:
    """At every "|"; without one at every comma, but not at those inside a value that may hold some."""
    if "|" in text:
        parts = text.split("|")
    else:
        outer = text.startswith("[") and text.endswith("]") and len(_pieces(text)) == 1
        inner = text[1:-1] if outer and (not several or _BRACKETS & set(text[1:-1])) else text
        parts = _pieces(inner) if not several or _BRACKETS & set(inner) else [inner]
    return [part.strip().strip("()[]").strip().removesuffix(",") if several else part.strip() for part in parts]


def _pieces(text: str) -> list[str]:
    """Split at the commas outside of brackets; one at the end separates nothing."""
    parts, depth = [""], 0
    for letter in text.strip().removesuffix(","):
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _draw(path: str, text: str, kind: Any, rng: np.random.Generator) -> str:
    """One value of a random field."""
    form = _RANGE.fullmatch(text.replace(" ", ""))
    if form is None or "tuple" in str(kind) or "dict" in str(kind):
        values = _values(path, text, kind)
        return values[rng.integers(len(values))]
    try:
        low, high = float(form[2]), float(form[3])
    except ValueError:
        low = high = math.nan
    if not (-math.inf < low < high < math.inf) or (form[1] == "log" and low <= 0):
        raise ValueError(
            f"the range of {path} is {text!r}; expected two rising numbers" + (", above 0" if form[1] == "log" else "")
        )
    value = math.exp(rng.uniform(math.log(low), math.log(high))) if form[1] == "log" else rng.uniform(low, high)
    return str(round(value)) if kind is int else f"{value:.4g}"


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """{path: the shortest end of it that no other path has}."""

    def shortest(path: str) -> str:
        parts = path.split(".")
        ends = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        return next(end for end in ends if sum(f".{other}".endswith(f".{end}") for other in paths) == 1)

    return {path: shortest(path) for path in paths}
