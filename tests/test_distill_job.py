"""Layer maps and rollouts from the command line, in the job that trains."""

import jax
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from bmjax import config as configs
from bmjax import distill, losses, parallel
from bmjax.jobs import common
from bmjax.models import Plain
from bmjax.train import Problem, checkpoint, init_state
from bmjax.train import log as logs
from bmjax.train import run as runs
from bmjax.train.run import Bench, start_key, stream
from experiments import train as program

SMALL = ("--config.machine.mesh=data=8", "--config.machine.tensorboard=false", "--config.data.batch=8", "--config.run.steps=3")


def launch(*arguments):
    argv = ["experiments/train.py", *SMALL, *map(str, arguments)]
    configs.launch(program.main, presets=program.PRESETS, default="article", about=program.__doc__, argv=argv)


def network(root, layers, width, kind="Residual", *more):
    sizes = {"layers": layers, "width": width, "neurons": 8}
    return (f"--config.{root}={kind}", *(f"--config.{root}.{name}={value}" for name, value in sizes.items()), *more)


@pytest.fixture
def blobs(tmp_path):
    rng, targets = np.random.default_rng(0), np.arange(120) % 3
    inputs = (rng.normal(size=(120, 6)) + 5 * np.eye(3, 6)[targets]).astype(np.float32)
    np.savez(tmp_path / "blobs.npz", inputs=inputs, targets=targets)
    return f"--config.data.source=arrays:{tmp_path / 'blobs.npz'}"


HINT = ("--config.teacher.distill.hint_weight=0.5", "--config.teacher.distill.part=mlp", "--config.teacher.run.steps=3")


def at(params, path):
    for name in path.split("/")[2:]:
        params = params[name]
    return params


def language(tmp_path):
    """Flags of a small decoder and its teacher."""
    text, heads = tmp_path / "text.txt", lambda root: f"--config.{root}.heads=2"
    text.write_bytes(bytes(range(97, 123)) * 40)
    return (
        f"--config.data.source=text:{text}",
        "--config.data.length=8",
        *network("model", 2, 4, "Decoder", heads("model")),
        *network("teacher.model", 3, 8, "Decoder", heads("teacher.model")),
        *HINT,
        "--config.teacher.distill.layers=auto",
        "--config.teacher.distill.loss=jsd",
        "--config.teacher.distill.temperature=1",
        "--config.teacher.rollout.fraction=0.5",
        "--config.teacher.rollout.prompt=4",
        f"--workdir={tmp_path / 'run'}",
    )


def test_flags_make_the_problem_that_is_trained(tmp_path, monkeypatch):
    """All that happens before the first training: the step is traced, and nothing is compiled."""
    checked, check = [], runs.check

    def remember(bench, problem, run, frozen=None):
        checked.append(problem)
        check(bench, problem, run, frozen)

    def stop(*arguments, **more):
        raise ValueError("here the teacher would be trained")

    monkeypatch.setattr(runs, "check", remember)
    monkeypatch.setattr(common, "train", stop)
    with pytest.raises(SystemExit):
        launch(*language(tmp_path))
    teacher, student = checked
    assert teacher.rollout is None and student.rollout is not None
    batch = {
        "inputs": np.arange(16, dtype=np.int32).reshape(2, 8),
        "targets": np.arange(16, dtype=np.int32).reshape(2, 8),
        "id": np.arange(2, dtype=np.int32),
    }
    params = student.model.init(jax.random.key(0), batch)[0]
    coin = lambda seed: student.rollout(student.model, params, batch, jax.random.key(seed), np.int32(0))["sampled"]
    flips = np.concatenate([coin(seed) for seed in range(8)])
    assert 0 < flips.mean() < 1
    assert set(student.terms) == {"ce", "jsd", "hint"}
    hint = student.full_terms["hint"]
    assert hint.student_features == ("layers/0/mlp", "layers/1/mlp")  # until the teacher is there, spread uniformly
    assert hint.teacher_features == ("layers/1/mlp", "layers/2/mlp")


