"""Masks of partitioned parameters: nothing as large as a parameter moves, and they are those of one device and of NumPy.

All numbers are multiples of powers of two and small, so that float32 sums are exact in any order, and many scores are equal.
"""

import math
import re

import jax
import numpy as np
import optax
import pytest

from bmjax import parallel, prune, trees
from bmjax.prune.criteria import draw
from bmjax.types import Group, Member

A, C = "a/kernel", "layers/c/kernel"
SHAPES = {A: (64, 32), "a/bias": (32,), C: (2, 64, 32), "layers/c/bias": (2, 32)}
RULES = (
    (A, ("fsdp", "tensor")),
    (C, (None, "fsdp", "tensor")),
    ("a/bias", ("tensor",)),
    ("layers/c/bias", (None, "tensor")),
)
MESHES = ("fsdp=8", "data=2,fsdp=2,tensor=2", "fsdp=4,tensor=2")
each = np.arange(32)[:, None]
GROUPS = (
    Group("wide", 32, 0, (Member(A, 1, each), Member("a/bias", 0, each))),
    Group("units", 32, 2, (Member(C, 2, each), Member("layers/c/bias", 1, each))),
)
LR = 0.5


def draws(seed, unit):
    rng = np.random.default_rng(seed)
    return {
        path: (np.clip(np.round(rng.normal(size=shape) / unit), -2 / unit, 2 / unit) * unit) for path, shape in SHAPES.items()
    }


def tree_of(leaves):
    return trees.nested({path: np.asarray(leaf, np.float32) for path, leaf in leaves.items()})


def params():
    return draws(0, 0.25)


def gradients(step):
    return draws(100 + step, 0.5)


def flat(tree):
    return {path: np.asarray(leaf) for path, leaf in trees.paths(tree).items()}


# ---- what the compiled program moves ----

MOVES = re.compile(r"= (.*?) (?:all-gather|all-to-all|collective-permute|collective-broadcast|ragged-all-to-all)(?:-start)?\(")
SUMS = re.compile(r"= (.*?) (?:all-reduce|reduce-scatter)(?:-start)?\(")


def largest(pattern, text):
    """Elements of the largest array that these operations make."""
    arrays = [dims for found in pattern.findall(text) for dims in re.findall(r"\w+\[([\d,]*)\]", found)]
    return max((math.prod(int(n) for n in dims.split(",") if n) for dims in arrays), default=0)


def state_shardings(tx, tree, mesh):
    """As the train step has them."""
    shardings = parallel.partition(tree, RULES, mesh)
    return shardings, parallel.like_params(jax.eval_shape(tx.init, tree), tree, shardings, mesh)


def split_update(tx, tree, mesh):
    """(compiled update, its text, the state before the first update, the parameters' shardings)."""
    shardings, of_state = state_shardings(tx, tree, mesh)
    state = jax.jit(tx.init, out_shardings=of_state)(jax.device_put(tree, shardings))
    update = jax.jit(tx.update, in_shardings=(shardings, of_state, shardings), out_shardings=(shardings, of_state))
    compiled = update.lower(tree, state, tree).compile()
    return compiled, compiled.as_text(), state, shardings


def histories(tx, mesh, steps, most=0, alone=True):
    """Masks after each update, of 8 devices and of one: they must be equal, and nothing above `most` elements may move."""
    tree = tree_of(params())
    compiled, text, state, shardings = split_update(tx, tree, mesh)
    assert largest(MOVES, text) <= most
    assert largest(SUMS, text) <= 64 * 32 // 8  # so large is a device's part of the smallest kernel
    found, one, own, update = [], tree, tx.init(tree), jax.jit(tx.update)
    for step in range(steps):
        grads = tree_of(gradients(step))
        updates, state = compiled(jax.device_put(grads, shardings), state, jax.device_put(tree, shardings))
        tree = jax.device_get(optax.apply_updates(tree, updates))
        found.append(flat(prune.masks(state, tree)))
        if alone:
            updates, own = update(grads, own, one)
            one = jax.device_get(optax.apply_updates(one, updates))
            jax.tree.map(np.testing.assert_array_equal, (tree, found[-1]), (one, flat(prune.masks(own, one))))
    return found


# ---- NumPy ----


def top(scores, keep):
    """The `keep` largest in float32, the lower index first among equals; by a stable sort."""
    line = np.asarray(scores, np.float32).astype(np.float64).ravel()
    mask = np.zeros(line.size, bool)
    mask[np.argsort(-line, kind="stable")[:keep]] = True
    return mask.reshape(np.shape(scores))


def layers_of(path, array):
    """The layers of a stacked array, or the array itself as the only one."""
    return list(array) if path.startswith("layers/") else [array]


