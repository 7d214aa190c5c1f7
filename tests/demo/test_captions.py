from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clockwork_hooks.demo.captions import (
    ANY,
    EXAMPLES,
    MAX_TOKENS,
    VOCABULARY,
    CaptionError,
    UnknownWordError,
    decode,
    encode,
    parse,
    write_captions,
)
from clockwork_hooks.demo.model import DEMO_PROMPTS
from clockwork_hooks.demo.scenes import COLUMNS, draw_scenes


@given(seed=st.integers(0, 2**32 - 1), template=st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_a_caption_reads_back_as_its_scene(seed: int, template: int) -> None:
    scenes = draw_scenes(20, seed)
    tokens = write_captions(scenes, template)
    texts = decode(tokens)
    assert np.array_equal(parse(texts), scenes.attributes)
    assert np.array_equal(encode(texts), tokens)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_what_a_caption_leaves_out_is_left_open_and_the_rest_is_right(seed: int) -> None:
    scenes = draw_scenes(50, seed)
    read = parse(decode(write_captions(scenes, seed, leave_out=0.5)))
    assert ((read == scenes.attributes) | (read == ANY)).all()
    assert (read == ANY).any()
    assert (read[:, [1, 3, 4]] != ANY).all()


def test_every_template_is_drawn() -> None:
    texts = decode(write_captions(draw_scenes(400, 0), 0))
    for words in ("right of", "to the left of", "below", "above", "at the top left", "in the centre"):
        assert any(words in text for text in texts)
    assert any(text.startswith("on a") for text in texts)


def test_token_ids_stay_what_the_weights_were_trained_on() -> None:
    digest = hashlib.sha256(" ".join(VOCABULARY).encode()).hexdigest()
    assert (len(VOCABULARY), MAX_TOKENS, digest[:16]) == (36, 18, "f5c57981f860666a")


@pytest.mark.parametrize("prompt", [*EXAMPLES, *DEMO_PROMPTS])
def test_examples_and_demo_prompts_are_captions(prompt: str) -> None:
    parse([prompt])


def test_the_demo_prompts_are_varied() -> None:
    wanted = parse(DEMO_PROMPTS)
    assert len(set(DEMO_PROMPTS)) == 16
    for name, values in COLUMNS.items():
        words = set(wanted[:, list(COLUMNS).index(name)].tolist())
        assert len(words) >= min(len(values), 4), name


def test_spelling_variants() -> None:
    plain = parse(["a large orange circle in the centre on a grey background"])
    assert np.array_equal(parse(["An orange circle"])[:, 3:5], plain[:, 3:5])
    assert np.array_equal(parse(["A big orange circle, in the center, on a gray background."]), plain)


def test_the_empty_prompt_is_the_unconditional_one() -> None:
    assert encode([""]).tolist() == [[1] + [0] * (MAX_TOKENS - 1)]


def test_unknown_words_are_named_and_the_known_ones_listed() -> None:
    with pytest.raises(UnknownWordError) as caught:
        encode(["a purple elephant on a white background"])
    message = str(caught.value)
    assert "purple, elephant" in message
    for word in VOCABULARY[2:]:
        assert word in message.split("words it knows:")[1]


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("circle red", "names one object"),
        ("", "names one object"),
        ("a red circle in the centre left of a blue square", "only to a single object"),
        ("on a black background a red circle on a white background", "one background"),
        ("a white circle on a white background", "differs from its background"),
    ],
)
def test_a_wrong_form_gets_the_rule(prompt: str, says: str) -> None:
    with pytest.raises(CaptionError, match=says) as caught:
        parse([prompt])
    assert repr(prompt) in str(caught.value)
    assert "What to do:" in str(caught.value)


def test_a_long_prompt_is_refused() -> None:
    with pytest.raises(CaptionError, match="words: 40"):
        encode(["red " * 40])
