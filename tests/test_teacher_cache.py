"""Caches of teachers: shards by several writers, resumed, damaged, of something else; and students trained from them."""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from formulas import random_params

from bmjax import config as configs
from bmjax import data, distill, parallel
from bmjax.data.teacher_record import BATCH_KEY
from bmjax.jobs import cache as jobs
from bmjax.jobs import common
from bmjax.jobs import train as training
from bmjax.models import Decoder, Plain
from bmjax.train import loop
from bmjax.train.optimizer import Optimizer
from bmjax.train.run import Bench, Run, predictor
from experiments import cache_teacher

SHARDS = 4


@pytest.fixture(scope="module")
def blobs(tmp_path_factory):
    """The source of three blobs with 5 classes."""
    rng = np.random.default_rng(0)
    targets = np.arange(240) % 5
    inputs = (rng.normal(size=(240, 6)) + 3 * np.eye(5, 6)[targets]).astype(np.float32)
    path = tmp_path_factory.mktemp("data") / "blobs.npz"
    np.savez(path, inputs=inputs, targets=targets)
    return f"arrays:{path}"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Settings of whole documents of few letters, packed side by side with padding."""
    rng = np.random.default_rng(1)
    folder = tmp_path_factory.mktemp("text")
    for i in range(120):
        (folder / f"{i:03}.txt").write_bytes(bytes(rng.choice(list(b"abcd"), rng.integers(5, 30), p=[0.6, 0.2, 0.1, 0.1])))
    return data.Data(source=f"text:{folder}", batch=8, length=16, packing="first_fit")


def plan_of(dataset, settings, k=3, rows=32, **changes):
    layout = data.RecordLayout(k, dataset.classes, "bfloat16", (1.0, 2.0))
    return dataclasses.replace(data.plan_cache("a teacher", "a" * 64, dataset, settings, layout), rows=rows, **changes)


def numbers(plan, seen=None):
    """Records that are the same for an example whoever makes them; `seen` gets the shards that were asked for."""

    def make(first, last):
        if seen is not None:
            seen.append(first // plan.rows)
        for begin in range(first, last, plan.batch):
            rows = np.arange(begin, min(begin + plan.batch, last))
            size = (*plan.item, plan.layout.words)
            yield np.stack([np.random.default_rng(row).integers(0, 2**31, size, np.int32) for row in rows])

    return make


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def made(blobs, tmp_path_factory):
    """(dataset, settings, plan, folder of a finished cache of 4 shards)."""
    settings = data.Data(source=blobs, batch=8)
    dataset = data.load(settings)
    plan, folder = plan_of(dataset, settings), tmp_path_factory.mktemp("cache")
    assert data.write_cache(folder, plan, dataset.train.id, numbers(plan))
    assert plan.shards == SHARDS == len(list(folder.glob("*.parquet")))
    return dataset, settings, plan, folder


def copied(folder, to):
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


@pytest.mark.parametrize("count", [2, 3, 5])
def test_any_number_of_writers_write_the_same_bytes(made, tmp_path, count):
    dataset, _, plan, folder = made
    for index in reversed(range(count)):
        finished = data.write_cache(tmp_path, plan, dataset.train.id, numbers(plan), index, count)
        assert finished == (index == 0)
    assert content(tmp_path) == content(folder)


@pytest.mark.parametrize("written", [0, 1, 3])
def test_a_killed_writer_goes_on(made, tmp_path, written):
    dataset, _, plan, folder = made

    def dies(first, last):
        if first // plan.rows == written:
            raise KeyboardInterrupt
        yield from numbers(plan)(first, last)

    with pytest.raises(KeyboardInterrupt):
        data.write_cache(tmp_path, plan, dataset.train.id, dies)
    (tmp_path / f"{plan.name(written)}.tmp").write_bytes(b"half of it")
    with pytest.raises(ValueError, match=f"not finished: {written} of 4 shards"):
        data.open_cache(tmp_path)
    seen = []
    assert data.write_cache(tmp_path, plan, dataset.train.id, numbers(plan, seen))
    assert seen == [*range(written, SHARDS)]
    assert content(tmp_path) == content(folder)


def test_a_shard_that_was_damaged_before_the_end_is_written_again(made, tmp_path):
    dataset, _, plan, folder = made
    for shard in (0, 1, 2):
        (tmp_path / plan.name(shard)).write_bytes((folder / plan.name(shard)).read_bytes())
    (tmp_path / "plan.json").write_bytes((folder / "plan.json").read_bytes())
    flip(tmp_path / plan.name(1), -1000)
    (tmp_path / plan.name(2)).write_bytes(b"")
    seen = []
    data.write_cache(tmp_path, plan, dataset.train.id, numbers(plan, seen))
    assert seen == [1, 2, 3]
    assert content(tmp_path) == content(folder)


@pytest.mark.parametrize("again", ["one process", "two processes", "killed"])
def test_a_finished_cache_that_was_damaged_is_mended_with_other_bytes(made, tmp_path, again):
    """As other devices write them: the manifest is renewed, and a command that dies on the way leaves no old one."""
    dataset, _, plan, folder = made
    flip(copied(folder, tmp_path) / plan.name(1), -1000)
    flip(tmp_path / plan.name(2), -1000)

    def others(first, last):
        if again == "killed" and first // plan.rows == 2:
            raise KeyboardInterrupt
        yield from (rows ^ 1 for rows in numbers(plan)(first, last))

    ids = dataset.train.id
    if again == "killed":
        with pytest.raises(KeyboardInterrupt):
            data.write_cache(tmp_path, plan, ids, others)
        with pytest.raises(ValueError, match="not finished: 4 of 4 shards"):
            data.open_cache(tmp_path)
        data.write_cache(tmp_path, plan, ids, lambda first, last: (rows ^ 1 for rows in numbers(plan)(first, last)))
    elif again == "two processes":
        assert all(data.write_cache(tmp_path, plan, ids, others, index, 2) for index in range(2))
    else:
        assert data.write_cache(tmp_path, plan, ids, others)
    found = data.open_cache(tmp_path).beside(dataset.train).take(np.arange(plan.examples))[BATCH_KEY]
    want = np.concatenate(list(numbers(plan)(0, plan.examples)))
    want[plan.rows : 3 * plan.rows] ^= 1
    np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("damaged", ["manifest.json", "the shard's own description"])
def test_a_damaged_manifest_or_footer_is_mended_by_writing_again(made, tmp_path, damaged):
    dataset, _, plan, folder = made
    copied(folder, tmp_path)
    flip(tmp_path / ("manifest.json" if damaged == "manifest.json" else plan.name(1)), 20 if damaged == "manifest.json" else -12)
    with pytest.raises(ValueError, match=r"is not of this cache's|was altered"):
        data.open_cache(tmp_path)
    assert data.write_cache(tmp_path, plan, dataset.train.id, numbers(plan))
    data.open_cache(tmp_path).beside(dataset.train).take(np.arange(plan.examples))


def flip(path, place):
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def test_batches_have_the_records_of_their_examples(made):
    dataset, _, plan, folder = made
    cache = data.open_cache(folder)
    split = cache.beside(dataset.train)
    batch = data.train_batches(split, 32, 0)[5]
    row_of = {example: row for row, example in enumerate(dataset.train.id)}
    rows = [row_of[example] for example in batch["id"]]
    expected = np.concatenate(list(numbers(plan)(0, plan.examples)))
    np.testing.assert_array_equal(batch[BATCH_KEY], expected[rows])
    assert batch[BATCH_KEY].dtype == np.int32
    np.testing.assert_array_equal(split.take(slice(3, 9))[BATCH_KEY], expected[3:9])


def test_any_parquet_reader_reads_it(made):
    import pyarrow.parquet

    dataset, _, plan, folder = made
    table = pyarrow.parquet.read_table(sorted(folder.glob("*.parquet")))
    np.testing.assert_array_equal(table["id"], dataset.train.id)
    raw = np.frombuffer(b"".join(table["record"].to_pylist()), "<i4").reshape(plan.examples, -1)
    np.testing.assert_array_equal(raw, np.concatenate(list(numbers(plan)(0, plan.examples))))


@pytest.mark.parametrize("full", [1 << 30, 0])
def test_a_damaged_shard_is_named(made, tmp_path, monkeypatch, full):
    """At once in a small cache; in a large one as it is first read."""
    monkeypatch.setattr("bmjax.data.teacher_cache.FULL", full)
    dataset, _, plan, folder = made
    flip(copied(folder, tmp_path) / plan.name(2), -1000)
    with pytest.raises(ValueError, match=r"00002-of-00004.parquet was altered"):
        data.open_cache(tmp_path).beside(dataset.train).take(np.arange(plan.rows * 2, plan.rows * 2 + 4))
    if not full:
        data.open_cache(tmp_path).beside(dataset.train).take(np.arange(4))
    (tmp_path / plan.name(1)).unlink()
    with pytest.raises(ValueError, match=r"00001-of-00004.parquet is missing"):
        data.open_cache(tmp_path)


def test_what_is_no_cache(made, tmp_path):
    dataset, _, plan, _ = made
    with pytest.raises(ValueError, match=r"is no cache of a teacher: it has no plan.json"):
        data.open_cache(tmp_path)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(ValueError, match="is damaged"):
        data.open_cache(tmp_path)
    (tmp_path / "plan.json").rename(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match=r"holds notes.txt, so it is no folder of a cache"):
        data.write_cache(tmp_path, plan, dataset.train.id, numbers(plan))
    with pytest.raises(ValueError, match=r"records of shard 0 are float64 \[32, 3\]; expected int32 \[32, "):
        data.write_cache(tmp_path / "new", plan, dataset.train.id, lambda first, last: iter([np.zeros((last - first, 3))]))


CHANGES = {
    "teacher": (
        {"teacher": "b", "teacher_sha256": "b" * 64},
        "the teacher of the cache {} differs: it is a teacher (aaaaaaaaaaaa)",
    ),
    "tokenizer": ({"tokenizer": "t.json", "tokenizer_sha256": "c" * 64}, "the tokenizer of the cache {} differs: it is none"),
    "data": ({"fingerprint": "d" * 64}, "the data of the cache {} differs"),
    "order": ({"ids": "d" * 64}, "the order of the examples of the cache {} differs"),
    "examples": ({"examples": 50}, "the number of examples of the cache {} differs: it is 120 there and 50 here"),
    "split": ({"split": "valid"}, "the split of the cache {} differs: it is train there and valid here"),
    "length": ({"item": (7,)}, "the shape of an example's targets of the cache {} differs: it is [] there and [7] here"),
    "batch": ({"batch": 4}, "the batch of the cache {} differs: it is 8 there and 4 here"),
    "rows": ({"rows": 16}, "the shard size of the cache {} differs: it is 32 examples there and 16 examples here"),
    "k": ({"layout": data.RecordLayout(2, 5, "bfloat16", (1.0, 2.0))}, "the k of the cache {} differs: it is 3 there and 2 here"),
    "temperatures": (
        {"layout": data.RecordLayout(3, 5)},
        "the temperatures of the cache {} differs: it is [1.0, 2.0] there and [1.0] here",
    ),
    "values": ({"layout": data.RecordLayout(3, 5, "float32", (1.0, 2.0))}, "the type of the values of the cache {} differs"),
    "classes": ({"layout": data.RecordLayout(3, 6, temperatures=(1.0, 2.0))}, "the number of classes of the cache {} differs"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_plan_is_refused(made, what):
    dataset, _, plan, folder = made
    change, message = CHANGES[what]
    before = content(folder)
    with pytest.raises(ValueError, match=re.escape(message.format(folder))):
        data.write_cache(folder, dataclasses.replace(plan, **change), dataset.train.id, numbers(plan))
    assert content(folder) == before


def test_what_a_reader_minds(made, blobs):
    dataset, settings, _, folder = made
    cache = data.open_cache(folder)
    cache.check(dataset, dataclasses.replace(settings, batch=120), k=3, teacher=("moved", "a" * 64))
    with pytest.raises(ValueError, match=r"the k of the cache .* differs: it is 3 there and 4 here; give the cache of these"):
        cache.check(dataset, settings, k=4)
    with pytest.raises(ValueError, match=r"the teacher of the cache .* differs: it is a teacher \(a+\) there and b \(b+\) here"):
        cache.check(dataset, settings, teacher=("b", "b" * 64))
    other = data.Data(source=blobs, batch=8, limit=200)
    with pytest.raises(ValueError, match="the number of examples of the cache"):
        cache.check(data.load(other), other)
    changed = dataclasses.replace(dataset, fingerprint="e" * 64)
    with pytest.raises(ValueError, match=r"the data of the cache .* differs: it is arrays:"):
        cache.check(changed, settings)


def test_another_tokenizer_is_named(tmp_path):
    import tokenizers

    paths = []
    for name, order in (("a", "abcd"), ("b", "dcba")):
        model = tokenizers.models.WordLevel({letter: i for i, letter in enumerate(order)}, unk_token="a")
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
        tokenizer.save(str(tmp_path / f"{name}.json"))
        paths.append(str(tmp_path / f"{name}.json"))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "x.txt").write_text("abcd" * 200)
    mine, other = (data.Data(source=f"text:{tmp_path / 'text'}", batch=2, length=8, tokenizer=path) for path in paths)
    dataset = data.load(mine)
    plan = plan_of(dataset, mine, k=2)
    data.write_cache(tmp_path / "cache", plan, dataset.train.id, numbers(plan))
    cache = data.open_cache(tmp_path / "cache")
    cache.check(dataset, mine)
    with pytest.raises(ValueError, match=r"the tokenizer of the cache .* differs: it is .*a.json \(.* there and .*b.json"):
        cache.check(data.load(other), other)


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        (data.Augment(noise=0.1), "noise would change the inputs, .* set it to 0, or augment.beside_cache to True"),
        (data.Augment(mixup=0.2), "mixup would change the inputs, .* set it to 0$"),
        (data.Augment(mixup=0.2, beside_cache=True), "mixup would change the inputs"),
    ],
)
def test_changed_inputs_are_refused(made, augment, message):
    dataset, _, _, folder = made
    split = data.open_cache(folder).beside(dataset.train)
    with pytest.raises(ValueError, match=message):
        data.train_batches(split, 8, 0, augment)
    data.train_batches(dataset.train, 8, 0, augment)
    data.train_batches(split, 8, 0, data.Augment(noise=0.1, beside_cache=True))


# The jobs


def trained(settings, workdir, model, steps=60, **changes):
    run = Run(steps=steps, optimizer=Optimizer(learning_rate=0.03), every=loop.Every(log=1))
    found = training.Config(
        machine=common.Machine(mesh="data=8", tensorboard=False), data=settings, model=model, run=run, **changes
    )
    configs.validate(found)
    return training.train(configs.freeze(found), workdir, "command")


def cached(settings, workdir, teacher, **changes):
    found = jobs.Config(teacher=str(teacher), data=settings, **changes)
    configs.validate(found)
    return jobs.cache(configs.freeze(found), workdir, "command")


def student_of(folder, **changes):
    return training.Teacher(cached=str(folder), distill=distill.Distill(share=1.0, temperature=2.0), **changes)


def losses_of(workdir):
    """The distillation loss of each step."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["kd"] for line in lines if "kd" in line]


