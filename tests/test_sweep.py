"""What is swept is checked first, runs are processes of their own, a failed one is a row, and the same command goes on."""

import csv
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from bmjax import config as configs
from bmjax.jobs import sweep as jobs
from bmjax.jobs.points import points, short_names
from bmjax.jobs.train import Config, Teacher
from bmjax.models import Plain
from experiments import sweep

RATE, SEED, HIDDEN = "config.run.optimizer.learning_rate", "config.seed", "config.model.hidden"


def test_a_grid_is_all_combinations():
    found = points(Config(), "learning_rate=1e-3, 3e-3; config.seed=0,1; hidden=64|64,32", "", 1, 0)
    assert len(found) == 8
    assert {tuple(point) for point in found} == {(RATE, SEED, HIDDEN)}
    assert {point[HIDDEN] for point in found} == {"64", "64,32"}
    assert len({tuple(point.values()) for point in found}) == 8


def test_random_draws_keep_to_their_ranges_and_to_the_seed():
    text = "learning_rate=log(1e-4,1e-1); run.steps=uniform(10, 20); label_smoothing=uniform(0,0.5); config.seed=3,4"
    found = points(Config(), "", text, 200, 7)
    values = {path: [point[path] for point in found] for path in found[0]}
    rates = np.array(values[RATE], float)
    assert 1e-4 <= rates.min() < 2e-4 and 5e-2 < rates.max() <= 1e-1
    assert abs(np.log10(rates).mean() + 2.5) < 0.2  # even on a log scale
    assert {int(text) for text in values["config.run.steps"]} <= set(range(10, 21))
    assert set(values[SEED]) == {"3", "4"}
    assert points(Config(), "", text, 5, 7) == found[:5]
    assert points(Config(), "", text, 5, 8) != found[:5]
    assert len(points(Config(), "hidden=8|16", text, 5, 7)) == 10


