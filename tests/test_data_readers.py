"""Readers: every layout to Samples, and every defect to the report. Damage on a larger scale is in test_damage.py."""

import json
import zipfile

import pytest
from PIL import Image

from clip_phi.batching.sampler import Mixture
from clip_phi.data.files import MediaFolder
from clip_phi.data.report import Report, Skip
from clip_phi.data.sample import File, Sample, Turn, as_messages
from clip_phi.data.source import DataSource, parse_source
from clip_phi.data.synthetic import write_dataset

CAT, DOG = "000000000007.jpg", "000000000008.jpg"


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "train2017"
    folder.mkdir()
    for name in (CAT, DOG):
        Image.new("RGB", (8, 8), "red").save(folder / name)
    return folder


@pytest.fixture
def write(tmp_path):
    def write_json(content, name="records.json"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write_json


def read(text, report=None):
    """All Samples of a source; without a report, none may be skipped or mended."""
    found = report or Report()
    source = parse_source(str(text))
    samples = list(source.read(MediaFolder(source.images), found))
    assert report is not None or not (found.skipped or found.repaired), found.table()
    assert found.records == found.num_skipped + sum(len(sample.conversations) for sample in samples)
    return samples


COCO = {
    "info": {},
    "licenses": [],
    "images": [
        {"id": 7, "file_name": CAT, "height": 8, "width": 8},
        {"id": 8, "file_name": DOG, "height": 8, "width": 8},
        {"id": 9, "file_name": "a test image without captions.jpg", "height": 8, "width": 8},
    ],
    "annotations": [
        {"id": 1, "image_id": 8, "caption": "A dog. "},
        {"id": 2, "image_id": 7, "caption": "A cat."},
        {"id": 3, "image_id": 8, "caption": "The dog."},
    ],
}


def captions(*texts):
    return tuple((Turn("assistant", text),) for text in texts)


def test_coco_captions_become_one_sample_an_image_with_a_branch_a_caption(images, write):
    path = write(COCO)
    expected = [
        Sample(File(f"{images}/{CAT}"), captions("A cat."), (f"{path}:annotations[1]",)),
        Sample(
            File(f"{images}/{DOG}"),
            captions("A dog.", "The dog."),
            (f"{path}:annotations[0]", f"{path}:annotations[2]"),
        ),
    ]
    assert read(f"coco:{path},images={images}") == expected
    # The folder above, which is the usual place of the annotations, does as well.
    path = write(COCO, "captions_train2017.json")
    assert [sample.image for sample in read(f"coco:{path}")] == [sample.image for sample in expected]


@pytest.mark.parametrize("root", ["train2017", "train2017.zip", "."])
@pytest.mark.parametrize("inside", ["train2017/", ""])
def test_zip_archives_are_read_unopened_as_downloaded(images, write, tmp_path, root, inside):
    path = write(COCO, "captions_train2017.json")
    with zipfile.ZipFile(tmp_path / "train2017.zip", "w") as archive:
        for image in sorted(images.iterdir()):
            archive.write(image, inside + image.name)
            image.unlink()
    images.rmdir()
    found = [sample.image for sample in read(f"coco:{path},images={tmp_path / root}")]
    assert found == [File(f"{tmp_path}/train2017.zip", inside + name) for name in (CAT, DOG)]
    assert found[0].read()[:2] == b"\xff\xd8"


def test_a_broken_zip_is_named(write, tmp_path):
    (tmp_path / "train2017.zip").write_bytes(b"PK\3\4 half of it")
    with pytest.raises(ValueError, match=r"train2017.zip is not a whole zip archive"):
        read(f"coco:{write(COCO)},images={tmp_path}/train2017.zip")


KARPATHY = {
    "images": [
        {"filepath": "val2014", "filename": "COCO_val2014_000000000007.jpg", "cocoid": 7, "split": "restval"},
        {"filepath": "train2014", "filename": "COCO_train2014_000000000008.jpg", "cocoid": 8, "split": "train"},
        {"filepath": "val2014", "filename": "COCO_val2014_000000000009.jpg", "cocoid": 9, "split": "test"},
        {"filepath": "val2014", "filename": "COCO_val2014_000000000010.jpg", "cocoid": 10, "split": "val"},
    ]
}
for number, image in enumerate(KARPATHY["images"]):
    image["sentences"] = [{"raw": f"Caption {number}."}, {"raw": "It is."}]


@pytest.mark.parametrize(
    "layout", ["{filepath}/{filename}", "{filename}", "train2017/{cocoid:012d}.jpg", "val2017/{cocoid:012d}.jpg"]
)
def test_karpathy_splits_share_no_image_and_find_images_of_2014_and_2017(write, tmp_path, layout):
    path = write(KARPATHY, "dataset_coco.json")
    for image in KARPATHY["images"]:
        file = tmp_path / layout.format(**image)
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"x")
    places = {image["cocoid"]: File(f"{tmp_path}/{layout.format(**image)}") for image in KARPATHY["images"]}
    found = {split: [s.image for s in read(f"karpathy:{path},split={split}")] for split in ("train", "val", "test")}
    assert found == {"train": [places[7], places[8]], "val": [places[10]], "test": [places[9]]}
    assert read(f"karpathy:{path},split=test")[0].conversations == captions("Caption 2.", "It is.")
    with pytest.raises(ValueError, match="no split 'dev': it is one of train, val, test"):
        read(f"karpathy:{path},split=dev")


