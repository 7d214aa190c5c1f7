from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clockwork_hooks.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    COLUMNS,
    SHAPES,
    WHITE_BACKGROUND,
    WHITE_OBJECT,
    Scenes,
    draw_scenes,
    draw_split,
    held_out,
    render,
)
from clockwork_hooks.errors import ArgumentError

GOLDEN = [[4, 1, 9, 2, 6, 1, 3, 6, 0], [5, 0, 7, 3, 4, 0, 6, 8, 2], [1, 1, 9, 0, 2, 0, 5, 3, 1]]


def same(a: Scenes, b: Scenes) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in Scenes.__slots__)


def test_a_seed_gives_the_same_scenes_and_pictures() -> None:
    first, second, other = draw_scenes(20, 5), draw_scenes(20, 5), draw_scenes(20, 6)
    assert same(first, second)
    assert not same(first, other)
    assert torch.equal(render(first), render(second))


def test_the_scenes_of_a_seed_do_not_change() -> None:
    """The shipped weights were trained and measured on these scenes."""
    assert draw_scenes(3, 1).attributes.tolist() == GOLDEN


def test_a_generator_goes_on_drawing() -> None:
    rng = np.random.default_rng(0)
    assert not same(draw_scenes(10, rng), draw_scenes(10, rng))


def test_pictures_do_not_depend_on_their_batch() -> None:
    scenes = draw_scenes(9, 3)
    assert torch.equal(render(scenes)[4:6], render(scenes[4:6]))


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25)
def test_scenes_are_valid(seed: int) -> None:
    scenes = draw_scenes(50, seed)
    for column, values in zip(scenes.attributes.T, COLUMNS.values(), strict=True):
        assert column.min() >= 0
        assert column.max() < len(values)
    on_white = scenes.attributes[:, 0] == WHITE_BACKGROUND
    assert not (scenes.attributes[on_white][:, [4, 7]] == WHITE_OBJECT).any()
    alone = scenes.attributes[:, 1] == 0
    assert (scenes.attributes[alone, 6] == len(SHAPES)).all()
    pairs = scenes.centre[~alone]
    along = np.where((scenes.attributes[~alone, 2] == len(COLUMNS["layout"]) - 2), 0, 1)
    gap = (pairs[:, 1] - pairs[:, 0])[np.arange(len(pairs)), along]
    assert (gap > 20).all()  # object 1 is the left or the upper one


@pytest.mark.parametrize("shape", range(len(SHAPES)), ids=SHAPES)
def test_a_shape_has_its_colour_its_area_and_soft_edges(shape: int) -> None:
    scene = draw_scenes(1, 0, pairs=0.0)
    scene.attributes[:, [0, 2, 3, 4, 5]] = [1, 0, shape, WHITE_OBJECT, 0]
    scene.centre[:], scene.radius[:, 0], scene.angle[:], scene.tint[:] = 32.0, 12.0, 0.0, 0.0
    image = render(scene)[0, 0]
    areas = {"circle": 452, "square": 426, "triangle": 226, "star": 264, "cross": 337, "ring": 362}
    assert float(image.sum()) == pytest.approx(areas[SHAPES[shape]], rel=0.05)
    assert 0.05 < float(((image > 0.02) & (image < 0.98)).sum() / (image > 0.02).sum()) < 0.5
    assert float(image[0, 0]) == 0.0


def test_a_bigger_picture_shows_the_same_scene() -> None:
    scenes = draw_scenes(8, 2)
    small, large = render(scenes), render(scenes, size=128)
    assert float((torch.nn.functional.avg_pool2d(large, 2) - small).abs().mean()) < 0.003


def test_colours_are_far_apart() -> None:
    for palette in (COLOURS, BACKGROUNDS):
        values = torch.tensor([*palette.values()])
        distance = torch.cdist(values, values) + 9 * torch.eye(len(values))
        assert distance.min() > 0.25


def test_held_out_combinations_are_a_sixteenth_and_kept_apart() -> None:
    assert held_out(draw_scenes(20_000, 0).attributes).mean() == pytest.approx(1 / 16, abs=0.01)
    assert held_out(draw_split(300, 0, test=True).attributes).all()
    assert not held_out(draw_split(300, 0, test=False).attributes).any()


def test_a_wrong_count_is_refused() -> None:
    with pytest.raises(ArgumentError, match="count: -1"):
        draw_scenes(-1)
