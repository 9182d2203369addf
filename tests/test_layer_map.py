"""Which layer learns from which: by place, by number, by likeness; and what a map that does not fit is told."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from vit_pair import STUDENT, TEACHER, frozen, make_batch

from bmjax import config, distill, losses, measure, parallel
from bmjax.distill import layer_map
from bmjax.models import Residual, adapters
from bmjax.models.linen import LinenModel
from bmjax.models.vit import ViT
from bmjax.train import Problem, init_state, make_step, run
from bmjax.train.checkpoint import Checkpoints


def names(layers, root="layers", parts=("", "/attention", "/mlp")):
    return ("embed", *(f"{root}/{i}{part}" for i in range(layers) for part in parts), "final")


def numbers(pairs):
    return [int(name.split("/")[1]) for name in pairs.values()]


@pytest.mark.parametrize(
    ("student", "teacher", "want"),
    [
        (4, 12, [2, 5, 8, 11]),
        (3, 3, [0, 1, 2]),
        (1, 5, [4]),
        (2, 3, [1, 2]),
        (3, 2, [0, 0, 1]),  # round(2/3), round(4/3), 2, less 1
        (3, 8, [2, 4, 7]),
        (5, 1, [0, 0, 0, 0, 0]),
        (12, 24, list(range(1, 24, 2))),
    ],
)
def test_uniform_is_evenly_spread_and_ends_at_the_last(student, teacher, want):
    pairs = distill.uniform("mlp")(names(student), names(teacher))
    assert list(pairs) == [f"layers/{i}/mlp" for i in range(student)]
    assert numbers(pairs) == want
    assert pairs[f"layers/{student - 1}/mlp"] == f"layers/{teacher - 1}/mlp"


def test_layers_are_ordered_by_number_under_any_name():
    pairs = distill.uniform("", "")(names(11), names(22, "blocks"))
    assert pairs == {f"layers/{i}": f"blocks/{2 * i + 1}" for i in range(11)}
    assert distill.last("mlp", "attention")(names(3), names(12)) == {"layers/2/mlp": "layers/11/attention"}
    deep = ("stem", "stages/1/0", "stages/0/0", "stages/0/1", "stages/10/0")
    assert layer_map.layers(deep) == ("stages/0/0", "stages/0/1", "stages/1/0", "stages/10/0")
    assert layer_map.layers(("hidden_0", "hidden_1")) == ("hidden_0", "hidden_1")


def test_a_stride_pairs_by_number():
    odd = distill.stride(r"layers/(\d+)/mlp", step=2, offset=1)
    assert odd(names(3), names(6)) == {
        "layers/0/mlp": "layers/1/mlp",
        "layers/1/mlp": "layers/3/mlp",
        "layers/2/mlp": "layers/5/mlp",
    }
    renamed = distill.stride(r"layers/(\d+)", 3, 2, teacher="blocks/{}")
    assert renamed(names(2), names(6, "blocks")) == {"layers/0": "blocks/2", "layers/1": "blocks/5"}
    some = distill.stride(r"layers/([02])", teacher="layers/{}/attention")
    assert some(names(4), names(4)) == {"layers/0": "layers/0/attention", "layers/2": "layers/2/attention"}


@pytest.mark.parametrize(
    ("text", "want"),
    [("2i+1", [1, 3, 5]), ("2*i + 1", [1, 3, 5]), ("i", [0, 1, 2]), ("i+3", [3, 4, 5]), ("uniform", [1, 3, 5]), ("last", [5])],
)
def test_a_flag_names_a_map(text, want):
    assert numbers(layer_map.from_text(text, "mlp")(names(3), names(6))) == want
    term = distill.Distill(share=0.5, hint_weight=1.0, layers=text, part="mlp").terms(losses.cross_entropy_term())["hint"][1]
    student, teacher = (Residual(layers=n, width=4, neurons=4).build((4,), 2) for n in (3, 6))
    assert [int(name.split("/")[1]) for name in term.bind(student, teacher).teacher_features] == want


@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (3, 3), (3, 6), (4, 2), (2, 1)])
def test_monotone_is_the_best_of_all_that_do_not_cross(rows, columns):
    for seed in range(5):
        scores = np.random.default_rng(seed).normal(size=(rows, columns))
        apart = (lambda a, b: a < b) if columns >= rows else (lambda a, b: a <= b)
        every = [p for p in itertools.product(range(columns), repeat=rows) if all(map(apart, p, p[1:]))]
        best = max(every, key=lambda p: sum(scores[i, j] for i, j in enumerate(p)))
        assert layer_map.monotone(scores) == list(best)


def test_auto_finds_the_layers_that_were_copied():
    """A student whose layers are the teacher's first and last, rotated into a wider stream that it shares."""
    teacher, batch = frozen()["params"], make_batch()
    keep = np.array([0, 2])
    params = {**teacher, "layers": jax.tree.map(lambda x: x[keep] * 1.0, teacher["layers"])}
    params["layers"]["down"] = jax.tree.map(lambda x: 0.05 * x, params["layers"]["down"])
    short = LinenModel(TEACHER.module.clone(layers=2))
    pairs = distill.auto(short, TEACHER, params, frozen(), batch, part="attention")
    s, t = (
        jax.jit(
            lambda p, model=model, n=n: model.apply(p, {}, batch, capture=tuple(f"layers/{i}/attention" for i in range(n)))[0]
        )(p).features
        for model, p, n in ((short, params, 2), (TEACHER, teacher, 3))
    )
    weights = np.repeat(batch["weights"], 4)
    flat = lambda x: np.asarray(x).reshape(-1, x.shape[-1])
    table = np.array([[measure.linear_cka(flat(a), flat(b), weights) for b in t.values()] for a in s.values()])
    best = max(itertools.combinations(range(3), 2), key=lambda p: table[0, p[0]] + table[1, p[1]])
    assert numbers(pairs) == list(best) == [0, 2]


