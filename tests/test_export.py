"""The exported files: equal outputs, hashes that notice every change, and a prediction program that needs no bmjax."""

import hashlib
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bmjax import deploy, manifest
from bmjax.deploy import export, load
from experiments import predict

ROOT = pathlib.Path(__file__).parents[1]
NAMES = ["ant", "bee", "cow"]
GUARD = """
import runpy, sys
class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("bmjax", "flax", "tensorflow", "torch"):
            raise AssertionError("imported " + name)
sys.meta_path.insert(0, Guard())
sys.argv = ["predict"] + sys.argv[1:]
runpy.run_module("experiments.predict", run_name="__main__")
"""


def mlp(params, inputs):
    hidden = jnp.tanh(inputs.reshape(inputs.shape[0], -1) @ params["in"]["kernel"])
    return hidden @ params["out"]["kernel"] + params["out"]["bias"].astype(jnp.float32)


def mlp_params():
    rng = np.random.default_rng(0)
    return {
        "in": {"kernel": rng.normal(size=(6, 8)).astype(np.float32)},
        "out": {"kernel": rng.normal(size=(8, 3)).astype(np.float32), "bias": jnp.array([0.5, -0.25, 1.0], jnp.bfloat16)},
    }


def numpy_logits(inputs):
    params = mlp_params()
    hidden = np.tanh(inputs.reshape(len(inputs), -1).astype(np.float64) @ params["in"]["kernel"])
    return hidden @ params["out"]["kernel"] + np.array([0.5, -0.25, 1.0])


def export_mlp(directory, fn=mlp, params=None, **change):
    settings = {"input_shape": (2, 3), "input_dtype": "float32", "classes": 3, "metadata": {"class_names": NAMES, "seed": 1}}
    return export(fn, mlp_params() if params is None else params, directory, **(settings | change))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return export_mlp(tmp_path_factory.mktemp("model") / "export")


@pytest.fixture
def inputs():
    return np.random.default_rng(3).normal(size=(11, 2, 3)).astype(np.float32)


def copy(model, directory):
    directory.mkdir()
    for file in model.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def test_loaded_logits_are_numpys(model, inputs):
    loaded = load(model)
    for batch in (1, 4, 11):
        np.testing.assert_allclose(loaded(inputs[:batch]), numpy_logits(inputs[:batch]), atol=1e-5)


def test_the_files_and_the_manifest(model):
    assert sorted(file.name for file in model.iterdir()) == ["manifest.json", "model.jaxexport", "params.safetensors"]
    data = manifest.verify(model)
    assert data["input"] == {"shape": [2, 3], "dtype": "float32"}
    assert (data["classes"], data["class_names"], data["metadata"]["seed"]) == (3, NAMES, 1)
    content = json.loads((model / "manifest.json").read_text())
    for name, entry in content["files"].items():
        assert entry["sha256"] == hashlib.sha256((model / name).read_bytes()).hexdigest()
    from safetensors import safe_open

    with safe_open(model / "params.safetensors", "numpy") as file:
        assert sorted(file.keys()) == ["in/kernel", "out/bias", "out/kernel"]
    assert (model / "model.jaxexport").stat().st_size < 20_000  # the weights are not in it


def test_jitted_functions_and_sharded_parameters(tmp_path, inputs):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    params = jax.device_put(mlp_params(), NamedSharding(mesh, PartitionSpec()))
    directory = export_mlp(tmp_path / "export", fn=jax.jit(mlp), params=params)
    np.testing.assert_allclose(load(directory)(inputs), numpy_logits(inputs), atol=1e-5)


