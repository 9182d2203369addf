"""The job of training alone: dense, pruned, distilled; its export does on raw inputs what NumPy does with its parameters."""

import dataclasses
import functools
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from bmjax import config as configs
from bmjax import data, deploy, prune
from bmjax.data.dataset import stratified
from bmjax.distill import Distill
from bmjax.jobs import common
from bmjax.jobs import train as jobs
from bmjax.models import Plain
from bmjax.train import checkpoint, loop
from bmjax.train import log as logs
from bmjax.train.optimizer import Optimizer
from bmjax.train.run import Run
from experiments import train as program

RUN = Run(steps=40, optimizer=Optimizer(learning_rate=0.03), every=loop.Every(log=1, evaluate=20, save=20))
HIDDEN, STUDENT = (10, 7), (8,)


@functools.cache
def arrays():
    """Raw (inputs, targets) of three blobs, far from zero and in unlike units."""
    rng = np.random.default_rng(0)
    targets = np.arange(240) % 3
    inputs = (rng.normal(size=(240, 6)) + 5 * np.eye(3, 6)[targets]) * [1, 10, 0.1, 1, 3, 5] + 20
    return inputs.astype(np.float32), targets


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "blobs.npz"
    np.savez(path, inputs=arrays()[0], targets=arrays()[1], class_names=["red", "green", "blue"])
    return f"arrays:{path}"


def config(source, mesh="data=8", **changes):
    found = jobs.Config(
        machine=common.Machine(mesh=mesh, tensorboard=False),
        data=data.Data(source=source, batch=16),
        model=Plain(hidden=HIDDEN),
        run=RUN,
    )
    for name, value in changes.items():
        setattr(found, name, value)
    configs.validate(found)
    return configs.freeze(found)


@pytest.fixture(scope="module")
def dense(source, tmp_path_factory):
    """(workdir, results) of a plain training."""
    workdir = tmp_path_factory.mktemp("dense")
    return workdir, jobs.train(config(source), workdir, "the command")


def numpy_logits(params, raw):
    """The forward pass in float64, with the normalisation worked out from the raw training rows."""
    inputs, targets = arrays()
    train = inputs[stratified(targets)["train"]].astype(np.float64)
    x = (raw - train.mean(0)) / train.std(0)
    layers = sorted(name.removesuffix("/kernel") for name in params if name.endswith("kernel"))  # head, hidden_0, hidden_1, ...
    for name in [*layers[1:], layers[0]]:
        x = (np.maximum(x, 0) if name != "hidden_0" else x) @ params[f"{name}/kernel"] + params[f"{name}/bias"]
    return x


def check_export(workdir, model):
    """The exported file, the test split beside it and the reported figures say the same. Returns the parameters."""
    inputs, targets = arrays()
    rows = stratified(targets)["test"]
    with np.load(workdir / jobs.TEST) as test:
        np.testing.assert_allclose(test["inputs"], inputs[rows], rtol=1e-5)
        np.testing.assert_array_equal(test["targets"], targets[rows])
    params = load_file(workdir / jobs.EXPORT / "params.safetensors")
    expected = numpy_logits(params, inputs[rows].astype(np.float64))
    np.testing.assert_allclose(deploy.load(workdir / jobs.EXPORT)(inputs[rows]), expected, atol=2e-4)
    right = expected.argmax(-1) == targets[rows]
    assert model["metrics"]["accuracy"] == pytest.approx(right.mean())
    picked = expected[np.arange(len(rows)), targets[rows]]
    nll = np.log(np.exp(expected - expected.max(-1, keepdims=True)).sum(-1)) + expected.max(-1) - picked
    assert model["metrics"]["nll"] == pytest.approx(nll.mean(), rel=1e-3, abs=1e-6)
    assert model["parameters"] == sum(leaf.size for leaf in params.values())
    return params


def test_dense(dense, source):
    workdir, results = dense
    (model,) = results["models"]
    assert (model["name"], model["train_steps"], model["sparsity"]) == ("model", 40, 0.0)
    assert model["parameters"] == 6 * 10 + 10 + 10 * 7 + 7 + 7 * 3 + 3
    assert model["metrics"]["accuracy"] > 0.9
    assert model["metrics"]["count"] == 96  # 40% of 240
    check_export(workdir, model)
    assert json.loads((workdir / jobs.RESULTS).read_text()) == results
    manifest = json.loads((workdir / jobs.EXPORT / "manifest.json").read_text())["data"]
    assert manifest["class_names"] == ["red", "green", "blue"]
    assert manifest["metadata"]["config"] == configs.fingerprint(config(source))


def test_the_same_command_shows_the_same_and_trains_nothing(dense, source, monkeypatch):
    workdir, results = dense
    monkeypatch.setattr(loop, "fit", None)
    assert jobs.train(config(source), workdir, "the command") == results


