import dataclasses
import json
import math
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from bmjax import config as cfg
from bmjax.config import help, kinds

ROOT = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass
class Optimizer:
    learning_rate: float = cfg.field(1e-3, "peak learning rate", check=cfg.above(0))
    clip: float | None = cfg.field(None, "largest gradient norm", check=cfg.above(0))
    name: str = cfg.field("adamw", "which optimiser", choices=("adamw", "sgd"))


@dataclasses.dataclass
class Term:
    weight: float = cfg.field(1.0, "weight in the sum", check=cfg.at_least(0))


@dataclasses.dataclass
class Small:
    width: int = cfg.field(4, "units", check=cfg.above(0))


@dataclasses.dataclass
class Deep:
    width: int = cfg.field(8, "units")
    inner: Any = cfg.field(Small(), "what is inside", kinds={"Small": Small, "none": lambda: None})


KINDS = {"none": lambda: None, "Deep": Deep, "Small": Small}


@dataclasses.dataclass
class Chosen:
    model: Any = cfg.field(Small(), "the model", kinds={"Small": Small, "Deep": Deep})
    teacher: Deep | Small | None = cfg.field(None, "the teacher", kinds=KINDS)
    seed: int = cfg.field(0, "a number")
    code: dict[str, str] = cfg.recorded("hashes")


@dataclasses.dataclass
class Run:
    steps: int = cfg.field(100, "updates", check=cfg.at_least(1))
    widths: tuple[int, ...] = cfg.field((128, 64, 32), "hidden widths")
    sparsity: dict[str, float] = cfg.field({"layers": 0.5}, "sparsity by group")
    shuffle: bool = cfg.field(True, "shuffle the examples")
    note: str | None = cfg.field(None, "free text")
    optimizer: Optimizer = cfg.field(Optimizer(), "the optimiser")
    terms: tuple[Term, ...] = cfg.field((Term(), Term(0.5)), "loss terms")
    loss: Callable | None = cfg.field(None, "a function of your own")

    def validate(self) -> None:
        if len(self.widths) > self.steps:
            raise ValueError("more widths than steps")


PRESET = '''"""The small one.

More words.
"""
import sys
sys.path.insert(0, {tests!r})
from test_config import Run


def get_config():
    return Run(steps=7)
'''

MAIN = """
import pathlib, sys
from bmjax.config import launch, to_dict
import json

def main(config, workdir, command):
    assert "jax" not in sys.modules
    {body}
    print(json.dumps([to_dict(config), str(workdir), command]))

launch(main, presets=pathlib.Path({presets!r}), default="small", about="Tries the command line.")
"""


@pytest.fixture
def command(tmp_path):
    presets = tmp_path / "presets"
    presets.mkdir()
    (presets / "small.py").write_text(PRESET.format(tests=str(pathlib.Path(__file__).parent)))
    (presets / "broken.py").write_text('"""No function here."""\n')

    def run(*arguments, body="pass"):
        program = tmp_path / "program.py"
        program.write_text(MAIN.format(presets=str(presets), body=body))
        return subprocess.run([sys.executable, program, *arguments], capture_output=True, text=True, cwd=ROOT)

    return run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: setattr(c.optimizer, "learning_rate", math.nan),
            "config.optimizer.learning_rate is nan; expected a finite number above 0",
        ),
        (
            lambda c: setattr(c.optimizer, "learning_rate", math.inf),
            "config.optimizer.learning_rate is inf; expected a finite number above 0",
        ),
        (
            lambda c: setattr(c.optimizer, "learning_rate", 0.0),
            "config.optimizer.learning_rate is 0.0; expected a finite number above 0",
        ),
        (lambda c: setattr(c, "steps", True), "config.steps is True; expected an int of at least 1"),
        (lambda c: setattr(c, "steps", 1.5), "config.steps is 1.5; expected an int of at least 1"),
        (lambda c: setattr(c, "widths", (1, "2")), "config.widths is (1, '2'); expected a tuple, each item an int"),
        (lambda c: setattr(c.optimizer, "name", "sdg"), "config.optimizer.name is 'sdg'; expected one of adamw, sgd"),
        (lambda c: setattr(c.terms[1], "weight", -1.0), "config.terms.1.weight is -1.0; expected a finite number of at least 0"),
        (lambda c: setattr(c, "steps", 2), "config: more widths than steps"),
        (lambda c: setattr(c, "optimizer", None), "config.optimizer is None; expected Optimizer, set in a config file"),
        (lambda c: setattr(c, "loss", 3), "config.loss is 3; expected none or a function, set in a config file"),
    ],
)
def test_validate_names_the_field(change, message):
    config = Run()
    cfg.validate(config)
    change(config)
    with pytest.raises(ValueError, match="config") as raised:
        cfg.validate(config)
    assert str(raised.value) == message


