"""Jobs with several teachers, chains of generations, a moving average as the teacher, a teacher in fewer bits."""

import dataclasses
import itertools
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.special import log_softmax, logsumexp, softmax

from bmjax import config as configs
from bmjax import data, deploy, distill, parallel
from bmjax.data.dataset import stratified
from bmjax.distill import Distill
from bmjax.jobs import cache, common, evaluate, teachers
from bmjax.jobs import train as jobs
from bmjax.jobs.teachers import MeanTeacher, Teacher
from bmjax.models import Plain
from bmjax.train import checkpoint, loop
from bmjax.train import log as logs
from bmjax.train.optimizer import Optimizer
from bmjax.train.run import Run
from experiments import train as program

N = 240
RNG = np.random.default_rng(0)
TARGETS = np.arange(N) % 3
INPUTS = (RNG.normal(size=(N, 6)) + 2 * np.eye(3, 6)[TARGETS]).astype(np.float32)
TEST, TRAIN = (stratified(TARGETS)[key] for key in ("test", "train"))
RUN = Run(steps=8, optimizer=Optimizer(learning_rate=0.05), every=loop.Every(log=1, save=4))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "blobs.npz"
    np.savez(path, inputs=INPUTS, targets=TARGETS)
    return f"arrays:{path}"


def config(source, mesh="data=8", hidden=(5,), **changes):
    found = jobs.Config(
        machine=common.Machine(mesh=mesh, tensorboard=False),
        data=data.Data(source=source, batch=16),
        model=Plain(hidden=hidden),
        run=RUN,
    )
    for name, value in changes.items():
        setattr(found, name, value)
    configs.validate(found)
    return configs.freeze(found)


@pytest.fixture(scope="module")
def exports(source, tmp_path_factory):
    """Workdirs of two trained networks of different widths and depths."""
    folders = [tmp_path_factory.mktemp(name) for name in ("wide", "deep")]
    for folder, hidden in zip(folders, ((9,), (7, 6))):
        jobs.train(config(source, hidden=hidden, run=dataclasses.replace(RUN, steps=30)), folder, "c")
    return folders


def logits_of(params):
    """The forward pass of a network of dense layers on the test split, in float64."""
    mean, scale = INPUTS[TRAIN].astype(np.float64).mean(0), INPUTS[TRAIN].astype(np.float64).std(0)
    x = (INPUTS[TEST] - mean) / scale
    hidden = sorted(name for name in params if name.startswith("hidden") and name.endswith("kernel"))
    for name in (*(name.removesuffix("/kernel") for name in hidden), "head"):
        x = x @ params[f"{name}/kernel"].astype(np.float64) + params[f"{name}/bias"]
        x = x if name == "head" else np.maximum(x, 0)
    return x


def nll(logits):
    return -log_softmax(logits, -1)[np.arange(len(TEST)), TARGETS[TEST]].mean()


def params_of(workdir):
    return load_file(workdir / jobs.EXPORT / "params.safetensors")


def rows(results):
    return {model["name"]: model for model in results["models"]}


def test_the_average_of_two_pretrained_teachers(source, exports, tmp_path):
    teacher = Teacher(pretrained=",".join(map(str, exports)), weights=(3.0, 1.0), distill=Distill(temperature=2.0))
    run = dataclasses.replace(RUN, time_teacher=True)
    results = jobs.train(config(source, mesh="data=2,fsdp=4", teacher=teacher, run=run), tmp_path, "c")
    found = rows(results)
    assert list(found) == ["teacher", "teacher 2", "all teachers", "student"]
    each = [logits_of(params_of(folder)) for folder in exports]
    for name, logits in zip(("teacher", "teacher 2"), each):
        assert found[name]["metrics"]["nll"] == pytest.approx(nll(logits), rel=1e-4)
    mean = np.average(softmax(np.stack(each) / 2, -1), axis=0, weights=[3, 1])
    assert found["all teachers"]["metrics"]["nll"] == pytest.approx(nll(2 * np.log(mean)), rel=1e-4)
    answers = deploy.load(tmp_path / jobs.EXPORT)(INPUTS[TEST]).argmax(-1)
    assert found["student"]["metrics"]["teacher_agreement"] == pytest.approx((answers == mean.argmax(-1)).mean())
    assert [row["weights"] for row in found.values()] == ["pretrained", "pretrained", "several networks", "last step"]
    step = found["student"]["step"]
    forward = {"student": 6 * 5 + 5 * 3, "teachers": 6 * 9 + 9 * 3 + 6 * 7 + 7 * 6 + 6 * 3}
    assert step["teacher_flops_share"] == pytest.approx(forward["teachers"] / (3 * forward["student"] + forward["teachers"]))
    assert step["peak_bytes"] > step["temporary_bytes"] > 0
    assert 0 < step["teacher_time_share"] < 3
    shown = "".join(map(str, program.table(results).columns[0]._cells))
    assert "step memory, MiB" in shown
    assert "teacher's FLOPs" in shown


