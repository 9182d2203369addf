"""Pruning by flags: every method reaches its sparsity in what is exported, n:m finds its axes, what says nothing is refused."""

import functools
import json

import jax
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from bmjax import config as configs
from bmjax import prune, trees
from bmjax.jobs import evaluate
from bmjax.jobs import train as jobs
from bmjax.models import Decoder, ResNet
from bmjax.train import checkpoint
from experiments import train as program

EACH = {"hidden_0/kernel": 64 * 12, "hidden_1/kernel": 12 * 8}
RANDOM = ("static", "set", "rigl")
ATTENTION = "layers/attention"


def launch(workdir, *flags):
    argv = ["experiments/train.py", "--config.machine.devices=0", "--config.machine.tensorboard=false", *flags]
    argv += ["--config.run.every.evaluate=100", "--config.run.every.save=100", f"--workdir={workdir}"]
    configs.launch(program.main, presets=program.PRESETS, default="article", about=program.__doc__, argv=argv)
    return load_file(workdir / jobs.EXPORT / "params.safetensors")


def digits(workdir, *flags):
    """The exported parameters of a tiny network, after a few steps on digits."""
    data = ("--config.data.source=digits", "--config.data.limit=320", "--config.data.batch=32")
    return launch(workdir, *data, "--config.model=Plain", "--config.model.hidden=12,8", "--config.run.steps=12", *flags)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("gradual", ["score=saliency", "decay=0.5"]),
        ("straight_through", ["packed=true"]),
        ("static", []),
        ("set", ["drop=0.5"]),
        ("rigl", ["allocation=uniform"]),
        ("ac_dc", ["phase=0.1", "begin=0.1"]),
    ],
)
def test_every_method_by_flags_reaches_its_sparsity(tmp_path, method, flags):
    given = [f"method={method}", "sparsity=0.75", *([] if method in ("static", "ac_dc") else ["interval=2"]), *flags]
    params = digits(tmp_path, *(f"--config.prune.{flag}" for flag in given))
    held = checkpoint.read(tmp_path / "checkpoints" / "model").state
    zeros = {path: int((params[path] == 0).sum()) for path in EACH}
    dropped = {path: int((~mask_of(held, path)).sum()) for path in EACH} if method in RANDOM else zeros
    if method in ("static", "set"):  # Erdos-Renyi: the sparsity of all together, and more of it in the larger kernel
        assert sum(dropped.values()) == pytest.approx(0.75 * sum(EACH.values()), abs=1)
        assert dropped["hidden_0/kernel"] / EACH["hidden_0/kernel"] > dropped["hidden_1/kernel"] / EACH["hidden_1/kernel"]
    else:
        assert dropped == {path: 0.75 * size for path, size in EACH.items()}
    for path in EACH if method in RANDOM else ():  # what has just grown is zero too, until it has a gradient
        assert (params[path][~mask_of(held, path)] == 0).all()
    assert (params["head/kernel"] == 0).sum() == 0
    (model,) = json.loads((tmp_path / jobs.RESULTS).read_text())["models"]
    assert model["sparsity"] == pytest.approx(sum(zeros.values()) / (sum(EACH.values()) + 8 * 10))
    weights = held["params/model/hidden_0/kernel"]
    assert (weights == 0).sum() == (0 if method == "straight_through" else zeros["hidden_0/kernel"])
    if method == "straight_through":  # the export shows the trained weights, but for the smallest
        shown = params["hidden_0/kernel"]
        np.testing.assert_array_equal(shown, np.where(shown == 0, 0, weights))
        found = evaluate.evaluate(evaluate.defaults(str(tmp_path)), "c")  # the checkpoint, through its masks
        assert found["metrics"]["confusion"] == model["metrics"]["confusion"]
        assert found["metrics"]["nll"] == pytest.approx(model["metrics"]["nll"], rel=1e-5)


