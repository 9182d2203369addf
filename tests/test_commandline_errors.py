"""Every mistake gets one line and exit code 2 before anything is compiled, and leaves the workdir to the right command."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks import gpu_step
from bmjax import config as configs
from bmjax.config import kinds, leaves
from bmjax.train import loop
from bmjax.train import run as runs
from experiments import compress, predict, train

PROGRAMS = {"compress": (compress, "digits"), "train": (train, "article")}
PRESETS = [(name, path.stem) for name in PROGRAMS for path in sorted(PROGRAMS[name][0].PRESETS.glob("[!_]*.py"))]
TINY = ["--config.model.hidden=4", "--config.data.batch=8", "--config.run.steps=2", "--config.machine.tensorboard=false"]


def launch(program, *arguments):
    module, default = PROGRAMS[program]
    argv = [f"experiments/{program}.py", *map(str, arguments)]
    configs.launch(module.main, presets=module.PRESETS, default=default, about=module.__doc__, argv=argv)


class Started(BaseException):
    """Training would begin, and with it compiling."""


@pytest.fixture
def _nothing_runs(monkeypatch):
    def start(*_, **__):
        raise Started

    monkeypatch.setattr(runs, "init_state", start)
    monkeypatch.setattr(loop, "fit", start)


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs a mistaken command; its one line."""

    def run(program, *arguments, workdir=None):
        folder = workdir or tmp_path / "workdir"
        before = (folder / "config.json").exists()
        with pytest.raises(SystemExit) as end:
            launch(program, *arguments, f"--workdir={folder}")
        assert end.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert (folder / "config.json").exists() == before
        return err.removeprefix("error: ").rstrip()

    return run


@pytest.fixture(scope="module")
def blobs(tmp_path_factory):
    rng = np.random.default_rng(0)
    targets = np.arange(60) % 3
    inputs = (rng.normal(size=(60, 5)) + 4 * np.eye(3, 5)[targets]).astype(np.float32)
    path = tmp_path_factory.mktemp("data") / "blobs.npz"
    np.savez(path, inputs=inputs, targets=targets)
    return path


@pytest.fixture(scope="module")
def trained(blobs):
    """The workdir of a finished training of a 5-4-3 classifier."""
    workdir = blobs.parent / "trained"
    launch("train", *TINY, f"--config.data.source=arrays:{blobs}", f"--workdir={workdir}")
    return workdir


