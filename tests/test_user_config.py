"""A config file of the user's own: her functions take part in the run, her errors keep their traceback, her edits are noticed."""

import json
import sys

import numpy as np
import pytest

from bmjax import config as configs
from bmjax import prune
from bmjax.train import log as logs
from experiments import evaluate, train

HELPER = """
from bmjax.types import Mean


def spread(student, teacher, batch):
    return Mean.of((student.logits**2).mean(-1), batch["weights"])
"""

MINE = '''
"""Mine."""
import helper_of_mine
import jax, jax.numpy as jnp, numpy as np, optax
from bmjax import data, prune
from bmjax.jobs.common import Machine
from bmjax.jobs.train import Config
from bmjax.models import adapters
from bmjax.train.loop import Every
from bmjax.train.optimizer import Optimizer
from bmjax.train.run import Run


def examples():
    rng = np.random.default_rng(0)
    targets = np.arange(90) % 3
    inputs = (rng.normal(size=(90, 5)) + 3 * np.eye(3, 5)[targets]).astype(np.float32)
    return data.build("mine", inputs, targets, data.stratified(targets), class_names="abc")


def linear(shape, classes):
    def init(key, inputs):
        return {"kernel": 0.1 * jax.random.normal(key, (*shape, classes)), "scale": jnp.ones(())}

    return adapters.plain(init, lambda params, inputs: params["scale"] * (inputs @ params["kernel"]))


def frozen_scale(tx, steps):
    return optax.chain(tx, optax.masked(optax.set_to_zero(), {"kernel": False, "scale": True}))


def halved(params, opt_state, step):
    return {**params, "scale": params["scale"] * 0.5}


def get_config():
    return Config(
        machine=Machine(tensorboard=False),
        data=data.Data(source=examples, batch=8),
        model=linear,
        terms={"spread": (0.25, helper_of_mine.spread)},
        transform=frozen_scale,
        views=[halved],
        run=Run(steps=4, optimizer=Optimizer(custom=lambda steps: optax.sgd(0.1)), every=Every(log=1)),
    )
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "helper_of_mine", raising=False)
    (tmp_path / "helper_of_mine.py").write_text(HELPER)
    (tmp_path / "mine.py").write_text(MINE)
    yield tmp_path
    sys.modules.pop("helper_of_mine", None)


def launch(folder, *arguments):
    argv = ["experiments/train.py", f"--config={folder / 'mine.py'}", f"--workdir={folder / 'run'}", *arguments]
    configs.launch(train.main, presets=train.PRESETS, default="article", about=train.__doc__, argv=argv)


def refusal(folder, capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        launch(folder, *arguments)
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_her_functions_take_part_and_her_edits_are_noticed(folder, capsys):
    launch(folder)
    rows = [row for row in logs.read(folder / "run")["model"] if "loss" in row]
    assert len(rows) == 4
    for row in rows:
        assert row["spread"] > 0
        assert row["loss"] == pytest.approx(row["ce"] + 0.25 * row["spread"], rel=1e-5)
    record = json.loads((folder / "run" / "config.json").read_text())
    assert record["model"] == "mine_config:linear"
    assert record["terms"] == {"spread": [0.25, "helper_of_mine:spread"]}
    assert set(record["code"]) == {"mine.py", "helper_of_mine.py"}
    assert len(record["data_fingerprint"]) == 64
    from safetensors.numpy import load_file

    params = load_file(folder / "run" / "export" / "params.safetensors")
    assert float(params["scale"]) == 0.5  # her transform held it still at 1, and her view shows half of it
    launch(folder)  # the same files: nothing to say
    (folder / "helper_of_mine.py").write_text(HELPER + "# a word\n")
    capsys.readouterr()
    said = refusal(folder, capsys)
    assert "holds a run with another version of helper_of_mine.py, which was edited since (its SHA-256 differs)" in said
    assert "restore the file, or choose another --workdir" in said


def scored(*arguments):
    argv = ["evaluate", *arguments]
    configs.launch_settings(
        evaluate.main, settings=evaluate.defaults, by="model", forwards="config", about=evaluate.__doc__, argv=argv
    )


def test_with_her_file_again_a_checkpoint_is_evaluated(folder, capsys):
    """Her model, her view and one that reads the optimiser's state, her data: the figures are those of the training."""
    moved = "def moved(params, opt_state, step):\n    trace = optax.tree_utils.tree_get(opt_state, 'trace')['kernel']\n"
    mine = MINE.replace("def get_config", moved + "    return {**params, 'kernel': params['kernel'] + trace}\n\n\ndef get_config")
    mine = mine.replace("views=[halved]", "views=[halved, moved], prune=prune.Sparsity(0.5, 'straight_through', interval=1)")
    (folder / "mine.py").write_text(mine.replace("optax.sgd(0.1)", "optax.sgd(0.1, momentum=0.9)"))
    longer, run = "--config.run.steps=6", folder / "run"
    launch(folder, longer)
    (model,) = json.loads((run / "results.json").read_text())["models"]
    file = f"--config={folder / 'mine.py'}"
    scored(f"--model={run}", file, longer)
    found = json.loads((run / "evaluation_checkpoint.json").read_text())
    assert found["step"] == 6
    assert found["metrics"]["nll"] == pytest.approx(model["metrics"]["nll"], rel=1e-5)
    assert found["metrics"]["confusion"] == model["metrics"]["confusion"]
    scored(f"--model={run / 'export'}", file, longer)  # of an export her file has the data
    assert json.loads((run / "evaluation.json").read_text())["metrics"]["nll"] == pytest.approx(model["metrics"]["nll"], rel=1e-5)

    def said(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            scored(*arguments)
        assert end.value.code == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err

    assert "which evaluate cannot call; give a source by name" in said(f"--model={run}")
    assert "holds a run of another config (field run.steps: 6 there, 4 here); give the config file and the flags" in said(
        f"--model={run}", file
    )
    assert "was made with another config than --config gives" in said(f"--model={run / 'export'}", file)
    assert f"{longer} is of a training; give its config file too" in said(f"--model={run}", longer)
    (folder / "helper_of_mine.py").write_text(HELPER + "# a word\n")
    assert "a run with another version of helper_of_mine.py, which was edited since" in said(f"--model={run}", file, longer)


def test_data_that_change_between_two_runs_of_a_workdir_are_refused(folder, capsys):
    path = folder / "data.npz"
    rng = np.random.default_rng(0)
    np.savez(path, inputs=rng.normal(size=(60, 5)).astype(np.float32), targets=np.arange(60) % 3)
    arguments = [f"--config.data.source=arrays:{path}", "--config.run.steps=2"]
    launch(folder, *arguments)
    np.savez(path, inputs=rng.normal(size=(60, 5)).astype(np.float32), targets=np.arange(60) % 3)
    capsys.readouterr()
    assert "holds a run on other data: the fingerprint is " in refusal(folder, capsys, *arguments)


@pytest.mark.parametrize(
    ("find", "instead", "error"),
    [
        ("inputs @ params", "inputs @ nothing['x']", NameError),
        ('return {**params, "scale"', 'raise ValueError("of mine")\n    return {**params, "scale"', ValueError),
        ("rng = np.random.default_rng(0)", 'raise ValueError("of mine")', ValueError),
        ("def get_config():", "def get_config():\n    {}['x']", KeyError),
    ],
)
def test_she_sees_her_part_of_the_traceback_and_no_more(folder, capsys, find, instead, error):
    assert find in MINE
    (folder / "mine.py").write_text(MINE.replace(find, instead))
    with pytest.raises(SystemExit) as end:
        launch(folder)
    assert end.value.code == 1
    shown = capsys.readouterr().err
    assert {line.split('"')[1] for line in shown.splitlines() if line.startswith("  File")} == {str(folder / "mine.py")}
    assert f"\n{error.__name__}: " in shown
    assert not (folder / "run" / "config.json").exists()
    with pytest.raises(error) as raised:
        launch(folder, "--debug")
    assert raised.traceback[-1].path.name == "mine.py"


@pytest.mark.parametrize(
    ("find", "instead", "words"),
    [
        (
            "Machine(tensorboard=False)",
            "Machine(tensorbord=False)",
            "Machine has no field 'tensorbord'; the nearest is 'tensorboard'",
        ),
        ("return Config(", "return Config(modle=1,", "Config has no field 'modle'; the nearest is 'model'"),
    ],
)
def test_a_misspelt_field_in_her_file_gets_the_nearest(folder, capsys, find, instead, words):
    (folder / "mine.py").write_text(MINE.replace(find, instead))
    said = refusal(folder, capsys)
    assert words in said
    line = next(i for i, text in enumerate(MINE.replace(find, instead).splitlines(), 1) if "return Config(" in text)
    assert f"mine.py:{line}" in said or f"mine.py:{line + 1}" in said


def test_a_misspelt_attribute_in_her_file_gets_the_nearest(folder, capsys):
    after = "\n\nmade = get_config\n\n\ndef get_config():\n    config = made()\n    config.run.stepps = 3\n    return config\n"
    (folder / "mine.py").write_text(MINE + after)
    assert "sets 'stepps' of a Run, which has no such field; the nearest is 'steps'" in refusal(folder, capsys)


def test_profile_has_a_short_flag(folder, capsys):
    argv = ["train", f"--config={folder / 'mine.py'}", f"--workdir={folder / 'run'}", "--profile=9:12"]
    with pytest.raises(SystemExit) as end:
        configs.launch(
            train.main, presets=train.PRESETS, default="article", about="", argv=argv, short={"profile": "config.run.profile"}
        )
    assert end.value.code == 2
    assert "profile is '9:12', but the run has 4 steps" in capsys.readouterr().err


def test_a_config_of_another_experiment_is_refused(folder, capsys):
    (folder / "mine.py").write_text("from experiments.configs.compress.digits import get_config")
    assert "mine.py makes a bmjax.jobs.compress.Config; this experiment takes a bmjax.jobs.train.Config" in refusal(
        folder, capsys
    )


def test_mixed_targets_are_refused_by_a_term_that_takes_one_class(folder, capsys):
    (folder / "mine.py").write_text(MINE.replace("steps=4,", "steps=2, augment=data.Augment(mixup=0.2),"))
    launch(folder)  # spread reads no targets, and cross-entropy reads both
    taken = HELPER.replace("(student.logits**2).mean(-1)", "-student.logits[:, 0] * batch['targets']")
    (folder / "helper_of_mine.py").write_text(taken)
    sys.modules.pop("helper_of_mine")
    capsys.readouterr()
    said = refusal(folder, capsys, f"--workdir={folder / 'other'}")
    assert "mixup gives each example two targets, and the loss term 'spread' takes one class only; set mixup to 0" in said


def test_her_criterion_and_weights_count_and_the_flags_go_on_working(folder):
    """The criterion keeps the first rows of the kernel, whatever is in them."""
    first = "prune.per_weight(lambda s: jax.tree.map(lambda w: -jnp.arange(w.size * 1.0).reshape(w.shape), s.params))"
    settings = f"prune=prune.Sparsity(0.2, begin=0.0, end=0.5, interval=1, criterion={first})"
    (folder / "mine.py").write_text(MINE.replace("views=[halved]", settings))
    launch(folder, "--config.prune.sparsity=0.4", "--config.weights=spread=0.5")
    from safetensors.numpy import load_file

    kernel = load_file(folder / "run" / "export" / "params.safetensors")["kernel"]
    np.testing.assert_array_equal(kernel.ravel() != 0, np.arange(15) < 9)
    rows = [row for row in logs.read(folder / "run")["model"] if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(rows[0]["ce"] + 0.5 * rows[0]["spread"], rel=1e-5)


def test_her_gradient_is_taken(folder):
    mine = MINE.replace("steps=4,", "steps=4, gradient=still,").replace(
        "def get_config",
        "def still(loss, params, batch, ctx):\n    grads, aux = gradients.mean().apply(loss, params, batch, ctx)\n"
        "    return jax.tree.map(jnp.zeros_like, grads), aux\n\n\ndef get_config",
    )
    (folder / "mine.py").write_text(
        mine.replace("from bmjax.train.loop", "from bmjax.train import gradients\nfrom bmjax.train.loop")
    )
    launch(folder)
    rows = [row for row in logs.read(folder / "run")["model"] if "loss" in row]
    assert len({row["valid_nll"] for row in logs.read(folder / "run")["model"] if "valid_nll" in row}) == 1
    assert len(rows) == 4


@pytest.mark.parametrize(
    ("find", "instead", "words"),
    [
        ('"spread": (0.25', '"ce": (0.25', "config.terms has 'ce', which the objective has already; choose another name"),
        (
            "transform=frozen_scale",
            "transform=lambda tx, steps: steps",
            "config.transform returned int; expected an optax transform",
        ),
        (
            "model=linear",
            "model=lambda shape, classes: shape",
            "the model is made as tuple; expected a Model with init and apply",
        ),
        ("model=linear", "model=3", "the model is 3; expected a config with build(shape, classes), or a function"),
        ("views=[halved]", "views=[3]", "config.views is [3]; expected a list"),
        (
            "return Mean.of((student.logits**2).mean(-1)",
            "return Mean.of((student.logits**2).mean()",
            "the loss term 'spread': Mean.of was given values [] and weights [8]; the weights' axes must be the first ones",
        ),
        ("views=[halved]", "weights={'spreed': 1.0}", "config.weights names 'spreed'; the loss terms are ce, spread"),
        (
            "transform=frozen_scale",
            "prune=prune.Sparsity(0.5), transform=lambda tx, steps: prune.around(tx, sparsity=0.8)",
            "config.transform prunes already, and config.prune.sparsity is 0.5; set one of them",
        ),
        (
            "views=[halved]",
            "prune=prune.Sparsity(0.5, criterion=prune.per_weight(lambda s: jax.tree.map(jnp.sum, s.params)))",
            "the criterion's scores do not fit the parameters: kernel has shape",
        ),
        ("steps=4,", "steps=4, gradient=3,", "config.run.gradient: a gradient cannot be 3; set a function in a config file"),
        (
            "steps=4,",
            "steps=4, gradient=print, clip_per_example=1.0,",
            "gradient and clip_per_example are two ways to take the gradient; give one of them",
        ),
    ],
)
def test_what_she_gives_is_checked_before_anything_runs(folder, capsys, find, instead, words):
    assert find in MINE + HELPER
    (folder / "mine.py").write_text(MINE.replace(find, instead))
    (folder / "helper_of_mine.py").write_text(HELPER.replace(find, instead))
    assert words in refusal(folder, capsys)


def test_transforms_come_in_order_and_pruning_last(folder):
    mine = MINE.replace("transform=frozen_scale", "transform=[frozen_scale, lambda tx, steps: optax.chain(tx, optax.scale(2.0))]")
    (folder / "mine.py").write_text(mine)
    config = configs.load(str(folder / "mine.py"), train.PRESETS)
    config.prune.sparsity = 0.5
    config.prune.begin, config.prune.end, config.prune.interval = 0.0, 0.5, 1
    tx = config.wrap(config.run.optimizer.build(4), 4)
    params = {"kernel": np.arange(1.0, 9.0, dtype=np.float32).reshape(4, 2), "scale": np.float32(1)}
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update({"kernel": np.ones((4, 2), np.float32), "scale": np.float32(1)}, state, params)
        params = {name: params[name] + updates[name] for name in params}
    kept = np.asarray(prune.masks(state)["kernel"]) if np.ndim(prune.masks(state)["kernel"]) else np.ones((4, 2), bool)
    np.testing.assert_allclose(params["kernel"][kept], (np.arange(1.0, 9.0).reshape(4, 2) - 3 * 2 * 0.1)[kept], rtol=1e-5)
    assert (params["kernel"][~kept] == 0).all()
    assert params["scale"] == 1


def test_only_what_the_file_imports_from_its_folder_counts(tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "__init__.py").write_text("from . import deep\n")
    (tmp_path / "part" / "deep.py").write_text("import json\n")
    (tmp_path / "other.py").write_text("")
    (tmp_path / "mine.py").write_text("def f():\n    from part import deep\n")
    from bmjax.config.load import hashes

    assert set(hashes(tmp_path / "mine.py")) == {"mine.py", "part/__init__.py", "part/deep.py"}