def test_token_models(tmp_path):
    table = np.random.default_rng(0).normal(size=(5, 5)).astype(np.float32)
    export(lambda p, x: p["t"][x], {"t": table}, tmp_path, input_shape=(4,), input_dtype="int32", classes=5, metadata={})
    tokens = np.array([[0, 4, 2, 1]], np.int32)
    np.testing.assert_array_equal(load(tmp_path)(tokens)[0], table[tokens[0]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": 4, "metadata": {}}, r"\[batch, \.\.\., 4\]"),
        ({"metadata": {"class_names": ["one"]}}, "1 names, but there are 3 classes"),
        ({"metadata": {"array": np.ones(2)}}, "JSON cannot"),
        ({"params": mlp_params() | {"in/kernel": np.ones(2)}}, "same path"),
    ],
)
def test_export_refuses(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        export_mlp(tmp_path / "export", **change)
    assert not (tmp_path / "export").exists()


def test_a_function_that_is_not_the_same_twice_is_refused(tmp_path):
    calls = []

    def drifting(params, inputs):
        calls.append(1)
        return mlp(params, inputs) * len(calls)

    with pytest.raises(ValueError, match="differ from the original"):
        export_mlp(tmp_path / "export", fn=drifting)
    with pytest.raises(ValueError, match="no manifest"):
        load(tmp_path / "export")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "bytes, but the manifest says"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, but the manifest says"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x7f"), "was altered"),
    ],
)
def test_every_change_is_noticed(model, tmp_path, damage, message):
    directory = copy(model, tmp_path / "copy")
    damage(directory / "params.safetensors")
    with pytest.raises(ValueError, match=rf"params\.safetensors.*{message}"):
        load(directory)