def test_an_int_is_a_fine_float_and_none_skips_the_check():
    cfg.validate(Run(optimizer=Optimizer(learning_rate=1, clip=None)))


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("3", int, 3),
        ("1e-3", float, 1e-3),
        ("none", int | None, None),
        ("4", int | None, 4),
        ("none", str | None, None),
        ("4", str | None, "4"),
        ("128,64,32", tuple[int, ...], (128, 64, 32)),
        ("(128, 64,)", tuple[int, ...], (128, 64)),
        ("[128, 64]", tuple[int, ...], (128, 64)),
        ("", tuple[int, ...], ()),
        ("0.5,0.9", tuple[float, float], (0.5, 0.9)),
        ("layers=0.5,neurons=1", dict[str, float], {"layers": 0.5, "neurons": 1.0}),
        ("true", bool | None, True),
    ],
)
def test_text_becomes_a_typed_value(text, kind, value):
    read = kinds.read(text, kind)
    assert read == value
    assert type(read) is type(value)
    assert kinds.fits(read, kind)


@pytest.mark.parametrize(
    ("text", "kind"), [("1.5", int), ("x", float), ("1,2,3", tuple[int, int]), ("a", dict[str, int]), ("no", bool)]
)
def test_text_of_another_type_is_refused(text, kind):
    with pytest.raises(ValueError, match="expected"):
        kinds.read(text, kind)


def test_text_of_a_tuple_or_dict_is_refused_whole():
    with pytest.raises(ValueError, match=r"expected a tuple, each item an int$"):
        kinds.read("1,x", tuple[int, ...])
    with pytest.raises(ValueError, match="expected each name once"):
        kinds.read("a=1,a=2", dict[str, int])


def test_frozen_refuses_assignment_and_can_be_replaced():
    config = cfg.freeze(Run())
    with pytest.raises(dataclasses.FrozenInstanceError, match="steps"):
        config.steps = 3
    with pytest.raises(dataclasses.FrozenInstanceError, match="learning_rate"):
        config.optimizer.learning_rate = 1.0
    with pytest.raises(dataclasses.FrozenInstanceError, match="weight"):
        config.terms[0].weight = 1.0
    other = dataclasses.replace(config, steps=9)
    assert (other.steps, config.steps, other.optimizer) == (9, 100, config.optimizer)
    with pytest.raises(dataclasses.FrozenInstanceError):
        other.steps = 3
    assert isinstance(other, Run)
    assert cfg.fingerprint(config) == cfg.fingerprint(Run()) != cfg.fingerprint(other)


def test_default_instances_are_not_shared():
    one, two = Run(), Run()
    one.optimizer.learning_rate = 7.0
    one.sparsity["layers"] = 0.1
    assert two.optimizer.learning_rate == 1e-3
    assert two.sparsity == {"layers": 0.5}


def test_dict_is_json_and_names_classes_and_functions():
    plain = cfg.to_dict(Run(loss=json.dumps))
    assert json.loads(json.dumps(plain)) == plain
    assert plain["class"] == "Run"
    assert plain["optimizer"] == {"class": "Optimizer", "learning_rate": 1e-3, "clip": None, "name": "adamw"}
    assert plain["loss"] == "json:dumps"


def test_fingerprint_is_the_same_in_another_process():
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); from test_config import *; print(cfg.fingerprint(Run()))"
    prints = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONHASHSEED": seed}, cwd=ROOT
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert prints == {cfg.fingerprint(Run())}
    assert cfg.fingerprint(Run(steps=3)) != cfg.fingerprint(Run(steps=4))
    assert cfg.fingerprint(Optimizer(learning_rate=1)) == cfg.fingerprint(Optimizer(learning_rate=1.0))