@pytest.mark.parametrize(
    ("program", "arguments", "line"),
    [
        (
            "compress",
            ["--config.model.layer=3"],
            "the config has no field config.model.layer; the nearest is config.model.layers",
        ),
        ("train", ["--config.learning_rate=1"], "the nearest is config.run.optimizer.learning_rate"),
        ("compress", ["--workdri=x"], "there is no flag --workdri; the nearest is --workdir"),
        (
            "compress",
            ["--config.model=3"],
            "--config.model=3: expected one of Decoder, Encoder, Plain, Residual",
        ),
        ("compress", ["--config.big=3"], "config.big is a group of fields; set one of them: --config.big.steps,"),
        ("train", ["--config.teacher.distill.share=0.5"], "config.teacher: a teacher needs pretrained=<export or workdir>"),
        (
            "train",
            ["--config.teacher=none", "--config.teacher.pretrained=x"],
            "the config has no field config.teacher.pretrained",
        ),
        ("train", ["--config=artcle"], "there is no preset 'artcle'; the nearest is 'article' of article, article_student"),
        ("train", ["--config=none.py"], "there is no config file none.py"),
        ("compress", ["runs/digits"], "stray argument 'runs/digits'; every option is a flag"),
        ("train", ["--config.run.steps=many"], "--config.run.steps=many: expected an int"),
        ("train", ["--config.run.steps=0"], "config.run.steps is 0; expected an int of at least 1"),
        ("train", ["--config.run.optimizer.learning_rate=nan"], "learning_rate is nan; expected a finite number above 0"),
        ("compress", ["--config.big.optimizer.learning_rate=inf"], "learning_rate is inf; expected a finite number above 0"),
        ("compress", ["--config.machine.mesh=data=3"], "mesh 'data=3': it takes 3 devices, but there are 8"),
        ("train", ["--config.machine.mesh=data=-1,fsdp=3"], "mesh 'data=-1,fsdp=3': 3 does not divide the 8 devices"),
        ("train", ["--config.machine.mesh=model=8"], "the axis 'model' is not one of data, fsdp, tensor"),
        ("compress", ["--config.data.batch=100"], "a batch of 100 does not divide over 8 devices; take a multiple of 8"),
        ("compress", ["--config.retrain.accumulate=3"], "a batch of 128 does not divide over 8 devices x 3 microbatches"),
        ("train", ["--config.data.batch=8000"], "the batch size is 8000; expected 1 to 898, the examples of the train split"),
        ("train", ["--config.data.source=arrays:none.npz"], "there is no data file 'none.npz'; expected arrays:<file.npz>"),
        ("train", ["--config.data.source=digit"], "there is no data source 'digit'; the nearest is 'digits'"),
        ("train", ["--config.prune.sparsity=1"], "config.prune.sparsity is 1.0; expected a finite number in [0, 1)"),
        ("train", ["--config.prune.sparsity=-0.1"], "config.prune.sparsity is -0.1; expected a finite number in [0, 1)"),
        ("train", ["--config.prune.begin=0.8"], "config.prune: pruning begins at 0.8 and ends at 0.7; expected begin < end <= 1"),
        (
            "compress",
            ["--config.prune.ratios=1"],
            "config.prune.ratios is (1.0,); expected a tuple, each item a finite number above 1",
        ),
        ("compress", ["--config.distill.temperature=0"], "config.distill.temperature is 0.0; expected a finite number above 0"),
        (
            "train",
            ["--config=article_student", "--config.teacher.distill.temperature=-2"],
            "config.teacher.distill.temperature is -2.0; expected a finite number above 0",
        ),
        (
            "train",
            ["--config=article_student", "--config.teacher.distill.chunked=true", "--config.teacher.distill.loss=dist"],
            "config.teacher.distill: there is no chunked form of dist; set chunked to False, or take one of kd, ",
        ),
        ("compress", ["--config=digits_vit", "--config.model.heads=5"], "config.model: width 64 does not divide into 5 heads"),
        ("compress", ["--config=digits_vit", "--config.model.patch=3"], "patches of 3 pixels need images [H, W, C] with sides"),
        ("compress", ["--config.task.class_weights=1,2"], "2 class_weights for 10 classes; give one per class"),
        (
            "compress",
            ["--config.distill.hint_weight=1", "--config.distill.student_feature=finale"],
            "the loss term 'hint': the student has no feature 'finale'; the nearest are final, ",
        ),
        ("train", ["--config.seed=4294967296"], "config.seed is 4294967296; expected an int in [0, 4294967296)"),
        ("compress", ["--config.pretrained=none"], "none is not there; give the folder of an export"),
        ("train", ["--config=cifar_resnet"], "give --config.data.source=images:<file.parquet or folder>"),
        (
            "train",
            ["--config.run.executor=pmap", "--config.machine.mesh=data=2,fsdp=4"],
            "the executor pmap keeps parameters whole, and the mesh is data=2,fsdp=4,tensor=1",
        ),
        (
            "compress",
            ["--config.data.test=0.0001"],
            "has 1 example, of which no verdict can come: to call even a model that errs alike not worse takes 133 at budget",
        ),
    ],
)
@pytest.mark.usefixtures("_nothing_runs")
def test_a_mistake_gets_one_line(refused, program, arguments, line):
    assert line in refused(program, *arguments)


def test_stderr_is_one_line_where_jax_looks_for_its_devices_itself(tmp_path):
    """Without simulated devices JAX tells of the backends that it does not find; that comes before no refusal."""
    env = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES")}
    flags = ["--config.machine.devices=0", "--config.machine.mesh=data=31", f"--workdir={tmp_path}"]
    done = subprocess.run([sys.executable, "-m", "experiments.train", *flags], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"error: mesh 'data=31': it takes 31 devices, but there .*\n", done.stderr)


