import pytest
import torch
from helpers import make_index
from PIL import Image

from clip_phi.batching.dataset import ImageReader, SampleDataset, collate
from clip_phi.batching.images import load_image
from clip_phi.batching.packing import pack_samples
from clip_phi.data.report import Report, Skip
from clip_phi.data.sample import File, Sample, Turn

CAPTIONS = ("a red circle", "one blue square and a star", "yes")


@pytest.fixture
def image(tmp_path):
    Image.new("RGB", (40, 30), "blue").save(tmp_path / "image.png")
    return File(str(tmp_path / "image.png"))


@pytest.fixture
def sample(image):
    return Sample(image, tuple((Turn("assistant", caption),) for caption in CAPTIONS), ("file:3",) * 3)


@pytest.fixture
def dialogue(image):
    turns = (Turn("user", "a circle?"), Turn("assistant", "yes"), Turn("user", "a star?"), Turn("assistant", "no no"))
    return Sample(image, (turns, (Turn("user", "what"), Turn("assistant", "a red circle"))), ("file:4",) * 2)


def build_shared_prefix(sample, processor, max_length=200):
    return make_index([sample], processor, max_length).shared_prefix_sample(0)


def make_pack(dataset, places, processor):
    return collate([dataset[place] for place in places], processor.tokenizer.pad_token_id)


def test_tree_holds_the_image_once_and_predicts_each_branch_from_its_end(sample, processor):
    tree = build_shared_prefix(sample, processor)
    tokenizer, prefix = processor.tokenizer, processor.num_image_tokens
    answers = [
        [*tokenizer.encode(" " + caption, add_special_tokens=False), tokenizer.eos_token_id] for caption in CAPTIONS
    ]
    inputs = [answer[:-1] for answer in answers]
    assert tree.input_ids == [processor.image_token_id] * prefix + sum(inputs, [])
    assert tree.position_ids == list(range(prefix)) + [prefix + place for part in inputs for place in range(len(part))]
    assert tree.conversation_ids == [0] * prefix + [number for number, part in enumerate(inputs, 1) for _ in part]
    assert tree.shift_labels == sum(answers, [])
    expected, offset = [], prefix
    for part in inputs:
        expected += [prefix - 1, *range(offset, offset + len(part))]
        offset += len(part)
    assert tree.logits_to_keep == expected
    assert tree.origin == "file:3"


def test_tree_supervises_answers_and_end_tokens_only(dialogue, processor):
    tree = build_shared_prefix(dialogue, processor)
    tokenizer = processor.tokenizer
    answers = ["yes", "no no", "a red circle"]
    expected = [
        tokenizer.encode(" " + answer, add_special_tokens=False) + [tokenizer.eos_token_id] for answer in answers
    ]
    assert tree.shift_labels == sum(expected, [])


def test_text_only_sample_has_no_prefix(processor):
    sample = Sample(None, ((Turn("user", "a?"), Turn("assistant", "yes")),), ("file:9",))
    tree = build_shared_prefix(sample, processor)
    assert processor.image_token_id not in tree.input_ids
    assert set(tree.conversation_ids) == {1} and tree.position_ids == list(range(len(tree.input_ids)))


@pytest.mark.parametrize(
    ("conversation", "max_length", "message"),
    [
        (
            (Turn("assistant", "a red circle and a star"),),
            7,
            "longer than max_length .e.g. file:5: .* tokens up to the end of the first",
        ),
        ((Turn("user", "a?"),), 100, "question without an answer .e.g. file:5"),
        ((Turn("user", "a <image>?"), Turn("assistant", "yes")), 100, "2 <image> in the rendered text, not 1"),
        ((Turn("user", "a"), Turn("assistant", "<|endoftext|>")), 100, "2 <.endoftext.> in the rendered text, not 1"),
        ((Turn("user", "a", speech=b"x"), Turn("assistant", "b")), 100, "speech without a transcript"),
    ],
)
def test_a_sample_that_cannot_be_learnt_from_is_an_error_or_a_counted_skip(
    image, processor, conversation, max_length, message
):
    samples = [Sample(image, (conversation,), ("file:5",)), Sample(image, ((Turn("assistant", "!"),),), ("file:6",))]
    with pytest.raises(ValueError, match=message):
        make_index(samples, processor, max_length=max_length)
    report = Report()
    index = make_index(samples, processor, max_length, report)
    assert [index.sample(0)] == samples[1:] and report.num_skipped == 1


def test_a_long_conversation_is_cut_behind_the_last_answer_that_fits(image, processor):
    whole = tuple(Turn(("user", "assistant")[number % 2], f"turn {number} of many") for number in range(8))
    lengths = [
        make_index([Sample(image, (whole[:count],), ("x",))], processor, 500).num_tokens()[0] for count in (2, 4, 6, 8)
    ]
    for max_length, count in ((lengths[3], 8), (lengths[3] - 1, 6), (lengths[1], 4), (lengths[1] - 1, 2)):
        report = Report()
        index = make_index([Sample(image, (whole,), ("f:1",))], processor, int(max_length), report)
        alone = make_index([Sample(image, (whole[:count],), ("f:1",))], processor, 500)
        assert index.sample(0) == alone.sample(0) and index.shared_prefix_sample(0) == alone.shared_prefix_sample(0)
        assert sum(report.repaired.values()) == (count < 8) and not report.skipped


