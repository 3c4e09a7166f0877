import pytest
import torch
from PIL import Image

from clip_phi.batching.images import load_image
from clip_phi.batching.loader import EndlessSampler, TreeDataset
from clip_phi.batching.tree import build_tree, pack_trees
from clip_phi.samples import Sample, Turn

CAPTIONS = ("a red circle", "one blue square and a star", "yes")


@pytest.fixture
def image(tmp_path):
    Image.new("RGB", (40, 30), "blue").save(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.fixture
def sample(image):
    return Sample(image, tuple((Turn("assistant", caption),) for caption in CAPTIONS), "file:3")


@pytest.fixture
def dialogue(image):
    turns = (Turn("user", "a circle?"), Turn("assistant", "yes"), Turn("user", "a star?"), Turn("assistant", "no no"))
    return Sample(image, (turns, (Turn("user", "what"), Turn("assistant", "a red circle"))), "file:4")


def test_tree_holds_the_image_once_and_predicts_each_branch_from_its_end(sample, processor):
    tree = build_tree(sample, processor, max_length=100)
    tokenizer, prefix = processor.tokenizer, processor.num_image_tokens
    answers = [
        [*tokenizer.encode(" " + caption, add_special_tokens=False), tokenizer.eos_token_id] for caption in CAPTIONS
    ]
    inputs = [answer[:-1] for answer in answers]
    assert tree.input_ids == [processor.image_token_id] * prefix + sum(inputs, [])
    assert tree.position_ids == list(range(prefix)) + [prefix + place for part in inputs for place in range(len(part))]
    assert tree.branch_ids == [0] * prefix + [number for number, part in enumerate(inputs, 1) for _ in part]
    assert tree.targets == sum(answers, [])
    expected, offset = [], prefix
    for part in inputs:
        expected += [prefix - 1, *range(offset, offset + len(part))]
        offset += len(part)
    assert tree.kept == expected
    assert tree.origin == "file:3"


def test_tree_supervises_answers_and_end_tokens_only(dialogue, processor):
    tree = build_tree(dialogue, processor, max_length=200)
    tokenizer = processor.tokenizer
    answers = ["yes", "no no", "a red circle"]
    expected = [
        tokenizer.encode(" " + answer, add_special_tokens=False) + [tokenizer.eos_token_id] for answer in answers
    ]
    assert tree.targets == sum(expected, [])


def test_text_only_sample_has_no_prefix(processor):
    sample = Sample(None, ((Turn("user", "a?"), Turn("assistant", "yes")),), "file:9")
    tree = build_tree(sample, processor, max_length=100)
    assert processor.image_token_id not in tree.input_ids
    assert set(tree.branch_ids) == {1} and tree.position_ids == list(range(len(tree.input_ids)))


@pytest.mark.parametrize(
    ("branches", "max_length", "message"),
    [
        (((Turn("assistant", "a circle"),),), 5, "file:5: .* tokens are more than --max_length 5"),
        (((Turn("user", "a?"),),), 100, "file:5: branch 1 has no answer to learn from"),
        (((Turn("user", "a <image>?"), Turn("assistant", "yes")),), 100, "file:5: 2 <image> in the text but 1 images"),
    ],
)
def test_a_sample_that_cannot_be_learnt_from_is_named(image, processor, branches, max_length, message):
    with pytest.raises(ValueError, match=message):
        build_tree(Sample(image, branches, "file:5"), processor, max_length)


def test_pack_lets_a_branch_see_the_image_and_itself_only(sample, dialogue, processor):
    trees = [build_tree(each, processor, 200) for each in (sample, dialogue)]
    pack = pack_trees(trees, None, processor.tokenizer.pad_token_id)
    sees = pack.inputs["attention_mask"][:, 0]
    for row, tree in enumerate(trees):
        for query, branch in enumerate(tree.branch_ids):
            wanted = [key for key in range(query + 1) if tree.branch_ids[key] in (0, branch)]
            assert sees[row, query].nonzero().flatten().tolist() == wanted
    assert sees.any(-1).all(), "a position that sees nothing gives NaN"
    assert pack.inputs["input_ids"].shape[1] % 8 == 0
    assert pack.num_branches == 5 and pack.num_supervised == len(trees[0].targets) + len(trees[1].targets)
    assert pack.origins == ["file:3", "file:4"]


def test_pack_of_single_branches_needs_no_mask(image, processor):
    sample = Sample(image, ((Turn("assistant", "yes"),),), "file:1")
    pack = pack_trees([build_tree(sample, processor, 100)] * 2, None, processor.tokenizer.pad_token_id)
    assert set(pack.inputs) == {"input_ids", "logits_to_keep", "shift_labels"}


def one_by_one(model, sample, processor, num_items):
    """The plain form: each branch alone, with labels, unpadded."""
    pixel_values = processor.image_processor(load_image(sample.image), return_tensors="pt")["pixel_values"]
    for branch in sample.branches:
        tree = build_tree(Sample(sample.image, (branch,), "x"), processor, 200)
        ids = torch.tensor([tree.input_ids + [tree.targets[-1]]])
        labels = torch.full_like(ids, -100)
        labels[0, torch.tensor(tree.kept) + 1] = torch.tensor(tree.targets)
        yield model(input_ids=ids, pixel_values=pixel_values, labels=labels, num_items_in_batch=num_items).loss


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_tree_loss_and_projector_gradient_equal_one_by_one(model, processor, sample, dialogue, attention, request):
    request.addfinalizer(lambda: model.set_attn_implementation("sdpa"))
    model.set_attn_implementation(attention)
    dataset = TreeDataset([sample, dialogue], processor, max_length=200)
    pack = dataset.collate([dataset[0, 0], dataset[0, 1]])
    projector = model.model.projector

    plain = sum(loss for each in (sample, dialogue) for loss in one_by_one(model, each, processor, pack.num_supervised))
    (plain_gradient,) = torch.autograd.grad(plain, [projector.weight])
    loss = model(**pack.inputs, use_cache=False, num_items_in_batch=pack.num_supervised).loss
    (gradient,) = torch.autograd.grad(loss, [projector.weight])

    assert abs(loss.item() / plain.item() - 1) < 1e-6
    assert (gradient - plain_gradient).norm() / plain_gradient.norm() < 1e-5


def test_captions_take_turns_over_the_epochs(sample, processor):
    dataset = TreeDataset([sample], processor, max_length=100, branches_per_image=2)
    one = [build_tree(Sample(sample.image, (branch,), ""), processor, 100).targets for branch in sample.branches]
    taken = [dataset[epoch, 0][0].targets for epoch in range(3)]
    assert taken == [one[0] + one[1], one[2] + one[0], one[1] + one[2]]


def test_unreadable_image_names_sample_and_file(tmp_path, processor):
    (tmp_path / "bad.jpg").write_bytes(b"not an image")
    dataset = TreeDataset([Sample(tmp_path / "bad.jpg", ((Turn("assistant", "yes"),),), "file:8")], processor, 100)
    with pytest.raises(ValueError, match=r"file:8: .*bad.jpg is not a readable image"):
        dataset[0, 0]


def test_image_is_turned_upright(tmp_path):
    wide = Image.new("RGB", (20, 10))
    exif = wide.getexif()
    exif[0x0112] = 6  # to be shown rotated by 90 degrees
    wide.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (10, 20)
    assert load_image((tmp_path / "turned.jpg").read_bytes()).size == (10, 20)


def places(**options):
    defaults = {"num_samples": 10, "batch_size": 2, "gradient_accumulation_steps": 2, "seed": 0, "num_steps": 5}
    return [place for batch in EndlessSampler(**(defaults | options)) for place in batch]


def test_every_epoch_sees_every_sample_once_and_steps_are_always_full():
    stream = places()
    assert len(stream) == 20
    assert sorted(stream) == [(epoch, index) for epoch in range(2) for index in range(10)]
    assert [index for _, index in stream[:10]] != [index for _, index in stream[10:]], "epochs have orders of their own"
    assert places(seed=1) != stream


def test_order_is_the_same_for_any_number_of_ranks_and_from_any_step():
    one = places(batch_size=2, gradient_accumulation_steps=2)
    ranks = [places(batch_size=2, gradient_accumulation_steps=1, rank=rank, world_size=2) for rank in range(2)]
    for step in range(5):
        together = [place for rank in ranks for place in rank[2 * step : 2 * step + 2]]
        assert together == one[4 * step : 4 * step + 4]
    assert places(first_step=3) == one[12:]