def test_vqa_gives_the_usual_answer_to_learn_and_all_ten_to_judge_by(write, tmp_path):
    (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014/COCO_val2014_000000000007.jpg").write_bytes(b"x")
    questions = {"data_subtype": "val2014", "questions": [{"question_id": 70, "image_id": 7, "question": "Red?"}]}
    answers = ["yes"] * 6 + ["no"] * 4
    annotations = {"annotations": [{"question_id": 70, "answers": [{"answer": answer} for answer in answers]}]}
    spec = f"vqa:{write(questions, 'q.json')},annotations={write(annotations, 'a.json')}"
    (sample,) = read(spec)
    assert sample.image == File(f"{tmp_path}/val2014/COCO_val2014_000000000007.jpg")
    assert sample.conversations == ((Turn("user", "Red?"), Turn("assistant", "yes", references=tuple(answers))),)
    assert sample.ids == ((0, 70),)
    (unanswered,) = read(spec.split(",")[0])  # for evaluation
    assert unanswered.conversations == ((Turn("user", "Red?"),),) and unanswered.ids == ((0, 70),)


def test_drawn_data_is_read_whole_in_both_official_layouts(tmp_path):
    write_dataset(tmp_path, num_train=6, num_val=3, seed=1)
    for split, count in (("train", 6), ("val", 3)):
        from_captions = read(f"coco:{tmp_path}/annotations/captions_{split}2017.json,images={tmp_path}/{split}2017")
        conversations = read(f"llava:{tmp_path}/llava_instruct_{split}.json,images={tmp_path}/{split}2017")
        assert [len(sample.conversations) for sample in from_captions] == [5] * count
        assert [len(sample.conversations) for sample in conversations] == [2] * count
        assert [sample.image for sample in from_captions] == [sample.image for sample in conversations]


@pytest.mark.parametrize(
    ("change", "kind", "count", "left"),
    [
        ({"annotations": [3, {"image_id": 7, "caption": "x"}]}, "caption without 'image_id'", 1, 1),
        ({"annotations": [{"image_id": 7}]}, "caption is not text", 1, 0),
        ({"annotations": [{"image_id": 7, "caption": " "}, COCO["annotations"][1]]}, "caption is empty", 1, 1),
        ({"annotations": [{"image_id": 10, "caption": "x"}]}, "caption of an image that is not listed", 1, 0),
        ({"annotations": [COCO["annotations"][0]] * 2}, "duplicate caption id", 1, 1),
        ({"images": [{"id": 8}]}, "image name is empty", 2, 0),
        ({"images": [{"id": 8, "file_name": "no.jpg"}]}, "missing image", 2, 0),
        ({"images": [{"id": 8, "file_name": 3}]}, "image name is not text", 2, 0),
        ({"images": [{"file_name": "no.jpg"}, *COCO["images"]]}, "image without 'id'", 1, 3),
        ({"images": [*COCO["images"], COCO["images"][0]]}, "duplicate image id", 1, 3),
    ],
)
def test_a_bad_coco_record_is_skipped_and_counted_by_kind(images, write, change, kind, count, left):
    report = Report()
    samples = read(f"coco:{write(COCO | change)},images={images}", report)
    assert report.skipped[kind] == count and report.examples[kind][0].startswith(f"{images.parent}/records.json:")
    assert sum(len(sample.conversations) for sample in samples) == left


def test_a_file_of_another_form_is_an_error_that_names_it(write, tmp_path):
    for content, spec, message in (
        ([], "coco:{}", "is not a COCO captions file"),
        ([], "karpathy:{}", "is not a Karpathy split"),
        ({}, "llava:{}", "is not a list of records"),
        ({}, "vqa:{},annotations={}", "is not a VQA file: it needs a list 'questions'"),
        ("{", "llava:{}", "is not json"),
        ("[" * 100_000, "llava:{}", "is not json"),
    ):
        path = write(content)
        with pytest.raises(ValueError, match=f"records.json {message}"):
            read(spec.format(path, path))
    with pytest.raises(FileNotFoundError, match=r"no such file: .*none.json"):
        read(f"llava:{tmp_path}/none.json")


def record(*values, image=CAT, **more):
    turns = [{"from": "human" if index % 2 == 0 else "gpt", "value": value} for index, value in enumerate(values)]
    return {"id": "1", "conversations": turns} | ({"image": image} if image else {}) | more


def turns(*texts):
    return tuple(Turn("user" if index % 2 == 0 else "assistant", text) for index, text in enumerate(texts))


def test_llava_conversations_of_one_image_become_branches_and_text_only_records_stand_alone(images, write):
    path = write(
        [
            record("<image>\nWhat is it?", "A cat.", "Sure?", "Yes."),
            record("2 + 2?", "4", image=None),
            record("Describe it.\n<image>", "It is a cat."),
        ]
    )
    assert read(f"llava:{path},images={images}") == [
        Sample(
            File(f"{images}/{CAT}"),
            (turns("What is it?", "A cat.", "Sure?", "Yes."), turns("Describe it.", "It is a cat.")),
            (f"{path}:0", f"{path}:2"),
        ),
        Sample(None, (turns("2 + 2?", "4"),), (f"{path}:1",)),
    ]


def test_image_names_may_have_subfolders_be_absolute_or_lie_in_a_zip_of_their_folder(images, write, tmp_path):
    (tmp_path / "gqa").mkdir()
    (tmp_path / "gqa/1.jpg").write_bytes(b"gqa")
    with zipfile.ZipFile(tmp_path / "ocr.zip", "w") as archive:
        archive.writestr("ocr/2.jpg", b"ocr")
    names = ["gqa/1.jpg", "ocr/2.jpg", str(images / CAT)]
    path = write([record("<image> a", "b", image=name) for name in names], "mix.json")
    found = [sample.image for sample in read(f"llava:{path},images={tmp_path}")]
    assert found == [File(f"{tmp_path}/gqa/1.jpg"), File(f"{tmp_path}/ocr.zip", "ocr/2.jpg"), File(str(images / CAT))]
    assert [image.read()[:3] for image in found] == [b"gqa", b"ocr", b"\xff\xd8\xff"]


def messages(*contents):
    return [{"role": "user" if index % 2 == 0 else "assistant", "content": text} for index, text in enumerate(contents)]


@pytest.mark.parametrize(
    ("row", "conversations"),
    [
        ({"messages": messages("Hi?", "Yes.")}, (turns("Hi?", "Yes."),)),
        (
            {
                "image": CAT,
                "messages": messages(
                    [{"type": "text", "text": "What?"}, {"type": "image", "text": None}],
                    [{"type": "text", "text": "A."}],
                ),
            },
            (turns("What?", "A."),),
        ),
        ({"prompt": messages("Hi?"), "completion": [messages("", "Yes.")[1]]}, (turns("Hi?", "Yes."),)),
        ({"prompt": "Hi?", "completion": "Yes."}, (turns("Hi?", "Yes."),)),
        (
            {"messages": [{"role": "system", "content": "Be brief."}, *messages("Hi?", "Yes.")]},
            ((Turn("system", "Be brief."), *turns("Hi?", "Yes.")),),
        ),
        ({"messages": [{"role": "system", "content": " "}, *messages("Hi?", "Yes.")]}, (turns("Hi?", "Yes."),)),
        ({"image": CAT, "question": "Red?", "answer": "no"}, (turns("Red?", "no"),)),
        (
            {"image": CAT, "question": "Red?", "answers": ["no", "yes", "yes"]},
            ((Turn("user", "Red?"), Turn("assistant", "yes", references=("no", "yes", "yes"))),),
        ),
        ({"image": CAT, "captions": ["A cat.", "A cat."]}, captions("A cat.", "A cat.")),
        ({"image": CAT, "caption": "A cat."}, captions("A cat.")),
        ({"images": [CAT], "text": "A cat."}, captions("A cat.")),
        (
            {"file_name": CAT, "question": "Describe.", "answer": ["A cat.", "It."]},
            ((Turn("user", "Describe."), Turn("assistant", "A cat.", references=("A cat.", "It."))),),
        ),
        (
            {
                "image": CAT,
                "messages": [{"role": "user", "content": "Say.", "transcript": "go on"}, messages("", "b")[1]],
            },
            ((Turn("user", "Say.", transcript="go on"), Turn("assistant", "b")),),
        ),
    ],
)
@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_every_layout_of_a_row_is_read_from_json_and_jsonl(images, write, row, conversations, form):
    path = write([row], "rows.json") if form == "json" else write(f"\n{json.dumps(row)}\n", "rows.jsonl")
    (sample,) = read(f"llava:{path},images={images}")
    assert sample.conversations == conversations
    assert sample.image == (File(f"{images}/{CAT}") if CAT in str(row) else None)
    assert sample.origins == (f"{path}:{0 if form == 'json' else 2}",) * len(conversations)


def test_a_recording_beside_a_turn_is_found_like_an_image(images, write, tmp_path):
    (images / "a.wav").write_bytes(b"RIFF")
    row = record("<image> a", "b")
    row["conversations"][0]["speech"] = "a.wav"
    (sample,) = read(f"llava:{write([row])},images={images}")
    assert sample.conversations[0][0] == Turn("user", "a", speech=File(f"{images}/a.wav"))
    row["conversations"][0]["speech"] = "b.wav"
    report = Report()
    assert read(f"llava:{write([row])},images={images}", report) == [] and report.skipped == {"missing speech": 1}


BAD = [
    (3, "record is not an object"),
    ({"image": CAT}, "no conversation, question or caption"),
    ({"image": CAT, "conversations": []}, "conversation is empty"),
    ({"image": CAT, "conversations": "x"}, "conversation is not a list of turns"),
    ({"image": CAT, "conversations": ["x"]}, "turn is not an object"),
    ({"image": CAT, "conversations": [{"from": "bot", "value": "x"}]}, "unknown speaker"),
    ({"image": CAT, "conversations": [{"value": "x"}]}, "unknown speaker"),
    ({"image": CAT, "conversations": [{"from": "gpt", "value": "x"}]}, "first turn is an answer"),
    ({"conversations": [{"from": "human", "value": "x"}] * 2}, "two questions in a row"),
    ({"conversations": [*record("a", "b")["conversations"], {"from": "gpt", "value": "x"}]}, "two answers in a row"),
    ({"messages": [*messages("a", "b"), {"role": "system", "content": "x"}]}, "system turn is not the first"),
    ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "content is not text or image"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content text is not text"),
    ({"prompt": "x", "completion": 3}, "prompt or completion is neither text nor a list"),
    ({"question": "x", "answer": "y", "history": 7}, "history is not a list of questions with answers"),
    ({"question": "x", "answers": []}, "answers are not a list, or it is empty"),
    ({"caption": "x"}, "caption without an image"),
    ({"image": CAT, "captions": []}, "no caption"),
    (record("<image><image> two", "x"), "several <image> for one image"),
    (record("<image> one", "x <image>"), "<image> outside a question"),
    (record("<image> one", "x", image=None), "<image> without an image"),
    (record("<image>", "x"), "question is empty"),
    (record("<image> one", " "), "answer is empty"),
    (record("<image> one", None), "answer is not text"),
    (record("<image> one", "\ud800"), "answer is not valid Unicode"),
    (record("<image> one"), "no answer"),
    (record("<image> one", "x", image="gone.jpg"), "missing image"),
    (record("<image> one", "x", image="."), "missing image"),
    (record("<image> one", "x", image="a\0b"), "image name is not valid"),
    (record("<image> one", "x", image=7), "image name is not text"),
    (record("<image> one", "x", image=[CAT, DOG]), "<image> not once for each image"),
    (record("<image> good", "one"), "duplicate record"),
]


@pytest.mark.parametrize(("bad", "kind"), BAD, ids=[f"{kind}-{number}" for number, (_, kind) in enumerate(BAD)])
def test_a_bad_record_is_skipped_and_counted_by_kind_with_its_file_and_number(images, write, bad, kind):
    path = write([record("<image> good", "one"), bad])
    report = Report()
    (sample,) = read(f"llava:{path},images={images}", report)
    assert sample.origins == (f"{path}:0",)
    assert report.skipped == {kind: 1} and report.records == 2
    assert report.examples[kind][0].startswith(f"{path}:1")


@pytest.mark.parametrize(
    ("row", "kind", "conversation"),
    [
        (
            record("no image token", "x"),
            "image without <image> in the text was put first",
            turns("no image token", "x"),
        ),
        (
            record("a", "b", "c <image>", "d"),
            "image stood in a later turn, and was put first",
            turns("a", "b", "c", "d"),
        ),
        (record("<image> a", "b", "c"), "last question has no answer, and was cut", turns("a", "b")),
    ],
)
def test_what_can_be_mended_is_used_and_counted(images, write, row, kind, conversation):
    report = Report()
    (sample,) = read(f"llava:{write([row])},images={images}", report)
    assert sample.conversations == (conversation,) and report.repaired == {kind: 1} and not report.skipped


def test_a_line_that_is_not_json_is_counted_and_the_others_are_read(write):
    path = write(
        f"{json.dumps(record('a', 'b', image=None))}\n{{half\n\n" + json.dumps({"messages": messages("c", "d")}),
        "r.jsonl",
    )
    report = Report()
    samples = read(f"llava:{path}", report)
    assert [sample.origins for sample in samples] == [(f"{path}:1",), (f"{path}:4",)]
    assert report.skipped == {"line is not json": 1} and report.examples["line is not json"][0].startswith(
        f"{path}:2: "
    )


def test_report_stops_only_above_the_share_and_names_kinds_and_ways_out():
    report = Report(records=200)
    for number in range(2):
        report.skip(Skip("missing image", f"f.json:{number}", "x.jpg"))
    report.refuse_bad(0.01)
    with pytest.raises(ValueError, match="2 of 200 records are bad"):
        report.refuse_bad(0)
    report.skip(Skip("caption is empty", "f.json:9", ""))
    with pytest.raises(ValueError) as caught:
        report.refuse_bad(0.01)
    assert str(caught.value) == (
        "3 of 200 records are bad (1.50%), more than --max_bad_fraction 0.01 allows:\n"
        "  skipped 2: missing image (e.g. f.json:0: x.jpg)\n"
        "  skipped 1: caption is empty (e.g. f.json:9)\n"
        "Repair them, or allow more with --max_bad_fraction."
    )


def test_report_counts_what_every_epoch_meets_again_once_and_survives_json():
    report = Report(records=10)
    for _ in range(3):
        report.skip_once([Skip("damaged image", "f.json:3", "x.jpg", 2), Skip("cut", "f.json:4", "9 tokens", 0)])
    assert report.skipped == {"damaged image": 2} and report.repaired == {"cut": 1}
    assert Report.from_dict(json.loads(json.dumps(report.as_dict()))).as_dict() == report.as_dict()


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("coco:a.json", DataSource("coco", "a.json")),
        (
            "coco:/d/a,b.json,images=/d/x:y,weight=2",
            DataSource("coco", "/d/a,b.json", {"images": "/d/x:y", "weight": "2"}),
        ),
        ("dataset:user/name:split=train", DataSource("dataset", "user/name", {"split": "train"})),
        ("user/name,streaming=true", DataSource("dataset", "user/name", {"streaming": "true"})),
        ("x/rows.parquet", DataSource("dataset", "x/rows.parquet")),
    ],
)
def test_a_source_is_read_from_its_text(text, source):
    assert parse_source(text) == source


