import pytest
from kinds_of_tokenizers import TOKENIZERS, add_bos, bpe, llama_3, unigram
from PIL import Image
from tokenizers import processors
from transformers import PhiConfig, PreTrainedTokenizerFast

from clip_phi.batching.encode import prefix_ids
from clip_phi.evaluation.generate import encode_prompts
from clip_phi.serving.engine import Engine
from modeling_clip_phi import ClipPhiProcessor
from modeling_clip_phi.configuration_clip_phi import add_special_tokens

IMAGE = {"type": "image"}


def text(words):
    return {"type": "text", "text": words}


def user(*content):
    return {"role": "user", "content": list(content)}


def answer(words):
    return {"role": "assistant", "content": [text(words)]}


# (messages, the rendered text in pieces: those of odd number are supervised); "@" is an image, "$" the end token.
SHAPES = {
    "text_only": ([user(text("hi")), answer("yes")], ["Instruct: hi\nOutput:", " yes$"]),
    "image_first": ([user(IMAGE, text("hi")), answer("yes")], ["@Instruct: hi\nOutput:", " yes$"]),
    "image_last": ([user(text("hi"), IMAGE), answer("yes")], ["Instruct: hi@\nOutput:", " yes$"]),
    "image_between": ([user(text("a"), IMAGE, text("b")), answer("c")], ["Instruct: a@b\nOutput:", " c$"]),
    "two_images": ([user(IMAGE, IMAGE, text("hi")), answer("yes")], ["@@Instruct: hi\nOutput:", " yes$"]),
    "turns": (
        [user(IMAGE, text("a")), answer("b"), user(text("c")), answer("d")],
        ["@Instruct: a\nOutput:", " b$", "Instruct: c\nOutput:", " d$"],
    ),
    "system": (
        [{"role": "system", "content": "Be brief."}, user(IMAGE, text("a")), answer("b")],
        ["Be brief.\n@Instruct: a\nOutput:", " b$"],
    ),
    "transcript": (
        [user(IMAGE, {"type": "transcript", "text": " hello "}, text("a")), answer("b")],
        ["@Speech: hello\nInstruct: a\nOutput:", " b$"],
    ),
    "caption": ([user(IMAGE), answer("a red circle")], ["@", " a red circle$"]),
    "prompt": ([user(IMAGE, text("a"))], ["@Instruct: a\nOutput:"]),
    "string": (
        [{"role": "user", "content": " a "}, {"role": "assistant", "content": "b "}],
        ["Instruct: a\nOutput:", " b$"],
    ),
}


@pytest.fixture(params=TOKENIZERS, scope="module")
def any_processor(request, processor):
    make = TOKENIZERS[request.param]
    return processor if make is None else ClipPhiProcessor(processor.image_processor, make(), num_image_tokens=4)


def bos_of(processor):
    return processor.tokenizer("")["input_ids"]


@pytest.mark.parametrize("shape", SHAPES)
def test_encode_gives_the_ids_and_supervises_answers_and_end_tokens(shape, any_processor):
    messages, pieces = SHAPES[shape]
    tokenizer, bos = any_processor.tokenizer, bos_of(any_processor)
    pieces = [piece.replace("@", "<image>" * 4).replace("$", tokenizer.eos_token) for piece in pieces]
    pieces[0] = tokenizer.decode(bos) + pieces[0]
    expected = tokenizer.encode("".join(pieces), add_special_tokens=False)
    labels = [-100] * len(expected)
    for answer in range(1, len(pieces), 2):
        start = len(tokenizer.encode("".join(pieces[:answer]), add_special_tokens=False))
        stop = len(tokenizer.encode("".join(pieces[: answer + 1]), add_special_tokens=False))
        labels[start:stop] = expected[start:stop]
        text = tokenizer.decode(labels[start:stop], clean_up_tokenization_spaces=False)
        assert text.strip() == pieces[answer].strip()
    ids, found = any_processor.encode(messages)
    assert ids == expected and found == labels
    assert ids.count(any_processor.image_token_id) == sum(piece.count("<image>") for piece in pieces)
    assert found.count(tokenizer.eos_token_id) == len(pieces) // 2


TALKS = {
    "one turn": [user(IMAGE, text("a red circle?")), answer("yes")],
    "no image": [user(text("hello")), answer("hi"), user(text("b")), answer("(c)")],
    "turns": [user(IMAGE, text("a")), answer("yes"), user(text("c 3\n")), answer("4, d"), user(text("e")), answer("f")],
    "system": [{"role": "system", "content": [text("Be brief.")]}, user(text("a")), answer("b")],
    "empty system": [{"role": "system", "content": ""}, user(text("a")), answer("b")],
    "blank system": [{"role": "system", "content": [text(" ")]}, user(text("a")), answer("b")],
    "caption": [user(IMAGE), answer("a red circle.")],
    "caption in turns": [user(IMAGE), answer("3 circles"), user(text("  a  b?")), answer("- c")],
}