def test_a_tree_longer_than_max_length_is_split_and_loses_no_branch(sample, processor):
    lengths = [len(conversation.ids) for conversation in make_index([sample], processor, 200).encoded(0)]
    index = make_index([sample], processor, processor.num_image_tokens + lengths[0] + lengths[1])
    assert [index.sample(number).conversations for number in range(len(index))] == [
        sample.conversations[:2],
        sample.conversations[2:],
    ]
    assert index.num_tokens().tolist() == [4 + lengths[0] + lengths[1], 4 + lengths[2]]


def test_pack_is_one_row_of_trees_without_padding_between_them(sample, dialogue, processor):
    trees = [build_shared_prefix(each, processor) for each in (sample, dialogue)]
    pack = pack_samples(trees, None, processor.tokenizer.pad_token_id)
    ids, positions = pack.inputs["input_ids"][0].tolist(), pack.inputs["position_ids"][0].tolist()
    length = len(trees[0].input_ids) + len(trees[1].input_ids)
    assert ids[:length] == trees[0].input_ids + trees[1].input_ids
    assert set(ids[length:]) <= {processor.tokenizer.pad_token_id} and len(ids) == -(-length // 8) * 8
    assert positions == trees[0].position_ids + trees[1].position_ids + list(range(len(ids) - length))
    kept = trees[0].logits_to_keep + [len(trees[0].input_ids) + place for place in trees[1].logits_to_keep]
    assert pack.inputs["logits_to_keep"].tolist() == [kept]
    assert pack.inputs["shift_labels"].tolist() == [trees[0].shift_labels + trees[1].shift_labels]
    assert pack.num_conversations == 5 and pack.num_supervised == len(trees[0].shift_labels) + len(
        trees[1].shift_labels
    )
    assert pack.origins == ["file:3", "file:4"]


def one_by_one(model, sample, processor, num_items):
    """The plain form: each branch alone, with labels, unpadded."""
    pixel_values = processor.image_processor(load_image(sample.image), return_tensors="pt")["pixel_values"]
    for conversation in sample.conversations:
        tree = build_shared_prefix(Sample(sample.image, (conversation,), ("x",)), processor)
        ids = torch.tensor([tree.input_ids + [tree.shift_labels[-1]]])
        labels = torch.full_like(ids, -100)
        labels[0, torch.tensor(tree.logits_to_keep) + 1] = torch.tensor(tree.shift_labels)
        yield model(input_ids=ids, pixel_values=pixel_values, labels=labels, num_items_in_batch=num_items).loss


def test_tree_loss_and_projector_gradient_equal_one_by_one(packed_model, processor, sample, dialogue):
    model = packed_model
    dataset = SampleDataset([make_index([each], processor, 200) for each in (sample, dialogue)], ImageReader(processor))
    pack = make_pack(dataset, [(0, 0), (0, 1)], processor)
    projector = model.model.projector

    plain = sum(loss for each in (sample, dialogue) for loss in one_by_one(model, each, processor, pack.num_supervised))
    (plain_gradient,) = torch.autograd.grad(plain, [projector.weight])
    loss = model(**pack.inputs, use_cache=False, num_items_in_batch=pack.num_supervised).loss
    (gradient,) = torch.autograd.grad(loss, [projector.weight])

    assert abs(loss.item() / plain.item() - 1) < 1e-6
    assert (gradient - plain_gradient).norm() / plain_gradient.norm() < 1e-5


def test_captions_take_turns_over_the_epochs(sample, processor):
    dataset = SampleDataset([make_index([sample], processor, 100)], ImageReader(processor), conversations_per_image=2)
    one = [
        build_shared_prefix(Sample(sample.image, (conversation,), ("",)), processor).shift_labels
        for conversation in sample.conversations
    ]
    taken = [dataset[epoch, 0][0].shift_labels for epoch in range(3)]
    assert taken == [one[0] + one[1], one[2] + one[0], one[1] + one[2]]


@pytest.fixture
def unreadable(tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"not an image")
    conversations = ((Turn("assistant", "yes"),), (Turn("assistant", "no"),))
    return Sample(File(str(tmp_path / "bad.jpg")), conversations, ("file:8", "file:9"))


def test_an_unreadable_image_takes_its_sample_out_of_the_pack_and_is_told(sample, unreadable, processor):
    dataset = SampleDataset([make_index([unreadable, sample], processor, 100)], ImageReader(processor))
    pack, whole = (
        make_pack(dataset, [(0, 0), (0, 1)], processor),
        make_pack(dataset, [(0, 1)], processor),
    )
    assert pack.skipped == [Skip("not an image", "file:8", pack.skipped[0].detail, records=2)]
    assert "bad.jpg" in pack.skipped[0].detail
    for name in set(whole.inputs) - {"pack_layout"}:
        assert torch.equal(pack.inputs[name], whole.inputs[name])


def test_a_batch_of_nothing_or_of_text_alone_still_reaches_every_trained_weight(packed_model, unreadable, processor):
    text_only = Sample(None, ((Turn("user", "a?"), Turn("assistant", "yes")),), ("file:1",))
    dataset = SampleDataset([make_index([unreadable, text_only], processor, 100)], ImageReader(processor))
    packed_model.train()
    for index, supervised in ((0, 0), (1, 2)):
        pack = make_pack(dataset, [(0, index)], processor)
        loss = packed_model(**pack.inputs, use_cache=False, num_items_in_batch=1).loss
        (gradient,) = torch.autograd.grad(loss, [packed_model.model.projector.weight])
        assert pack.num_supervised == supervised and (loss.item() > 0) == (supervised > 0)
        assert not gradient.any()