@pytest.mark.parametrize(
    ("grid", "random", "words"),
    [
        ("", "", "there is nothing to sweep; give --grid="),
        ("learning_rte=1", "", "the config has no field learning_rte; the nearest is config.run.optimizer.learning_rate"),
        ("run.steps=1,2", "", "run.steps may be any of config.run.steps, config.teacher.run.steps; write more of the path"),
        ("learning_rate", "", "'learning_rate' is no field with values; write for example"),
        ("config.seed=1;config.seed=2", "", "config.seed is given twice"),
        ("config.seed=1", "config.seed=2", "config.seed is in the grid and among the random fields"),
        ("config.seed=1,1", "", "the values of config.seed are '1,1'; expected different ones"),
        ("", "smoothing=log(0,1)", "the config has no field smoothing"),
        ("", "label_smoothing=log(0,1)", "expected two rising numbers, above 0"),
        ("", "label_smoothing=uniform(1,0)", "expected two rising numbers"),
        ("", "label_smoothing=uniform(a,b)", "expected two rising numbers"),
    ],
)
def test_what_cannot_be_swept_is_refused(grid, random, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        points(Config(teacher=Teacher(model=Plain())), grid, random, 3, 0)


@pytest.mark.parametrize(
    ("grid", "field", "values"),
    [
        ("hidden=(64,32),(32,)", HIDDEN, ["64,32", "32"]),
        ("hidden=(64, 32) | 32", HIDDEN, ["64, 32", "32"]),
        ("hidden=[64,32],[32]", HIDDEN, ["64,32", "32"]),
        ("hidden=[(64,32),(32)]", HIDDEN, ["64,32", "32"]),
        ("hidden=(64,32)", HIDDEN, ["64,32"]),
        ("class_weights=none,(1,2)", "config.task.class_weights", ["none", "1,2"]),
        ("learning_rate=[1e-3, 1e-2]", RATE, ["1e-3", "1e-2"]),
        ("config.seed=1,2,", SEED, ["1", "2"]),
        ("model=Plain,Residual", "config.model", ["Plain", "Residual"]),
        ("weights=ce=1,kd=2|ce=2", "config.weights", ["ce=1,kd=2", "ce=2"]),
    ],
)
def test_values_of_lists_and_kinds(grid, field, values):
    assert [point[field] for point in points(Config(), grid, "", 1, 0)] == values
    assert {point[field] for point in points(Config(), "", grid, 40, 0)} == set(values)


@pytest.mark.parametrize(
    ("grid", "random", "words"),
    [
        ("hidden=64,32", "", "which is one value; write '64|32' for several, or '(64,32)' for this one"),
        ("weights=ce=1,ce=2", "", "which is one value; write 'ce=1|ce=2' for several"),
        ("hidden=uniform(8,64)", "", "it takes several values; uniform(...) is for a field of one number in --random"),
        ("", "hidden=log(8,64)", "it takes several values; log(...) is for a field of one number in --random"),
        ("learning_rate=log(1e-4,1e-1)", "", "a grid takes single values; log(...) is for a field of one number in --random"),
        ("model.layers=2,3", "", "(there is one with --config.model=Decoder, Encoder, Residual, Transformer)"),
    ],
)
def test_the_right_form_is_shown(grid, random, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        points(Config(), grid, random, 3, 0)


def test_language_models_are_compared_by_the_byte_where_all_can_be():
    tokens = {"valid_bits_per_token": 2.0, "valid_accuracy": 0.5}
    both = {**tokens, "valid_bits_per_byte": 1.0}
    rows = lambda *figures: [{"figures": found} for found in figures]
    assert jobs._main_metric(rows(both, both, {})) == "valid_bits_per_byte"
    assert jobs._main_metric(rows(both, tokens)) == "valid_bits_per_token"
    assert jobs._main_metric(rows({"valid_accuracy": 1.0}, {})) == jobs._main_metric(rows({})) == "valid_accuracy"


def test_help_lists_the_metrics(capsys):
    launch("--help")
    whole = " ".join(capsys.readouterr().out.split())
    assert "main figure (one of valid_accuracy, valid_nll," in whole


def test_names_are_as_short_as_they_can_be():
    paths = ["config.run.steps", "config.teacher.run.steps", "config.seed"]
    assert list(short_names(paths).values()) == ["config.run.steps", "teacher.run.steps", "seed"]


def launch(*arguments):
    argv = ["sweep", *map(str, arguments)]
    configs.launch_settings(sweep.main, settings=lambda _: jobs.Config(), forwards="config", about=sweep.__doc__, argv=argv)


@pytest.fixture
def refused(capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)  # nothing may start

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            launch(*arguments)
        assert end.value.code == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1
        return err

    return run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--grid=learning_rate=1e-3,-1"], "config.run.optimizer.learning_rate is -1.0; expected a finite number above 0"),
        (["--grid=config.seed=0,x"], "--config.seed=x: expected an int"),
        (["--grid=config.seed=0", "--config.stps=1"], "the config has no field config.stps"),
        (["--grid=config.seed=0", "--config=none"], "there is no preset 'none'"),
        (["--grid=config.seed=0", "--program=predict"], "program is 'predict'; expected one of train, compress"),
        (["--grid=config.seed=0", "--metric=acuracy"], "metric is 'acuracy'; expected one of"),
        (["--grid=config.seed=0", "--paralel=2"], "there is no flag --paralel; the nearest is --parallel"),
        (["--grid=max_drop=0.1,2", "--program=compress"], "config.budget.max_drop is 2.0; expected"),
    ],
)
def test_every_point_is_checked_before_a_run_starts(refused, tmp_path, arguments, words):
    assert words in refused(*arguments, f"--workdir={tmp_path / 'sweep'}")
    assert not (tmp_path / "sweep").exists()


@pytest.fixture(scope="module")
def blobs(tmp_path_factory):
    rng = np.random.default_rng(0)
    targets = np.arange(60) % 3
    inputs = (rng.normal(size=(60, 5)) + 4 * np.eye(3, 5)[targets]).astype(np.float32)
    path = tmp_path_factory.mktemp("data") / "blobs.npz"
    np.savez(path, inputs=inputs, targets=targets)
    return path


