import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.trace import keep
from bmjax.types import Group, Member


def params():
    rng = np.random.default_rng(0)
    return {
        "q": {"kernel": rng.normal(size=(3, 5, 8)), "bias": rng.normal(size=(3, 8))},
        "out": {"kernel": rng.normal(size=(3, 4, 5))},
        "norm": rng.normal(size=(5,)),
    }


# Two heads, each choosing per layer: strided blocks of 3 on q (positions 3 and 7 belong to nobody), blocks of 2 on out.
HEADS = Group(
    "heads",
    2,
    3,
    (
        Member("q/kernel", 2, np.array([[0, 2, 4], [1, 5, 6]])),
        Member("q/bias", 1, np.array([[0, 2, 4], [1, 5, 6]])),
        Member("out/kernel", 1, np.array([[0, 1], [2, 3]])),
    ),
)
WIDTH = Group(
    "width",
    5,
    0,
    (
        Member("q/kernel", 1, np.arange(5)[:, None]),
        Member("out/kernel", 2, np.arange(5)[:, None]),
        Member("norm", 0, np.arange(5)[:, None]),
    ),
)


def leaf_of(tree, path):
    for part in path.split("/"):
        tree = tree[part]
    return tree


def brute_masks(groups, keeps, tree):
    """One assignment for each dropped element, member and layer."""
    masks = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), tree)
    for group in groups:
        choice = keeps.get(group.name)
        for index in [] if choice is None else np.argwhere(~np.asarray(choice)):
            for member in group.members:
                where = [slice(None)] * leaf_of(tree, member.path).ndim
                where[member.axis] = member.index[index[-1]]
                if group.stack:
                    where[0] = int(index[0])
                leaf_of(masks, member.path)[tuple(where)] = False
    return masks


HEADS_KEEP = np.array([[True, False], [False, True], [True, True]])
WIDTH_KEEP = np.array([True, False, True, True, False])


@pytest.mark.parametrize("keeps", [{}, {"heads": HEADS_KEEP}, {"width": WIDTH_KEEP}, {"heads": HEADS_KEEP, "width": WIDTH_KEEP}])
def test_masks_drop_every_weight_of_a_dropped_element(keeps):
    tree = params()
    got = keep.masks([HEADS, WIDTH], keeps, tree)
    jax.tree.map(np.testing.assert_array_equal, got, brute_masks([HEADS, WIDTH], keeps, tree))


def test_masks_of_traced_keeps_and_abstract_params():
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params())
    got = jax.jit(lambda k: keep.masks([HEADS], {"heads": k}, abstract))(HEADS_KEEP)
    jax.tree.map(np.testing.assert_array_equal, got, brute_masks([HEADS], {"heads": HEADS_KEEP}, params()))


def test_pool_sums_all_weights_of_an_element():
    tree = params()
    squares = jax.tree.map(lambda x: jnp.asarray(x**2, jnp.float32), tree)
    heads = np.zeros((3, 2))
    for layer in range(3):
        for head, (q, out) in enumerate([([0, 2, 4], [0, 1]), ([1, 5, 6], [2, 3])]):
            heads[layer, head] = sum(
                (part**2).sum()
                for part in (tree["q"]["kernel"][layer][:, q], tree["q"]["bias"][layer][q], tree["out"]["kernel"][layer][out])
            )
    np.testing.assert_allclose(keep.pool(HEADS, squares), heads, rtol=1e-5)
    width = (tree["q"]["kernel"] ** 2).sum((0, 2)) + (tree["out"]["kernel"] ** 2).sum((0, 1)) + tree["norm"] ** 2
    np.testing.assert_allclose(keep.pool(WIDTH, squares), width, rtol=1e-5)


def test_bad_input_is_one_line():
    tree = params()
    with pytest.raises(ValueError, match="no group is called 'haeds'; there are heads, width"):
        keep.masks([HEADS, WIDTH], {"haeds": HEADS_KEEP}, tree)
    with pytest.raises(ValueError, match=r"shape \[2\], expected \[3, 2\]"):
        keep.masks([HEADS], {"heads": np.ones(2, bool)}, tree)
    stranger = WIDTH._replace(members=(Member("k/kernel", 0, np.arange(5)[:, None]),))
    with pytest.raises(ValueError, match="'k/kernel', which is no parameter"):
        keep.masks([stranger], {"width": WIDTH_KEEP}, tree)
    with pytest.raises(ValueError, match="'k/kernel', which has no scores"):
        keep.pool(stranger, tree)
