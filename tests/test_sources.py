import json

import pytest
from PIL import Image

from clip_phi.samples import Sample, Turn, as_messages
from clip_phi.sources.coco import read_coco_captions
from clip_phi.sources.drawn import write_dataset
from clip_phi.sources.instruct import read_llava_instruct


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "train2017"
    folder.mkdir()
    for name in ("000000000007.jpg", "000000000008.jpg"):
        Image.new("RGB", (8, 8), "red").save(folder / name)
    return folder


@pytest.fixture
def write(tmp_path):
    def write_json(content, name="records.json"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write_json


COCO = {
    "info": {},
    "licenses": [],
    "images": [
        {"id": 7, "file_name": "000000000007.jpg", "height": 8, "width": 8},
        {"id": 8, "file_name": "000000000008.jpg", "height": 8, "width": 8},
    ],
    "annotations": [
        {"id": 1, "image_id": 8, "caption": "A dog. "},
        {"id": 2, "image_id": 7, "caption": "A cat."},
        {"id": 3, "image_id": 8, "caption": "The dog."},
    ],
}


def test_coco_captions_become_one_sample_an_image_with_a_branch_a_caption(images, write):
    path = write(COCO)
    assert read_coco_captions(path, images) == [
        Sample(images / "000000000007.jpg", ((Turn("assistant", "A cat."),),), f"{path}:images[0]"),
        Sample(
            images / "000000000008.jpg",
            ((Turn("assistant", "A dog."),), (Turn("assistant", "The dog."),)),
            f"{path}:images[1]",
        ),
    ]


def test_drawn_data_is_read_whole_in_both_official_layouts(tmp_path):
    write_dataset(tmp_path, num_train=6, num_val=3, seed=1)
    for split, count in (("train", 6), ("val", 3)):
        captions = read_coco_captions(tmp_path / f"annotations/captions_{split}2017.json", tmp_path / f"{split}2017")
        conversations = read_llava_instruct(tmp_path / f"llava_instruct_{split}.json", tmp_path / f"{split}2017")
        assert [len(sample.branches) for sample in captions] == [5] * count
        assert [len(sample.branches) for sample in conversations] == [2] * count
        assert [sample.image for sample in captions] == [sample.image for sample in conversations]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotations": [{"image_id": 7}]}, "annotations[0] needs 'image_id' and a text 'caption'"),
        ({"annotations": [{"image_id": 7, "caption": " "}]}, "annotations[0] (image 7) has an empty caption"),
        ({"annotations": [{"image_id": 9, "caption": "x"}]}, "captions for images that it does not list, e.g. image 9"),
        ({"images": [{"id": 7}]}, "images[0] needs 'id' and 'file_name'"),
        ({"images": [{"id": 7, "file_name": "no.jpg"}]}, "images[0]: no image"),
    ],
)
def test_a_bad_coco_record_is_named(images, write, change, message):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        read_coco_captions(write(COCO | change), images)
    assert message in str(caught.value) and "records.json" in str(caught.value)


def test_other_json_is_not_taken_for_coco_or_llava(images, write, tmp_path):
    with pytest.raises(ValueError, match="is not a COCO captions file"):
        read_coco_captions(write([]), images)
    with pytest.raises(ValueError, match="is not a LLaVA-Instruct file"):
        read_llava_instruct(write({}), images)
    with pytest.raises(ValueError, match="is not json"):
        read_llava_instruct(write("{"), images)
    with pytest.raises(FileNotFoundError, match="no such file: .*none.json"):
        read_llava_instruct(tmp_path / "none.json", images)


def record(*values, image="000000000007.jpg"):
    turns = [{"from": "human" if index % 2 == 0 else "gpt", "value": value} for index, value in enumerate(values)]
    return {"id": "1", "conversations": turns} | ({"image": image} if image else {})


def test_llava_conversations_of_one_image_become_branches_and_text_only_records_stand_alone(images, write):
    path = write(
        [
            record("<image>\nWhat is it?", "A cat.", "Sure?", "Yes."),
            record("2 + 2?", "4", image=None),
            record("Describe it.\n<image>", "It is a cat."),
        ]
    )
    assert read_llava_instruct(path, images) == [
        Sample(
            images / "000000000007.jpg",
            (
                (
                    Turn("user", "What is it?"),
                    Turn("assistant", "A cat."),
                    Turn("user", "Sure?"),
                    Turn("assistant", "Yes."),
                ),
                (Turn("user", "Describe it."), Turn("assistant", "It is a cat.")),
            ),
            f"{path}:0",
        ),
        Sample(None, ((Turn("user", "2 + 2?"), Turn("assistant", "4")),), f"{path}:1"),
    ]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (record("no image token", "x"), "turn 0 has 0 <image>, not 1"),
        (record("<image><image> two", "x"), "turn 0 has 2 <image>, not 1"),
        (record("<image> one", "x <image>"), "turn 1 has 1 <image>, not 0"),
        (record("<image>", "x"), "turn 0 is empty"),
        (record("<image> one", " "), "turn 1 is empty"),
        (record("<image> one"), "ends with an answer"),
        (record(), "ends with an answer"),
        ({"image": "000000000007.jpg"}, "needs a list 'conversations'"),
        (
            {"image": "a", "conversations": [{"from": "gpt", "value": "x"}]},
            "turn 0 is from 'gpt'; human and gpt must alternate",
        ),
        ({"image": "a", "conversations": [{"from": "bot", "value": "x"}]}, "turn 0 needs 'from' (human or gpt)"),
        (record("<image> one", "x", image="gone.jpg"), "no image"),
    ],
)
def test_a_bad_llava_record_is_named_by_file_and_number(images, write, bad, message):
    path = write([record("<image> good", "one"), bad])
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        read_llava_instruct(path, images)
    assert str(caught.value).startswith(f"{path}:1") and message in str(caught.value)


def test_messages_put_the_image_first_and_the_transcript_before_the_text():
    branch = (Turn("user", "Answer.", transcript="what is it"), Turn("assistant", "A cat."))
    assert as_messages(branch, has_image=True) == [
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "transcript", "text": "what is it"},
                {"type": "text", "text": "Answer."},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ]
    assert as_messages((Turn("assistant", "A cat."),), has_image=True)[0] == {
        "role": "user",
        "content": [{"type": "image"}],
    }
    assert as_messages((), has_image=False) == []