def test_a_pretrained_teacher_in_int8(source, exports, tmp_path):
    teacher = Teacher(pretrained=str(exports[1]), precision="int8", distill=Distill(temperature_end=1.0, share_end=0.5))
    results = jobs.train(config(source, teacher=teacher), tmp_path, "c")
    exact = nll(logits_of(params_of(exports[1])))
    assert rows(results)["teacher"]["metrics"]["nll"] == pytest.approx(exact, rel=0.05)
    assert rows(results)["teacher"]["metrics"]["nll"] != pytest.approx(exact, rel=1e-6)
    sizes = {name: leaf.size for name, leaf in params_of(exports[1]).items()}
    kernels = sum(size for name, size in sizes.items() if name.endswith("kernel"))
    scales = 7 + 6 + 3  # one for each output
    assert rows(results)["teacher"]["parameters"] == sum(sizes.values())
    assert rows(results)["teacher"]["bytes"] == kernels + 4 * (sum(sizes.values()) - kernels + scales)
    lines = [row for row in logs.read(tmp_path)["student"] if "loss" in row]
    assert [lines[0]["kd/temperature"], lines[-1]["kd/temperature"]] == [2.0, 1.0]
    assert [lines[0]["kd/weight"], lines[-1]["kd/weight"]] == pytest.approx([0.9, 0.5])
    for row in lines:
        assert row["loss"] == pytest.approx(row["ce/weight"] * row["ce"] + row["kd/weight"] * row["kd"], rel=1e-5)


def test_generations_teach_each_other_and_go_on_after_a_stop(source, tmp_path, monkeypatch):
    chain = config(source, teacher=Teacher(generations=2, export="ensemble", distill=Distill(share=0.7)))
    calls, fit, train = [], loop.fit, common.train

    def stops(*arguments, **named):
        if named["name"] == "student":
            raise KeyboardInterrupt
        return fit(*arguments, **named)

    monkeypatch.setattr(loop, "fit", stops)
    with pytest.raises(KeyboardInterrupt):
        jobs.train(chain, tmp_path / "stopped", "c")

    def recorded(bench, name, *arguments, teacher=None, **named):
        calls.append((name, teacher, train(bench, name, *arguments, teacher=teacher, **named)))
        return calls[-1][2]

    monkeypatch.setattr(loop, "fit", fit)
    monkeypatch.setattr(common, "train", recorded)
    results = jobs.train(chain, tmp_path / "straight", "c")
    names = ["teacher", "generation 1", "student"]
    assert [name for name, _, _ in calls] == names
    assert calls[0][1] is None
    for (_, _, before), (_, teacher, _) in itertools.pairwise(calls):
        assert teacher.params is before.params
    assert list(rows(results)) == [*names, "ensemble"]

    trained = []
    monkeypatch.setattr(loop, "fit", lambda *a, **named: (trained.append(named["name"]), fit(*a, **named))[1])
    again = jobs.train(chain, tmp_path / "stopped", "c")
    assert trained == ["student"]
    for one, other in zip(results["models"], again["models"]):
        assert one["metrics"] == other["metrics"]
    # What is exported is the mean of the generations' probabilities.
    params = params_of(tmp_path / "stopped")
    parts = [{name[2:]: leaf for name, leaf in params.items() if name.startswith(f"{i}/")} for i in range(2)]
    want = logsumexp([log_softmax(logits_of(part), -1) for part in parts], axis=0) - np.log(2)
    found = np.asarray(deploy.load(tmp_path / "stopped" / jobs.EXPORT)(INPUTS[TEST]))
    np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-4)
    assert rows(results)["ensemble"]["metrics"]["nll"] == pytest.approx(nll(want), rel=1e-3)
    metadata = json.loads((tmp_path / "stopped" / jobs.EXPORT / "manifest.json").read_text())["data"]["metadata"]
    assert metadata["weights"] == "several networks"
    # And it teaches, by the mean of what the loss softens.
    soft = 2 * (logsumexp([log_softmax(logits_of(part) / 2, -1) for part in parts], axis=0) - np.log(2))
    teacher = Teacher(pretrained=str(tmp_path / "stopped"))
    taught = jobs.train(config(source, teacher=teacher), tmp_path / "taught", "c")
    assert rows(taught)["teacher"]["metrics"]["nll"] == pytest.approx(nll(soft), rel=1e-3)
    assert nll(soft) != pytest.approx(nll(want), rel=1e-3)