def mask_of(state, path):
    """A kernel's mask in a checkpoint."""
    (found,) = [leaf for name, leaf in state.items() if name.endswith(f"masks/{path}")]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gradual", "straight_through"])
def test_two_of_four_run_along_what_each_layer_contracts(tmp_path, method):
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(97, 123)) * 60)
    flags = (f"--config.data.source=text:{text}", "--config.data.length=8", "--config.data.batch=8", "--config.run.steps=5")
    sizes = {"layers": 2, "width": 16, "heads": 2, "neurons": 8}
    model = ("--config.model=Decoder", *(f"--config.model.{name}={size}" for name, size in sizes.items()))
    pruned = ("--config.prune.pattern=2:4", "--config.prune.interval=1", f"--config.prune.method={method}")
    params = launch(tmp_path / "run", *flags, *model, *pruned)
    axes = {f"{ATTENTION}/{name}/kernel": 1 for name in ("query", "key", "value")}  # [layers, width, heads, dim]
    axes |= {f"{ATTENTION}/out/kernel": 2}  # [layers, heads, dim, width]
    axes |= {f"layers/{name}/kernel": 1 for name in ("gate", "up", "down")}
    for path, axis in axes.items():
        fours = np.moveaxis(params[path], axis, -1).reshape(-1, 4)
        assert ((fours != 0).sum(1) == 2).all(), path


def axes_of(model, shape, **how):
    """What the settings find in a model, of shapes alone."""
    net = model.build(shape, 32)
    inputs = np.zeros((2, *shape), np.int32 if len(shape) == 1 else np.float32)
    batch = {"inputs": inputs, "targets": np.zeros((2, *shape[:1]) if len(shape) == 1 else (2,), np.int32)}
    params, abstract = jax.eval_shape(net.init, jax.random.key(0), batch)
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    settings = prune.Sparsity(pattern="2:4", **how)
    found = settings.sides(lambda p, b: net.apply(p, state, b)[0].logits, params, batch)
    return params, {path: sides.inputs[-1] for path, sides in found.items()}


def test_convolutions_contract_their_channels():
    params, axes = axes_of(ResNet(), (16, 16, 4))
    shapes = {path: leaf.shape for path, leaf in trees.paths(params).items()}
    convolutions = {path: axis for path, axis in axes.items() if len(shapes[path]) >= 4}
    assert convolutions
    assert set(convolutions.values()) == {-2}


def test_a_kernel_whose_axis_is_not_found_is_refused():
    with pytest.raises(
        ValueError, match=r"2:4 runs along a layer's inputs, and those of embed/embedding .* are not found: .*where"
    ) as e:
        axes_of(Decoder(layers=1, width=8, heads=2, neurons=8), (4,), where="embed")
    assert "\n" not in str(e.value)


def test_without_an_axis_attention_is_refused():
    net = Decoder(layers=2, width=16, heads=2, neurons=8).build((4,), 32)
    ids = np.zeros((2, 4), np.int32)
    params, _ = jax.eval_shape(net.init, jax.random.key(0), {"inputs": ids, "targets": ids})
    for stacked in (None, "layers/"):
        tx = prune.sparsify(pattern=prune.n_m(2, 4), stacked=stacked)
        with pytest.raises(
            ValueError, match=r"layers/attention/\w+/kernel \[16, 2, 8\].*axis=\{path: axis\} from trace.contracting"
        ):
            tx.init(params)
        prune.sparsify(pattern=prune.n_m(2, 4), stacked=stacked, where="up|down").init(params)


def masks_after(tx, params, steps):
    """The masks after so many updates of nothing."""
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    for _ in range(steps):
        _, state = update(jax.tree.map(np.zeros_like, params), state, params)
    return jax.device_get(prune.masks(state))


@functools.cache
def kernels():
    return {"kernel": np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)}