@pytest.mark.parametrize("talk", TALKS)
def test_training_evaluation_engine_and_pipeline_have_the_same_tokens_before_each_answer(talk, any_processor, model):
    messages, image = TALKS[talk], Image.new("RGB", (40, 30), "red")
    ids, labels = any_processor.encode(messages)
    answers = [place for place in range(1, len(ids)) if labels[place] != -100 == labels[place - 1]]
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    with Engine(model, any_processor) as engine:
        for start, turn in zip(answers, turns, strict=True):
            before, trained = messages[:turn], ids[:start]
            has_image = IMAGE in [*before[0]["content"]]
            evaluated = encode_prompts(any_processor, [(before, image if has_image else None)])
            rendered = any_processor.apply_chat_template(before, add_generation_prompt=True)
            shown = [{**before[0], "content": [{**IMAGE, "image": image}, *before[0]["content"][1:]]}, *before[1:]]
            options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
            pipeline = any_processor.apply_chat_template(shown if has_image else before, **options)
            called = any_processor(text=rendered, images=image if has_image else None)
            assert trained == evaluated["input_ids"][0].tolist() == engine._encode(before, int(has_image))
            assert [trained] == pipeline["input_ids"] == [*called["input_ids"]]


def test_bos_is_at_the_front_once(any_processor):
    bos = bos_of(any_processor)
    image, hand_written = Image.new("RGB", (8, 8)), "<image>Instruct: a\nOutput:"
    for has_image in (True, False):
        assert prefix_ids(any_processor, has_image) == bos + [any_processor.image_token_id] * 4 * has_image
    for messages in TALKS.values():
        ids, _ = any_processor.encode(messages)
        assert ids[: len(bos)] == bos and (not bos or ids[len(bos)] != bos[0])
    for before in ("", any_processor.tokenizer.decode(bos)):
        found = any_processor(text=[before + hand_written] * 2, images=[[image]] * 2)["input_ids"]
        assert found == [any_processor.encode([user(IMAGE, text("a"))])[0]] * 2


def test_template_without_bos_trains_after_bos_all_the_same(processor):
    plain = ClipPhiProcessor(processor.image_processor, llama_3(), processor.chat_template, num_image_tokens=4)
    usual = ClipPhiProcessor(processor.image_processor, llama_3(), num_image_tokens=4)
    assert plain.chat_template != usual.chat_template and plain.encode(TALKS["turns"]) == usual.encode(TALKS["turns"])


def test_tokenizer_that_joins_prompt_and_answer_is_refused(processor):
    tokenizer = bpe(["Output: yes"] * 9, ["<unk>", "</s>", "<pad>", "<image>"])  # words are not split
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    joining = ClipPhiProcessor(processor.image_processor, fast, num_image_tokens=4)
    with pytest.raises(ValueError, match=r"joins the end of a prompt with its answer: '.*Output:'"):
        joining.encode([user(text("a")), answer("yes")])


def test_tokenizer_that_ends_each_text_with_a_token_is_refused(processor):
    tokenizer = llama_3()
    add_bos(tokenizer.backend_tokenizer, "<s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    with pytest.raises(ValueError, match="adds </s> behind a text: switch this off"):
        ClipPhiProcessor(processor.image_processor, tokenizer)


def test_template_whose_answers_lack_the_end_token_is_refused(processor):
    template = processor.chat_template.replace(" + eos_token -}}", " -}}").replace(
        "{%- endgeneration -%}", "{%- endgeneration -%}{{- eos_token -}}"
    )
    other = ClipPhiProcessor(processor.image_processor, processor.tokenizer, template, num_image_tokens=4)
    with pytest.raises(ValueError, match="must end each generation block with <.endoftext.>"):
        other.encode(TALKS["turns"])


def test_encode_in_numbers(processor):
    end, image = processor.tokenizer.eos_token_id, processor.image_token_id
    assert (end, image, processor.tokenizer.pad_token_id) == (0, image, image + 1)
    ids, labels = processor.encode([user(IMAGE), answer("!")])
    space, mark = processor.tokenizer.convert_tokens_to_ids(["Ġ", "!"])
    assert ids == [image] * 4 + [space, mark, end]
    assert labels == [-100] * 4 + [space, mark, end]


@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "string"])
def test_encode_equals_apply_chat_template(shape, any_processor):
    processor = any_processor
    messages, _ = SHAPES[shape]
    image = Image.new("RGB", (40, 30), "red")
    shown = [
        message
        | {
            "content": [item | {"image": image} if item["type"] == "image" else item for item in message["content"]]
            if isinstance(message["content"], list)
            else message["content"]
        }
        for message in messages
    ]
    encoding = processor.apply_chat_template(shown, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, labels = processor.encode(messages)
    assert encoding["input_ids"] == [ids]
    assert encoding["assistant_masks"] == [[int(label != -100) for label in labels]]


def test_prompt_is_the_beginning_of_the_trained_conversation(processor):
    messages, _ = SHAPES["image_first"]
    prompt, _ = processor.encode(messages[:1])
    whole, labels = processor.encode(messages)
    assert whole[: len(prompt)] == prompt
    assert labels[: len(prompt)] == [-100] * len(prompt) and -100 not in labels[len(prompt) :]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([user(IMAGE, text("see <image>"))], "2 <image> in the rendered text, not 1"),
        ([user(text("<image>"))], "1 <image> in the rendered text, not 0"),
        ([user(text("stop <|endoftext|>")), answer("yes")], "2 <.endoftext.> in the rendered text, not 1"),
        ([user(text("a <pad> b")), answer("yes")], "1 <pad> in the rendered text, not 0"),
        ([user(text("half \ud800"))], "half a character"),
        ([user({"type": "video"})], "content of type 'video' is not text, image or transcript"),
        ([{"role": "tool", "content": "x"}], "role 'tool' is not system, user or assistant"),
    ],
)
def test_wrong_conversations_are_refused(messages, message, processor):
    with pytest.raises(Exception, match=message):
        processor.encode(messages)


