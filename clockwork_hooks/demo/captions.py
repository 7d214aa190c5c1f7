"""Captions of scenes: writing them (vectorised), reading them back, and telling what went wrong.

A caption is a row of token ids of fixed length: `<start>`, the words, then padding. Text is only a view of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from clockwork_hooks.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    COLUMNS,
    LAYOUTS,
    PLACES,
    SHAPES,
    SIDE_BY_SIDE,
    SIZES,
    STACKED,
    WHITE_BACKGROUND,
    WHITE_OBJECT,
    Scenes,
)  # fmt: skip
from clockwork_hooks.errors import DemoError

Ints = NDArray[np.int64]

ANY = -1  # an attribute that a caption leaves open
PAD, START = 0, 1
_GRAMMAR = ("a", "on", "background", "at", "in", "the", "to", "left", "right", "of", "above", "below", "top", "bottom")
_GROUNDS = ("dark", "black", "grey")
VOCABULARY: tuple[str, ...] = ("<pad>", "<start>", *_GRAMMAR, "centre", *SIZES, *COLOURS, *SHAPES, *_GROUNDS)
MAX_TOKENS = 18  # <start>, and at most 5 + 4 + 4 + 4 words
EXAMPLES = (
    "a large red circle left of a small blue square on a dark green background",
    "a small yellow star below a large pink ring on a black background",
    "a large white cross at the top left on a dark blue background",
    "a small green triangle in the centre on a black background",
)
_LIKE_THESE = "write it like one of these:" + "".join(f"\n  {example}" for example in EXAMPLES)
_IDS = {word: index for index, word in enumerate(VOCABULARY)}
_ALIASES = {"an": "a", "center": "centre", "gray": "grey", "big": "large", "little": "small"}


class CaptionError(DemoError):
    """A prompt whose words are known but whose form is not."""


class UnknownWordError(CaptionError):
    """A prompt with words that the demo model has never seen."""


def _table(phrases: Sequence[str], width: int) -> Ints:
    rows = [[_IDS[word] for word in phrase.split()] for phrase in phrases]
    return np.array([row + [PAD] * (width - len(row)) for row in rows], dtype=np.int64)


_BACKGROUND = _table([f"on a {name} background" for name in BACKGROUNDS], 5)
_SHAPE, _COLOUR, _SIZE = (_table([*names, ""], 1)[:, 0] for names in (SHAPES, COLOURS, SIZES))
_RELATIONS = ("left of", "above", "right of", "below", "to the left of", "above", "to the right of", "below")
_MIDDLE = _table([*PLACES, *_RELATIONS], 4)


def write_captions(scenes: Scenes, seed: int | np.random.Generator = 0, *, leave_out: float = 0.0) -> Ints:
    """Write one caption for each scene, in a template drawn at random (either object first, background first or last).

    Args:
        scenes: N scenes.
        seed: an int, or a generator to go on drawing from.
        leave_out: the chance that a caption leaves out a size, the place of a lone object, or the background.

    Returns:
        (N, 18) token ids; `decode` turns them into text.
    """
    rng = np.random.default_rng(seed)
    attributes, count = scenes.attributes, len(scenes)
    two, layout = attributes[:, 1] == 1, attributes[:, 2]
    swap = two & (rng.random(count) < 0.5)
    first = np.where(swap[:, None], attributes[:, 6:9], attributes[:, 3:6])
    second = np.where(swap[:, None], attributes[:, 3:6], attributes[:, 6:9])
    relation = (layout - SIDE_BY_SIDE) + 2 * swap + 4 * (rng.random(count) < 0.3)
    middle = _MIDDLE[np.where(two, len(PLACES) + relation, layout)]
    middle[~two & (rng.random(count) < leave_out)] = PAD
    background = _BACKGROUND[attributes[:, 0]]
    background[rng.random(count) < leave_out] = PAD
    front = (rng.random(count) < 0.25)[:, None]
    parts = [
        np.full((count, 1), START), np.where(front, background, PAD), _object(first, leave_out, rng), middle,
        _object(second, leave_out, rng), np.where(front, PAD, background),
    ]  # fmt: skip
    slots = np.concatenate(parts, axis=1)
    order = np.argsort(slots == PAD, axis=1, kind="stable")
    return np.take_along_axis(slots, order, axis=1)[:, :MAX_TOKENS]


def _object(rows: Ints, leave_out: float, rng: np.random.Generator) -> Ints:
    """Words (N, 4) of objects given as (shape, colour, size); none at all for an object that is not there."""
    shape = _SHAPE[rows[:, 0]]
    size = np.where(rng.random(len(rows)) < leave_out, PAD, _SIZE[rows[:, 2]])
    return np.stack([np.where(shape == PAD, PAD, _IDS["a"]), size, _COLOUR[rows[:, 1]], shape], axis=1)


def decode(tokens: Ints) -> list[str]:
    """Captions as text. Args: tokens (N, 18). Returns: N strings."""
    texts = [" ".join(VOCABULARY[token] for token in row if token > START) for row in tokens]
    return [re.sub(r"\ba orange", "an orange", text) for text in texts]


def encode(prompts: Sequence[str]) -> Ints:
    """Token ids of prompts; the empty prompt is the unconditional one.

    Args:
        prompts: N texts; case and punctuation do not matter.

    Returns:
        (N, 18) token ids.

    Raises:
        UnknownWordError: a word that the model has never seen; the message lists those it knows.
        CaptionError: a prompt that is too long.
    """
    rows = np.full((len(prompts), MAX_TOKENS), PAD, dtype=np.int64)
    for row, prompt in zip(rows, prompts, strict=True):
        words = _words(prompt)
        if len(words) >= MAX_TOKENS:
            raise CaptionError(
                f"a prompt of the demo has at most {MAX_TOKENS - 1} words",
                seen={"prompt": repr(prompt), "words": len(words)},
                do=_LIKE_THESE,
            )
        row[0] = START
        row[1 : len(words) + 1] = [_IDS[word] for word in words]
    return rows


def _words(prompt: str) -> list[str]:
    words = [_ALIASES.get(word, word) for word in re.findall(r"[^\W_]+", prompt.lower())]
    unknown = [word for word in dict.fromkeys(words) if word not in _IDS]
    if unknown:
        raise UnknownWordError(
            "the demo model was trained on a small vocabulary and reads no other words",
            seen={
                "prompt": repr(prompt),
                "unknown": ", ".join(unknown),
                "words it knows": ", ".join(sorted(VOCABULARY[2:])),
            },
            do=_LIKE_THESE,
        )
    return words


_OBJECT = rf"a (?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_ON = rf"on a ({'|'.join(BACKGROUNDS)}) background"
_BETWEEN = "(?:to the )?(left) of|(?:to the )?(right) of|(above)|(below)"
_SENTENCE = re.compile(rf"(?:{_ON} )?{_OBJECT}(?: ({'|'.join(PLACES)}))?(?: (?:{_BETWEEN}) {_OBJECT})?(?: {_ON})?")


def parse(prompts: Sequence[str]) -> Ints:
    """Read prompts back into the attributes that they ask for.

    Args:
        prompts: N texts.

    Returns:
        (N, 9) indices into the values of `COLUMNS`, `ANY` (-1) where the prompt leaves an attribute open.

    Raises:
        UnknownWordError: a word that the model has never seen.
        CaptionError: known words in a form that is not a caption, or a white object on white.
    """
    return np.array([_parse(prompt) for prompt in prompts], dtype=np.int64).reshape(-1, len(COLUMNS))


def _parse(prompt: str) -> list[int]:
    match = _SENTENCE.fullmatch(" ".join(_words(prompt)))
    if match is None:
        raise CaptionError(
            "a prompt of the demo names one object, or two and how they stand to each other, and may name a background",
            seen={"prompt": repr(prompt)},
            do=_LIKE_THESE,
        )
    before, *first, place, left, right, above, _ = match.groups()[:9]
    second, after = match.groups()[9:12], match.groups()[12]
    two = second[2] is not None
    if (two and place) or (before and after):
        raise CaptionError(
            "a prompt of the demo gives a place only to a single object, and names at most one background",
            seen={"prompt": repr(prompt)},
            do=_LIKE_THESE,
        )
    background = _index("background", before or after)
    if two:
        layout = SIDE_BY_SIDE if left or right else STACKED
        pair = (_object_row(first), _object_row(second))
        one, other = pair if left or above else pair[::-1]
    else:
        layout = ANY if place is None else LAYOUTS.index(place)
        one, other = _object_row(first), [len(SHAPES), len(COLOURS), len(SIZES)]
    if background == WHITE_BACKGROUND and WHITE_OBJECT in (one[1], other[1]):
        raise CaptionError(
            "an object differs from its background",
            seen={"prompt": repr(prompt)},
            do="choose another colour for the white object, or another background",
        )
    return [background, int(two), layout, *one, *other]


def _object_row(words: Sequence[str | None]) -> list[int]:
    size, colour, shape = words
    return [_index("shape_1", shape), _index("colour_1", colour), _index("size_1", size)]


def _index(column: str, value: str | None) -> int:
    return ANY if value is None else COLUMNS[column].index(value)
