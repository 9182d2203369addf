"""Sizes to try: parameter counts against closed forms, and the choice against trying everything."""

import itertools
import math

import pytest

from bmjax.jobs.proposals import parameters, propose
from bmjax.models import Plain, Residual, Transformer

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


def every_choice(whole):
    """(imbalance, depth, fraction, sizes) of all depths and all fractions of the largest inner size."""
    inner = {name: size for name, size in whole.items() if name != "layers"}
    steps = max(inner.values())
    for depth in range(1, whole.get("layers", 1) + 1):
        for fraction in (j / steps for j in range(1, steps + 1)):
            sizes = {name: max(1, round(size * fraction)) for name, size in inner.items()}
            layers = {"layers": depth} if "layers" in whole else {}
            imbalance = abs(math.log(depth / whole["layers"] / fraction)) if layers else 0.0
            yield imbalance, depth, fraction, layers | sizes


@pytest.mark.parametrize("name", MODELS)
def test_the_proposal_is_the_most_balanced_of_the_largest_that_fit(name):
    model, count, whole = built(name)
    ratios = (1.5, 2.0, 3.0)
    found = propose(model, whole, ratios, SHAPE)
    assert [proposal.ratio for proposal in found] == list(ratios)
    for proposal in found:
        limit = count() / proposal.ratio
        assert set(proposal.sizes) == set(whole)
        assert proposal.parameters == count(**proposal.sizes) <= limit
        fitting = [choice for choice in every_choice(whole) if count(**choice[3]) <= limit]
        largest = [max((c for c in fitting if c[1] == depth), key=lambda c: c[2]) for depth in {c[1] for c in fitting}]
        assert proposal.sizes == min(largest, key=lambda choice: choice[0])[3]


def test_depth_and_neurons_shrink_together():
    model, _, whole = built("residual")
    (proposal,) = propose(model, whole, (3.0,), SHAPE)
    # 7770 / 3 = 2590, of which 1242 are outside the blocks; a block has 48 + 33 n: 1 x 39, 2 x 18, 3 x 12 or 4 x 8 neurons.
    assert proposal.sizes == {"layers": 2, "neurons": 18}


def test_without_inner_sizes_the_deepest_that_fits_is_taken():
    model, _, _ = built("residual")
    (proposal,) = propose(model, {"layers": 4}, (1.9,), SHAPE)
    depths = [depth for depth in range(1, 5) if residual_count(layers=depth) <= residual_count() / 1.9]
    assert proposal.sizes == {"layers": max(depths)}


def test_a_ratio_that_nothing_reaches_is_left_out():
    model, count, whole = built("residual")
    limit = count() / count(layers=1, neurons=1)  # embedding, norms and head cannot shrink
    found = propose(model, whole, (2.0, limit, limit * 1.001, 1000.0), SHAPE)
    assert [proposal.ratio for proposal in found] == [2.0, limit]
    assert found[-1].sizes == {"layers": 1, "neurons": 1}
    assert propose(model, whole, (1000.0,), SHAPE) == []


def test_two_ratios_with_the_same_sizes_are_tried_once():
    model, _, whole = built("plain")
    found = propose(model, whole, (2.0, 2.0001), SHAPE)
    assert [proposal.ratio for proposal in found] == [2.0]