def test_a_benchmark_beside_a_peer_that_is_not_installed_is_refused_at_once(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(sys, "argv", ["gpu_step", "--size=toy", "--peer"])
    monkeypatch.setattr(gpu_step, "ours", None)
    with pytest.raises(SystemExit) as end:
        gpu_step.main()
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: --peer times PyTorch, which is not installed; install torch, or leave --peer out\n"


GOOD = {"inputs": np.ones((40, 5), np.float32) * np.arange(40)[:, None], "targets": np.arange(40) % 2}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"targets": np.arange(40) % 3, "class_names": ["a", "b"]}, "the target of row 2 is 2; expected a class from 0 to 1"),
        ({"targets": np.arange(40) % 2 - 1}, "the target of row 0 is -1; expected a class from 0 to 0"),
        ({"targets": np.arange(40) % 2 + 0.5}, "targets are float64; expected integers, the class of each example"),
        ({"targets": np.zeros(39, int)}, "targets have shape [39]; expected [40], one label for each input"),
        ({"inputs": np.full((40, 5), np.nan)}, "the inputs of row 0 hold NaN or infinity (40 such rows)"),
        ({"inputs": np.zeros((0, 5)), "targets": np.zeros(0, int)}, "inputs have shape [0, 5]; expected at least one example"),
        ({"inputs": None}, "there is no array 'inputs'; there are targets"),
        ({"split": ["train", "test"] * 20}, "the valid split is empty; every split needs examples"),
        ({"split": ["train", "valid"] * 20}, "the test split is empty; every split needs examples"),
    ],
)
@pytest.mark.usefixtures("_nothing_runs")
def test_data_that_cannot_be_used_get_one_line(refused, tmp_path, changes, line):
    arrays = {name: array for name, array in {**GOOD, **changes}.items() if array is not None}
    np.savez(tmp_path / "data.npz", **arrays)
    said = refused("train", *TINY, f"--config.data.source=arrays:{tmp_path / 'data.npz'}")
    assert line in said
    assert "data.npz" in said


@pytest.mark.usefixtures("_nothing_runs")
def test_rows_of_numbers_cannot_be_shifted_nor_cut_into_patches(refused, blobs):
    source = ["--config.data.batch=8", f"--config.data.source=arrays:{blobs}"]
    said = refused("train", *TINY, *source, "--config.run.augment.shift=1")
    assert said == "shift is 1 for inputs [5]; expected images [H, W, C] larger than the shift"
    assert "patches of 2 pixels need images" in refused("compress", "--config=digits_vit", *source)


@pytest.mark.usefixtures("_nothing_runs")
def test_a_file_that_is_no_npz_gets_one_line(refused, tmp_path):
    (tmp_path / "data.npz").write_text("inputs, targets")
    assert "data.npz is not readable as an .npz file" in refused("train", f"--config.data.source=arrays:{tmp_path / 'data.npz'}")


def test_a_workdir_of_another_config_gets_one_line(trained, blobs, refused, monkeypatch):
    monkeypatch.setattr(runs, "init_state", None)
    held = (trained / "config.json").read_text()
    said = refused("train", *TINY, f"--config.data.source=arrays:{blobs}", "--config.seed=1", workdir=trained)
    assert f"{trained} holds a run of another config (field seed: 0 there, 1 here); choose another --workdir" in said
    assert (trained / "config.json").read_text() == held


def test_a_workdir_that_is_a_file_gets_one_line(refused, blobs):
    assert f"workdir {blobs} cannot be made" in refused("train", *TINY, f"--config.data.source=arrays:{blobs}", workdir=blobs)


def test_a_checkpoint_of_another_model_gets_one_line(trained, blobs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runs, "init_state", None)
    workdir = tmp_path / "moved"
    shutil.copytree(trained / "checkpoints", workdir / "checkpoints")
    arguments = [*TINY, f"--config.data.source=arrays:{blobs}", "--config.model.hidden=6", f"--workdir={workdir}"]
    with pytest.raises(SystemExit) as end:
        launch("train", *arguments)
    assert end.value.code == 2
    said = capsys.readouterr().err
    # in the order of the tree: "head" comes before "hidden_0", "bias" before "kernel", and a head's bias has no hidden axis
    assert re.search(r"does not fit the model: params/model/head/kernel has shape \[4, 3\], expected \[6, 3\]\n$", said)


def student_of(export):
    return [
        "--config=article_student",
        f"--config.teacher.pretrained={export}",
        "--config.predict=false",
        "--config.data.batch=8",
    ]


@pytest.mark.usefixtures("_nothing_runs")
def test_a_teacher_of_other_classes_gets_one_line(trained, refused):
    said = refused("train", *student_of(trained / "export"))
    assert said == f"{trained / 'export'} has 3 classes and digits has 10; teacher and student need the same classes"