@pytest.mark.slow
def test_a_student_finds_its_layers_and_learns_on_what_it_writes(tmp_path, monkeypatch):
    calls, seek = [], distill.auto

    def remember(model, teacher, params, frozen, batch, **more):
        calls.append((jax.device_get(params), seek(model, teacher, params, frozen, batch, **more)))
        return calls[-1][1]

    monkeypatch.setattr(distill, "auto", remember)
    launch(*language(tmp_path))
    ((start, pairs),) = calls  # once, when the teacher was trained
    assert list(pairs) == ["layers/0/mlp", "layers/1/mlp"]
    assert set(pairs.values()) <= {f"layers/{i}/mlp" for i in range(3)}
    held = checkpoint.read(tmp_path / "run" / "checkpoints" / "student").state
    kernels = [path for path in held if path.startswith("params/loss/hint/project") and path.endswith("kernel")]
    assert [held[path].shape for path in kernels] == [(4, 8), (4, 8)]
    own = [path for path in held if path.startswith("params/model")]
    assert {held[path].shape == at(start, path).shape for path in own} == {True}
    assert not all(np.array_equal(held[path], at(start, path)) for path in own)
    shipped = load_file(tmp_path / "run" / "export" / "params.safetensors")
    assert {f"params/model/{name}" for name in shipped} == set(own)  # the projections stay behind
    rows = [row for row in logs.read(tmp_path / "run")["student"] if "loss" in row]
    assert rows
    for row in rows:
        assert row["loss"] == pytest.approx(0.9 * row["jsd"] + 0.1 * row["ce"] + 0.5 * row["hint"], rel=1e-5)
        assert min(row["jsd"], row["ce"], row["hint"]) > 0


def test_auto_sees_the_parameters_that_the_run_starts_from(tmp_path):
    """The key is that of `init_state`."""
    batch = {"inputs": np.zeros((2, 3), np.float32), "targets": np.zeros(2, np.int32), "weights": np.ones(2, np.float32)}
    model, mesh = Plain(hidden=(4,)).build((3,), 2), parallel.make_mesh("data=1", jax.devices()[:1])
    bench = Bench(mesh, None, None, tmp_path, None, seed=5)
    problem = Problem(model, {"ce": (1.0, losses.cross_entropy_term())}, optax.sgd(0.1))
    state = init_state(problem, mesh, model.rules, jax.random.key(stream(5, "student")), batch)
    jax.tree.map(np.testing.assert_array_equal, model.init(start_key(bench, "student"), batch)[0], state.params["model"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("distill.layers=unifrom",), "layers is 'unifrom'; expected uniform, last, auto, or a stride such as 2i+1"),
        (
            ("distill.layers=3i",),
            "layers/1/mlp would learn from layers/3/mlp, which the teacher has not; the nearest are layers/",
        ),
        (("distill.layers=last", "distill.part=attention"), "the student has no layers with a part 'attention'; the nearest are"),
        (("distill.layers=last", "distill.vocabulary=2"), "distill.vocabulary is 2, and the data have 3 classes"),
        (("distill.layers=last", "rollout.fraction=0.5"), "a rollout continues tokens [B, T]; the inputs are [8, 6]"),
        (("distill.layers=last", "rollout.fraction=1.5"), "config.teacher.rollout.fraction is 1.5; expected"),
        (
            ("model=none", "distill.layers=last", "cached=here", "rollout.fraction=0.5"),
            "cached outputs are of the data's tokens; for a rollout",
        ),
    ],
)
def test_a_mistake_gets_one_line(blobs, tmp_path, capfd, flags, words):
    nets = (*network("model", 2, 4), *network("teacher.model", 3, 6))
    nets = nets if "model=none" not in flags else network("model", 2, 4)
    with pytest.raises(SystemExit) as stopped:
        launch(blobs, *nets, *HINT, *(f"--config.teacher.{flag}" for flag in flags), f"--workdir={tmp_path / 'run'}")
    error = capfd.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and words in error[-1], error[-3:]