@pytest.fixture(scope="module")
def classifier(blobs, tmp_path_factory):
    """(settings, workdir of a teacher, cache of all its classes, results)."""
    folder, settings = tmp_path_factory.mktemp("jobs"), data.Data(source=blobs, batch=24)
    trained(settings, folder / "teacher", Plain(hidden=(16,)))
    results = cached(settings, folder / "cache", folder / "teacher", values="float32", shard=1)
    return settings, folder, results


def test_a_student_of_a_cache_is_one_of_its_teacher(classifier):
    """All classes in float32 are cached: the student's run is that of a teacher that runs in the step."""
    settings, folder, results = classifier
    assert results["finished"]
    assert (results["k"], results["items"]) == (5, 120)
    teacher = training.Teacher(pretrained=str(folder / "teacher"), distill=distill.Distill(share=1.0, temperature=2.0))
    trained(settings, folder / "online", Plain(hidden=(4,)), teacher=teacher)
    given = student_of(folder / "cache", pretrained=str(folder / "teacher"), k=5)
    offline = trained(settings, folder / "offline", Plain(hidden=(4,)), teacher=given)
    a, b = (common.deploy.load_params(folder / name / "export") for name in ("online", "offline"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), a, b)
    assert [model["name"] for model in offline["models"]] == ["student"]
    np.testing.assert_allclose(losses_of(folder / "online"), losses_of(folder / "offline"), rtol=1e-3)