@pytest.mark.usefixtures("_nothing_runs")
def test_an_export_of_another_model_gets_one_line(trained, blobs, refused):
    data = f"--config.data.source=arrays:{blobs}"
    said = refused("train", *student_of(trained / "export"), data, "--config.teacher.model.hidden=6")
    assert said == f"{trained / 'export'} does not fit the model: head/kernel has shape [4, 3], expected [6, 3]"
    said = refused("compress", "--config=article", data, "--config.data.batch=8", f"--config.pretrained={trained / 'export'}")
    assert "does not fit the model: head/kernel has shape [4, 3], expected [32, 3]" in said
    checkpoint = next((trained / "checkpoints" / "model").iterdir())
    said = refused("train", *student_of(checkpoint), data)
    assert said == f"{checkpoint} is not an exported model; give the folder that an export wrote"


@pytest.mark.usefixtures("_nothing_runs")
def test_after_a_mistake_the_right_command_takes_the_same_workdir(refused, tmp_path):
    refused("compress", "--config=digits_vit", "--config.model.patch=3")
    refused("compress", "--config.big.accumulate=3")
    with pytest.raises(Started):
        launch("compress", f"--workdir={tmp_path / 'workdir'}")
    assert (tmp_path / "workdir" / "config.json").exists()


def given(preset, folder):
    """What a preset leaves to the command line."""
    if preset != "cifar_resnet":
        return []
    for name in "ab":
        (folder / "images" / name).mkdir(parents=True)
        for i in range(16):
            Image.new("RGB", (20, 20), (15 * i, 0, 0)).save(folder / "images" / name / f"{i}.png")
    return [f"--config.data.source=images:{folder / 'images'}", "--config.data.batch=8", "--config.data.limit=0"]


@pytest.mark.parametrize(("program", "preset"), PRESETS)
@pytest.mark.usefixtures("_nothing_runs")
def test_every_preset_reaches_its_training(program, preset, tmp_path):
    with pytest.raises(Started):
        launch(program, f"--config={preset}", *given(preset, tmp_path), f"--workdir={tmp_path}")
    assert (tmp_path / "config.json").exists()


@pytest.mark.parametrize("columns", [80, 130])
@pytest.mark.parametrize(("program", "preset"), PRESETS)
def test_help_prints_every_field(program, preset, columns, capsys, monkeypatch):
    """With its type, its default and what it is, in sections that are no wider than the terminal."""
    monkeypatch.setenv("COLUMNS", str(columns))
    launch(program, f"--config={preset}", "--help")
    out = capsys.readouterr().out
    fields = out[out.index(f"Fields of {preset}") :]
    module, _ = PROGRAMS[program]
    expected = list(leaves(configs.load(preset, module.PRESETS)))
    assert sorted(re.findall(r"^  --(config\.[\w.]+)", fields, re.M)) == sorted(leaf.path for leaf in expected)
    assert max(map(len, fields.splitlines())) <= columns
    whole = " ".join(fields.split())
    for leaf in expected:
        assert leaf.field.metadata["help"]
        value = leaf.value if isinstance(leaf.value, (int, float)) and not isinstance(leaf.value, bool) else None
        shown = r".+?" if value is None else re.escape(str(value))
        start = rf"--{re.escape(leaf.path)} {re.escape(kinds.short_name(leaf.type))} {shown} "
        assert re.search(start + re.escape(leaf.field.metadata["help"]), whole), leaf.path
    for heading in ("config.machine: devices and logs", "config.data: examples"):
        assert f"\n\n{heading}\n  --" in fields


def test_help_of_predict_prints_every_flag(capsys):
    predict.main(["predict", "--help"])
    out = capsys.readouterr().out
    for name in ("model", "input", "key", "output", "batch"):
        assert re.search(rf"  --{name}  \((string|int), default: \w+\)\n      \S", out)


@pytest.mark.usefixtures("_nothing_runs")
def test_one_hot_targets_and_pickles_get_one_line(refused, tmp_path):
    np.savez(tmp_path / "data.npz", inputs=np.ones((40, 5)), targets=np.eye(2)[np.arange(40) % 2])
    said = refused("train", *TINY, f"--config.data.source=arrays:{tmp_path / 'data.npz'}")
    assert said.endswith("targets have shape [40, 2]; expected [40], a class each; of one-hot rows take argmax(axis=1)")
    (tmp_path / "data.npz").write_bytes(b"no archive")
    assert refused("train", f"--config.data.source=arrays:{tmp_path / 'data.npz'}").endswith("an .npz file of plain arrays")


