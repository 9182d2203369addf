import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bmjax import trees


def tree():
    return {
        "layers": {"up": {"kernel": np.zeros((2, 3, 4), np.float32), "bias": np.zeros((2, 4), np.float16)}},
        "head": [np.zeros(5, np.int8), np.zeros((), np.float64)],
    }


PATHS = ["head/0", "head/1", "layers/up/bias", "layers/up/kernel"]


def test_paths_are_the_leaves_in_the_order_of_jax():
    found = trees.paths(tree())
    assert list(found) == PATHS
    assert [x.shape for x in found.values()] == [x.shape for x in jax.tree.leaves(tree())]


def test_paths_name_the_fields_of_an_optimiser_state():
    state = optax.adam(1e-3).init({"a": {"kernel": jnp.zeros(2)}})
    assert {"0/mu/a/kernel", "0/nu/a/kernel", "0/count"} <= set(trees.paths(state))


def test_map_with_path_sees_the_path_and_every_tree():
    ones = jax.tree.map(np.ones_like, tree())
    found = trees.map_with_path(lambda path, a, b: (path, float(np.sum(a + b))), tree(), ones)
    assert found["layers"]["up"]["kernel"] == ("layers/up/kernel", 24.0)
    assert found["head"] == [("head/0", 5.0), ("head/1", 1.0)]


def test_replace_changes_only_what_is_named():
    before = tree()
    after = trees.replace(before, {"head/0": "new"})
    assert after["head"][0] == "new"
    assert after["head"][1] is before["head"][1]
    assert after["layers"]["up"]["kernel"] is before["layers"]["up"]["kernel"]
    assert before["head"][0].shape == (5,)


def test_replace_names_the_path_that_is_not_there():
    with pytest.raises(ValueError, match="no parameter is called 'layers/down/kernel'; there are head/0, head/1"):
        trees.replace(tree(), {"layers/down/kernel": 0})


@pytest.mark.parametrize(
    ("pattern", "chosen"),
    [
        ("kernel", {"layers/up/kernel"}),
        ("^head", {"head/0", "head/1"}),
        ("up/(bias|kernel)$", {"layers/up/bias", "layers/up/kernel"}),
        ("", set(PATHS)),
    ],
)
def test_select_is_a_regex_search_of_the_path(pattern, chosen):
    found = trees.select(tree(), pattern)
    assert jax.tree.structure(found) == jax.tree.structure(tree())
    assert {path for path, yes in trees.paths(found).items() if yes} == chosen


@pytest.mark.parametrize(
    ("pattern", "words"), [("kernal", "'kernal' matches none of the parameters head/0"), ("(", "is not a regular expression")]
)
def test_select_refuses_what_chooses_nothing(pattern, words):
    with pytest.raises(ValueError, match=words):
        trees.select(tree(), pattern)


def test_size_and_bytes_of_arrays_and_of_shapes():
    for each in (tree(), jax.eval_shape(lambda: jax.tree.map(jnp.asarray, {"a": np.zeros((3, 4)), "b": np.int8(1)}))):
        leaves = jax.tree.leaves(each)
        assert trees.size(each) == sum(np.zeros(x.shape).size for x in leaves)
        assert trees.nbytes(each) == sum(np.zeros(x.shape, x.dtype).nbytes for x in leaves)
    assert (trees.size(tree()), trees.nbytes(tree())) == (24 + 8 + 5 + 1, 24 * 4 + 8 * 2 + 5 + 8)
    assert (trees.size({}), trees.nbytes({})) == (0, 0)


def test_size_does_not_overflow():
    huge = {"a": jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32)}
    assert (trees.size(huge), trees.nbytes(huge)) == (2**40, 2**42)


def test_abstract_keeps_shape_dtype_and_sharding():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    found = trees.abstract({"a": jax.device_put(np.zeros((8, 2), np.int8), sharding), "b": np.zeros(3, np.float32)})
    assert found["a"] == jax.ShapeDtypeStruct((8, 2), jnp.int8, sharding=sharding)
    assert found["b"] == jax.ShapeDtypeStruct((3,), jnp.float32)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"a": np.zeros((2, 3), np.float32), "b": {"c": np.zeros(4, np.int32)}}, ""),
        ({"a": np.zeros((2, 3), np.float32)}, "b/c is missing"),
        ({"a": np.zeros((3, 2), np.float32), "b": {"c": np.zeros(4, np.int32)}}, "a has shape [3, 2], expected [2, 3]"),
        ({"a": np.zeros((2, 3), np.float16), "b": {"c": np.zeros(4, np.int32)}}, "a is float16, expected float32"),
        ({"a": np.zeros((2, 3), np.float32), "b": {"c": np.zeros(4, np.int32), "d": np.zeros(1)}}, "b/d is not expected"),
    ],
)
def test_first_difference_is_one_line(found, words):
    expected = {"a": jax.ShapeDtypeStruct((2, 3), jnp.float32), "b": {"c": jax.ShapeDtypeStruct((4,), jnp.int32)}}
    assert trees.first_difference(expected, found) == words


def test_nested_is_the_inverse_of_paths():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert trees.nested(trees.paths(tree)) == tree
    assert trees.nested({}) == {}
