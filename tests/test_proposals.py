"""Sizes to try: parameter counts against closed forms, and the choice against trying everything."""

import itertools

import numpy as np
import pytest

from bmjax.jobs.proposals import parameters, propose
from bmjax.models import Plain, Residual, Transformer
from bmjax.prune.curves import Curve

SHAPE, CLASSES = (8, 8, 1), 10
RESIDUAL = Residual(layers=4, width=16, neurons=48)
VIT = Transformer(patch=4, layers=3, width=12, heads=4, neurons=20)


def plain_count(**sizes):
    widths = [64, *(sizes.get(f"hidden_{i}", size) for i, size in enumerate((128, 64, 32))), CLASSES]
    return sum(a * b + b for a, b in itertools.pairwise(widths))


def residual_count(layers=4, neurons=48, w=16):
    block = 2 * w + (w * neurons + neurons) + (neurons * w + w)
    return (64 * w + w) + layers * block + 2 * w + (w * CLASSES + CLASSES)


def vit_count(layers=3, heads=4, neurons=20, w=12):
    d, patch, tokens = 3, 4 * 4, 4  # the width of a head stays when heads go
    attention = 3 * (w * heads * d + heads * d) + (heads * d * w + w)
    block = 4 * w + attention + (w * neurons + neurons) + (neurons * w + w)
    return (patch * w + w) + tokens * w + layers * block + 2 * w + (w * CLASSES + CLASSES)


MODELS = {
    "plain": (Plain(), plain_count, {"hidden_0": 128, "hidden_1": 64, "hidden_2": 32}),
    "residual": (RESIDUAL, residual_count, {"layers": 4, "neurons": 48}),
    "vit": (VIT, vit_count, {"layers": 3, "heads": 4, "neurons": 20}),
}


def built(name):
    config, count, whole = MODELS[name]
    return config.build(SHAPE, CLASSES), count, whole


@pytest.mark.parametrize("name", MODELS)
def test_parameters_have_their_closed_form(name):
    model, count, whole = built(name)
    for sizes in ({}, whole, dict.fromkeys(whole, 1), {key: size // 2 for key, size in whole.items()}):
        assert parameters(model, sizes, SHAPE) == count(**sizes)


def test_the_articles_classifier_has_19018_parameters():
    assert parameters(Plain().build(SHAPE, CLASSES), {}, SHAPE) == 64 * 128 + 128 + 128 * 64 + 64 + 64 * 32 + 32 + 32 * 10 + 10


def even(whole):
    """Curves that lose what they drop: every group is as sensitive as the others."""
    return {name: Curve(np.array([0.0, 1 - 1 / size]), np.array([0.0, 1 - 1 / size])) for name, size in whole.items()}


def bent(whole, seed):
    """Random rising curves, some with flat parts, down to one element."""
    rng = np.random.default_rng(seed)

    def curve(size):
        places = np.unique(np.round(np.array([0, 0.3, 0.6, 0.9, 1]) * size).clip(0, size - 1)) / size
        return Curve(places, np.append(0.0, np.maximum(0, rng.uniform(-0.1, 0.4, len(places) - 1)).cumsum()))

    return {name: curve(size) for name, size in whole.items()}


SMALL = (Plain(hidden=(12, 9, 6)), plain_count, {"hidden_0": 12, "hidden_1": 9, "hidden_2": 6})


@pytest.mark.parametrize("name", ["plain", "residual", "vit"])
@pytest.mark.parametrize("curves", ["even", 0, 1, 2])
def test_no_sizes_that_fit_are_expected_to_lose_less(name, curves):
    config, count, whole = SMALL if name == "plain" else MODELS[name]
    model = config.build(SHAPE, CLASSES)
    curves = even(whole) if curves == "even" else bent(whole, curves)
    worst = lambda sizes: max(curves[size].drop(1 - kept / whole[size]) for size, kept in sizes.items())
    total, ratios = count(**whole), (1.3, 2.0, 3.0)
    everything = [dict(zip(whole, sizes)) for sizes in itertools.product(*(range(1, n + 1) for n in whole.values()))]
    found = propose(model, whole, ratios, SHAPE, curves)
    assert [proposal.ratio for proposal in found] == list(ratios)
    for proposal in found:
        limit = total / proposal.ratio
        assert proposal.parameters == count(**proposal.sizes) <= limit
        best = min(worst(sizes) for sizes in everything if count(**sizes) <= limit)
        assert worst(proposal.sizes) == pytest.approx(best, abs=1e-6)
        for size, kept in proposal.sizes.items():  # and nothing more fits
            assert kept == whole[size] or count(**{**proposal.sizes, size: kept + 1}) > limit


def test_equal_curves_shrink_depth_and_neurons_together():
    model, _, whole = built("residual")
    (proposal,) = propose(model, whole, (3.0,), SHAPE, even(whole))
    # 7770 / 3 = 2590, of which 1242 are outside the blocks; a block has 48 + 33 n: 1 x 39, 2 x 18, 3 x 12 or 4 x 8 neurons.
    assert proposal.sizes == {"layers": 2, "neurons": 18}


@pytest.mark.parametrize(("robust", "sizes"), [("layers", (1, 39)), ("neurons", (4, 8))])
def test_what_is_less_sensitive_gives_more(robust, sizes):
    model, _, whole = built("residual")
    curves = {name: line._replace(drops=line.drops * (0.01 if name == robust else 1)) for name, line in even(whole).items()}
    (proposal,) = propose(model, whole, (3.0,), SHAPE, curves)
    assert proposal.sizes == dict(zip(whole, sizes))


def test_where_nothing_is_lost_all_go_the_same_way():
    model, _, _ = built("plain")
    whole = {"hidden_0": 128, "hidden_1": 64}
    free = {name: Curve(np.array([0.0, 0.75, 1 - 1 / size]), np.array([0.0, 0.0, 1.0])) for name, size in whole.items()}
    (proposal,) = propose(model, whole, (2.0,), SHAPE, free)
    assert proposal.sizes["hidden_0"] / 128 == pytest.approx(proposal.sizes["hidden_1"] / 64, abs=0.02)
    assert plain_count() / 2 - 130 < proposal.parameters <= plain_count() / 2


def test_without_inner_sizes_the_deepest_that_fits_is_taken():
    model, _, _ = built("residual")
    (proposal,) = propose(model, {"layers": 4}, (1.9,), SHAPE, even({"layers": 4}))
    depths = [depth for depth in range(1, 5) if residual_count(layers=depth) <= residual_count() / 1.9]
    assert proposal.sizes == {"layers": max(depths)}


def test_a_ratio_that_nothing_reaches_is_left_out():
    model, count, whole = built("residual")
    limit = count() / count(layers=1, neurons=1)  # embedding, norms and head cannot shrink
    found = propose(model, whole, (2.0, limit, limit * 1.001, 1000.0), SHAPE, even(whole))
    assert [proposal.ratio for proposal in found] == [2.0, limit]
    assert found[-1].sizes == {"layers": 1, "neurons": 1}
    assert propose(model, whole, (1000.0,), SHAPE, even(whole)) == []


def test_two_ratios_with_the_same_sizes_are_tried_once():
    model, _, whole = built("plain")
    found = propose(model, whole, (2.0, 2.0001), SHAPE, even(whole))
    assert [proposal.ratio for proposal in found] == [2.0]