def test_the_moving_average_teaches_and_is_shipped(source, tmp_path):
    results = jobs.train(config(source, teacher=MeanTeacher(decay=0.8)), tmp_path, "c")
    (model,) = results["models"]
    assert (model["name"], model["weights"]) == ("student", "moving average")
    held = checkpoint.read(tmp_path / "checkpoints" / "student").state
    for name, leaf in params_of(tmp_path).items():
        np.testing.assert_array_equal(leaf, held[f"extra/ema/{name}"])
    assert not np.array_equal(held["extra/ema/head/kernel"], held["params/model/head/kernel"])
    lines = [row for row in logs.read(tmp_path)["student"] if "loss" in row]
    assert lines[0]["consistency"] == pytest.approx(0.0, abs=1e-9)  # at first the average is the student
    assert lines[-1]["consistency"] > 1e-6
    for row in lines:
        assert row["loss"] == pytest.approx(0.1 * row["ce"] + 0.9 * row["consistency"], rel=1e-5)
    for folder in (tmp_path, tmp_path / jobs.EXPORT):
        settings = dataclasses.replace(evaluate.defaults(str(folder)), output=str(tmp_path / "found.json"))
        found = evaluate.evaluate(settings, "c")
        assert found["weights"] == "moving average"
        assert found["metrics"]["nll"] == pytest.approx(model["metrics"]["nll"], rel=1e-5)


def test_a_loaded_teacher_is_read_part_by_part(exports):
    folder, mesh = exports[0] / jobs.EXPORT, parallel.make_mesh("fsdp=2,tensor=4")
    mapped, whole = deploy.map_params(folder), deploy.load_params(folder)
    jax.tree.map(np.testing.assert_array_equal, mapped, whole)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    read = []

    class Seen:
        shape = mapped["hidden_0"]["kernel"].shape

        def __getitem__(self, index):
            read.append(mapped["hidden_0"]["kernel"][index].shape)
            return mapped["hidden_0"]["kernel"][index]

    found = deploy.place({"kernel": Seen()}, {"kernel": rows})["kernel"]
    assert set(read) == {(3, 9)}  # halves, as the devices hold them
    assert found.sharding == rows
    np.testing.assert_array_equal(found, whole["hidden_0"]["kernel"])


@pytest.mark.slow
def test_copies_differ_and_each_item_takes_one(source, tmp_path):
    teacher = Teacher(model=Plain(hidden=(6,)), copies=2, combine="right", precision="bfloat16", run=RUN)
    found = rows(jobs.train(config(source, teacher=teacher), tmp_path, "c"))
    assert list(found) == ["teacher", "teacher 2", "all teachers", "student"]
    one, two, chosen = (found[name]["metrics"] for name in ("teacher", "teacher 2", "all teachers"))
    assert one["nll"] != two["nll"]
    assert chosen["nll"] < min(one["nll"], two["nll"])  # the labels choose
    assert chosen["accuracy"] >= max(one["accuracy"], two["accuracy"])


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        (lambda: Teacher(pretrained="a,b", weights=(1.0,)), "weights has 1 numbers for 2 teachers"),
        (lambda: Teacher(pretrained="a,b", combine="right", weights=(1.0, 2.0)), "give one of them"),
        (lambda: Teacher(pretrained="a", copies=2), "need no training"),
        (lambda: Teacher(pretrained="a,b", distill=Distill(chunked=True)), "set combine to logits, or"),
        (lambda: Teacher(), "a teacher needs pretrained"),
        (lambda: Distill(hint_weight=1.0, layers="last", student_feature="a"), "leave student_feature and teacher_feature out"),
        (lambda: Teacher(pretrained="a", export="ensemble"), "set generations to 2"),
        (lambda: Teacher(cached="a", generations=2), "one teacher that does not run"),
        (lambda: Teacher(pretrained="a", weights=(1.0,)), "of several teachers, and there is one"),
        (lambda: Teacher(pretrained="a", combine="right"), "of several teachers, and there is one"),
        (lambda: Teacher(pretrained="a", run=RUN), "run trains a teacher from its model, and none is given"),
        (lambda: Distill(layers="uniform"), "layers is uniform, and hint_weight 0 takes none"),
        (lambda: Distill(layers="auto"), "layers is auto, and hint_weight 0 takes none"),
        (lambda: Distill(hint_weight=1.0, part="mlp"), "part is mlp, which is of layers"),
        (lambda: Distill(schedule="cosine"), "schedule is cosine, and nothing goes to an end"),
        (lambda: MeanTeacher(distill=Distill(hint_weight=1.0, layers="auto")), "has the student's own layers; take uniform"),
        (lambda: Teacher(pretrained="a", combine="median"), "combine is 'median'; expected one of probability, logits"),
        (lambda: MeanTeacher(decay=1.0), "decay is 1.0"),
        (lambda: jobs.Config(teacher=MeanTeacher(), run=Run(ema=0.5)), "the decay of one moving average"),
    ],
)
def test_what_does_not_go_together_is_one_clear_line(teacher, words):
    with pytest.raises(ValueError, match=words) as error:
        configs.validate(teacher())
    assert "\n" not in str(error.value)


