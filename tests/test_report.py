"""The page, the table and the Markdown: figures against the fixtures' own, HTML against the standard parser."""

from __future__ import annotations

import copy
import html.parser
import json
import re

import numpy as np
import pytest
import rich.console

from bmjax import report
from bmjax.report import axes, numbers, pictures, sensitivity
from bmjax.report.markup import Markup, tag

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Balanced(html.parser.HTMLParser):
    """Collects elements and text; fails where an end tag does not match."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, name, attributes):
        self.tags.append(name)
        self.attributes += attributes
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open[-1:] == [name], f"</{name}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "title"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def confusion(errors: int, seed: int, classes: int = 10, n: int = 719) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    counts = np.diag(np.full(classes, n // classes) + (np.arange(classes) < n % classes))
    for _ in range(errors):
        i, j = rng.choice(classes, 2, replace=False)
        counts[i, i] -= 1
        counts[i, j] += 1
    return counts.tolist()


def entry(name, about, accuracy, interval, parameters, flops, median, errors, seed, agreement=None, steps=900):
    average = {"macro": accuracy - 0.0002, "micro": accuracy, "weighted": accuracy}
    quality = {"accuracy": accuracy, "precision": average, "recall": average, "f1": average, "nll": 0.0812, "ece": 0.0123}
    return {
        "name": name,
        "about": about,
        "metrics": {**quality, "teacher_agreement": agreement, "confusion": confusion(errors, seed), "count": 719},
        "accuracy_interval": interval,
        "parameters": parameters,
        "bytes": 4 * parameters,
        "flops": flops,
        "latency": {"batch": 256, "median_ms": median, "low_ms": 0.9 * median, "high_ms": 1.2 * median},
        "train_steps": steps,
        "train_flops": 3 * 256 * steps * flops,
    }


def training(seed, steps=900, start=2.3, end=0.03, accuracy=0.985, first=0.12):
    rng, rows = np.random.default_rng(seed), []
    for i, step in enumerate(range(10, steps + 1, 10)):
        left = np.exp(-6 * step / steps)
        loss = (end + (start - end) * left) * np.exp(0.1 * rng.normal())
        reached = accuracy - (accuracy - first) * left**2
        row = {"step": step, "loss": loss, "accuracy": min(1.0, reached + 0.012 * rng.normal())}
        rows.append(row | ({"valid_accuracy": reached - 0.006} if i % 9 == 8 else {}))
    return rows


def curves() -> dict:
    """A sensitivity analysis of layers, of neurons in all layers, and of the neurons of each."""
    names = ["layers", "neurons", *(f"neurons/{i}" for i in range(4))]
    sparsities = [[0.25, 0.5, 0.75], *[[0.25, 0.5, 0.875]] * 5]
    quality = [[0.97, 0.95, 0.6], [0.98, 0.9, 0.1], *([0.98, 0.97, 0.5 + 0.1 * i] for i in range(4))]
    return {"names": names, "sparsities": sparsities, "quality": quality, "dense": 0.98, "units": [4] * 6, "weights": [9] * 6}


def mlp() -> dict:
    """A residual MLP, 4 layers x 512 neurons made 2 x 64."""
    rng = np.random.default_rng(0)

    def neurons():
        kept = np.zeros(512, bool)
        kept[rng.choice(512, 64, replace=False)] = True
        return {"neurons": {"kept": kept.tolist()}}

    importance = [0.31, 0.04, 0.02, 0.22]
    tried = [(4, 256, 271882, 0.9889, -0.0), (3, 128, 112330, 0.9889, 0.0), (2, 128, 79306, 0.9833, 0.0056)]
    tried += [(2, 64, 42474, 0.9833, 0.0056), (2, 32, 25994, 0.9667, 0.0222), (1, 32, 17674, 0.9444, 0.0445)]
    return {
        "title": "digits, residual MLP",
        "task": "Handwritten digits of 8 x 8 pixels, 10 classes; 898 examples to train on, 180 to validate, 719 to test.",
        "command": "python -m experiments.compress --config=digits --config.seed=0 --workdir=runs/digits",
        "seed": 0,
        "created": "2026-01-31 12:00 UTC",
        "environment": {"jax": "0.10.2", "devices": "2 x cpu", "python": "3.11.9"},
        "verdict": {
            "verdict": "not worse",
            "sentence": "not worse: accuracy changed by -0.28 points on 719 examples, and the drop lies between -0.40 and 1.09 "
            "points (90% interval), within the allowed 2 points",
            "margin": 0.02,
            "drop": 0.0028,
            "interval": [-0.0040, 0.0109],
            "n": 719,
            "big_only": 5,
            "small_only": 3,
            "power": 0.934,
            "needed": None,
            "level": 0.05,
        },
        "models": [
            entry("big", "4 residual layers of 512 neurons", 0.9861, [0.9746, 0.9924], 536074, 1070000, 4.213, 10, 1),
            entry("small", "pruned, distilled", 0.9833, [0.9711, 0.9904], 42474, 84480, 0.612, 12, 2, 0.9889),
            entry("from scratch", "same sizes, same compute", 0.9694, [0.9541, 0.9797], 42474, 84480, 0.612, 22, 3, 0.9722, 3100),
            entry(
                "without teacher", "pruned, no distillation", 0.9736, [0.9591, 0.9831], 42474, 84480, 0.612, 19, 4, 0.9764, 3100
            ),
        ],
        "candidates": [
            {"sizes": {"layers": n, "neurons": k}, "parameters": p, "valid_accuracy": a, "valid_drop": d}
            | {"holds": d < 0.02, "chosen": p == 42474}
            for n, k, p, a, d in tried
        ],
        "structure": {
            "sizes_before": {"layers": 4, "neurons": 512},
            "sizes_after": {"layers": 2, "neurons": 64},
            "layers": [{"index": i, "kept": i in (0, 3), "importance": importance[i], "parts": neurons()} for i in range(4)],
            "shared": {},
        },
        "sensitivity": curves(),
        "curves": {
            "big": training(1),
            "prune 2 x 64": training(2, 600, 0.5, 0.09, 0.978, 0.93),
            "retrain": training(3, 300, 0.12, 0.04, 0.981, 0.965),
            "from scratch": training(4, 3100, 2.3, 0.002, 0.97),
            "without teacher": training(5, 900, 0.9, 0.01, 0.974, 0.8),
        },
        "files": {"export": "export/", "predict": "python -m experiments.predict --model=runs/digits/export input.npz"},
        "notes": ["Latency was measured on the devices above, both models in turn."],
    }


def vit() -> dict:
    """A ViT whose heads, FFN neurons, layers and width shrink, and whose verdict is open."""
    results, rng = mlp(), np.random.default_rng(1)

    def some(n, k):
        kept = np.zeros(n, bool)
        kept[rng.choice(n, k, replace=False)] = True
        return {"kept": kept.tolist()}

    results["title"] = "digits, ViT"
    results["verdict"] |= {"verdict": "inconclusive", "interval": [-0.004, 0.031], "drop": 0.0139, "needed": 2900, "power": 0.41}
    results["verdict"]["sentence"] = "inconclusive: about 2,900 examples needed"
    results["class_names"] = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    results["structure"] = {
        "sizes_before": {"layers": 6, "heads": 8, "neurons": 384, "width": 96},
        "sizes_after": {"layers": 4, "heads": 3, "neurons": 96, "width": 96},
        "layers": [
            {
                "index": i,
                "kept": i not in (2, 4),
                "importance": 0.4 - 0.05 * i,
                "parts": {"heads": some(8, 3), "neurons": some(384, 96)},
            }
            for i in range(6)
        ],
        "shared": {"width": some(96, 96)},
    }
    return results


def nothing_passed() -> dict:
    results = mlp()
    results["verdict"] = {"verdict": "nothing passed", "sentence": "nothing passed: every candidate lost more than 2 points"}
    results["models"] = [{key: value for key, value in results["models"][0].items() if key != "latency"}]
    for key in ("candidates", "structure", "curves", "files", "notes", "command", "environment", "seed", "created", "task"):
        del results[key]
    return results


FIXTURES = {"mlp": mlp, "vit": vit, "nothing passed": nothing_passed}


def written(results: dict, tmp_path) -> str:
    results = json.loads(json.dumps(results))  # a report may be written from the file that a run left
    return report.write(results, tmp_path / "deep" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FIXTURES)
def test_page_is_one_balanced_self_contained_file(name, tmp_path):
    page = written(FIXTURES[name](), tmp_path)
    parsed = Balanced(page)
    assert page.count("<main>") == 1
    assert not {"script", "link", "img", "iframe", "object"} & set(parsed.tags)
    assert not {"src", "href", "onload", "onclick"} & {key for key, _ in parsed.attributes}
    assert "http" not in page
    assert "url(" not in page
    assert "@import" not in page
    assert len(page.encode()) < 200_000
    assert "None" not in parsed.text
    assert "nan" not in parsed.text


def test_page_shows_the_figures_of_the_results(tmp_path):
    text = Balanced(written(mlp(), tmp_path)).text
    for figure in (
        "The small model is not worse",
        "Accuracy changed by -0.28 points on 719 examples",
        "Of 719 test examples, 5 are right with the big model only, 3 with the small one only.",
        "12.6x fewer parameters 536k → 42.5k",  # 536074 / 42474 = 12.62
        "12.7x fewer FLOPs per example 1.07M → 84.5k",  # 1070000 / 84480 = 12.67
        "6.9x faster for a batch of 256 4.21 ms → 0.612 ms",  # 4.213 / 0.612 = 6.88
        "98.3% [97.1, 99.0]",
        "98.9%",  # agreement of the small one with the big one
        "0.0812",
        "0.0123",
        "58.4G",  # 3 * 256 * 900 * 84480 = 5.839e10
        "neurons 64 of 512",
        "layers 4 → 2; neurons 512 → 64",
        "importance 0.31",
        "python -m experiments.compress --config=digits --config.seed=0 --workdir=runs/digits",
        "python -m experiments.predict --model=runs/digits/export input.npz",
        "Latency was measured on the devices above",
    ):
        assert figure in text, figure
    assert "98.3% [97.1, 99.0]" in report.markdown(mlp())


def test_everything_from_outside_is_escaped(tmp_path):
    results, evil = mlp(), '<script>alert("1")</script>&'
    for key in ("title", "task", "command", "created"):
        results[key] = evil
    results["verdict"]["sentence"] = evil
    results["models"][2] |= {"name": evil, "about": evil}
    results["structure"]["sizes_before"][evil] = 3
    results["structure"]["layers"][0]["parts"][evil] = {"kept": [True, False]}
    results["structure"]["shared"][evil] = {"kept": [True, False]}
    results["sensitivity"]["names"][0] = evil
    results["curves"][evil] = results["curves"].pop("big")
    results |= {"class_names": [evil] * 10, "files": {evil: evil}, "notes": [evil], "environment": {evil: evil}}
    parsed = Balanced(written(results, tmp_path))
    assert "script" not in parsed.tags
    assert parsed.text.count(evil) >= 15


def optional_parts() -> list[tuple[str, ...]]:
    full = mlp()
    needed = ("title", "verdict", "models")
    parts = [(key,) for key in full if key not in needed]
    parts += [("verdict", key) for key in full["verdict"] if key != "verdict"]
    parts += [("models", key) for key in full["models"][0] if key != "name"]
    return parts + [("metrics", key) for key in full["models"][0]["metrics"]]


@pytest.mark.parametrize("part", optional_parts(), ids="-".join)
@pytest.mark.parametrize("gone", ["missing", "null"])
def test_any_optional_part_may_be_missing(part, gone, tmp_path):
    results = mlp()
    holders = {
        "verdict": [results["verdict"]],
        "models": results["models"],
        "metrics": [entry["metrics"] for entry in results["models"]],
    }
    for holder in holders[part[0]] if len(part) == 2 else [results]:
        holder[part[-1]] = None
        if gone == "missing":
            del holder[part[-1]]
    text = Balanced(written(results, tmp_path)).text
    assert "The small model is not worse" in text
    assert "None" not in text
    assert "12.6x" in report.markdown(results)


@pytest.mark.parametrize("key", ["title", "verdict", "models"])
def test_what_is_needed_is_named(key, tmp_path):
    results = mlp()
    del results[key]
    with pytest.raises(ValueError, match=f"results without '{key}'"):
        report.write(results, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_nothing_passed_claims_no_ratio(tmp_path):
    text = Balanced(written(nothing_passed(), tmp_path)).text
    assert "No smaller model passed Every candidate lost more than 2 points." in text
    assert "fewer" not in text
    assert "latency" not in text
    assert "98.6%" in text


def test_latency_at_different_batches_is_not_compared(tmp_path):
    results = mlp()
    for model in results["models"][1:]:
        model["latency"]["batch"] = 64
    assert "faster" not in Balanced(written(results, tmp_path)).text


def test_removed_layers_are_struck_and_empty(tmp_path):
    page = written(vit(), tmp_path)
    assert page.count('class="layer removed"') == 2
    assert page.count("heads 0 of 8") == 2
    assert page.count("heads 3 of 8") == 4
    assert page.count("neurons 96 of 384") == 4
    assert "shared by all layers" in page
    assert "96 of 96" in page


def test_cells_lie_where_the_kept_elements_are():
    # 5 heads in a pitch of 20 (17 filled, 3 free): elements 1, 2 and 4 are kept.
    drawn = pictures.cells([False, True, True, False, True])
    assert 'd="M20 8.5h37M80 8.5h17" class="kept"' in drawn
    # 130 elements: rows of 64 in a pitch of 6, so element 129 is the second of the third row.
    assert 'd="M6 14.5h5" class="kept"' in pictures.cells([i == 129 for i in range(130)])
    # 1024 elements: two a cell, half of the first cell kept.
    drawn = pictures.cells([i == 0 for i in range(1024)])
    assert 'd="M0 2.5h5" class="kept"' in drawn
    assert 'stroke-opacity="0.5"' in drawn


def test_a_cell_of_which_a_little_was_kept_is_pale_but_there():
    drawn = pictures.cells([i == 0 for i in range(2560)])  # five a cell
    assert 'd="M0 2.5h5" class="kept" stroke-width="5" stroke-dasharray="5 1" stroke-opacity="0.25"' in drawn


def places(drawn):
    """[(class, [(x, y)])] of the lines of a picture."""
    found = []
    for d, style in re.findall(r'd="M([^"]*)" class="line (\w+)"', drawn):
        found.append((style, [tuple(map(float, pair.split())) for pair in d.split("L")]))
    return found


def test_sensitivity_is_drawn_to_scale_and_labelled():
    y = axes.Scale(0.0, 1.0, 174, 24)
    shown = [("all", [(0.0, 1.0), (0.5, 0.9), (1.0, 0.0)]), ("0", [(0.0, 1.0), (0.5, 0.98)]), ("1", [(0.0, 1.0), (0.5, 1.0)])]
    drawn = sensitivity.panel("neurons", shown, y, "quality", str)
    (strong, first), (_, second), (weak, third) = places(drawn)
    assert (strong, weak) == ("valid", "train")
    assert first == [(44, 24), (153, 39), (262, 174)]  # 0 to 1 is 44 to 262, and 1 to 0 is 24 to 174
    assert second == [(44, 24), (153, 27)]
    assert third == [(44, 24), (153, 24)]
    labels = re.findall(r'<text x="272" y="([\d.]+)"[^>]*>(\w+)<', drawn)
    assert [words for _, words in labels] == ["1", "0", "all"]
    heights = [float(height) for height, _ in labels]
    assert heights[0] == 28  # beside its line, and the next one moved out of its way
    assert heights[1] - heights[0] == 11
    assert heights[2] == 178


def test_only_the_lowest_of_many_lines_are_labelled_and_stay_above_the_axis():
    y = axes.Scale(0.0, 1.0, 174, 24)
    drawn = sensitivity.panel("up", [(str(i), [(0.0, 1.0), (0.9, 0.001 * i)]) for i in range(30)], y, "quality", str)
    labels = re.findall(r'<text x="272" y="([\d.]+)"[^>]*>(\w+)<', drawn)
    assert [int(words) for _, words in labels] == list(range(9, -1, -1))
    heights = np.array([float(height) for height, _ in labels])
    assert (np.diff(heights) == 11).all()
    assert heights[-1] <= 178


def test_like_layers_share_a_panel():
    names = ["embed/kernel", "layers/0/up/kernel", "layers/1/up/kernel", "heads", "heads/0", "heads/1", "hidden_0", "hidden_1"]
    assert sensitivity.families([*names, "stage_0/blocks"]) == {
        "embed/kernel": {"embed/kernel": ""},
        "layers/*/up/kernel": {"layers/0/up/kernel": "0", "layers/1/up/kernel": "1"},
        "heads": {"heads": "all", "heads/0": "0", "heads/1": "1"},
        "hidden_*": {"hidden_0": "0", "hidden_1": "1"},
        "stage_0/blocks": {"stage_0/blocks": ""},
    }


def test_the_page_shows_a_curve_for_every_part(tmp_path):
    page = written(mlp(), tmp_path)
    part = page[page.index("How much each part matters") :].partition("</section>")[0]
    lines = places(part)
    assert [style for style, _ in lines] == ["valid", "valid", *["train"] * 4]
    assert all(len(line) == 4 for _, line in lines)  # with the dense model, at nothing dropped
    assert part.count("accuracy, %</text>") == 2
    assert len({line[0] for _, line in lines}) == 1


def test_sensitivity_alone_and_with_gaps(tmp_path):
    record = curves()
    record["quality"][0] = [0.9, float("nan"), None]
    place = report.write_sensitivity(record, tmp_path / "deep" / "curves.html", "of <mine>")
    page = place.read_text(encoding="utf-8")
    parsed = Balanced(page)
    assert "of <mine>" in parsed.text
    assert [len(line) for _, line in places(page)] == [2, *[4] * 5]
    assert "nan" not in parsed.text


def test_a_deep_network_stays_below_a_megabyte(tmp_path):
    results, rng = vit(), np.random.default_rng(0)
    layer = {"kept": True, "importance": 0.1}
    results["structure"]["layers"] = [
        layer
        | {
            "index": i,
            "parts": {"heads": {"kept": (rng.random(64) < 0.5).tolist()}, "neurons": {"kept": (rng.random(8192) < 0.5).tolist()}},
        }
        for i in range(96)
    ]
    assert len(written(results, tmp_path).encode()) < 1_000_000


def test_many_classes_list_the_most_confused_pairs(tmp_path):
    results = mlp()
    results["class_names"] = [f"class{i:02}" for i in range(40)]
    for model, n in zip(results["models"], (2, 11, 1, 1)):
        counts = 20 * np.eye(40, dtype=int)
        counts[3, 7], counts[5, 6] = n, 1
        model["metrics"]["confusion"] = counts.tolist()
    text = Balanced(written(results, tmp_path)).text
    assert "class big small class03 taken for class07 2 11 class05 taken for class06 1 1" in text


def test_confusion_matrix_holds_every_count():
    counts = [[5, 1, 0], [0, 7, 2], [3, 4, 9]]
    drawn = Balanced(pictures.confusion(counts, ["a", "b", "c"], "title"))
    shown = [word for word in drawn.text.split() if word.isdigit()]
    assert sorted(map(int, shown)) == [1, 2, 3, 4, 5, 7, 9]
    styles = [value for key, value in drawn.attributes if key == "class"]
    assert (styles.count("right"), styles.count("wrong")) == (3, 4)


def test_interval_is_drawn_to_scale():
    drawn = Balanced(pictures.interval(0.005, (-0.01, 0.02), 0.01))
    whisker = next(value for key, value in drawn.attributes if key == "d" and value.count("v16") == 2)
    low, high = (float(whisker.split("M")[1].split()[0]), float(whisker.split("H")[1].split("M")[0]))
    dot = float(dict(drawn.attributes)["cx"])
    allowed, beyond = [float(value) for key, value in drawn.attributes if key == "x"][:2]
    assert allowed < low < dot < beyond < high
    assert dot == pytest.approx((low + high) / 2, abs=0.1)  # 0.5 points is halfway between -1 and 2
    assert beyond == pytest.approx(low + (high - low) * 2 / 3, abs=0.1)  # and the margin two thirds of the way


def test_curves_break_at_nothing_and_stay_in_the_frame():
    rows = [{"step": i, "loss": float("nan") if i == 3 else 2.0 / (i + 1), "accuracy": i / 10} for i in range(10)]
    rows[4]["accuracy"] = None
    drawn = Balanced(pictures.curve(rows, "title", 0.5))
    lines = [value for key, value in drawn.attributes if key == "d" and value.count("L") > 1]
    assert [line.count("L") + 1 for line in lines] == [9, 9]
    for line in lines:
        places = np.array([place.split() for place in line[1:].split("L")], float)
        assert (places >= 0).all()
        assert (places[:, 0] <= 300).all()
        assert (places[:, 1] <= 240).all()
    accuracy = [float(place.split()[1]) for place in lines[0][1:].split("L")]
    assert max(accuracy) == accuracy[0] == accuracy[3] == 108  # at the floor, which the first steps are below
    assert Balanced(pictures.curve([{"step": 1, "loss": 0.0}], "one point", 0.0)).tags.count("circle") == 1


def test_table_and_markdown_show_the_same_figures():
    console = rich.console.Console(width=120, color_system=None)
    with console.capture() as captured:
        console.print(report.table(mlp()))
    shown, lines = captured.get(), report.markdown(mlp()).splitlines()
    assert "digits, residual MLP: The small model is not worse" in shown
    assert "between -0.40 and 1.09" in " ".join(shown.split())
    body = [line for line in lines if line.startswith("| ")]
    assert body[0] == "|  | big | small | from scratch | without teacher |"
    assert "| accuracy | 98.6% [97.5, 99.2] | 98.3% [97.1, 99.0] | 96.9% [95.4, 98.0] | 97.4% [95.9, 98.3] |" in body
    assert "| parameters | 536k | 42.5k 12.6x fewer | 42.5k 12.6x fewer | 42.5k 12.6x fewer |" in body
    for line in body[2:]:
        for figure in line.strip("|").split("|"):
            assert figure.split()[0] in shown


def test_table_takes_square_brackets_and_pipes_literally():
    results = mlp()
    results["title"], results["models"][2]["name"] = "a [bold]title[/bold]", "x|y"
    console = rich.console.Console(width=160, color_system=None)
    with console.capture() as captured:
        console.print(report.table(results))
    assert "a [bold]title[/bold]" in captured.get()
    assert "| x\\|y |" in report.markdown(results)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (numbers.count(3466), "3,466"),
        (numbers.count(536074), "536k"),
        (numbers.count(42474), "42.5k"),
        (numbers.count(999_999), "1.00M"),
        (numbers.count(2_136_000_000), "2.14G"),
        (numbers.count(0), "0"),
        (numbers.count(None), "–"),
        (numbers.count(float("nan")), "–"),
        (numbers.tick(30000), "30k"),
        (numbers.tick(300_000), "300k"),
        (numbers.tick(2000), "2,000"),
        (numbers.tick(1_500_000), "1.5M"),
        (numbers.nbytes(512), "512 B"),
        (numbers.nbytes(2144296), "2.14 MB"),
        (numbers.percent(0.979), "97.9%"),
        (numbers.percent(0.99961), "99.96%"),
        (numbers.percent(1.0), "100.0%"),
        (numbers.points(-0.004), "−0.40"),
        (numbers.points(-0.00001), "0.00"),
        (numbers.milliseconds(0.3906), "0.391 ms"),
        (numbers.milliseconds(1240.2), "1,240 ms"),
        (numbers.times(536074, 42474, "fewer", "more"), "12.6x fewer"),
        (numbers.times(10, 25, "faster", "slower"), "2.5x slower"),
        (numbers.times(1e6, 2e3, "fewer", "more"), "500x fewer"),
        (numbers.times(100, 101, "fewer", "more"), "the same"),
        (numbers.times(None, 5, "fewer", "more"), ""),
    ],
)
def test_numbers_for_people(written, expected):
    assert written == expected


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (axes.Scale(0, 1, 0, 1), [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (axes.Scale(-0.013, 0.024, 0, 1), [-0.01, 0.0, 0.01, 0.02]),
        (axes.Scale(0.02, 3, 0, 1, log=True), [0.03, 0.1, 0.3, 1, 3]),
        (axes.Scale(0.09, 0.6, 0, 1, log=True), [0.1, 0.2, 0.5]),
        (axes.Scale(4.1, 4.9, 0, 1, log=True), [4.2, 4.4, 4.6, 4.8]),
    ],
)
def test_ticks_are_round(scale, expected):
    assert axes.ticks(scale) == pytest.approx(expected)


def test_scales_are_linear_and_logarithmic():
    linear, logarithmic = axes.Scale(2, 4, 10, 50), axes.Scale(1, 100, 10, 0, log=True)
    assert [linear(x) for x in (2, 3, 4)] == pytest.approx([10, 30, 50])
    assert [logarithmic(x) for x in (1, 10, 100)] == pytest.approx([10, 5, 0])


def test_tag_escapes_text_and_attributes_but_not_markup():
    made = tag("a", "<&", Markup("<b></b>"), None, class_='x"y', stroke_width=1.25, x=2.0, gone=None)
    assert made == '<a class="x&quot;y" stroke-width="1.2" x="2">&lt;&amp;<b></b></a>'


def test_the_results_are_left_as_they_were(tmp_path):
    results = mlp()
    before = copy.deepcopy(results)
    report.write(results, tmp_path / "report.html"), report.markdown(results), report.table(results)
    assert results == before