def test_devices_write_the_same_to_rounding(classifier, tmp_path):
    """The classes are the same, log-probabilities to one rounding of bfloat16; on the same devices all bytes are."""
    settings, folder, _ = classifier
    for name, mesh in (("eight", "data=8"), ("again", "data=8"), ("split", "data=4,fsdp=2")):
        model = Plain(hidden=(16,)) if name == "again" else None
        cached(settings, tmp_path / name, folder / "teacher", mesh=mesh, k=3, model=model)
    eight, again, split = (data.open_cache(tmp_path / name) for name in ("eight", "again", "split"))
    records = [cache.records.take(np.arange(120)) for cache in (eight, again, split)]
    np.testing.assert_array_equal(records[0], records[1])
    one, other = (eight.layout.unpack(jax.numpy.asarray(x), 2.0) for x in (records[0], records[2]))
    np.testing.assert_array_equal(one[0], other[0])
    np.testing.assert_allclose(one[1], other[1], rtol=2**-7, atol=2**-7)
    (tmp_path / "eight" / "manifest.json").unlink()
    (tmp_path / "eight" / eight.plan.name(0)).unlink()
    cached(settings, tmp_path / "eight", folder / "teacher", k=3)
    assert (tmp_path / "eight" / eight.plan.name(0)).read_bytes() == (tmp_path / "again" / eight.plan.name(0)).read_bytes()