def shaped(path, parts):
    return np.stack(parts) if path.startswith("layers/") else parts[0]


class Seen:
    """What a criterion has seen: gradients, and the weights that each was taken at."""

    def __init__(self):
        self.weights, self.slopes = [], []

    def scores(self, name, path):
        w, g = [step[path] for step in self.weights], [step[path] for step in self.slopes]
        mean = lambda values: sum(0.5 ** (len(values) - i) * value for i, value in enumerate(values))
        return {
            "magnitude": lambda: abs(w[-1]),
            "random": lambda: np.asarray(draw(3, path, SHAPES[path])),
            "saliency": lambda: mean([abs(x * y) for x, y in zip(w, g)]),
            "movement": lambda: -sum(x * y for x, y in zip(w, g)),
            "fisher": lambda: 0.5 * w[-1] ** 2 * mean([y**2 for y in g]),
            "taylor": lambda: (w[-1] * mean(g)) ** 2,
            "given": lambda: given_scores()[path],
        }[name]()

    def elements(self, name, group):
        """Each element's score: all its weights' together."""
        if name == "random":
            return np.asarray(draw(3, group.name, (group.stack, group.size) if group.stack else (group.size,)))
        total = 0.0
        for member in group.members:
            score = self.scores(name, member.path)
            if name in ("magnitude", "given"):
                score = score.astype(np.float64) ** 2
            if name == "taylor":  # signed, and squared after the sum
                score = self.weights[-1][member.path] * sum(
                    0.5 ** (len(self.slopes) - i) * step[member.path] for i, step in enumerate(self.slopes)
                )
            over = tuple(i for i in range(score.ndim) if i != member.axis and not (group.stack and i == 0))
            total = total + score.sum(over)
        return total**2 if name == "taylor" else total


def given_scores():
    return draws(9, 0.5)


CRITERIA = {
    "magnitude": prune.magnitude,
    "random": lambda: prune.random(3),
    "saliency": lambda: prune.saliency(0.5),
    "movement": prune.movement,
    "fisher": lambda: prune.fisher(0.5),
    "taylor": lambda: prune.taylor(0.5),
    "given": lambda: prune.given(tree_of(given_scores())),
}
PATTERNS = {
    "unstructured": prune.unstructured,
    "n_m": lambda: prune.n_m(1, 4),
    "n_m last": lambda: prune.n_m(2, 4, -1),
    "block": lambda: prune.block(4, 2),
    "channel": prune.channel,
    "groups": lambda: prune.groups(GROUPS),
}
ALLOCATIONS = {
    "uniform": prune.uniform,
    "global": prune.global_threshold,
    "erdos_renyi": prune.erdos_renyi_kernel,
    "floor": lambda: prune.global_threshold(floor=0.25, normalise=True),
    "owl": prune.owl,
}