def test_auto_is_the_same_with_the_batch_over_eight_devices_and_for_another_width():
    batch, mesh = make_batch(), parallel.make_mesh("data=8")
    params, _ = jax.jit(STUDENT.init)(jax.random.key(1), batch)
    here = distill.auto(STUDENT, TEACHER, params, frozen(), batch)
    put = lambda tree: jax.device_put(tree, parallel.replicated(mesh))
    assert distill.auto(STUDENT, TEACHER, put(params), put(frozen()), parallel.put_batch(batch, mesh)) == here
    assert list(here) == ["layers/0", "layers/1"]
    padded = {**batch, "inputs": np.where(batch["weights"][:, None, None, None] > 0, batch["inputs"], 1e3).astype(np.float32)}
    assert distill.auto(STUDENT, TEACHER, params, frozen(), padded) == here
    pixels = LinenModel(ViT(patch=1, layers=2, width=8, heads=2, head_dim=4, neurons=8, classes=4))  # other positions: averaged
    fine, _ = jax.jit(pixels.init)(jax.random.key(2), batch)
    assert len(distill.auto(pixels, TEACHER, fine, frozen(), batch)) == 2


def problem(layers=None, **changes):
    hint = losses.on_features(distill.hint, layers or distill.uniform("mlp"), project="auto", **changes)
    terms = {"ce": (1.0, losses.cross_entropy_term()), "hint": (0.5, hint)}
    return Problem(STUDENT, terms, optax.sgd(0.1), teacher=TEACHER, loss_tx=optax.sgd(0.1))


def test_a_map_in_a_problem_is_the_dict_that_it_stands_for():
    pairs = {"layers/0/mlp": "layers/1/mlp", "layers/1/mlp": "layers/2/mlp"}
    assert problem().captures == problem(pairs).captures == (tuple(pairs), tuple(pairs.values()))
    one, other = (after(p, 1)[0] for p in (problem(), problem(pairs)))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert one.params["loss"]["hint"]["project"]["1"]["kernel"].shape == (8, 16)


@functools.cache
def mesh():
    return parallel.make_mesh("data=2", jax.devices()[:2])


