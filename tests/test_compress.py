"""The main job on three blobs: what it reports is what it ships, it goes on where it was cut, and it says when nothing passed."""

import copy
import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from bmjax import config as configs
from bmjax import data, deploy, parallel, prune, trees
from bmjax.data.dataset import stratified
from bmjax.distill import Distill
from bmjax.jobs import common
from bmjax.jobs import compress as jobs
from bmjax.jobs import search as parts
from bmjax.jobs import train as alone
from bmjax.jobs.search import Pruning
from bmjax.losses import Task
from bmjax.measure import tango_interval
from bmjax.models import Plain, Residual, Transformer
from bmjax.train import log as logs
from bmjax.train import loop
from bmjax.train.optimizer import Optimizer
from bmjax.train.run import Bench, Run
from experiments import compress

BATCH, BIG_STEPS, PRUNE_STEPS, RETRAIN_STEPS = 16, 30, 30, 20
RESIDUAL = Residual(layers=2, width=8, neurons=16)
MESH = "data=2,fsdp=4"


@functools.cache
def arrays(image):
    """Raw (inputs, targets) of three blobs that no straight cut confuses."""
    rng = np.random.default_rng(0)
    targets = np.arange(400) % 3
    inputs = 0.3 * rng.normal(size=(400, 16)) + 3 * np.eye(3, 16)[targets]
    return inputs.reshape((400, 4, 4, 1) if image else (400, 16)).astype(np.float32), targets


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """image -> name of the data."""
    folder = tmp_path_factory.mktemp("data")
    for image in (False, True):
        np.savez(folder / f"{image}.npz", inputs=arrays(image)[0], targets=arrays(image)[1])
    return lambda image: f"arrays:{folder / f'{image}.npz'}"


def run(steps, rate=0.01):
    return Run(steps=steps, optimizer=Optimizer(learning_rate=rate), every=loop.Every(log=10, evaluate=0, save=0))


def config(source, model=RESIDUAL, *, mesh=MESH, ratios=(3.0,), max_drop=0.1, pruned=None, **changes):
    found = jobs.Config(
        title="three blobs",
        machine=common.Machine(mesh=mesh, tensorboard=False),
        data=data.Data(source=source, batch=BATCH),
        model=model,
        distill=Distill(share=0.5),
        big=run(BIG_STEPS, 0.03),
        prune=Pruning(ratios=ratios, run=pruned or run(PRUNE_STEPS), interval=7),
        retrain=run(RETRAIN_STEPS),
        budget=jobs.Budget(max_drop=max_drop),
        latency=jobs.Latency(batch=64, repeats=5),
        **changes,
    )
    configs.validate(found)
    return configs.freeze(found)


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    """(workdir, results) of the whole job."""
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, jobs.compress(config(source(False)), workdir, "the command")


def named(results):
    return {model["name"]: model for model in results["models"]}


def shipped_accuracy(workdir, image=False):
    """Of the exported file on the raw test rows."""
    inputs, targets = arrays(image)
    rows = stratified(targets)["test"]
    return np.mean(np.argmax(deploy.load(workdir / jobs.EXPORT)(inputs[rows]), -1) == targets[rows])


def residual_count(layers, neurons, w=8):
    return (16 * w + w) + layers * (2 * w + (w * neurons + neurons) + (neurons * w + w)) + 2 * w + (w * 3 + 3)


def residual_flops(layers, neurons, w=8):
    return 2 * (16 * w + layers * 2 * w * neurons + w * 3)


