"""An export and a checkpoint are scored as they were when they were made, and what does not fit gets one line."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from bmjax import config as configs
from bmjax import data, manifest
from bmjax.jobs.evaluate import _of_its_kind
from experiments import evaluate, train


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    rng = np.random.default_rng(0)
    targets = np.arange(120) % 3
    inputs = (rng.normal(size=(120, 5)) + 3 * np.eye(3, 5)[targets]).astype(np.float32) * 7 + 1
    path = tmp_path_factory.mktemp("data") / "blobs.npz"
    np.savez(path, inputs=inputs, targets=targets, class_names=["a", "b", "c"])
    return path


@pytest.fixture(scope="module")
def workdir(source):
    """Of a student with a teacher, with checkpoints at steps 20 and 30."""
    folder = source.parent / "run"
    argv = [
        "train",
        f"--config.data.source=arrays:{source}",
        "--config.data.batch=16",
        "--config.machine.devices=0",
        "--config.machine.tensorboard=false",
        "--config.model.hidden=6",
        "--config.run.steps=30",
        "--config.run.every.save=10",
        "--config.run.every.evaluate=10",
        "--config.run.optimizer.learning_rate=0.03",
        "--config.teacher.model=Residual",
        "--config.teacher.model.layers=1",
        "--config.teacher.model.width=8",
        "--config.teacher.model.neurons=8",
        "--config.teacher.run.steps=5",
        f"--workdir={folder}",
    ]
    configs.launch(train.main, presets=train.PRESETS, default="article", about=train.__doc__, argv=argv)
    return folder


def launch(*arguments):
    argv = ["evaluate", *map(str, arguments)]
    configs.launch_settings(evaluate.main, settings=evaluate.defaults, by="model", about=evaluate.__doc__, argv=argv)


@pytest.fixture
def scored(tmp_path):
    def run(*arguments):
        launch(*arguments, f"--output={tmp_path / 'figures.json'}")
        return json.loads((tmp_path / "figures.json").read_text())

    return run


@pytest.fixture
def refused(capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            launch(*arguments)
        assert end.value.code == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1
        return err

    return run


def close(found, expected):
    assert found["confusion"] == expected["confusion"]
    for name in ("accuracy", "nll", "ece"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6)


def test_an_export_and_a_checkpoint_score_as_in_training(workdir, scored, capsys):
    teacher, student = json.loads((workdir / "results.json").read_text())["models"]
    found = scored(f"--model={workdir / 'export'}")
    close(found["metrics"], student["metrics"])
    assert (found["step"], found["note"], found["split"], found["class_names"]) == (None, "", "test", ["a", "b", "c"])
    assert found["accuracy_interval"] == student["accuracy_interval"]
    close(scored(f"--model={workdir}")["metrics"], student["metrics"])
    close(scored(f"--model={workdir}", "--run=teacher", "--mesh=data=4,fsdp=2")["metrics"], teacher["metrics"])
    valid = scored(f"--model={workdir}", "--split=valid")["metrics"]
    assert valid["accuracy"] == pytest.approx(student["valid"]["accuracy"])
    assert valid["count"] == 12
    printed = capsys.readouterr().out
    for part in ("recall (macro)", "accuracy, 95% interval", "step 30", "support"):
        assert part in printed


def test_a_checkpoint_goes_by_step_or_by_what_was_best(workdir, scored):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    measured = {row["step"]: row for row in rows if row["prefix"] == "student" and "valid_nll" in row}
    assert set(measured) == {10, 20, 30}
    found = scored(f"--model={workdir}", "--step=20", "--split=valid")
    assert found["step"] == 20
    assert found["metrics"]["nll"] == pytest.approx(measured[20]["valid_nll"], rel=1e-4)
    best = scored(f"--model={workdir}", "--best", "--split=valid")
    assert best["metrics"]["accuracy"] == max(row["valid_accuracy"] for row in measured.values())


def test_other_data_are_named_and_noted(workdir, source, scored, tmp_path):
    with np.load(source) as held:
        arrays = dict(held)
    arrays["inputs"] = arrays["inputs"] + np.float32(0.1)
    np.savez(tmp_path / "other.npz", **arrays)
    found = scored(f"--model={workdir / 'export'}", f"--data.source=arrays:{tmp_path / 'other.npz'}")
    assert found["note"] == "these are other data than it was trained on"
    assert found["metrics"]["count"] == 48


def test_figures_lie_where_they_belong(workdir):
    launch(f"--model={workdir / 'export'}")
    assert json.loads((workdir / "evaluation.json").read_text())["step"] is None
    launch(f"--model={workdir}")
    assert json.loads((workdir / "evaluation_checkpoint.json").read_text())["step"] == 30
    launch(f"--model={workdir}", "--best", "--split=valid")
    assert json.loads((workdir / "evaluation_checkpoint_best_valid.json").read_text())["split"] == "valid"
    assert json.loads((workdir / "evaluation.json").read_text())["step"] is None
    manifest.verify(workdir / "export")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--model must be given: the folder of an export, or a workdir"),
        (["--model={run}", "--step=7"], "holds no checkpoint of step 7; there are"),
        (["--model={run}", "--step=20", "--best"], "--best and --step=20 ask for two checkpoints"),
        (["--model={run}", "--run=studnet"], "has no run 'studnet'; the nearest is 'student' of student, teacher"),
        (["--model={run}", "--data.source=digits"], "does not fit digits: head/bias has shape [3], expected [10]"),
        (["--model={run}/export", "--data.source=digits"], "has 3 classes and digits has 10; give its own data"),
        (["--model={run}/nothing"], "is neither an export (manifest.json) nor a workdir (config.json)"),
        (["--model={run}/checkpoints/student/00000030"], "is not an exported model; give the folder that an export wrote"),
        (["--model={run}", "--data.batch=9"], "a batch of 9 does not divide over 8 devices"),
        (["--model={run}", "--output={run}/gone/x.json"], "/gone/x.json must be a file in a folder that exists"),
        (["--model={run}", "--output={run}"], "must be a file in a folder that exists"),
        (["--model={run}", "--split=tets"], "split is 'tets'; expected one of train, valid, test"),
        (["--mdel=x"], "there is no flag --mdel; the nearest is --model"),
    ],
)
def test_a_mistake_gets_one_line(workdir, refused, arguments, words):
    assert words in refused(*(argument.format(run=workdir) for argument in arguments))


def damaged(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_damage_is_named(workdir, refused, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    damaged(copy / "export" / "params.safetensors")
    assert "params.safetensors was altered: its SHA-256 is not the manifest's" in refused(f"--model={copy / 'export'}")
    newest = copy / "checkpoints" / "student" / "00000030"
    damaged(max((file for file in (newest / "state").rglob("*") if file.is_file()), key=lambda file: file.stat().st_size))
    assert "00000030" in refused(f"--model={copy}")
    assert newest.exists()  # evaluating sets nothing aside
    launch(f"--model={copy}", "--step=20")
    shutil.rmtree(copy / "checkpoints")
    assert f"{copy} holds no checkpoint; was the run stopped" in refused(f"--model={copy}")
    (copy / "config.json").write_text("{")
    assert "config.json is not readable as JSON" in refused(f"--model={copy}")


def test_a_model_of_the_users_own_needs_its_config_file(workdir, refused, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    record = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**record, "model": "mine_config:linear"}))
    said = refused(f"--model={copy}")
    assert "cannot be built: it does not say what the model is" in said
    assert "give its config file again, --config=<file.py> with the flags of the training, or evaluate its export" in said
    (copy / "config.json").write_text(json.dumps({**record, "data": {**record["data"], "source": "mine_config:examples"}}))
    assert "came from a function, mine_config:examples, which evaluate cannot call; give a source by name" in refused(
        f"--model={copy}"
    )


def test_what_was_recorded_of_another_kind_of_source_is_forgotten():
    recorded = data.Data(source="images:cats", size=16, on_error="skip", batch=32)
    about = {"data_config": configs.to_dict(recorded)}
    given = dataclasses.replace(recorded, source="digits", limit=100)
    assert _of_its_kind(given, about) == data.Data(source="digits", limit=100, batch=32)
    same = dataclasses.replace(recorded, source="images:dogs")
    assert _of_its_kind(same, about) == same


@pytest.mark.parametrize("packing", ["concat", "first_fit"])
def test_tokens_of_a_tokenizer_are_scored_by_the_byte(packing, scored, tmp_path, capsys):
    """The bytes are those of the test split's targets as the tokenizers package spells them; export and checkpoint agree."""
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    words = np.random.default_rng(0).choice(["the", "cat", "sat", "on", "mats"], (60, 30))
    texts = [" ".join(line) for line in words]
    made.train_from_iterator(texts, trainer)
    made.save(str(tmp_path / "t.json"))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    argv = [
        "train",
        f"--config.data.source=jsonl:{tmp_path / 'a.jsonl'}",
        f"--config.data.tokenizer={tmp_path / 't.json'}",
        f"--config.data.packing={packing}",
        "--config.data.length=16",
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
    ]
    configs.launch(train.main, presets=train.PRESETS, default="article", about=train.__doc__, argv=argv)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    figures = results["models"][0]["metrics"]
    with np.load(tmp_path / "run" / "test.npz") as test:
        kept = test["weights"] > 0 if packing == "first_fit" else np.ones(test["targets"].shape, bool)
        spelt = made.decode(test["targets"][kept].tolist())
    assert figures["count"] == kept.sum()
    assert figures["text_bytes"] == len(spelt) > 1.5 * figures["count"]
    assert figures["bits_per_byte"] == pytest.approx(figures["nll"] * kept.sum() / np.log(2) / len(spelt), rel=1e-12)
    assert results["bigram_bits_per_byte"] == pytest.approx(results["bigram_bits"] * kept.sum() / len(spelt), rel=1e-12)
    shown = capsys.readouterr().out
    assert f"{figures['bits_per_byte']:.4f}" in shown and f"{results['bigram_bits_per_byte']:.4f}" in shown
    assert "valid_bits_per_byte" in (tmp_path / "run" / "metrics.jsonl").read_text()
    again = scored(f"--model={tmp_path / 'run'}", "--mesh=data=2,fsdp=4")["metrics"]
    if packing == "concat":
        again = [again, scored(f"--model={tmp_path / 'run' / 'export'}")["metrics"]]
    for found in again if packing == "concat" else [again]:
        assert found["bits_per_byte"] == pytest.approx(figures["bits_per_byte"], rel=1e-5)
        assert found["text_bytes"] == len(spelt)
    assert "text bytes" in capsys.readouterr().out
    about = json.loads((tmp_path / "run" / "export" / "manifest.json").read_text())["data"]["metadata"]
    assert about["vocabulary"] == made.get_vocab_size()
