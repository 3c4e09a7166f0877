"""Tokens to text as they come: whole characters, stop strings, no spaces around."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_phi.serving.detokenizer import TextStream


def pieces(tokenizer, tokens, stop=()):
    """All pieces up to the end, or to the stop string; and the stream."""
    stream, found = TextStream(tokenizer, stop), []
    for token in tokens:
        found.append(stream.add(token))
        if stream.stopped:
            break
    return [*found, stream.end()], stream


def ids(processor, text):
    return processor.tokenizer(text)["input_ids"]


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_pieces_of_any_tokens_are_the_decoded_text_stripped(processor, data):
    tokens = data.draw(st.lists(st.integers(0, len(processor.tokenizer) - 1), max_size=12))
    found, stream = pieces(processor.tokenizer, tokens)
    assert "".join(found) == processor.tokenizer.decode(tokens, skip_special_tokens=True).strip() == stream.text


@settings(deadline=None, max_examples=100)
@given(
    text=st.text(alphabet="ab é漢👩🏽\n", max_size=20),
    stop=st.lists(st.text("ab \né", min_size=1, max_size=3), max_size=2),
)
def test_text_ends_before_the_first_stop_string(processor, text, stop):
    found, stream = pieces(processor.tokenizer, ids(processor, text), stop)
    cuts = [text.find(each) for each in stop if each in text]
    # where two stop strings overlap, the one that is complete first ends the answer
    if len(cuts) < 2:
        assert "".join(found) == text[: min(cuts, default=len(text))].strip()
    assert stream.stopped == bool(cuts) and not any(each in stream.text for each in stop if each.strip() == each)


def test_a_character_of_several_tokens_is_one_piece(processor):
    tokens = ids(processor, "a 👩 b")
    found, _ = pieces(processor.tokenizer, tokens)
    assert len(tokens) > 5 and [piece for piece in found if piece] == ["a", " 👩", " b"]


def test_an_unfinished_character_is_shown_at_the_end(processor):
    tokens = ids(processor, "a👩")[:-1]
    found, _ = pieces(processor.tokenizer, tokens)
    assert "".join(found) == processor.tokenizer.decode(tokens) == "a\ufffd"


@pytest.mark.parametrize("begun", ["ST", "S", "a S"])
def test_text_that_only_begins_like_a_stop_string_is_kept_at_the_end(processor, begun):
    found, stream = pieces(processor.tokenizer, ids(processor, begun), ["STOP"])
    assert "".join(found) == begun and not stream.stopped
