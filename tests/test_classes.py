"""A teacher with padding at the end of its vocabulary, or a student with it, against the logits themselves."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax import config as configs
from bmjax import data, distill
from bmjax.jobs import common, teachers
from bmjax.jobs import train as jobs
from bmjax.models import Decoder
from bmjax.types import Context, Outputs

RNG = np.random.default_rng(0)
HIDDEN, KERNEL, BIAS = (RNG.normal(size=shape).astype(np.float32) for shape in ((3, 4), (4, 6), (6,)))


class Headed:
    """A network whose head is its parameters."""

    axes, rules, features, vocabulary = {}, ((".*", ()),), ("a",), 6

    def init(self, key, batch):
        return {"kernel": jnp.asarray(KERNEL)}, {}

    def apply(self, params, model_state, batch, *, train=False, rngs=None, capture=()):
        bias = batch.get("bias")
        logits = HIDDEN @ params["kernel"] + (0 if bias is None else bias)
        return Outputs(logits, dict.fromkeys(capture, logits), (jnp.asarray(HIDDEN), params["kernel"], bias)), model_state


@pytest.mark.parametrize("bias", [None, BIAS])
@pytest.mark.parametrize("classes", [4, 6, 9])
def test_logits_and_head_have_the_classes(classes, bias):
    model = distill.OfClasses(Headed(), classes)
    params, state = model.init(jax.random.key(0), {})
    found, _ = model.apply(params, state, {"bias": bias}, capture=("a",))
    want = np.full((3, classes), -np.inf)
    plain = HIDDEN @ KERNEL + (0 if bias is None else bias)
    want[:, :6] = plain[:, :classes]
    np.testing.assert_allclose(found.logits, want, rtol=1e-5)
    hidden, kernel, fitted = found.head
    np.testing.assert_allclose(hidden @ kernel + (0 if fitted is None else fitted), want, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.features["a"], plain, rtol=1e-5)


def test_all_else_is_the_models():
    model = distill.OfClasses(Decoder(layers=1, width=8, heads=2, neurons=8).build((4,), 6), 9)
    assert (model.vocabulary, model.rules, model.features) == (6, model.model.rules, model.model.features)
    assert model.axes == model.model.axes
    small = model.resize({"neurons": 4})
    assert small == distill.OfClasses(model.model.resize({"neurons": 4}), 9)
    for again in (copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again == model
        assert hash(again) == hash(model)
    with pytest.raises(AttributeError, match="nothing"):
        _ = model.nothing


def settings(text, vocabulary):
    return data.Data(source=f"text:{text}", length=8, batch=8, vocabulary=vocabulary)


NET = Decoder(layers=1, width=8, heads=2, neurons=8)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """{classes: folder} of networks that were not trained, and the text that they are of."""
    folder = tmp_path_factory.mktemp("teachers")
    text = folder / "text.txt"
    text.write_bytes(bytes(range(97, 123)) * 40)
    for classes in (256, 300):
        with common.bench(jobs.Config(data=settings(text, classes)), folder / "bench") as bench:
            model = NET.build((8,), classes)
            params, state = jax.jit(model.init)(jax.random.key(classes), bench.example())
            common.ship(bench, common.Net(model, params, state), folder / str(classes), {}, NET)
    return text, folder


@pytest.mark.parametrize(("theirs", "ours"), [(300, 256), (256, 300)])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_teacher_of_another_vocabulary_teaches_what_both_have(exports, theirs, ours, chunked, tmp_path):
    """The loss of the step is `kd` over the 256 ids that both know."""
    text, folder = exports
    tutor = teachers.Teacher(
        pretrained=str(folder / str(theirs)), distill=distill.Distill(share=1.0, vocabulary=256, chunked=chunked)
    )
    config = jobs.Config(data=settings(text, ours), model=NET, teacher=tutor)
    configs.validate(config)
    with common.bench(configs.freeze(config), tmp_path) as bench:
        tutor.distill.check_classes(bench.dataset)
        whole = teachers.prepare(bench, tutor, None, {}, config.run).whole
        student = NET.build((8,), ours)
        params, state = jax.jit(student.init)(jax.random.key(1), bench.example())
        batch = {name: jnp.asarray(x) for name, x in bench.dataset.train.take(np.arange(8)).items()}
        batch = {"weights": jnp.ones(8), **batch}
        mine = student.apply(params, state, batch)[0]
        other = whole.model.apply(whole.params, whole.model_state, batch)[0]
        assert other.logits.shape == mine.logits.shape == (8, 8, ours)
        (_, term) = config.objective()[1]["kd"]
        found = term.apply(Context({}, {}, jnp.int32(0), jax.random.key(0), None, None), mine, other, batch).value()
    plain = whole.model.model.apply(whole.params, whole.model_state, batch)[0].logits
    want = distill.kd(mine.logits[..., :256], plain[..., :256], tutor.distill.temperature)
    np.testing.assert_allclose(found, np.average(want.mean(-1), weights=batch["weights"].reshape(8, -1).mean(-1)), rtol=1e-4)


def test_one_that_was_not_named_is_refused(exports, tmp_path):
    text, folder = exports
    for vocabulary in (None, 270):
        tutor = teachers.Teacher(pretrained=str(folder / "300"), distill=distill.Distill(vocabulary=vocabulary))
        with common.bench(jobs.Config(data=settings(text, 256)), tmp_path / str(vocabulary)) as bench:
            with pytest.raises(ValueError, match=r"has 300 classes and .* has 256; .* distill\.vocabulary=256 leaves that out"):
                teachers.prepare(bench, tutor, None, {}, None)
            with pytest.raises(ValueError, match=r"need the same classes$"):
                common.load(bench, None, str(folder / "300"))


def test_the_student_samples_no_padding_and_data_hold_none(exports, tmp_path):
    text, _ = exports
    with common.bench(jobs.Config(data=settings(text, 300)), tmp_path) as bench:
        model = NET.build((8,), 300)
        params = jax.jit(model.init)(jax.random.key(0), bench.example())[0]
        params["embed"]["embedding"] = params["embed"]["embedding"].at[110:].multiply(50.0)  # padding is what it likes best
        batch = {name: jnp.asarray(x) for name, x in bench.dataset.train.take(np.arange(8)).items()}
        drawn = [
            distill.on_policy(4, vocabulary=vocabulary, temperature=temperature)(
                model, params, batch, jax.random.key(0), jnp.int32(0)
            )
            for vocabulary, temperature in ((0, 1.0), (110, 1.0), (110, 0.0))
        ]
        sampled = [np.asarray(found["targets"][:, 4:]) for found in drawn]
        assert sampled[0].max() >= 110 > max(x.max() for x in sampled[1:])
        assert bench.dataset.within(300) is bench.dataset
        narrow = bench.dataset.within(110)  # "n" is 110
        assert narrow.fingerprint == bench.dataset.fingerprint
        with pytest.raises(ValueError, match="a batch holds the id 122, which is outside the vocabulary of 110; correct"):
            narrow.train.take(np.arange(8))
    for how, words in (
        ({"vocabulary": -1}, "vocabulary is -1; expected 0"),
        ({"vocabulary": 301}, "vocabulary is 301; expected 0"),
        ({"vocabulary": 110, "stop": 110}, r"stop is 110; expected a token in \[0, 109\]"),
        ({"vocabulary": 110, "top_k": 111}, "top_k is 111; expected 0"),
    ):
        with pytest.raises(ValueError, match=words):
            distill.on_policy(4, **how)(model, params, batch, jax.random.key(0), jnp.int32(0))