def test_the_small_model_is_not_worse_and_has_the_ratio(finished):
    _, results = finished
    verdict, models = results["verdict"], named(results)
    assert list(models) == ["big", "small", "from scratch", "without teacher"]
    assert verdict["verdict"] == "not worse"
    assert verdict["n"] == 160  # 40% of 400
    assert models["big"]["metrics"]["accuracy"] == 1.0
    assert verdict["drop"] == pytest.approx(1.0 - models["small"]["metrics"]["accuracy"])
    (candidate,) = results["candidates"]
    sizes = candidate["sizes"]
    assert candidate["chosen"] and candidate["holds"]
    assert models["big"]["parameters"] == residual_count(2, 16)
    assert models["small"]["parameters"] == candidate["parameters"] == residual_count(**sizes) <= residual_count(2, 16) / 3
    for name in ("from scratch", "without teacher"):
        assert models[name]["parameters"] == models["small"]["parameters"]
    assert models["small"]["bytes"] == 4 * models["small"]["parameters"]


def test_what_was_removed_where_is_what_was_shipped(finished):
    workdir, results = finished
    structure, (candidate,) = results["structure"], results["candidates"]
    assert structure["sizes_before"] == {"layers": 2, "neurons": 16}
    assert structure["sizes_after"] == candidate["sizes"]
    kept = [layer for layer in structure["layers"] if layer["kept"]]
    assert len(kept) == candidate["sizes"]["layers"] == 1
    assert kept[0]["importance"] == max(layer["importance"] for layer in structure["layers"])
    assert sum(kept[0]["parts"]["neurons"]["kept"]) == candidate["sizes"]["neurons"]
    params = load_file(workdir / jobs.EXPORT / "params.safetensors")
    assert params["layers/up/kernel"].shape == (1, 8, candidate["sizes"]["neurons"])
    assert sum(leaf.size for leaf in params.values()) == candidate["parameters"]


def test_the_export_predicts_what_the_results_say(finished):
    workdir, results = finished
    assert named(results)["small"]["metrics"]["accuracy"] == pytest.approx(shipped_accuracy(workdir))
    assert results["files"]["export"] == str(workdir / jobs.EXPORT)
    manifest = json.loads((workdir / jobs.EXPORT / "manifest.json").read_text())["data"]
    assert manifest["metadata"]["verdict"] == "not worse"


def test_the_baselines_get_equal_compute(finished):
    _, results = finished
    models, sizes = named(results), results["candidates"][0]["sizes"]
    big, small = residual_flops(2, 16), residual_flops(**sizes)
    assert [models["big"]["flops"], models["small"]["flops"]] == [big, small]
    assert models["big"]["train_flops"] == BIG_STEPS * BATCH * 3 * big
    spent = PRUNE_STEPS * BATCH * (3 * big + big) + RETRAIN_STEPS * BATCH * (3 * small + big)
    assert models["small"]["train_flops"] == spent
    assert models["small"]["train_steps"] == PRUNE_STEPS + RETRAIN_STEPS
    step = BATCH * 3 * small
    for name in ("from scratch", "without teacher"):
        assert abs(models[name]["train_flops"] - spent) <= step / 2
    assert models["from scratch"]["train_flops"] == models["from scratch"]["train_steps"] * step


def test_the_report_shows_the_results(finished):
    workdir, results = finished
    page = (workdir / jobs.REPORT).read_text()
    assert "three blobs" in page
    assert "The small model is not worse" in page
    assert results["verdict"]["sentence"].partition(": a")[2] in page
    assert f"{named(results)['small']['parameters']:,}" in page
    assert json.loads((workdir / jobs.RESULTS).read_text()) == json.loads(json.dumps(results))


def test_the_sensitivity_is_measured_saved_and_shown(finished):
    workdir, results = finished
    curves = results["sensitivity"]
    assert curves["names"] == ["layers", "neurons", "neurons/0", "neurons/1"]
    assert curves["units"] == [2, 16, 16, 16]
    assert curves["dense"] == results["candidates"][0]["valid_accuracy"] + results["candidates"][0]["valid_drop"]
    assert [line[-1] for line in curves["sparsities"]] == [1 / 2, *[15 / 16] * 3]  # one element is left
    assert prune.Sensitivity.load(workdir / "sensitivity.json").as_dict() == curves
    page = (workdir / jobs.REPORT).read_text()
    assert page.count(": accuracy, % against sparsity") == 2  # layers, neurons
    assert page.index("What was removed") < page.index("How much each part matters") < page.index("Sizes that were tried")