def test_manifest_covers_folders_below_and_replaces_itself(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "file").write_bytes(b"abc")
    manifest.write(tmp_path, {"a": 1})
    manifest.write(tmp_path, {"a": 2})
    assert manifest.verify(tmp_path) == {"a": 2}
    files = json.loads((tmp_path / "manifest.json").read_text())["files"]
    assert files == {"below/file": {"bytes": 3, "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}}
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        manifest.verify(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match="no manifest"):
        manifest.verify(tmp_path)


def test_predict_needs_neither_bmjax_nor_flax(model, tmp_path, inputs):
    targets = numpy_logits(inputs).argmax(-1)
    targets[0] = (targets[0] + 1) % 3
    np.savez(tmp_path / "new.npz", inputs=inputs, targets=targets)
    command = [f"--model={model}", f"--input={tmp_path / 'new.npz'}", f"--output={tmp_path / 'out.csv'}", "--batch=4"]
    environment = {key: value for key, value in os.environ.items() if key != "JAX_NUM_CPU_DEVICES"}
    done = subprocess.run([sys.executable, "-c", GUARD, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "accuracy 0.9091 (10 of 11)" in done.stdout
    rows = [line.split(",") for line in (tmp_path / "out.csv").read_text().splitlines()]
    assert rows[0] == ["example", "class", "name", "confidence"]
    expected = numpy_logits(inputs)
    probabilities = np.exp(expected) / np.exp(expected).sum(-1, keepdims=True)
    assert [int(row[1]) for row in rows[1:]] == expected.argmax(-1).tolist()
    assert [row[2] for row in rows[1:]] == [NAMES[k] for k in expected.argmax(-1)]
    np.testing.assert_allclose([float(row[3]) for row in rows[1:]], probabilities.max(-1), atol=2e-6)


def run_predict(capsys, *arguments):
    """(exit code, stdout, stderr) in this process."""
    predict.FLAGS.unparse_flags()
    for name in predict.FLAGS:
        predict.FLAGS[name].unparse()
    code = 0
    try:
        predict.main(["predict", *map(str, arguments)])
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def test_predict_prints_rows_and_a_histogram(model, tmp_path, inputs, capsys):
    np.save(tmp_path / "new.npy", inputs)
    code, out, _ = run_predict(capsys, f"--model={model}", f"--input={tmp_path / 'new.npy'}")
    assert code == 0
    counts = np.bincount(numpy_logits(inputs).argmax(-1), minlength=3)
    histogram = {line.split()[0]: int(line.split()[1]) for line in out.splitlines() if line.startswith("  ")}
    assert histogram == {name: count for name, count in zip(NAMES, counts) if count}
    assert f"example 0: {NAMES[numpy_logits(inputs)[0].argmax()]}" in out
    assert "11 examples" in out
    assert "accuracy" not in out
    code, _, _ = run_predict(capsys, f"--model={model}", f"--input={tmp_path / 'new.npy'}", f"--output={tmp_path / 'out.npz'}")
    np.testing.assert_allclose(np.load(tmp_path / "out.npz")["logits"], numpy_logits(inputs), atol=1e-5)


def test_predict_explains_itself(capsys):
    code, out, _ = run_predict(capsys, "--help")
    assert code == 0
    for text in ("--model  (string, default: none)", "--batch  (int, default: 256)", "--key  (string, default: inputs)"):
        assert text in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model and --input must be given"),
        (["--model={model}"], "--input must be given"),
        (["--model={model}", "--input={tmp}/good.npz", "stray"], "unexpected argument 'stray'"),
        (["--model={model}", "--inputs={tmp}/good.npz"], "Unknown command line flag 'inputs'. Did you mean: input"),
        (["--model={model}", "--input={tmp}/good.npz", "--batch=0"], "--batch=0"),
        (["--model={tmp}/none", "--input={tmp}/good.npz"], "is not a folder"),
        (["--model={tmp}", "--input={tmp}/good.npz"], "has no manifest.json"),
        (["--model={tmp}/altered", "--input={tmp}/good.npz"], "params.safetensors was altered"),
        (["--model={model}", "--input={tmp}/none.npz"], "is not a file"),
        (["--model={model}", "--input={tmp}/text.npz"], "not a readable .npy or .npz"),
        (["--model={model}", "--input={tmp}/good.npz", "--key=x"], "no array 'x'; there are bad_targets, empty, inputs, nan"),
        (["--model={model}", "--input={tmp}/good.npz", "--key=shape"], "shape [4, 3, 2], but the model takes [n, 2, 3] float32"),
        (["--model={model}", "--input={tmp}/good.npz", "--key=scalar"], "shape []"),
        (["--model={model}", "--input={tmp}/good.npz", "--key=whole"], "the inputs are uint8"),
        (["--model={model}", "--input={tmp}/good.npz", "--key=empty"], "the input is empty"),
        (["--model={model}", "--input={tmp}/good.npz", "--key=nan"], "NaN or infinity, first in example 2 (1 of 4 examples)"),
        (["--model={model}", "--input={tmp}/good.npz", "--output={tmp}/out.txt"], "must end in .csv or .npz"),
        (["--model={model}", "--input={tmp}/good.npz", "--output={tmp}/none/out.csv"], "a folder that exists"),
        (["--model={model}", "--input={tmp}/targets.npz"], "targets in"),
    ],
)
def test_mistakes_get_one_line(model, tmp_path, capsys, arguments, message):
    good = np.zeros((4, 2, 3), np.float32)
    nan = good.copy()
    nan[2, 0, 1] = np.nan
    np.savez(
        tmp_path / "good.npz",
        inputs=good,
        nan=nan,
        bad_targets=np.zeros(3, int),
        shape=np.zeros((4, 3, 2), np.float32),
        scalar=np.float32(1),
        whole=np.zeros((4, 2, 3), np.uint8),
        empty=good[:0],
    )
    np.savez(tmp_path / "targets.npz", inputs=good, targets=np.zeros(3, int))
    (tmp_path / "text.npz").write_text("no numbers")
    altered = copy(model, tmp_path / "altered")
    content = bytearray((altered / "params.safetensors").read_bytes())
    content[-3] ^= 1
    (altered / "params.safetensors").write_bytes(content)
    code, _, err = run_predict(capsys, *(argument.format(model=model, tmp=tmp_path) for argument in arguments))
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_the_state_lies_beside_the_parameters_and_goes_with_them(tmp_path):
    params, state = {"w": np.ones((3, 2), np.float32)}, {"stats": {"mean": np.full(3, 0.5, np.float32)}}

    def write(state):
        fn = lambda p, x: (x - 0.5) @ p["w"]
        deploy.export(fn, params, tmp_path, input_shape=(3,), input_dtype="float32", classes=2, metadata={}, state=state)

    write(state)
    np.testing.assert_array_equal(deploy.load_state(tmp_path)["stats"]["mean"], state["stats"]["mean"])
    assert set(deploy.load_params(tmp_path)) == {"w"}
    (tmp_path / "state.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"state\.safetensors has 1 bytes"):
        deploy.load_state(tmp_path)
    write({})
    assert deploy.load_state(tmp_path) == {}
