import json
import math
import pathlib
import sys
import time
import types

import pytest

from bmjax.train import log as log_module
from bmjax.train.log import Log, Progress, read


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_each_call_is_one_line_at_once(tmp_path):
    with Log(tmp_path, tensorboard=False) as log:
        log.scalars(10, {"loss": 0.5, "accuracy": 1}, prefix="big")
        assert lines(tmp_path) == [{"step": 10, "prefix": "big", "loss": 0.5, "accuracy": 1.0}]
        log.scalars(20, {"loss": math.nan, "norm": math.inf})
    assert lines(tmp_path)[1] == {"step": 20, "prefix": "", "loss": None, "norm": None}
    assert read(tmp_path) == {"big": [{"step": 10, "loss": 0.5, "accuracy": 1.0}], "": [{"step": 20, "loss": None, "norm": None}]}
    assert read(tmp_path / "nothing") == {}


def test_resume_drops_what_came_after_the_checkpoint(tmp_path):
    with Log(tmp_path, tensorboard=False) as log:
        for step in (10, 20, 30):
            log.scalars(step, {"loss": step}, prefix="a")
            log.scalars(step, {"loss": step}, prefix="b")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "pre')  # killed while writing
    with Log(tmp_path, tensorboard=False) as log:
        log.resume(20, prefix="a")
        log.scalars(25, {"loss": 1}, prefix="a")
    steps = {prefix: [row["step"] for row in rows] for prefix, rows in read(tmp_path).items()}
    assert steps == {"a": [10, 20, 25], "b": [10, 20, 30]}
    assert not list(tmp_path.glob("*.tmp"))


def test_tensorboard_events_hold_the_scalars(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    with Log(tmp_path) as log:
        log.scalars(3, {"loss": 0.25}, prefix="big")
    (file,) = (tmp_path / "tensorboard").iterdir()
    content, found, place = file.read_bytes(), [], 0
    while place < len(content):  # a record: length u64, crc u32, data, crc u32
        length = int.from_bytes(content[place : place + 8], "little")
        event = Event.FromString(content[place + 12 : place + 12 + length])
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        place += 16 + length
    assert found == [("big/loss", 3, 0.25)]


def test_wandb_is_imported_only_when_asked(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if not installed
    with Log(tmp_path, tensorboard=False):
        pass
    with pytest.raises(ValueError, match=r"not installed; install the extra bmjax\[wandb\]"):
        Log(tmp_path, tensorboard=False, wandb="project")
    logged, finished = [], []
    run = types.SimpleNamespace(log=logged.append, finish=lambda: finished.append(True))
    asked = {}
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **given: asked.update(given) or run))
    with Log(tmp_path, tensorboard=False, wandb="project") as log:
        log.scalars(5, {"loss": 2.0}, prefix="big")
    assert (asked["project"], asked["resume"]) == ("project", "allow")
    assert logged == [{"big/loss": 2.0, "big/step": 5}]
    assert finished == [True]


def test_without_a_terminal_progress_is_a_line_now_and_then(monkeypatch):
    now, said = [100.0], []
    monkeypatch.setattr(log_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(log_module.logging, "info", lambda message, *values: said.append(message % values))
    with Progress(1000, 200, "big") as progress:
        for step in range(201, 401):
            now[0] += 0.125
            progress(step, 0.5 if step == 300 else None)
    assert said == [
        "big: step 280 of 1000, loss -, 8 steps/s, 1:30 left",
        "big: step 360 of 1000, loss 0.5, 8 steps/s, 1:20 left",
        "big: step 400 of 1000, loss 0.5, 8 steps/s, 1:15 left",
    ]
    with Progress(10, show=False) as progress:
        now[0] += 1000
        progress(10, 1.0)
    assert len(said) == 3


def test_the_last_line_comes_at_the_end(monkeypatch):
    said = []
    monkeypatch.setattr(log_module.logging, "info", lambda message, *values: said.append(message % values))
    with Progress(5) as progress:
        progress(5, 0.125)
    assert len(said) == 1
    assert said[0].startswith("train: step 5 of 5, loss 0.125, ")
    assert said[0].endswith("0:00 left")


def test_on_a_terminal_progress_is_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    now = [0.0]
    monkeypatch.setattr(log_module.time, "monotonic", lambda: now[0])
    with Progress(100, 0, "big") as progress:
        now[0] = 5.0
        progress(50, 0.25)
    shown = capsys.readouterr().err
    assert "50/100" in shown
    assert "loss 0.25, 10 steps/s, 0:05 left" in shown


@pytest.mark.parametrize(("seconds", "text"), [(5, "0:05"), (65, "1:05"), (3725, "1:02:05"), (59.6, "1:00")])
def test_clock(seconds, text):
    assert log_module._clock(seconds) == text


def test_a_step_with_nothing_to_show_is_cheap(tmp_path):
    with Log(tmp_path, tensorboard=False) as log, log.progress(10**9) as progress:
        best = math.inf
        for _ in range(5):
            start = time.perf_counter()
            for step in range(20_000):
                progress(step, 0.5)
            best = min(best, (time.perf_counter() - start) / 20_000)
    assert best < 5e-6


def test_the_directory_is_made(tmp_path: pathlib.Path):
    with Log(tmp_path / "a" / "b", tensorboard=False) as log:
        log.scalars(1, {"x": 1})
    assert lines(tmp_path / "a" / "b")[0]["x"] == 1.0