def after(problem, steps, state=None):
    """(state, its abstract twin) after some steps."""
    batch = make_batch()
    fresh = init_state(problem, mesh(), STUDENT.rules, jax.random.key(0), batch, frozen=frozen())
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), fresh)
    step, state = make_step(problem, mesh(), abstract), fresh if state is None else state
    for _ in range(steps):
        state, metrics = step(state, frozen(), batch)
        jax.block_until_ready(metrics)
    return state, abstract


def test_projections_train_are_saved_and_stay_out_of_the_result(tmp_path):
    made = problem()
    straight = jax.device_get(after(made, 4)[0])
    half, abstract = after(made, 2)
    begun = jax.device_get(half.params["loss"]["hint"]["project"])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, half)
    with Checkpoints(tmp_path) as checkpoints:
        resumed = jax.device_get(after(made, 2, checkpoints.restore(abstract).state)[0])
    jax.tree.map(np.testing.assert_array_equal, resumed, straight)
    for index in ("0", "1"):
        moved = resumed.params["loss"]["hint"]["project"][index]["kernel"] - begun[index]["kernel"]
        assert np.abs(moved).max() > 1e-5
    shipped = run.result(made, straight)
    assert jax.tree.structure(shipped) == jax.tree.structure(jax.eval_shape(STUDENT.init, jax.random.key(0), make_batch())[0])


plain = lambda **more: adapters.plain(lambda key, x: {"w": jnp.zeros((2, 2))}, lambda p, x: x, **more)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: problem(distill.uniform("mpl")),
            "the loss term 'hint': the student has no layers with a part 'mpl'; the nearest are layers/",
        ),
        (
            lambda: problem(distill.stride(r"layers/(\d+)/mlp", 3)),
            "layers/1/mlp would learn from layers/3/mlp, which the teacher has not; the nearest are layers/",
        ),
        (lambda: problem(distill.stride(r"layer/(\d+)")), "matches none of the student's features; the nearest are layers/"),
        (lambda: problem(distill.stride(r"(layers)/\d+")), "the first group of the layer pattern .* must be a number"),
        (lambda: problem(distill.stride(r"layers/(\d+")), "is no regex"),
        (lambda: distill.stride("x", step=0), "the layer map's step is 0; expected 1 or more"),
        (lambda: problem(lambda s, t: {}), "the loss term 'hint': hint was given no layers"),
        (lambda: layer_map.from_text("2j+1"), "layers is '2j\\+1'; expected uniform, last, auto, or a stride such as 2i\\+1"),
        (lambda: config.validate(distill.Distill(layers="unifrom")), "layers is 'unifrom'; expected uniform"),
        (
            lambda: Problem(STUDENT, {"hint": (1.0, losses.on_features(distill.hint, distill.last()))}, optax.sgd(0.1)),
            "the loss term 'hint': the term hint needs a teacher",
        ),
        (
            lambda: Problem(
                STUDENT, {"h": (1.0, losses.on_features(distill.hint, distill.last()))}, optax.sgd(0.1), teacher=plain()
            ),
            "the teacher does not say which features it has",
        ),
        (lambda: distill.auto(STUDENT, plain(features=("h",)), {}, {}, {}), "the teacher has no layers with a part ''"),
        (lambda: losses.on_features(distill.hint, distill.last()).init(None, None, None), "the layers of hint are not known yet"),
        (
            lambda: problem({"layers/7": "layers/0"}),
            "the loss term 'hint': the student has no feature 'layers/7'; the nearest are layers/",
        ),
        (lambda: problem({"embed": "end"}), "the teacher has no feature 'end'; the nearest are "),
        (lambda: problem(lambda s, t: {s[0]: "layers/9"}), "the teacher has no feature 'layers/9'; the nearest are layers/"),
        (
            lambda: layer_map.layers(("0/layers/0", "1/layers/0"), "", "the teacher"),
            "the teacher is 2 networks; name the layers as",
        ),
    ],
)
def test_bad_input_is_one_clear_line(make, words):
    with pytest.raises(ValueError, match=words) as error:
        make()
    assert "\n" not in str(error.value)
