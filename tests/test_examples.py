"""The examples run on 8 devices, are short, and print what the guide says they print."""

import pathlib
import re
import runpy
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def numbers(text):
    return [float(found) for found in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e-?\d+)?", text)]


def printed(name, capsys):
    """The numbers in each line that an example prints."""
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    return [numbers(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_at_most_30_lines_says_what_it_is_and_stands_in_the_guide(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 30
    assert lines[0].startswith('"""') and lines[0].endswith('"""')
    assert f"examples/{path.name}" in (ROOT / "docs" / "extending.md").read_text()


def test_the_code_of_the_guide_is_that_of_the_examples_and_its_links_and_commands_exist():
    guide = (ROOT / "docs" / "extending.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    sources = [path.read_text() for path in EXAMPLES]
    assert len(blocks) >= 6
    for block in blocks:
        assert any(block in source for source in sources), block
    for link in re.findall(r"\]\((.*?)\)", guide):
        assert (ROOT / "docs" / link).is_file()
    for name in re.findall(r"(?:python |--config=)(examples/\S+)", guide):
        assert (ROOT / name).is_file()


def test_the_code_of_the_tutorial_on_distillation_is_that_of_its_example():
    guide, source = ((ROOT / name).read_text() for name in ("docs/distillation.md", "examples/own_distillation_loss.py"))
    blocks = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    assert len(blocks) == 2
    assert all(block in source for block in blocks)
    for link in re.findall(r"\]\((.*?)\)", guide):
        assert (ROOT / "docs" / link).is_file()


def test_own_distillation_loss_brings_the_student_to_the_teacher(capsys):
    (*_, teacher_ce, _), (*_, ce, hint, _, margin) = printed("own_distillation_loss", capsys)
    assert teacher_ce < 0.2
    assert ce < 1.0
    assert margin < 0.6
    assert hint < 1.5


def test_own_loss_term_makes_predictions_less_certain(capsys):
    (_, _, sure), (_, ce, unsure) = printed("own_loss_term", capsys)
    assert unsure > 2 * sure
    assert ce < 0.7


def test_own_transform_keeps_the_mean_of_the_weights_and_goes_before_pruning(capsys):
    (loss, dense, moved), (_, zeros, _) = printed("own_transform", capsys)
    assert loss < 0.3
    assert (dense, zeros) == (0, 80)
    assert moved < 1e-5


def test_own_param_view_trains_for_what_it_shows(capsys):
    (afterwards,), (through,) = printed("own_param_view", capsys)
    assert through > afterwards + 3


def test_own_gradient_ends_where_it_is_flat(capsys):
    (sharp, sharp_near, _), (flat, flat_near, _) = printed("own_gradient", capsys)
    assert flat_near - flat < 0.5 * (sharp_near - sharp)


def test_own_linen_model_is_the_same_on_1_and_8_devices_and_has_groups(capsys):
    (one, loss), (eight, same), (channels, *_), (units, *_) = printed("own_model_linen", capsys)
    assert (one, eight) == (1, 8)
    assert same == pytest.approx(loss, abs=2e-5)
    assert {channels, units} == {8, 32}


def test_own_nnx_model_is_teacher_and_hinted_student(capsys):
    (width, ce, loss), (small, student_ce, hint, total) = printed("own_model_nnx", capsys)
    assert (width, small) == (128, 8)
    assert loss == ce < 0.3
    assert total == pytest.approx(student_ce + hint, abs=2e-3)
    assert student_ce < 1.5


def test_own_plain_model_is_cut_and_exported(capsys):
    ((kept, of, gap, right),) = printed("own_model_plain", capsys)
    assert (kept, of) == (16, 64)
    assert gap < 1e-5
    assert right > 90


def test_own_data_is_learnt(capsys):
    ((train, right, test),) = printed("own_data", capsys)
    assert (train, test) == (1500, 1200)
    assert right > 95


def test_own_criterion_prunes_as_much_and_better(capsys):
    (zeros, loss, _), (same, better, right) = printed("own_pruning_criterion", capsys)
    assert zeros == same == 94
    assert better < loss
    assert right > 70


def test_own_experiment_is_a_config_that_resumes_and_is_refused_when_its_code_changed(tmp_path):
    config = tmp_path / "mine.py"
    config.write_text((ROOT / "examples" / "own_experiment.py").read_text())
    flags = [f"--config={config}", "--config.run.steps=20", "--config.machine.tensorboard=false", f"--workdir={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "experiments.train", *flags]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "accuracy" in first.stdout
    assert (tmp_path / "run" / "export" / "manifest.json").is_file()
    assert '"confidence"' in (tmp_path / "run" / "metrics.jsonl").read_text()
    config.write_text(config.read_text().replace("(0.1, confidence)", "(0.2, confidence)"))
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert len(second.stderr.strip().splitlines()[-1]) > 0
    assert second.stderr.strip().splitlines()[-1].startswith("error: ")