def test_help_has_a_section_for_every_dataclass(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert help.sections(Run(), "config", cfg.leaves(Run())) == [
        "  --config.steps     int              100         updates",
        "  --config.widths    int,...          128,64,32   hidden widths",
        "  --config.sparsity  name=float,...   layers=0.5  sparsity by group",
        "  --config.shuffle   bool             true        shuffle the examples",
        "  --config.note      str | none       none        free text",
        "  --config.loss      function | none  none        a function of your own",
        "",
        "config.optimizer: the optimiser",
        "  --config.optimizer.learning_rate  float         0.001  peak learning rate",
        "  --config.optimizer.clip           float | none  none   largest gradient norm",
        "  --config.optimizer.name           str           adamw  which optimiser (one of adamw, sgd)",
        "",
        "config.terms.0: loss terms",
        "  --config.terms.0.weight  float  1.0  weight in the sum",
        "",
        "config.terms.1: loss terms",
        "  --config.terms.1.weight  float  0.5  weight in the sum",
    ]


def test_help_is_wrapped_beside_the_columns_or_below_them(monkeypatch):
    rows = [("--a", "int", "0", "some words that go on"), ("--b", "int", "x" * 30, "more of them")]
    monkeypatch.setenv("COLUMNS", "60")
    assert help.table([("--a", "int", "0", "word " * 12)])[1] == " " * 15 + "word word word"
    assert help.table(rows) == ["  --a  int  0  some words that go on", f"  --b  int  {'x' * 30}", " " * 15 + "more of them"]
    assert help.table([("--long" * 5, "int", "0", "some words")]) == [f"  {'--long' * 5}  int  0", "      some words"]


def test_an_empty_value_and_an_empty_choice_can_be_seen(command):
    @dataclasses.dataclass
    class Metric:
        name: str = cfg.field("", "what to sort by; empty is the first", choices=("", "a", "b"))

    (line,) = help.sections(Metric(), "", cfg.leaves(Metric(), ""))
    assert line == '  --name  str  ""  what to sort by; empty is the first (one of a, b)'
    with pytest.raises(ValueError, match="name is 'c'; expected one of nothing, a, b"):
        cfg.validate(Metric("c"), "")


def test_workdir_of_another_config_is_refused(tmp_path):
    cfg.write_resolved(Run(), tmp_path / "run")
    path = cfg.write_resolved(Run(), tmp_path / "run")
    assert json.loads(path.read_text())["steps"] == 100
    with pytest.raises(
        ValueError, match=r"another config \(field optimizer.learning_rate: 0.001 there, 0.002 here\); choose another --workdir"
    ):
        cfg.write_resolved(Run(optimizer=Optimizer(2e-3)), tmp_path / "run")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file cannot be made: File exists"):
        cfg.write_resolved(Run(), tmp_path / "file")
    path.write_text("{")
    with pytest.raises(ValueError, match="not readable as JSON"):
        cfg.write_resolved(Run(), tmp_path / "run")


def test_command_line_overrides_fields(command, tmp_path):
    done = command(
        "--config=small",
        "--config.widths=8,4",
        "--config.optimizer.learning_rate",
        "3e-4",
        "--config.terms.1.weight=2",
        "--config.sparsity=layers=0.25",
        "--noconfig.shuffle",
        "--workdir=here",
    )
    assert done.stderr == ""
    config, workdir, line = json.loads(done.stdout)
    assert workdir == "here"
    assert line.endswith("--noconfig.shuffle --workdir=here")
    assert config["steps"] == 7
    assert config["widths"] == [8, 4]
    assert config["optimizer"]["learning_rate"] == 3e-4
    assert [term["weight"] for term in config["terms"]] == [1, 2]
    assert config["sparsity"] == {"layers": 0.25}
    assert config["shuffle"] is False
    assert json.loads(command("--config.shuffle", "--config.note=none").stdout)[0]["shuffle"] is True


def test_help_lists_flags_presets_and_fields(command):
    done = command("-h", "--config.steps=3")
    assert done.returncode == 0
    assert done.stderr == ""
    for part in (
        "Tries the command line.",
        "--workdir",
        "small   The small one.",
        "Usage: python",  # a long path goes to the next line
        "config.optimizer: the optimiser\n  --config.optimizer.learning_rate  float",
        "--config.optimizer.learning_rate",
        "peak learning rate",
    ):
        assert part in done.stdout
    some = command("--help=optimizer.l").stdout
    assert "learning_rate" in some and "--workdir" not in some and "clip" not in some
    assert "--config.steps" in command("--help=true").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=smal"], "there is no preset 'smal'; the nearest is 'small' of broken, small"),
        (["--config.shuffle=maybe"], "--config.shuffle=maybe: expected true or false"),
        (["--config=gone.py"], "there is no config file gone.py"),
        (["--config=broken"], "has no function get_config()"),
        (
            ["--config.learning_rat=1"],
            "the config has no field config.learning_rat; the nearest is config.optimizer.learning_rate",
        ),
        (["--config.step=1"], "the nearest is config.steps"),
        (["--config.steps=1.5"], "--config.steps=1.5: expected an int"),
        (["--config.loss=f"], "expected none or a function, set in a config file"),
        (["--config.optimizer=sgd"], "config.optimizer is a group of fields; set one of them: --config.optimizer.learning_rate"),
        (["--config.optimizer.learning_rate=nan"], "config.optimizer.learning_rate is nan; expected a finite number above 0"),
        (["digits"], "stray argument 'digits'"),
        (["--config.steps=9", "x"], "stray argument 'x'"),
        (["--wordir=x"], "there is no flag --wordir; the nearest is --workdir"),
        (["--workdir"], "workdir"),
    ],
)
def test_a_mistake_gets_one_line_and_exit_code_2(command, arguments, message):
    done = command(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_only_our_own_value_errors_lose_their_traceback(command):
    done = command(body="from bmjax.config import kinds; kinds.read('x', int)")
    assert (done.returncode, done.stderr) == (2, "error: expected an int\n")
    assert "Traceback" in command("--debug", body="from bmjax.config import kinds; kinds.read('x', int)").stderr
    for body in ("raise ValueError('mine')", "raise KeyError('mine')", "import json; json.loads('{')"):
        done = command(body=body)
        assert done.returncode == 1
        assert "Traceback" in done.stderr


def test_ctrl_c_ends_quietly(command):
    done = command(body="raise KeyboardInterrupt")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


CHOSEN = """import sys
sys.path.insert(0, {tests!r})
from test_config import Chosen


def get_config():
    return Chosen()
"""


@pytest.fixture
def chosen(tmp_path):
    """The config that a line of flags makes."""
    (tmp_path / "chosen.py").write_text(CHOSEN.format(tests=str(pathlib.Path(__file__).parent)))
    return lambda *arguments: cfg.to_dict(cfg.from_arguments([*arguments], tmp_path, "chosen"))


@pytest.mark.parametrize(
    ("arguments", "model", "teacher"),
    [
        ([], {"class": "Small", "width": 4}, None),
        (["--config.model.width=5"], {"class": "Small", "width": 5}, None),
        (["--config.model.width=5", "--config.model=Deep"], ["Deep", 5, "Small"], None),
        (["--config.model=Deep", "--config.model.inner=none"], ["Deep", 8, None], None),
        (["--config.teacher.width=3"], {"class": "Small", "width": 4}, ["Deep", 3, "Small"]),
        (["--config.teacher.inner.width", "2"], {"class": "Small", "width": 4}, ["Deep", 8, "Small"]),
        (["--config.teacher", "Small"], {"class": "Small", "width": 4}, {"class": "Small", "width": 4}),
    ],
)
def test_a_group_takes_the_kind_that_is_named_or_its_first(chosen, arguments, model, teacher):
    found = chosen(*arguments)
    for expected, value in ((model, found["model"]), (teacher, found["teacher"])):
        if isinstance(expected, list):
            inner = value["inner"] and value["inner"]["class"]
            assert [value["class"], value["width"], inner] == expected
        else:
            assert value == expected
    if "--config.teacher.inner.width" in arguments:
        assert found["teacher"]["inner"]["width"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.model=Deeper"], "--config.model=Deeper: expected one of Small, Deep"),
        (["--config.model.inner.width=2"], "the config has no field config.model.inner.width; the nearest is config.model.width"),
        (["--config.teacher=none", "--config.teacher.width=2"], "the config has no field config.teacher.width"),
        (["--config.model.inner=none"], "config.model.inner"),
        (["--config.model.inner.width=2"], "(there is one with --config.model=Deep)"),
        (["--config.code=x"], "the config has no field config.code"),
    ],
)
def test_a_kind_or_a_field_that_is_not_there_is_named(chosen, arguments, message):
    with pytest.raises(ValueError, match="config") as error:
        chosen(*arguments)
    assert message in str(error.value)