def test_a_finished_job_is_shown_again(finished, source, monkeypatch):
    workdir, results = finished
    monkeypatch.setattr(loop, "fit", None)
    assert jobs.compress(config(source(False)), workdir, "another command") == json.loads(json.dumps(results))


def lasting(results):
    """What does not depend on when and where a job ran."""
    found = copy.deepcopy(json.loads(json.dumps(results)))
    for key in ("created", "files", "command"):
        del found[key]
    for model in found["models"]:
        del model["latency"]
    return found


def test_a_job_that_was_killed_goes_on(finished, source, tmp_path, monkeypatch):
    trained, fit, killed_at = [], loop.fit, "retrain"

    def watched(*args, name, **kwargs):
        if name == killed_at:
            raise KeyboardInterrupt
        trained.append(name)
        return fit(*args, name=name, **kwargs)

    monkeypatch.setattr(loop, "fit", watched)
    with pytest.raises(KeyboardInterrupt):
        jobs.compress(config(source(False)), tmp_path, "the command")
    assert trained == ["big", "prune 3x"]
    assert not (tmp_path / jobs.RESULTS).exists()

    killed_at = ""
    monkeypatch.setattr(prune, "analyse", None)  # its curves were saved
    results = jobs.compress(config(source(False)), tmp_path, "the command")
    assert trained == ["big", "prune 3x", "retrain", "from scratch", "without teacher"]
    assert lasting(results) == lasting(finished[1])

    (tmp_path / jobs.RESULTS).unlink()  # as if it had been killed while the last figures were taken
    again = jobs.compress(config(source(False)), tmp_path, "the command")
    assert len(trained) == 5
    assert lasting(again) == lasting(results)


def test_a_vision_transformer_is_pruned_and_cut(source, tmp_path):
    """The middle of the job, on one device and from fresh parameters: what is cut is what the search proposed, and it works."""
    model = Transformer(patch=2, layers=2, width=8, heads=2, neurons=16).build((4, 4, 1), 3)
    settings, terms = data.Data(source=source(True), batch=BATCH), {"ce": (1.0, Task().term())}
    with logs.Log(tmp_path, tensorboard=False) as log:
        mesh = parallel.make_mesh("data=1", jax.devices()[:1])
        bench = Bench(mesh, data.load(settings), settings, tmp_path, log, 0)
        big = common.Net(model, *jax.jit(model.init)(jax.random.key(0), bench.example()))
        analysis = parts.analyse(bench, big)
        pruning = Pruning(ratios=(3.0,), run=run(200, 0.02), interval=5, end=0.3)
        (candidate,) = parts.search(bench, big, analysis, parts.measure_sensitivity(bench, big, analysis), pruning, terms, 1.0)
        small = parts.compact(bench, candidate, analysis)
        accuracy = common.evaluate(bench, small, bench.dataset.test).summary["accuracy"]
    whole = {"layers": 2, "heads": 2, "neurons": 16}
    assert {group.name: group.size for group in analysis.groups} == whole
    sizes = candidate.proposal.sizes
    assert {name: int(keep.sum(-1).max()) for name, keep in candidate.keeps.items()} == sizes
    assert sizes["layers"] == sizes["heads"] == 1 and sizes["neurons"] < 16
    leaves = trees.paths(small.params)
    assert leaves["layers/attention/query/kernel"].shape == (sizes["layers"], 8, sizes["heads"], 4)
    assert leaves["layers/up/kernel"].shape == (sizes["layers"], 8, sizes["neurons"])
    assert trees.size(small.params) == candidate.proposal.parameters <= trees.size(big.params) / 3
    assert accuracy > 0.9