def test_the_kind_of_a_bare_path_is_told_from_its_content(tmp_path, write):
    write_dataset(tmp_path / "drawn", num_train=2, num_val=1)
    captions_json = f"{tmp_path}/drawn/annotations/captions_train2017.json"
    assert parse_source(f"{tmp_path}/drawn") == DataSource("coco", captions_json, {"images": f"{tmp_path}/drawn"})
    assert len(read(tmp_path / "drawn")) == 2
    for content, name, kind in (
        (COCO, "a.json", "coco"),
        (KARPATHY, "b.json", "karpathy"),
        ({"questions": []}, "c.json", "vqa"),
        ([], "d.json", "llava"),
        ("", "e.jsonl", "llava"),
    ):
        assert parse_source(str(write(content, name))).kind == kind


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("coco:", "has no path"),
        ("coco:a.json,image=b", "has no option image: coco has images, name, weight"),
        ("coco:a.json,weight=0", "weight must be a number above 0"),
        ("coco:a.json,weight=much", "weight must be a number above 0"),
        ("dataset:a/b,streaming=yes", "streaming is true or false"),
        ("nothing.json", "no such file: nothing.json"),
        ("README.md", "is of no known kind"),
        ("tests", "is of no known kind"),
    ],
)
def test_a_bad_source_is_one_line_that_says_why(text, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        parse_source(text)
    assert "\n" not in str(caught.value)


def places(mixture, epochs):
    return [
        [mixture.place(epoch * mixture.length + place) for place in range(mixture.length)] for epoch in range(epochs)
    ]


def test_a_proportional_mixture_passes_once_over_everything_in_an_epoch():
    one, two = places(Mixture([7, 3], None, seed=0), 2)
    assert sorted(one) == [(0, index) for index in range(10)] and sorted(two) == [(1, index) for index in range(10)]
    assert [index for _, index in one] != [index for _, index in two]
    assert places(Mixture([7, 3], None, seed=0), 2) == [one, two] != places(Mixture([7, 3], None, seed=1), 2)


def test_a_weighted_mixture_keeps_its_shares_and_wastes_no_sample():
    mixture = Mixture([90, 10], [1, 1], seed=3)
    epochs = places(mixture, 9)
    small = [place for epoch in epochs for place in epoch if place[1] >= 90]
    assert all(sum(index >= 90 for _, index in epoch) == 50 for epoch in epochs)
    assert sorted(small) == [(number, index) for number in range(45) for index in range(90, 100)]
    large = [place for epoch in epochs for place in epoch if place[1] < 90]
    assert sorted(large) == [(number, index) for number in range(5) for index in range(90)]
    assert [mixture.place(position) for position in (850, 3, 851)] == [epochs[8][50], epochs[0][3], epochs[8][51]]


def test_rounding_leaves_no_place_of_an_epoch_empty():
    mixture = Mixture([5, 5, 7], [1, 1, 1], seed=0)
    assert sorted(mixture.counts) == [5, 6, 6] and len(places(mixture, 1)[0]) == 17
    with pytest.raises(ValueError, match=r"a source has no place in an epoch: \[1000, 10\] samples"):
        Mixture([1000, 10], [1, 1e-9], seed=0)


def test_messages_put_image_then_transcript_then_text():
    conversation = (Turn("user", "Answer.", transcript="what is it"), Turn("assistant", "A cat."))
    assert as_messages(conversation, num_images=1) == [
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
    assert as_messages((Turn("assistant", "A cat."),), num_images=1)[0] == {
        "role": "user",
        "content": [{"type": "image"}],
    }
    assert as_messages((), num_images=0) == []