@pytest.mark.parametrize("mesh", ["data=8", "data=2,fsdp=4"])
def test_pruned(source, tmp_path, mesh):
    pruning = prune.Sparsity(sparsity=0.7, interval=7)
    (model,) = jobs.train(config(source, mesh, prune=pruning), tmp_path, "c")["models"]
    params = check_export(tmp_path, model)
    zeros = {name: int((leaf == 0).sum()) for name, leaf in params.items()}
    assert zeros["hidden_0/kernel"] == 42  # 0.7 x 6 x 10
    assert zeros["hidden_1/kernel"] == 49  # 0.7 x 10 x 7
    assert zeros["head/kernel"] == 0
    assert model["sparsity"] == pytest.approx((42 + 49) / (60 + 70 + 21))
    assert model["metrics"]["accuracy"] > 0.8


def test_pruned_with_one_threshold(source, tmp_path):
    pruning = prune.Sparsity(sparsity=0.5, allocation="global", schedule="one_shot")
    (model,) = jobs.train(config(source, prune=pruning), tmp_path, "c")["models"]
    params = check_export(tmp_path, model)
    assert sum(int((params[f"hidden_{i}/kernel"] == 0).sum()) for i in range(2)) == 65  # 0.5 x (60 + 70)


def student(source, predict=False, **teacher):
    learned_from = jobs.Teacher(model=Plain(hidden=HIDDEN), run=RUN, **teacher)
    return config(source, model=Plain(hidden=STUDENT), teacher=learned_from, predict=predict)


def test_distilled_with_a_hint_and_predicted_elsewhere(source, tmp_path, capfd):
    objective = Distill(share=0.6, temperature=3.0, hint_weight=0.5, student_feature="hidden_0", teacher_feature="hidden_1")
    program.main(student(source, predict=True, distill=objective), tmp_path, "c")
    printed = capfd.readouterr().out
    teacher, model = json.loads((tmp_path / jobs.RESULTS).read_text())["models"]
    assert [teacher["name"], model["name"]] == ["teacher", "student"]
    assert [teacher["parameters"], model["parameters"]] == [6 * 10 + 10 + 10 * 7 + 7 + 7 * 3 + 3, 6 * 8 + 8 + 8 * 3 + 3]
    params = check_export(tmp_path, model)  # the hint's projector stays behind
    assert set(params) == {"hidden_0/kernel", "hidden_0/bias", "head/kernel", "head/bias"}
    rows = [row for row in logs.read(tmp_path)["student"] if "loss" in row]
    assert len(rows) == 40
    for row in rows:
        assert row["loss"] == pytest.approx(0.4 * row["ce"] + 0.6 * row["kd"] + 0.5 * row["hint"], rel=1e-5)
    for name in ("kd", "hint"):
        assert rows[-1][name] < rows[0][name]
    assert model["metrics"]["teacher_agreement"] > 0.9
    inputs, targets = arrays()
    expected = numpy_logits(params, inputs[stratified(targets)["test"]].astype(np.float64)).argmax(-1)
    lines = [line.split(",") for line in (tmp_path / "predictions.csv").read_text().splitlines()]
    assert [int(line[1]) for line in lines[1:]] == expected.tolist()
    assert f"accuracy {model['metrics']['accuracy']:.4f}" in printed


def test_the_teacher_comes_from_an_export(dense, source, tmp_path):
    workdir, results = dense
    found = jobs.train(student(source, pretrained=str(workdir / jobs.EXPORT)), tmp_path, "c")
    teacher, model = found["models"]
    assert teacher["metrics"]["confusion"] == results["models"][0]["metrics"]["confusion"]
    assert teacher["metrics"]["nll"] == pytest.approx(results["models"][0]["metrics"]["nll"], rel=1e-5)
    assert teacher["train_steps"] == 0
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["student"]
    assert set(logs.read(tmp_path)) == {"student"}
    inputs, targets = arrays()
    test = inputs[stratified(targets)["test"]]
    answers = [np.argmax(deploy.load(folder / jobs.EXPORT)(test), -1) for folder in (workdir, tmp_path)]
    assert model["metrics"]["teacher_agreement"] == pytest.approx(np.mean(answers[0] == answers[1]))


def launch(*arguments):
    argv = ["experiments/train.py", *map(str, arguments)]
    configs.launch(program.main, presets=program.PRESETS, default="article", about=program.__doc__, argv=argv)