@pytest.mark.parametrize(
    "how",
    [
        {"method": "static"},
        {"method": "rigl", "interval": 5},
        {"score": "random", "schedule": "one_shot", "begin": 0.0, "end": 0.1},
    ],
)
def test_random_masks_go_by_the_seed_of_the_run(how):
    def mask(seed):
        tx = jobs.Config(seed=seed, prune=prune.Sparsity(0.5, **how)).wrap(optax.sgd(0.1), 10)
        return masks_after(tx, kernels(), 2)["kernel"]

    assert [mask(seed).sum() for seed in (0, 7)] == [128, 128]
    np.testing.assert_array_equal(mask(7), mask(7))
    assert 0.3 < (mask(0) != mask(7)).mean() < 0.7


def test_an_end_at_the_end_of_the_run_is_reached():
    tx = prune.Sparsity(0.5, end=1.0).after(optax.sgd(0.1), 10)
    assert masks_after(tx, kernels(), 10)["kernel"].sum() == 128


def test_the_global_allocation_takes_its_floor_and_scale():
    big, small = (
        np.random.default_rng(0).normal(size=(2, 16, 16)).astype(np.float32) * np.array([100, 1], np.float32)[:, None, None]
    )
    params = {"a": {"kernel": big}, "b": {"kernel": small}}

    def kept(**how):
        settings = prune.Sparsity(0.5, allocation="global", schedule="one_shot", begin=0.0, end=0.1, **how)
        return int(masks_after(settings.after(optax.sgd(0.1), 10), params, 2)["b"]["kernel"].sum())

    assert kept() < 8
    assert kept(floor=0.25) == 64
    assert 96 < kept(normalise=True) < 160


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"method": "rigl", "score": "random"}, "score is 'random', which the method rigl does not look at; leave it out"),
        ({"method": "set", "pattern": "2:4"}, "pattern is '2:4', which the method set does not look at"),
        ({"method": "ac_dc", "schedule": "linear"}, "schedule is 'linear', which the method ac_dc does not look at"),
        ({"method": "ac_dc", "interval": 5}, "interval is 5, which the method ac_dc does not look at"),
        ({"method": "static", "begin": 0.1}, "begin is 0.1, which the method static does not look at"),
        ({"drop": 0.5}, "drop is 0.5, which the method gradual does not look at"),
        ({"method": "rigl", "phase": 0.5}, "phase is 0.5, which the method rigl does not look at"),
        ({"method": "rigl", "allocation": "global"}, "random at first and have no scores, by which the allocation global goes"),
        ({"method": "straight_through", "score": "taylor"}, "which the score taylor is not meant for"),
        ({"method": "straight_through", "criterion": prune.fisher()}, "which the score fisher is not meant for"),
        ({"method": "straight_through", "sparsity": 0.0}, "the sparsity 0, which prunes nothing; set sparsity"),
        ({"floor": 0.1}, "floor is of the global allocation, and allocation is uniform"),
        ({"normalise": True, "allocation": "owl"}, "normalise is of the global allocation, and allocation is owl"),
        ({"decay": 0.5}, "decay is of the scores saliency, movement, fisher, taylor, and the score is magnitude"),
        ({"decay": 1.0, "score": "fisher"}, "the decay of a running mean is 1.0"),
        ({"pattern": "2:4", "allocation": "owl", "sparsity": 0.0}, "is the same everywhere; the allocation owl"),
        ({"where": "(a"}, r"config.prune.where: '\(a' is not a regular expression"),
        (
            {"method": "prune"},
            "config.prune.method is 'prune'; expected one of gradual, straight_through, static, set, rigl, ac_dc",
        ),
        ({"phase": 0.0}, "config.prune.phase is 0.0; expected a finite number above 0"),
        ({"drop": 1.0}, r"config.prune.drop is 1.0; expected a finite number in \(0, 1\)"),
    ],
)
def test_what_says_nothing_is_one_line(how, message):
    with pytest.raises(ValueError, match=message) as error:
        configs.validate(jobs.Config(prune=prune.Sparsity(**{"sparsity": 0.5, **how})))
    assert str(error.value).startswith("config.prune")
    assert "\n" not in str(error.value)