def test_a_test_split_that_cannot_say_not_worse_is_refused_before_training(source, tmp_path, monkeypatch):
    """How many it takes: the interval of no discordant pair is below the allowed drop from there on, and not before."""
    monkeypatch.setattr(loop, "fit", None)
    settings = config(source(False), max_drop=0.01)
    with pytest.raises(
        ValueError, match=r"the test split has 160 examples, of which no verdict can come: .* takes 268 at"
    ) as found:
        jobs.compress(settings, tmp_path, "c")
    assert "budget.max_drop=0.01 and budget.level=0.05" in str(found.value)
    assert tango_interval(0, 0, 268)[1] < 0.01 < tango_interval(0, 0, 267)[1]
    assert not (tmp_path / "config.json").exists()


def test_a_big_model_that_saw_other_images_is_said_to():
    digits = configs.load("digits", compress.PRESETS)
    assert jobs._augmentation(digits) == [
        "The big model was trained with augmentation (shift=1, noise=0.15); "
        "the small model and the baselines were trained without augmentation."
    ]
    digits.retrain.augment = dataclasses.replace(digits.big.augment, shift=2)
    digits.pretrained = "elsewhere"
    assert jobs._augmentation(digits) == [
        "The big model was given as it is, trained elsewhere; the small model and the baselines were trained with augmentation "
        "(shift=2, noise=0.15), and pruning went without augmentation."
    ]
    digits.pretrained, digits.prune.run.augment = "", digits.big.augment
    digits.retrain.augment = digits.big.augment
    assert jobs._augmentation(digits) == []


@pytest.mark.slow
def test_a_vision_transformer_loses_layers_heads_and_neurons(source, tmp_path):
    model = Transformer(patch=2, layers=2, width=8, heads=2, neurons=16)
    results = jobs.compress(config(source(True), model, mesh="data=8"), tmp_path, "c")
    (candidate,) = results["candidates"]
    assert results["structure"]["sizes_before"] == {"layers": 2, "heads": 2, "neurons": 16}
    assert results["structure"]["sizes_after"] == candidate["sizes"]
    assert candidate["sizes"]["layers"] == candidate["sizes"]["heads"] == 1
    assert candidate["sizes"]["neurons"] < 16
    params = load_file(tmp_path / jobs.EXPORT / "params.safetensors")
    assert params["layers/attention/query/kernel"].shape == (1, 8, 1, 4)
    assert params["layers/up/kernel"].shape == (1, 8, candidate["sizes"]["neurons"])
    small = named(results)["small"]
    assert small["parameters"] == sum(leaf.size for leaf in params.values()) <= named(results)["big"]["parameters"] / 3
    assert results["verdict"]["verdict"] == "not worse"
    assert small["metrics"]["accuracy"] == pytest.approx(shipped_accuracy(tmp_path, image=True))


@pytest.fixture(scope="module")
def classifier(source, tmp_path_factory):
    """Folder of an exported plain classifier, trained alone."""
    workdir = tmp_path_factory.mktemp("classifier")
    settings = alone.Config(
        machine=common.Machine(mesh="data=8", tensorboard=False),
        data=data.Data(source=source(False), batch=BATCH),
        model=Plain(hidden=(24, 12)),
        run=run(40, 0.03),
    )
    results = alone.train(configs.freeze(settings), workdir, "c")
    return workdir / alone.EXPORT, results["models"][0]


