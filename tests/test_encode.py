"""What is supervised, for any text in any language: the answers, whole, each with its end token, and nothing else."""

import pytest
from helpers import make_index
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from clip_phi.data.report import Report
from clip_phi.data.sample import File
from clip_phi.data.schema import read_records
from modeling_clip_phi import ClipPhiProcessor
from modeling_clip_phi.configuration_clip_phi import IGNORE_INDEX

SPACE = "\u2581"  # how SentencePiece writes one
SPECIAL = ("<|endoftext|>", "<image>", "<pad>", "<unk>", "<s>", "</s>")
CHARACTERS = st.characters(exclude_categories=["Cs"])
PIECES = st.sampled_from(
    [
        " ",
        "\n",
        "\t",
        "\r\n",
        "\u00a0",
        "\u200b",
        "\0",
        "  ",
        "Instruct:",
        "Output:",
        "{{ x }}",
        "<",
        "|>",
        "\U0001f600",
    ]
)
TEXT = (
    st.one_of(st.text(CHARACTERS, max_size=40), st.lists(PIECES | st.text(CHARACTERS, max_size=5)).map("".join))
    .filter(lambda text: text.strip())
    .filter(lambda text: not any(token in text for token in SPECIAL))
)
TURNS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def fallback_processor(processor) -> ClipPhiProcessor:
    """A tokenizer of Llama's kind: spaces are characters, and what is not in the vocabulary is spelt in bytes."""
    tokens = ["<unk>", "<s>", "</s>", "<pad>", "<image>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [SPACE, *"abcdefghijklmnopqrstuvwxyzIO:", f"{SPACE}a", "th", "the", f"{SPACE}the"]
    merges = [(SPACE, "a"), ("t", "h"), ("th", "e"), (SPACE, "the")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return ClipPhiProcessor(processor.image_processor, fast, num_image_tokens=4)


def supervised(row: dict, processor: ClipPhiProcessor) -> list[str]:
    """What is learnt from each branch of a row, as text."""
    report = Report()
    samples = list(read_records([("origin", row)], lambda *_: File("a.jpg"), report))
    index = make_index(samples, processor, max_length=10**6, report=report)
    assert not report.skipped and len(index) == 1, report.table()
    texts = []
    for ids, labels in index.encoded(0):
        learnt = [label for label in labels if label != IGNORE_INDEX]
        assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True))
        assert processor.tokenizer.unk_token_id is None or processor.tokenizer.unk_token_id not in ids
        texts.append(processor.tokenizer.decode(learnt, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    return texts


def written(answers: list[str], processor: ClipPhiProcessor) -> str:
    text = "".join(f" {answer.strip()}{processor.tokenizer.eos_token}" for answer in answers)
    return text if processor.tokenizer.eos_token == "<|endoftext|>" else text.replace(SPACE, " ")


@pytest.fixture(params=["processor", "fallback_processor"], scope="module")
def any_processor(request) -> ClipPhiProcessor:
    return request.getfixturevalue(request.param)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(turns=TURNS, has_image=st.booleans(), system=st.none() | TEXT, transcript=st.none() | TEXT)
def test_supervised_tokens_of_any_conversation_are_its_answers_and_end_tokens(
    any_processor, turns, has_image, system, transcript
):
    said = [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)]
    if transcript is not None:
        said[0]["transcript"] = transcript
    if system is not None:
        said.insert(0, {"from": "system", "value": system})
    row = {"conversations": said} | ({"image": "a.jpg"} if has_image else {})
    assert supervised(row, any_processor) == [written([answer for _, answer in turns], any_processor)]


@settings(deadline=None, derandomize=True, max_examples=100)
@given(captions=st.lists(TEXT, min_size=1, max_size=5))
def test_supervised_tokens_of_any_captions_are_the_captions_each_with_its_end_token(any_processor, captions):
    row = {"image": "a.jpg", "captions": captions}
    assert supervised(row, any_processor) == [written([caption], any_processor) for caption in captions]


@settings(deadline=None, derandomize=True, max_examples=100)
@given(question=TEXT, answer=TEXT, token=st.sampled_from(["eos_token", "pad_token"]), place=st.integers(0, 80))
def test_an_end_or_pad_token_in_any_text_is_refused_and_never_learnt(any_processor, question, answer, token, place):
    special = getattr(any_processor.tokenizer, token)
    whole = question + "\n" + answer
    whole = whole[: place % len(whole)] + special + whole[place % len(whole) :]
    question, _, answer = whole.partition("\n")
    assume(question.strip() and answer.strip() and special in question + answer)
    report = Report()
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    samples = list(read_records([("origin", {"conversations": said})], lambda *_: File("a.jpg"), report))
    index = make_index(samples, any_processor, max_length=10**6, report=report)
    assert len(index) == 0 and dict(report.skipped) == {"text cannot be encoded": 1}
