"""Scores of edited scenes: means, what is against plain, and how sure that is."""

import json

import numpy as np
import pytest
import torch

from clockwork_hooks.demo.captions import parse
from clockwork_hooks.demo.edits import EditRow, SceneScore, layout_error, scores_of
from clockwork_hooks.demo.model import load_demo
from clockwork_hooks.demo.scenes import render, scenes_of


def row(*moved, right=9, grown=0.1, name="some", macs=60):
    return EditRow(name, macs, 100, 1.0, tuple(SceneScore(right, 9, one, grown, 1) for one in moved))


def test_a_row_is_the_mean_of_its_scenes():
    row = EditRow("a", 60, 100, 1.0, (SceneScore(9, 9, 1.0, 0.1, 0), SceneScore(3, 6, 2.0, 0.3, 2)))
    assert (row.saving, row.accuracy, row.moved, row.lost) == (0.4, 12 / 15, 1.5, 2)
    assert row.grown == pytest.approx(0.2)
    assert EditRow.from_dict(json.loads(json.dumps(row.to_dict()))) == row


def test_scenes_are_compared_in_pairs():
    plain = row(1.0, 10.0, 3.0, 0.5)
    same, more = row(1.0, 10.0, 3.0, 0.5).against(plain), row(1.1, 11.0, 3.3, 0.55).against(plain)
    assert (same["moved"].value, same["moved"].low, same["moved"].high) == (0, 0, 0)
    assert [getattr(more["moved"], of) for of in ("value", "low", "high")] == pytest.approx([0.1] * 3)
    one = row(1.0, 12.0, 3.0, 0.5).against(plain)["moved"]  # all of the difference is one scene's
    assert one.low == 0 < one.value < one.high
    assert one.value == pytest.approx(2 / 14.5)
    assert row(1.0, 1.0, right=6).against(row(1.0, 1.0))["accuracy"].value == pytest.approx(-1 / 3)
    assert f"{one:+.1%}".startswith("+13.8% (+0.0% to +")


def test_an_interval_covers_the_truth_as_often_as_it_says():
    rng, hits = np.random.default_rng(1), 0
    for _ in range(60):
        plain = rng.uniform(1, 2, 30)
        gap = row(*plain * rng.normal(1.1, 0.2, 30)).against(row(*plain))["moved"]
        hits += gap.low <= 0.1 <= gap.high
    assert 50 <= hits < 60  # 95% of 60 are 57


def test_scenes_are_judged_one_by_one():
    captions = [
        "a large red circle at the left on a grey background",
        "a small blue star at the top on a grey background",
    ]
    wanted = parse(captions)
    pictures = render(scenes_of(wanted, 0))
    good, bad = scores_of(load_demo().classifier, pictures, pictures.flip(0), wanted), wanted[::-1]
    assert [score.asked for score in good] == [6, 6]
    assert all(score.right < 6 for score in good)
    same = scores_of(load_demo().classifier, pictures, pictures, wanted)
    assert [(score.right, score.moved, score.grown, score.lost) for score in same] == [(6, 0, 0, 0)] * 2
    assert scores_of(load_demo().classifier, pictures, pictures.flip(0), bad)[0].right == 6


def test_an_object_that_is_gone_has_moved_by_its_radius():
    before, empty, far = torch.zeros(3, 1, 3, 64, 64)
    before[..., 10:20, 10:20] = 1
    far[..., 40:50, 40:50] = 1
    radius = (100 / np.pi) ** 0.5
    assert layout_error(before, empty) == (pytest.approx(radius), 1.0, 1)
    assert layout_error(before, far) == (pytest.approx(radius), 1.0, 0)