def test_padding_by_the_token_of_unknown_characters_is_replaced(processor):
    tokenizer = unigram()
    tokenizer.pad_token = "<unk>"
    with pytest.raises(ValueError, match="needs a padding token of its own"):
        ClipPhiProcessor(processor.image_processor, tokenizer, num_image_tokens=4)
    own = ClipPhiProcessor(processor.image_processor, add_special_tokens(tokenizer), num_image_tokens=4)
    assert own.tokenizer.pad_token == "<pad>"
    assert own.encode([user(text("é")), answer("b")])[0].count(own.tokenizer.unk_token_id) == 1


@pytest.mark.parametrize(("wide", "token"), [("＜/s＞", "</s>"), ("＜s＞", "<s>"), ("＜pad＞", "<pad>")])
@pytest.mark.parametrize("place", ["question", "answer"])
def test_text_that_a_normalizer_turns_into_a_special_token_is_refused(wide, token, place, processor):
    """Or the label would end in the middle of the answer."""
    tokenizer = unigram()
    assert tokenizer(wide, add_special_tokens=False)["input_ids"][-1] == tokenizer.convert_tokens_to_ids(token)
    normalizing = ClipPhiProcessor(processor.image_processor, tokenizer, num_image_tokens=4)
    said = {"question": "a", "answer": "b"} | {place: f"{wide} c"}
    with pytest.raises(ValueError, match=f"a text contains {token}: . {token} in the rendered text, not ."):
        normalizing.encode([user(text(said["question"])), answer(said["answer"])])


def test_system_turn_without_text_and_empty_question_are_nothing(processor):
    """As they are in a pipeline, which makes an empty list of an empty text."""
    plain = [user(text("a")), answer("b")]
    for content in ("", " ", [], [text("")]):
        assert processor.encode([{"role": "system", "content": content}, *plain]) == processor.encode(plain)
    empty = [*plain, {"role": "user", "content": ""}, answer("c")]
    ids, _ = processor.encode(empty)
    assert processor.tokenizer.decode(ids) == "Instruct: a\nOutput: b<|endoftext|> c<|endoftext|>"
    assert processor.apply_chat_template(empty, tokenize=True, return_dict=True)["input_ids"] == [ids]


def test_prompt_with_more_places_than_images_is_refused(processor):
    with pytest.raises((ValueError, StopIteration)):  # StopIteration: transformers 5.18
        processor(images=[Image.new("RGB", (8, 8))], text=["<image> <image>"])


def test_decoder_with_fewer_rows_than_the_tokenizer_has_tokens_is_refused(vision_backbone, tmp_path):
    from conftest import TEXT, save_tokenizer

    entries = len(save_tokenizer(tmp_path))
    PhiConfig(**TEXT | {"vocab_size": entries - 1}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"has {entries} tokens, and its embedding {entries - 1} rows"):
        ClipPhiProcessor.from_backbones(vision_backbone, str(tmp_path))


def test_tokenizer_without_the_two_tokens_is_refused(processor, tmp_path):
    from conftest import save_tokenizer

    tokenizer = save_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="has no <image> token: make the processor with from_backbones"):
        ClipPhiProcessor(processor.image_processor, tokenizer)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    for pad_token in (None, tokenizer.eos_token):
        tokenizer.pad_token = pad_token
        with pytest.raises(ValueError, match="needs a padding token of its own"):
            ClipPhiProcessor(processor.image_processor, tokenizer)


def test_processor_survives_saving(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    reloaded = ClipPhiProcessor.from_pretrained(tmp_path)
    messages, _ = SHAPES["turns"]
    assert reloaded.encode(messages) == processor.encode(messages)
    image = Image.effect_noise((40, 30), 50).convert("RGB")
    ours, theirs = (one(images=[image], text=["<image>a"], return_tensors="pt") for one in (processor, reloaded))
    assert ours.keys() == theirs.keys()
    assert all(ours[key].equal(theirs[key]) for key in ours)
    assert reloaded._get_num_multimodal_tokens([(40, 30), (8, 8)]).num_image_tokens == [4, 4]
    assert reloaded._get_num_multimodal_tokens().num_image_tokens is None