def test_a_teacher_by_flags_comes_with_its_own_architecture(dense, source, tmp_path):
    workdir, results = dense
    launch(
        f"--config.data.source={source}",
        "--config.data.batch=16",
        "--config.machine.devices=0",
        "--config.machine.tensorboard=false",
        "--config.model=Residual",
        "--config.model.layers=1",
        "--config.model.width=8",
        "--config.model.neurons=8",
        "--config.run.steps=3",
        f"--config.teacher.pretrained={workdir}",
        f"--workdir={tmp_path}",
    )
    teacher, model = json.loads((tmp_path / jobs.RESULTS).read_text())["models"]
    assert teacher["metrics"]["confusion"] == results["models"][0]["metrics"]["confusion"]
    assert teacher["parameters"] == results["models"][0]["parameters"]
    assert model["metrics"]["count"] == 96
    assert {"kd", "ce"} <= set(logs.read(tmp_path)["student"][0])
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["teacher"]["model"] is None


def test_the_moving_average_is_what_is_scored_and_shipped(source, tmp_path):
    run = dataclasses.replace(RUN, ema=0.9, norms=True)
    (model,) = jobs.train(config(source, run=run, prune=prune.Sparsity(sparsity=0.5, interval=5)), tmp_path, "c")["models"]
    params = check_export(tmp_path, model)
    assert int((params["hidden_0/kernel"] == 0).sum()) == 30  # zeros stay zeros in the average
    held = checkpoint.read(tmp_path / "checkpoints" / "model").state
    average, last = held["extra/ema/hidden_0/kernel"], held["params/model/hidden_0/kernel"]
    np.testing.assert_array_equal(params["hidden_0/kernel"], np.where(last == 0, 0, average))
    assert not np.array_equal(average, last)
    assert {"grad_norm", "update_norm"} <= set(logs.read(tmp_path)["model"][0])


def test_tokens(tmp_path):
    """A decoder on bytes: the exported program takes ids, and its figures are those of NumPy over its logits."""
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(97, 123)) * 60)
    launch(
        f"--config.data.source=text:{text}",
        "--config.data.length=8",
        "--config.data.batch=8",
        "--config.machine.devices=0",
        "--config.machine.tensorboard=false",
        "--config.model=Decoder",
        "--config.model.layers=1",
        "--config.model.width=8",
        "--config.model.heads=2",
        "--config.model.neurons=8",
        "--config.run.steps=5",
        f"--workdir={tmp_path / 'run'}",
    )
    results = json.loads((tmp_path / "run" / jobs.RESULTS).read_text())
    (model,) = results["models"]
    assert "confusion" not in model["metrics"]
    assert 0 < results["bigram_bits"] < 4  # each letter is always followed by the same one
    with np.load(tmp_path / "run" / jobs.TEST) as test:
        inputs, targets = test["inputs"], test["targets"]
        weights = test["weights"] if "weights" in test else np.ones(targets.shape)
    assert inputs.dtype == np.int32
    logits = np.asarray(deploy.load(tmp_path / "run" / jobs.EXPORT)(inputs), np.float64)
    assert logits.shape == (*inputs.shape, 256)
    total = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    nll = ((total - np.take_along_axis(logits, targets[..., None], -1)[..., 0]) * weights).sum() / weights.sum()
    assert model["metrics"]["nll"] == pytest.approx(nll, rel=1e-4)
    assert model["metrics"]["bits_per_token"] == pytest.approx(nll / np.log(2), rel=1e-4)
    assert model["valid"]["perplexity"] > 1


def test_token_ids_with_a_class_train_an_encoder(tmp_path):
    rng = np.random.default_rng(0)
    targets = np.arange(120) % 2
    inputs = np.where(targets[:, None] == 1, rng.integers(10, 20, (120, 6)), rng.integers(0, 10, (120, 6)))
    np.savez(tmp_path / "ids.npz", inputs=inputs, targets=targets)
    launch(
        f"--config.data.source=arrays:{tmp_path / 'ids.npz'}",
        "--config.data.vocabulary=20",
        "--config.data.batch=16",
        "--config.machine.devices=0",
        "--config.machine.tensorboard=false",
        "--config.model=Encoder",
        "--config.model.layers=1",
        "--config.model.width=8",
        "--config.model.heads=2",
        "--config.model.neurons=8",
        "--config.model.vocabulary=20",
        "--config.run.steps=60",
        "--config.run.optimizer.learning_rate=0.03",
        f"--workdir={tmp_path / 'run'}",
    )
    (model,) = json.loads((tmp_path / "run" / jobs.RESULTS).read_text())["models"]
    assert model["metrics"]["accuracy"] > 0.9
    with np.load(tmp_path / "run" / jobs.TEST) as test:
        assert test["inputs"].dtype == np.int32
        found = np.asarray(deploy.load(tmp_path / "run" / jobs.EXPORT)(test["inputs"])).argmax(-1)
        assert (found == test["targets"]).mean() == pytest.approx(model["metrics"]["accuracy"])