def test_a_plain_classifier_from_an_export(source, classifier, tmp_path):
    trained, known = classifier
    export = tmp_path.with_name("given")
    shutil.copytree(trained, export)
    settings = config(source(False), Plain(hidden=(24, 12)), mesh="data=8", ratios=(2.0,), pretrained=str(export))
    results = jobs.compress(settings, tmp_path, "c")
    models = named(results)
    assert models["big"]["metrics"]["confusion"] == known["metrics"]["confusion"]
    assert models["big"]["train_steps"] == 0
    assert "big" not in logs.read(tmp_path)
    assert results["verdict"]["verdict"] == "not worse"
    a, b = (results["candidates"][0]["sizes"][name] for name in ("hidden_0", "hidden_1"))
    assert models["small"]["parameters"] == 16 * a + a + a * b + b + b * 3 + 3 <= (16 * 24 + 24 + 24 * 12 + 12 + 12 * 3 + 3) / 2
    shared = results["structure"]["shared"]
    assert [sum(shared[name]["kept"]) for name in ("hidden_0", "hidden_1")] == [a, b]
    params = load_file(tmp_path / jobs.EXPORT / "params.safetensors")
    assert [params[f"hidden_{i}/kernel"].shape for i in range(2)] == [(16, a), (a, b)]
    assert models["small"]["metrics"]["accuracy"] == pytest.approx(shipped_accuracy(tmp_path))
    said = "was given as it is, trained elsewhere; the small model and the baselines were trained without augmentation."
    assert said in results["notes"][-1] and said in (tmp_path / jobs.REPORT).read_text()
    check_curve(results["sensitivity"], export, data.load(settings.data).valid.take(slice(None)))
    recorded = json.loads((tmp_path / "config.json").read_text())
    assert recorded["teachers"] == {str(export): common.identity(str(trained))}
    recorded["teachers"][str(export)] = "0" * 64
    (tmp_path / "config.json").write_text(json.dumps(recorded))
    with pytest.raises(ValueError, match=r"of another pretrained network: the SHA-256 of .*given is 000000000000 there"):
        jobs.compress(settings, tmp_path, "c")
    shutil.rmtree(export)
    assert named(jobs.compress(settings, tmp_path, "c")) == named(json.loads(json.dumps(results)))  # finished, and shown again


def check_curve(curves, export, valid):
    """The curve of the first hidden layer, against NumPy with the exported parameters."""
    known = {name: leaf.astype(np.float64) for name, leaf in load_file(export / "params.safetensors").items()}
    norms = sum((known[name] ** 2).sum(axis) for name, axis in (("hidden_0/kernel", 0), ("hidden_1/kernel", 1)))
    order = np.argsort(norms + known["hidden_0/bias"] ** 2)
    at = curves["names"].index("hidden_0")
    for sparsity, quality in zip(curves["sparsities"][at], curves["quality"][at]):
        keep = np.ones(24)
        keep[order[: round(24 * sparsity)]] = 0
        x = np.maximum(valid["inputs"] @ known["hidden_0/kernel"] + known["hidden_0/bias"], 0) * keep
        x = np.maximum(x @ known["hidden_1/kernel"] + known["hidden_1/bias"], 0)
        right = np.argmax(x @ known["head/kernel"] + known["head/bias"], -1) == valid["targets"]
        assert quality == pytest.approx(np.mean(right))
    assert min(curves["quality"][at]) < curves["dense"]


@pytest.mark.parametrize(
    ("ratios", "tried", "sentence"),
    [((20.0, 25.0), 1, "no candidate held"), ((1e6,), 0, "no sizes of this model reach a ratio")],
)
def test_when_nothing_passes_it_says_so(source, classifier, tmp_path, ratios, tried, sentence):
    export, _ = classifier
    settings = config(
        source(False),
        Plain(hidden=(24, 12)),
        mesh="data=8",
        ratios=ratios,
        max_drop=0.02,
        pruned=run(3, 1e-6),  # one neuron a layer, and no time to learn: three classes cannot be told apart
        pretrained=str(export),
    )
    results = jobs.compress(settings, tmp_path, "c")
    assert results["verdict"]["verdict"] == "nothing passed"
    assert sentence in results["verdict"]["sentence"]
    assert [model["name"] for model in results["models"]] == ["big"]
    assert [candidate["holds"] for candidate in results["candidates"]] == [False] * tried
    assert results["structure"] is None
    assert not (tmp_path / jobs.EXPORT).exists()
    page = (tmp_path / jobs.REPORT).read_text()
    assert "No smaller model passed" in page
    assert sentence[1:] in page