def test_help_names_the_kinds_and_finds_a_word(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    whole = help.page("About.", "python x", [], [], Chosen(teacher=Deep()), "config", "Fields of x", "").splitlines()
    first = next(i for i, line in enumerate(whole) if line.startswith("Kinds"))
    assert [line.split() for line in whole[first + 1 : first + 4]] == [
        [*["--config.model", "Small", "the", "model", "(one", "of", "Small,", "Deep)"]],
        [*["--config.teacher", "Deep", "the", "teacher", "(one", "of", "none,", "Deep,", "Small)"]],
        [*["--config.teacher.inner", "Small", "what", "is", "inside", "(one", "of", "Small,", "none)"]],
    ]
    some = help.page("About.", "python x", [], [], Chosen(teacher=Deep()), "config", "Fields of x", "inner").splitlines()
    assert [line.split()[0] for line in some if line.startswith("  ")] == ["--config.teacher.inner.width"]
    with pytest.raises(ValueError, match="no field's flag has 'widht' in it; the nearest word is 'width'"):
        help.page("About.", "python x", [], [], Chosen(), "config", "Fields of x", "widht")


@pytest.mark.parametrize(
    "config", [Chosen(), Chosen(Deep(3, None), Small(2), 5), Run(widths=(1, 2), note="x", sparsity={"a": 1.0})]
)
def test_a_record_becomes_the_config_again(config):
    classes = {kind.__name__: kind for kind in (Chosen, Deep, Small, Run, Optimizer, Term)}
    plain = json.loads(json.dumps(cfg.to_dict(config)))
    again = cfg.from_dict(plain, classes)
    assert again == config
    assert type(again) is type(config)


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"class": "Other"}, "there is no config class 'Other' here; there are Small"),
        ({"class": "Small", "depth": 1}, "Small has no field 'depth'; it was written by another version"),
        ({"class": "Small", "width": 0}, "Small.width is 0; expected an int above 0"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(plain, message):
    with pytest.raises(ValueError, match=message):
        cfg.from_dict(plain, {"Small": Small})


def test_the_record_holds_code_and_data_and_both_are_compared(tmp_path):
    config = Chosen(code={"a.py": "1", "b.py": "2"})
    cfg.write_resolved(config, tmp_path, "d1" * 32)
    cfg.check_workdir(config, tmp_path, "d1" * 32)
    cfg.check_workdir(config, tmp_path)  # a job that knows no data
    with pytest.raises(ValueError, match=r"on other data: the fingerprint is d1d1d1d1d1d1 there, e2e2e2e2e2e2 here; restore"):
        cfg.check_workdir(config, tmp_path, "e2" * 32)
    taught = {"runs/big": "a1" * 32}
    cfg.write_resolved(config, tmp_path / "taught", "d1" * 32, taught)
    cfg.check_workdir(config, tmp_path / "taught", "d1" * 32, taught)
    cfg.check_workdir(config, tmp_path / "taught", "d1" * 32)  # before the teachers are known
    with pytest.raises(ValueError, match=r"network: the SHA-256 of runs/big is a1a1a1a1a1a1 there, b2b2b2b2b2b2 here"):
        cfg.check_workdir(config, tmp_path / "taught", "d1" * 32, {"runs/big": "b2" * 32})
    with pytest.raises(ValueError, match=r"another version of b\.py, which was edited since"):
        cfg.check_workdir(Chosen(code={"a.py": "1", "b.py": "3"}), tmp_path, "d1" * 32)
    assert cfg.fingerprint(config) != cfg.fingerprint(Chosen(code={"a.py": "1"}))


SETTINGS = """
import sys, json
sys.path.insert(0, {tests!r})
from test_config import Chosen, Deep
from bmjax import config

config.launch_settings(
    lambda found, rest, command: print(json.dumps([config.to_dict(found), rest])),
    settings=lambda name: Chosen(model=Deep(width=len(name) or 1)),
    by="seed",
    forwards="config",
    about="Tries settings.",
)
"""


def test_settings_are_flags_by_their_own_names(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(SETTINGS.format(tests=str(pathlib.Path(__file__).parent)))

    def run(*arguments):
        return subprocess.run([sys.executable, program, *arguments], capture_output=True, text=True, cwd=ROOT)

    found, rest = json.loads(run("--seed=123", "--config=x", "--noconfig.a", "--teacher.width=9", "--config.b=2").stdout)
    assert rest == ["--config=x", "--noconfig.a", "--config.b=2"]
    assert (found["seed"], found["model"]["width"], found["teacher"]["width"]) == (123, 3, 9)
    assert "--model.width" in run("--help").stdout
    assert run("--sed=1").stderr == "error: there is no flag --sed; the nearest is --seed\n"
    assert run("x").stderr.startswith("error: stray argument 'x'")
    assert run("--model.width=no").stderr == "error: --model.width=no: expected an int\n"