def units_of(pattern, score):
    """One layer's scores of what is dropped together."""
    if pattern == "block":
        return score.reshape(score.shape[0] // 4, 4, -1, 2).sum((1, 3))
    return score.sum(0) if pattern == "channel" else score


def mask_of(pattern, units, shape):
    if pattern == "block":
        return units.repeat(4, 0).repeat(2, 1)
    return np.broadcast_to(units, shape)


def shares(allocation, sparsity=0.6):
    """The sparsity of each kernel; Erdos-Renyi by its formula."""
    if allocation != "erdos_renyi":
        return {A: sparsity, C: sparsity}
    raw = {path: sum(SHAPES[path][-2:]) / math.prod(SHAPES[path][-2:]) for path in (A, C)}
    sizes = {path: math.prod(SHAPES[path]) for path in (A, C)}
    epsilon = (1 - sparsity) * sum(sizes.values()) / sum(raw[path] * sizes[path] for path in raw)
    return {path: 1 - epsilon * raw[path] for path in raw}


def n_m_mask(score, old, stay, axis):
    held = np.moveaxis(np.where(old, score, -np.inf), axis, -1)
    rows = np.stack([top(row, stay) for row in held.reshape(-1, 4)]).reshape(held.shape)
    return np.moveaxis(rows, -1, axis) & old


def kept_units(held, dropped, across):
    """Masks of a list of layers' scores; `dropped` of each, or of all together."""
    if not across:
        return [top(score, score.size - int(gone)) for score, gone in zip(held, dropped)]
    line = np.concatenate([score.ravel() for score in held])
    mask, ends = top(line, line.size - int(dropped)), np.cumsum([0, *(score.size for score in held)])
    return [mask[a:b].reshape(score.shape) for a, b, score in zip(ends, ends[1:], held)]


def chosen(seen, criterion, pattern, allocation, old, fraction):
    """The masks of both kernels that follow the old ones."""
    scores = {path: seen.scores(criterion, path) for path in (A, C)}
    if pattern.startswith("n_m"):
        n, axis = (1, -2) if pattern == "n_m" else (2, -1)
        return {path: n_m_mask(scores[path], old[path], 4 - int(fraction * (4 - n)), axis) for path in (A, C)}
    held, dropped = [], []
    for path in (A, C):
        for score, mask in zip(layers_of(path, scores[path]), layers_of(path, old[path])):
            held.append(units_of(pattern, np.where(mask, score, -np.inf)))
            dropped.append(math.floor(fraction * round(shares(allocation)[path] * held[-1].size)))
    total = math.floor(fraction * round(0.6 * sum(score.size for score in held)))
    units = kept_units(held, total if allocation == "global" else dropped, allocation == "global")
    full = [mask_of(pattern, unit, (64, 32)) for unit in units]
    return {A: full[0] & old[A], C: np.stack(full[1:]) & old[C]}


def chosen_groups(seen, criterion, keeps, fraction):
    found = {}
    for group in GROUPS:
        scores, old = np.atleast_2d(seen.elements(criterion, group)), np.atleast_2d(keeps[group.name])
        gone = math.floor(fraction * round(0.6 * group.size))
        found[group.name] = np.stack([top(np.where(o, s, -np.inf), group.size - gone) & o for s, o in zip(scores, old)])
    return found


def by_hand(criterion, pattern, allocation, steps):
    """Masks after each update of SGD, by NumPy in float64."""
    tree, seen = params(), Seen()
    masks = {path: np.ones(shape, bool) for path, shape in SHAPES.items()}
    keeps, found = {group.name: np.ones(group.size, bool) for group in GROUPS}, []
    if pattern == "groups":
        keeps["units"] = np.ones((2, 32), bool)
    for step in range(steps):
        grads, before, fraction = gradients(step), masks, min(step / 2, 1.0)
        seen.weights.append({path: tree[path] * masks[path] for path in tree})
        seen.slopes.append(grads)
        if pattern == "groups":
            keeps = chosen_groups(seen, criterion, keeps, fraction)
            wide, units = keeps["wide"][0], keeps["units"]
            masks = {
                A: np.broadcast_to(wide, (64, 32)),
                "a/bias": wide,
                C: np.broadcast_to(units[:, None], (2, 64, 32)),
                "layers/c/bias": units,
            }
        else:
            masks = {**masks, **chosen(seen, criterion, pattern, allocation, masks, fraction)}
        tree = {path: np.where(masks[path], tree[path] - LR * grads[path] * before[path], 0.0) for path in tree}
        found.append(masks)
    return found


# ---- criteria, patterns, allocations ----

CHOICES = [
    (pattern, allocation)
    for pattern in PATTERNS
    for allocation in ("uniform", "global", "erdos_renyi")
    if allocation == "uniform" or pattern in ("unstructured", "block", "channel")
]
EVERY = [*CHOICES, ("unstructured", "floor"), ("block", "owl")]
QUICK = [
    ("fisher", "unstructured", "global", True, MESHES[1]),
    ("magnitude", "n_m", "uniform", True, MESHES[0]),
    ("random", "n_m last", "uniform", False, MESHES[1]),
    ("given", "block", "global", False, MESHES[2]),
    ("movement", "channel", "erdos_renyi", True, MESHES[0]),
    ("taylor", "groups", "uniform", False, MESHES[2]),
    ("saliency", "unstructured", "owl", True, MESHES[2]),
]


def check(criterion, pattern, allocation, packed, mesh, alone=True):
    sparsity = None if pattern.startswith("n_m") else 0.6
    tx = prune.around(
        optax.sgd(LR),
        CRITERIA[criterion](),
        sparsity=sparsity,
        pattern=PATTERNS[pattern](),
        allocation=ALLOCATIONS[allocation](),
        schedule=prune.linear(0, 2),
        stacked=None if pattern == "groups" else "layers/",
        packed=packed,
    )
    # Of groups only elements' scores and keeps, 2 layers of 32, come together.
    found = histories(tx, parallel.make_mesh(mesh), 4, most=64 if pattern == "groups" else 0, alone=alone)
    if allocation in ("floor", "owl"):
        return
    expected = by_hand(criterion, pattern, allocation, 4)
    for step, (masks, wanted) in enumerate(zip(found, expected)):
        for path in (A, C, *(("a/bias", "layers/c/bias") if pattern == "groups" else ())):
            np.testing.assert_array_equal(masks[path], wanted[path], err_msg=f"{path} after update {step}")
    dropped = [sum((~masks[path]).sum() for path in (A, C)) for masks in found]
    assert dropped[0] == 0 < dropped[1] < dropped[2] == dropped[3]
    assert dropped[3] / (3 * 64 * 32) == pytest.approx({"n_m": 0.75, "n_m last": 0.5}.get(pattern, 0.6), abs=0.02)


@pytest.mark.parametrize(("criterion", "pattern", "allocation", "packed", "mesh"), QUICK)
def test_partitioned_masks_are_those_of_one_device_and_of_numpy(criterion, pattern, allocation, packed, mesh):
    check(criterion, pattern, allocation, packed, mesh)


@pytest.mark.slow
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(("i", "pattern", "allocation"), [(i, *choice) for i, choice in enumerate(EVERY)])
def test_every_partitioned_combination(criterion, i, pattern, allocation):
    turn = i + list(CRITERIA).index(criterion)
    check(criterion, pattern, allocation, bool(turn % 2), MESHES[turn % 3], alone=allocation in ("floor", "owl"))


# ---- sparse training ----

STEPS, SPARSITY = 5, 0.6
LIVE = {path: 64 * 32 - round(SPARSITY * 64 * 32) for path in (A, C)}
LINE = {"sparsity": SPARSITY, "stacked": "layers/", "allocation": prune.uniform()}


def straight(packed):
    st = prune.straight_through(**LINE, every=2, packed=packed)
    return optax.chain(optax.sgd(LR), st.tx)


METHODS = {
    "static_sparse": lambda packed: prune.static_sparse(optax.sgd(LR), **LINE, seed=3, packed=packed),
    "sparse_evolution": lambda packed: prune.sparse_evolution(optax.sgd(LR), **LINE, end=4, every=2, seed=3, packed=packed),
    "rigl": lambda packed: prune.rigl(optax.sgd(LR), **LINE, end=4, every=2, seed=3, packed=packed),
    "ac_dc": lambda packed: prune.ac_dc(optax.sgd(LR), **LINE, begin=1, phase=1, end=4, packed=packed),
    "straight_through": straight,
}


def drawn(name, path, step=0):
    return np.asarray(draw(3, name, SHAPES[path], step))


def each_top(path, scores, keep):
    """The largest of each layer."""
    return shaped(path, [top(layer, keep) for layer in layers_of(path, scores)])


def exchanged(path, weights, growth, old, step):
    """The smallest go, and as many of the others grow."""
    moved = int(LIVE[path] * 0.5 * 0.3 * (1 + math.cos(math.pi * step / 4)) + 1e-3)
    kept = each_top(path, np.where(old, abs(weights), -np.inf), LIVE[path] - moved)
    return kept | each_top(path, np.where(kept, -np.inf, growth), moved)


def method_mask(method, path, step, weights, slope, old):
    """The mask after the update of a step."""
    if method == "static_sparse" or (step in (0, 1, 3) and method in ("sparse_evolution", "rigl")):
        return old
    if method == "rigl":
        return exchanged(path, weights, abs(slope), old, step)
    if method == "sparse_evolution":
        return exchanged(path, weights, drawn(f"grow/{path}", path, step), old, step)
    if method == "ac_dc":
        return each_top(path, abs(weights), LIVE[path]) if step in (1, 3, 4) else np.ones_like(old)
    return each_top(path, abs(weights), LIVE[path]) if step % 2 == 0 else old


def method_by_hand(method):
    tree, found = params(), []
    random = method in ("static_sparse", "sparse_evolution", "rigl")
    masks = {p: each_top(p, drawn(p, p), LIVE[p]) if random else np.ones(SHAPES[p], bool) for p in (A, C)}
    for step in range(STEPS):
        grads, before = gradients(step), masks
        if method == "straight_through":  # masks of the updated weights
            tree.update({path: tree[path] - LR * grads[path] for path in (A, C)})
        masks = {p: method_mask(method, p, step, tree[p], grads[p], before[p]) for p in (A, C)}
        for path in (A, C):
            if method != "straight_through":
                tree[path] = np.where(masks[path], tree[path] - LR * grads[path] * before[path], 0.0)
        found.append(masks)
    return found


def check_method(method, packed, mesh):
    found = histories(METHODS[method](packed), parallel.make_mesh(mesh), STEPS)
    for step, (masks, wanted) in enumerate(zip(found, method_by_hand(method))):
        for path in (A, C):
            np.testing.assert_array_equal(masks[path], wanted[path], err_msg=f"{path} after update {step}")
    assert {path: int((~found[-1][path]).sum()) for path in (A, C)} == {A: 2048 - LIVE[A], C: 2 * (2048 - LIVE[C])}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "packed"), [("static_sparse", True), ("rigl", False), ("straight_through", True)])
def test_partitioned_sparse_training_is_that_of_one_device_and_of_numpy(method, packed):
    check_method(method, packed, MESHES[1])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("method", METHODS)
def test_every_partitioned_method(method, mesh):
    check_method(method, mesh != MESHES[1], mesh)