def test_runs_are_processes_and_a_failed_one_is_a_row(blobs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    line = [
        f"--config.data.source=arrays:{blobs}",
        "--config.machine.devices=0",
        "--config.machine.tensorboard=false",
        "--config.model.hidden=4",
        "--config.run.steps=3",
        "--grid=batch=8,5000",
        "--parallel=2",
        f"--workdir={tmp_path}",
    ]
    launch(*line)
    shown = capsys.readouterr().out
    results = json.loads((tmp_path / jobs.RESULTS).read_text())
    good, bad = results["runs"]
    assert (results["fields"], results["metric"]) == (["batch"], "valid_accuracy")
    assert (good["values"], bad["values"]) == ({"batch": "8"}, {"batch": "5000"})
    assert 0 <= good["figures"]["valid_accuracy"] <= 1 and good["error"] == ""
    assert bad["error"].startswith("the batch size is 5000; expected 1 to 30, the examples of the train split (exit code 2)")
    assert "accuracy" in shown and "5000" in shown
    assert (tmp_path / jobs.PICTURE).read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((tmp_path / jobs.TABLE).read_text().splitlines()))
    assert [row["batch"] for row in rows] == ["8", "5000"]
    assert float(rows[0]["test_accuracy"]) == good["figures"]["test_accuracy"]
    assert (tmp_path / "batch=8" / "config.json").exists()

    started = []
    monkeypatch.setattr(subprocess, "Popen", fake_popen(started))
    launch(*line)  # the finished run is read, the broken one is started again
    assert [call[-1] for call in started] == [f"--workdir={tmp_path / 'batch=5000'}"]
    assert started[0][:3] == [sys.executable, "-m", "experiments.train"]
    assert "--config.data.batch=5000" in started[0]
    again = json.loads((tmp_path / jobs.RESULTS).read_text())["runs"]
    assert [row["values"]["batch"] for row in again] == ["5000", "8"]  # the better one first
    assert again[1]["figures"] == good["figures"]

    with pytest.raises(SystemExit):
        launch(*line, "--config.run.steps=4")
    assert "holds a sweep of other runs" in capsys.readouterr().err


def fake_popen(started, accuracy=lambda flags: 1.0, code=0):
    """In place of a process: writes what a finished training leaves."""

    class Process:
        def __init__(self, program, **_):
            started.append(program)
            folder = pathlib.Path(program[-1].partition("=")[2])
            metrics = {"accuracy": accuracy(program), "confusion": [[1]]}
            model = {"name": "model", "metrics": metrics, "valid": {"accuracy": accuracy(program), "nll": 0.5}, "parameters": 7}
            (folder / jobs.RESULTS).write_text(json.dumps({"models": [model]}))

        def wait(self):
            return code

        def poll(self):
            return code

    return Process


def test_runs_are_sorted_by_the_metric_that_is_asked_for(tmp_path, monkeypatch):
    started = []
    accuracy = lambda program: float(next(flag for flag in program if "label_smoothing" in flag).partition("=")[2])
    monkeypatch.setattr(subprocess, "Popen", fake_popen(started, accuracy))
    launch("--grid=label_smoothing=0.1,0.3,0.2; allocation=uniform,global", f"--workdir={tmp_path}")
    rows = json.loads((tmp_path / jobs.RESULTS).read_text())["runs"]
    assert [row["values"]["label_smoothing"] for row in rows] == ["0.3", "0.3", "0.2", "0.2", "0.1", "0.1"]
    assert len({row["folder"] for row in rows}) == 6
    launch("--grid=label_smoothing=0.1,0.3,0.2; allocation=uniform,global", "--metric=valid_nll", f"--workdir={tmp_path}")
    assert len(started) == 6
    assert jobs.falls("valid_nll") and not jobs.falls("test_accuracy")
    assert json.loads((tmp_path / jobs.RESULTS).read_text())["metric"] == "valid_nll"


def test_after_ctrl_c_what_runs_is_told_once_and_nothing_else_starts(tmp_path, monkeypatch):
    told = []

    class Process:
        def __init__(self, program, *, start_new_session, **_):
            assert start_new_session  # or the terminal would tell it a second time, which ends a run unsaved
            self.ended = threading.Event()
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()

        def wait(self):
            assert self.ended.wait(20)
            return 130

        def poll(self):
            return None

        def send_signal(self, number):
            told.append(number)
            self.ended.set()

    monkeypatch.setattr(subprocess, "Popen", Process)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started without it
    try:
        with pytest.raises(SystemExit) as end:
            launch("--grid=config.seed=0,1,2", f"--workdir={tmp_path}")
    finally:
        signal.signal(signal.SIGINT, before)
    assert end.value.code == 130
    assert told == [signal.SIGINT]
    assert not (tmp_path / jobs.RESULTS).exists()