def test_jobs_refuse(classifier, tmp_path, monkeypatch):
    settings, folder, _ = classifier
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *_, **__: pytest.fail("something was compiled"))
    refused = lambda message: pytest.raises(ValueError, match=message)
    with refused("the loss dkd needs all of the teacher's logits"):
        given = dataclasses.replace(student_of(folder / "cache"), distill=distill.Distill(loss="dkd"))
        trained(settings, tmp_path / "a", Plain(hidden=(4,)), teacher=given)
    with refused("the temperature is 3 and the cached outputs have the tail of 1, 2, 4"):
        given = dataclasses.replace(student_of(folder / "cache"), distill=distill.Distill(temperature=3.0))
        trained(settings, tmp_path / "a", Plain(hidden=(4,)), teacher=given)
    with refused("the k of the cache .* it is 5 there and 2 here"):
        trained(settings, tmp_path / "a", Plain(hidden=(4,)), teacher=student_of(folder / "cache", k=2))
    with refused("the number of examples of the cache"):
        limited = dataclasses.replace(settings, limit=200)
        trained(limited, tmp_path / "a", Plain(hidden=(4,)), teacher=student_of(folder / "cache"))
    with refused("--config.teacher must be given"):
        configs.validate(jobs.Config())
    with refused("cached and model are two ways"):
        configs.validate(training.Teacher(cached="x", model=Plain()))
    with refused("k is 3, which is of cached outputs"):
        configs.validate(training.Teacher(pretrained="x", k=3))
    assert not list(tmp_path.glob("a/checkpoints"))