def test_a_path_with_a_comma_that_is_there_is_one_teacher(tmp_path):
    folder = tmp_path / "a,b"
    folder.mkdir()
    assert Teacher(pretrained=str(folder)).folders == (str(folder),)
    assert Teacher(pretrained=" x , y,").folders == ("x", "y")
    assert jax.device_count() == 8


def test_a_cache_is_of_one_export(source, tmp_path):
    for make in (lambda: cache.identity("a,b"), lambda: cached(source, "a,b", tmp_path)):
        with pytest.raises(ValueError, match="the teacher is a,b: a cache is of one export"):
            make()


def cached(source, teacher, workdir):
    return cache.cache(configs.freeze(cache.Config(teacher=teacher, data=data.Data(source=source, batch=16))), workdir, "c")


def test_a_run_does_not_go_on_with_another_teacher(source, exports, tmp_path):
    shutil.copytree(exports[0], tmp_path / "teacher")
    taught = config(source, teacher=Teacher(pretrained=str(tmp_path / "teacher"), distill=Distill(temperature=2.0)))
    jobs.train(taught, tmp_path / "run", "c")
    before = (tmp_path / "run" / jobs.RESULTS).read_bytes()
    jobs.train(taught, tmp_path / "run", "c")  # the same is shown again
    shutil.rmtree(tmp_path / "teacher")
    shutil.copytree(exports[1], tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"holds a run of another pretrained network: the SHA-256 of .*teacher is .* restore it"):
        jobs.train(taught, tmp_path / "run", "c")
    assert (tmp_path / "run" / jobs.RESULTS).read_bytes() == before


def test_an_ensemble_of_more_classes_is_softened_too():
    net = common.Net(distill.OfClasses(distill.ensemble([Plain(hidden=(4,)).build((6,), 5)] * 2), 3), {}, {})
    softened = teachers._softened(net, 4.0).model
    assert (softened.classes, softened.model.temperature) == (3, 4.0)
    alone = net._replace(model=net.model.model.models[0])
    assert teachers._softened(alone, 4.0) is alone


def test_a_teacher_that_teaches_nothing_is_told_of(source, exports, tmp_path, caplog, monkeypatch):
    class CheckedError(Exception):
        pass

    def checked(*_):
        raise CheckedError

    monkeypatch.setattr(common, "record", checked)
    baseline = config(source, teacher=Teacher(pretrained=str(exports[0]), distill=Distill(share=0.0)))
    with caplog.at_level("WARNING"), pytest.raises(CheckedError):
        jobs.train(baseline, tmp_path / "run", "c")
    assert "the teacher teaches nothing" in caplog.text


def test_a_teacher_that_is_no_folder_and_one_below_the_home(source, exports, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for name, words in (("file", "file is a file; give"), ("nowhere", "nowhere is not there; give the folder of an export")):
        for make in (
            lambda path: jobs.train(config(source, teacher=Teacher(pretrained=path)), tmp_path / "run", "c"),
            lambda path: cached(source, path, tmp_path / "cache"),
        ):
            with pytest.raises(ValueError, match=words):
                make(str(tmp_path / name))
    with pytest.raises(ValueError, match="file is a file; give the folder of a cache"):
        data.open_cache(tmp_path / "file")
    with pytest.raises(ValueError, match=r"workdir .*file cannot be made"):
        cached(source, str(exports[0]), tmp_path / "file")
    monkeypatch.setenv("HOME", str(exports[0].parent))
    assert cache.identity(f"~/{exports[0].name}") == cache.identity(str(exports[0]))
    assert common.export_in(f"~/{exports[0].name}") == str(exports[0] / jobs.EXPORT)
