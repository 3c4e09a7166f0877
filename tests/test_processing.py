import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PhiConfig, PreTrainedTokenizerFast

from modeling_clip_phi import ClipPhiProcessor

IMAGE = {"type": "image"}


def text(words):
    return {"type": "text", "text": words}


def user(*content):
    return {"role": "user", "content": list(content)}


def answer(words):
    return {"role": "assistant", "content": [text(words)]}


# (messages, the pieces that are tokenised apart: those of odd number are supervised); "@" stands for an image.
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


@pytest.fixture(scope="module")
def metaspace_processor(processor, tmp_path_factory):
    """A tokenizer of SentencePiece's kind, that puts a space before each text and <s> before each prompt."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=special)
    tokenizer.train_from_iterator(
        ["Instruct: a\nOutput: yes", "Speech: hello", "Be brief. a red circle hi b c d"], trainer
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    return ClipPhiProcessor(processor.image_processor, fast, num_image_tokens=4)


@pytest.fixture(params=["processor", "metaspace_processor"])
def any_processor(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("shape", SHAPES)
def test_encode_gives_the_ids_and_supervises_answers_and_end_tokens(shape, any_processor):
    messages, pieces = SHAPES[shape]
    tokenizer = any_processor.tokenizer
    expected_ids, expected_labels = [], []
    for number, piece in enumerate(pieces):
        piece = piece.replace("@", "<image>" * 4).replace("$", tokenizer.eos_token)
        ids = tokenizer.encode(piece, add_special_tokens=False)
        expected_ids += ids
        expected_labels += ids if number % 2 else [-100] * len(ids)
    ids, labels = any_processor.encode(messages)
    assert ids == expected_ids
    assert labels == expected_labels
    assert ids.count(any_processor.image_token_id) == 4 * sum(piece.count("@") for piece in pieces)
    assert labels.count(tokenizer.eos_token_id) == len(pieces) // 2


def test_encode_in_numbers(processor):
    end, image = processor.tokenizer.eos_token_id, processor.image_token_id
    assert (end, image, processor.tokenizer.pad_token_id) == (0, image, image + 1)
    ids, labels = processor.encode([user(IMAGE), answer("!")])
    space, mark = processor.tokenizer.convert_tokens_to_ids(["Ġ", "!"])
    assert ids == [image] * 4 + [space, mark, end]
    assert labels == [-100] * 4 + [space, mark, end]


@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "string"])
def test_encode_equals_apply_chat_template(shape, processor):
    messages, _ = SHAPES[shape]
    picture = Image.new("RGB", (40, 30), "red")
    shown = [
        message
        | {
            "content": [item | {"image": picture} if item["type"] == "image" else item for item in message["content"]]
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
        ([user({"type": "video"})], "content of type 'video' is not text, image or transcript"),
        ([{"role": "tool", "content": "x"}], "role 'tool' is not system, user or assistant"),
    ],
)
def test_wrong_conversations_are_refused(messages, message, processor):
    with pytest.raises(Exception, match=message):
        processor.encode(messages)


def test_prompt_with_more_places_than_images_is_refused(processor):
    with pytest.raises((ValueError, StopIteration)):  # StopIteration: transformers 5.18
        processor(images=[Image.new("RGB", (8, 8))], text=["<image> <image>"])


def test_decoder_without_spare_rows_is_refused(vision_backbone, text_backbone, tmp_path):
    from conftest import TEXT, save_tokenizer

    entries = len(save_tokenizer(tmp_path))
    PhiConfig(**TEXT | {"vocab_size": entries + 1}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"has {entries + 1} vocabulary rows but {entries + 2} are needed"):
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
    picture = Image.effect_noise((40, 30), 50).convert("RGB")
    ours, theirs = (one(images=[picture], text=["<image>a"], return_tensors="pt") for one in (processor, reloaded))
    assert ours.keys() == theirs.keys()
    assert all(ours[key].equal(theirs[key]) for key in ours)
    assert reloaded._get_num_multimodal_tokens([(40, 30), (8, 8)]).num_image_tokens == [4, 4]
    assert reloaded._get_num_multimodal_tokens().num_image_tokens is None