def test_another_teacher_is_refused(classifier, tmp_path):
    settings, folder, _ = classifier
    trained(settings, tmp_path / "other", Plain(hidden=(5,)))
    with pytest.raises(ValueError, match=r"the teacher of the cache .* differs: it is .*teacher \(.* there and .*other \("):
        cached(settings, folder / "cache", tmp_path / "other", values="float32", shard=1)
    given = student_of(folder / "cache", pretrained=str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"the teacher of the cache .* differs"):
        trained(settings, tmp_path / "a", Plain(hidden=(4,)), teacher=given)


def test_tokens_with_padding(words, tmp_path):
    """Packed documents: what is cached is what the teacher says within its documents, and a student learns it."""
    dataset = data.load(words)
    model = Decoder(layers=1, width=16, heads=2, neurons=16)
    net = teacher_of(words, dataset, model, tmp_path / "teacher")
    results = cached(words, tmp_path / "cache", tmp_path / "teacher", k=4)
    assert results["items"] == dataset.train.targets.size
    cache = data.open_cache(tmp_path / "cache")
    batch = data.eval_batches(cache.beside(dataset.train), 8)[0]
    assert 0 < batch["weights"].mean() < 1
    logits = np.asarray(predictor(net.model)(net.params, {}, batch), np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    classes, log_probs, tail = cache.layout.unpack(jax.numpy.asarray(batch[BATCH_KEY]), 1.0)
    real = batch["weights"] > 0
    want = -np.sort(-p, -1)[..., :4]
    np.testing.assert_allclose(np.exp(log_probs)[real], want[real], rtol=0.03, atol=1e-4)
    np.testing.assert_allclose(np.exp(tail)[real], (1 - want.sum(-1))[real], rtol=0.03, atol=1e-4)
    np.testing.assert_allclose(np.take_along_axis(p, np.asarray(classes), -1)[real], want[real], rtol=1e-3)
    given = student_of(tmp_path / "cache", pretrained=str(tmp_path / "teacher"))
    trained(words, tmp_path / "student", model, steps=25, teacher=given)
    losses = losses_of(tmp_path / "student")
    assert losses[-1] < 0.7 * losses[0]


def teacher_of(settings, dataset, model, folder):
    """A network of random parameters, exported as a trained one."""
    bench = Bench(parallel.make_mesh("data=8"), dataset, settings, folder, None, 0)
    built = model.build(dataset.shape, dataset.classes)
    net = common.Net(built, random_params(built, bench.example()), {})
    common.ship(bench, net, folder / "export", {}, model)
    return net


def test_the_command_line(classifier, tmp_path, capsys):
    settings, folder, _ = classifier
    for preset in ("article", "lm", "cifar_resnet"):
        loaded = configs.load(preset, cache_teacher.PRESETS)
        loaded.teacher = "somewhere"
        configs.validate(loaded)
    arguments = ["cache_teacher", f"--config.data.source={settings.source}", "--config.data.batch=24", "--config.devices=0"]
    line = lambda *more: configs.launch(
        cache_teacher.main, presets=cache_teacher.PRESETS, default="article", about="", argv=[*arguments, *more]
    )
    line(f"--config.teacher={folder / 'teacher'}", "--config.k=2", f"--workdir={tmp_path / 'cache'}")
    assert "log-probabilities of each" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        line(f"--config.teacher={folder / 'teacher'}", "--config.k=3", f"--workdir={tmp_path / 'cache'}")
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert "the k of the cache" in error[0]
    for given, message in (("processes=2", "coordinator is empty"), ("process=1", "process is 1 and there are 1 processes")):
        with pytest.raises(SystemExit) as ended:
            line(f"--config.teacher={folder / 'teacher'}", f"--config.{given}", f"--workdir={tmp_path / 'other'}")
        assert ended.value.code == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1
        assert message in error[0]


WRITER = """
import sys
from bmjax import config
from bmjax.data import teacher_plan
from experiments import cache_teacher
teacher_plan.MAX_ROWS = 128  # several shards of a small split
config.launch(cache_teacher.main, presets=cache_teacher.PRESETS, default="article", about="", argv=sys.argv)
"""


@pytest.mark.slow
def test_digits_by_two_processes_from_the_command_line(tmp_path):
    """A teacher is trained, cached by two processes and by one with the same bytes, and its student is better than chance."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_NUM_CPU_DEVICES", "NPROC")}
    launch = lambda *line, **how: subprocess.Popen([sys.executable, *line], env=environment, **how)
    train = lambda workdir, *more: launch(
        "-m",
        "experiments.train",
        "--config.machine.devices=1",
        "--config.run.steps=300",
        f"--workdir={tmp_path / workdir}",
        *more,
    )
    assert train("teacher").wait() == 0
    teacher = ("--config.data.batch=64", "--config.devices=1", f"--config.teacher={tmp_path / 'teacher'}")
    several = (f"--config.coordinator={address}", "--config.processes=2", f"--workdir={tmp_path / 'cache'}")
    line = lambda i: ("-c", WRITER, *teacher, *several, f"--config.process={i}")
    writers = [launch(*line(i), stderr=subprocess.PIPE, text=True) for i in range(2)]
    told = [writer.communicate()[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], told
    for i in range(2):  # each its own
        assert re.findall(r"examples (\d+) to", told[i]) == [str(128 * shard) for shard in range(i, 8, 2)]
    assert len([*(tmp_path / "cache").glob("*.parquet")]) == 8
    alone = launch("-m", "experiments.cache_teacher", *teacher, f"--workdir={tmp_path / 'alone'}")
    assert alone.wait() == 0
    rows = [data.open_cache(tmp_path / name).records.take(np.arange(898)) for name in ("cache", "alone")]
    np.testing.assert_array_equal(*rows)
    found = []
    for name, chunked in (("student", False), ("chunked", True)):
        more = (f"--config.teacher.distill.chunked={chunked}", f"--config.task.chunked={chunked}", "--config.model.hidden=64")
        assert train(name, f"--config.teacher.cached={tmp_path / 'cache'}", *more).wait() == 0
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert results["models"][-1]["metrics"]["accuracy"] > 0.8
        found.append(losses_of(tmp_path / name))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-2)