@pytest.mark.usefixtures("_nothing_runs")
def test_half_of_a_surrogate_pair_gets_one_line(refused, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "abc \\ud800"}\n')
    said = refused("train", "--config=lm", f"--config.data.source=jsonl:{tmp_path / 'a.jsonl'}")
    assert said == f"line 2 of {tmp_path / 'a.jsonl'} has half of a surrogate pair in 'text', which is no text; mend it"


@pytest.mark.usefixtures("_nothing_runs")
def test_a_config_file_with_wrong_syntax_gets_one_line(refused, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import os\ndef get_config(:\n    pass\n")
    assert refused("train", f"--config={path}") == f"{path}:2: invalid syntax: def get_config(:"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "c.model = lambda shape: None",
            "config.model: the function get_config.<locals>.<lambda>(shape) cannot be called with (",
        ),
        ("c.transform = lambda tx: tx", "(tx) cannot be called with (optimiser, steps)"),
        ("c.transform = [lambda tx, steps: tx, lambda: 0]", "config.transform: the function"),
        ("c.views = [lambda params: params]", "(params) cannot be called with (params, opt_state, step)"),
        ("c.terms = {'mine': (1.0, lambda batch: 0)}", "config.terms['mine']: the function"),
        ("c.data.source = lambda path: None", "config.data.source: the function"),
    ],
)
@pytest.mark.usefixtures("_nothing_runs")
def test_a_function_of_other_arguments_gets_one_line(refused, tmp_path, line, words):
    path = tmp_path / "mine.py"
    path.write_text(f"from bmjax.jobs.train import Config\n\n\ndef get_config():\n    c = Config()\n    {line}\n    return c\n")
    assert words in refused("train", f"--config={path}")


def test_a_traceback_of_the_users_ends_with_her_error(tmp_path, capsys, monkeypatch):
    """Without JAX's note on its own frames, of which none is shown."""
    path = tmp_path / "mine.py"
    body = "c.data.batch = 8\n    c.terms = {'mine': (1.0, lambda student, teacher, batch: batch['nothing'])}"
    path.write_text(f"from bmjax.jobs.train import Config\n\n\ndef get_config():\n    c = Config()\n    {body}\n    return c\n")
    monkeypatch.setattr(runs, "init_state", None)
    with pytest.raises(SystemExit) as end:
        launch("train", f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert end.value.code == 1
    last = capsys.readouterr().err.rstrip().splitlines()[-2:]
    assert last == ["KeyError: 'nothing'", "This came from the loss term 'mine'."]


def predicted(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        predict.main(["predict", *map(str, arguments)])
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (np.zeros(3, int), "have shape [3], expected [4]"),
        (np.array([0, 1, 2, 3]), "are 0 to 3; expected whole numbers, classes from 0 to 2"),
        (np.array([0.0, 1, 2, 1]), "are 0.0 to 2.0; expected whole numbers"),
        (np.array(list("abca")), "are <U1; expected whole numbers"),
    ],
)
def test_targets_that_do_not_fit_are_seen_before_a_prediction(trained, tmp_path, capsys, monkeypatch, targets, words):
    np.savez(tmp_path / "x.npz", inputs=np.ones((4, 5), np.float32), targets=targets)
    monkeypatch.setattr(predict, "predict", None)
    assert words in predicted(capsys, f"--model={trained / 'export'}", f"--input={tmp_path / 'x.npz'}")


def test_predict_points_to_the_export_of_a_workdir(trained, tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.ones((4, 5), np.float32))
    said = predicted(capsys, f"--model={trained}", f"--input={tmp_path / 'x.npy'}")
    assert f"{trained} has no manifest.json; give --model={trained / 'export'}" in said


@pytest.mark.parametrize("wrong", [-1, 7])
def test_ids_outside_the_vocabulary_are_no_prediction(wrong):
    inputs = np.array([[0, 6], [wrong, 3]])
    with pytest.raises(ValueError, match=rf"ids from {min(0, wrong)} to {max(6, wrong)}, but the model's vocabulary is 0 to 6"):
        predict.check_inputs(inputs, [2], "int32", 7)
    assert predict.check_inputs(inputs[:1], [2], "int32", 7).dtype == np.int32
