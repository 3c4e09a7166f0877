"""Every layout of table that people publish, at the size of a few rows: what comes out, and what is told of damage."""

import io
import json
import tarfile
from itertools import islice

import datasets
import pytest
import torch
from PIL import Image

from clip_phi.batching.images import load_image
from clip_phi.data.files import MediaFolder
from clip_phi.data.hf_dataset import open_table, read_table, stream_table
from clip_phi.data.report import Report
from clip_phi.data.sample import File, Sample, Turn
from clip_phi.data.schema import ANY_LAYOUT, Layout

TEXT = datasets.Value("string")
IMAGE = {"bytes": datasets.Value("binary"), "path": TEXT}
VSFT = datasets.Features(
    {
        "messages": datasets.List(
            {
                "content": datasets.List({"index": datasets.Value("int64"), "text": TEXT, "type": TEXT}),
                "role": TEXT,
            }
        ),
        "images": datasets.List(datasets.Image()),
    }
)
COCO = datasets.Features({"image": datasets.Image(), "caption": datasets.List(TEXT), "id": TEXT})


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """datasets has read its environment by now, so that only its config can be changed."""
    for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, tmp_path / "cache" / name)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.01)  # seconds after each pass of parquet


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), (number, 255 - number, 7)).save(file, "png")
    return file.getvalue()


def cell(number: int) -> dict:
    return {"bytes": png(number), "path": None}


def captions(numbers, **options) -> datasets.Dataset:
    rows = [{"image": cell(n), "caption": [f"{n}", f"{n} again"], "id": f"k{n}"} for n in numbers]
    return datasets.Dataset.from_list(rows, features=COCO, **options)


def vsft(number: int) -> dict:
    def content(*texts):
        return [{"index": None, "text": text, "type": "text" if text else "image"} for text in texts]

    messages = [("user", content(f"What is {number}?", None)), ("assistant", content("It is\n", "that"))]
    return {
        "messages": [{"role": role, "content": parts} for role, parts in messages],
        "images": [cell(number)],
    }


def write_tar(path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def write_lines(path, rows) -> None:
    path.write_text("\n".join(json.dumps(row) for row in rows))


def read(path, media=None, layout=ANY_LAYOUT, **options) -> tuple[list[Sample], Report]:
    report = Report()
    table = open_table(str(path), **options)
    return list(read_table(table, MediaFolder(media or path.parent), report, layout)), report


def dialogue(question: str, answer: str, references=()) -> tuple[Turn, ...]:
    return (Turn("user", question), Turn("assistant", answer, references=references))


def image_of(sample: Sample) -> bytes:
    """Its bytes, which must lie in an Arrow file and be an image."""
    assert isinstance(sample.image, File) and sample.image.path.endswith(".arrow"), sample.image
    assert load_image(sample.image.read()).size == (4, 3)
    return sample.image.read()


def test_messages_with_lists_of_images_are_read_from_parquet(tmp_path):
    datasets.Dataset.from_list([vsft(1), vsft(2)], features=VSFT).to_parquet(tmp_path / "mix.parquet")
    samples, report = read(tmp_path / "mix.parquet")
    assert [sample.conversations for sample in samples] == [(dialogue(f"What is {n}?", "It is\nthat"),) for n in (1, 2)]
    assert [sample.origins for sample in samples] == [("mix.parquet:0",), ("mix.parquet:1",)]
    assert [image_of(sample) for sample in samples] == [png(1), png(2)]
    assert samples[1].image.member == "1/images/0"
    assert report == Report(records=2)


def test_prompt_and_completion_columns_are_one_conversation(tmp_path):
    turns = datasets.List({"role": TEXT, "content": TEXT})
    features = datasets.Features({"images": datasets.List(datasets.Image()), "prompt": turns, "completion": turns})
    row = {
        "images": [cell(3)],
        "prompt": [{"role": "user", "content": "Is it red?"}],
        "completion": [{"role": "assistant", "content": "No"}],
    }
    datasets.Dataset.from_list([row], features=features).to_parquet(tmp_path / "trl.parquet")
    samples, _ = read(tmp_path / "trl.parquet")
    assert [sample.conversations for sample in samples] == [(dialogue("Is it red?", "No"),)]
    assert image_of(samples[0]) == png(3)


def test_a_list_of_answers_is_the_accepted_ones_unless_a_column_option_makes_them_captions(tmp_path):
    row = {"image": cell(5), "question": "Describe.", "answer": ["5", "5 again"]}
    features = datasets.Features({"image": datasets.Image(), "question": TEXT, "answer": datasets.List(TEXT)})
    datasets.Dataset.from_list([row], features=features).to_parquet(tmp_path / "coco.parquet")
    (sample,), _ = read(tmp_path / "coco.parquet")
    assert sample.conversations == (dialogue("Describe.", "5", ("5", "5 again")),)
    samples, report = read(tmp_path / "coco.parquet", layout=Layout({"caption": "answer"}))
    assert samples[0].conversations == ((Turn("assistant", "5"),), (Turn("assistant", "5 again"),))
    assert samples[0].origins == ("coco.parquet:0", "coco.parquet:0")
    assert report == Report(records=2)


def test_the_most_frequent_of_the_answers_of_vqa_is_learnt(tmp_path):
    features = {"image": datasets.Image(), "question": TEXT, "answers": datasets.List({"answer": TEXT})}
    row = {"image": cell(1), "question": "Colour?", "answers": [{"answer": text} for text in ("red", "blue", "blue")]}
    datasets.Dataset.from_list([row], features=datasets.Features(features)).to_parquet(tmp_path / "vqa.parquet")
    samples, _ = read(tmp_path / "vqa.parquet")
    assert samples[0].conversations == (dialogue("Colour?", "blue", ("red", "blue", "blue")),)


def test_coco_without_bytes_finds_its_files_also_a_folder_above(tmp_path):
    (tmp_path / "coco" / "train2017").mkdir(parents=True)
    name = "000000000009.jpg"
    (tmp_path / "coco" / "train2017" / name).write_bytes(png(9))
    row = {"file_name": name, "coco_url": f"http://images.cocodataset.org/train2017/{name}", "captions": ["a", "b"]}
    missing = {"file_name": "1.jpg", "coco_url": "http://images.cocodataset.org/val2017/1.jpg", "captions": ["c", "d"]}
    datasets.Dataset.from_list([row, missing]).to_parquet(tmp_path / "coco.parquet")
    for folder in (tmp_path / "coco", tmp_path / "coco" / "train2017"):
        samples, report = read(tmp_path / "coco.parquet", media=folder)
        conversations = ((Turn("assistant", "a"),), (Turn("assistant", "b"),))
        origins = ("coco.parquet:0", "coco.parquet:0")
        assert samples == [Sample(File(str(tmp_path / "coco" / "train2017" / name)), conversations, origins)]
        assert report.skipped == {"missing image": 2}  # both captions


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_rows_of_json_about_one_named_image_are_one_sample(tmp_path, suffix):
    (tmp_path / "a.png").write_bytes(png(1))

    def turns(question, answer):
        return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]

    rows = [
        {"id": 1, "image": "a.png", "conversations": turns("<image>\nOne?", "Yes")},
        {"id": "text", "conversations": turns("Two?", "No")},
        {"id": 3, "image": "a.png", "conversations": turns("<image>\nThree?", "So")},
    ]
    path = tmp_path / f"mix.{suffix}"
    write_lines(path, rows) if suffix == "jsonl" else path.write_text(json.dumps(rows))
    samples, report = read(path)
    both = (dialogue("One?", "Yes"), dialogue("Three?", "So"))
    assert samples == [
        Sample(File(str(tmp_path / "a.png")), both, (f"{path.name}:0", f"{path.name}:2")),
        Sample(None, (dialogue("Two?", "No"),), (f"{path.name}:1",)),
    ]
    assert report == Report(records=3)


def test_contents_that_are_now_text_and_now_a_list_come_out_as_they_are(tmp_path):
    """datasets makes a Json feature of such a column."""
    answer = {"role": "assistant", "content": [{"type": "text", "text": "a"}]}
    write_lines(tmp_path / "mixed.jsonl", [{"messages": [{"role": "user", "content": "q"}, answer]}])
    assert "Json" in str(open_table(str(tmp_path / "mixed.jsonl")).features)
    samples, _ = read(tmp_path / "mixed.jsonl")
    assert samples == [Sample(None, (dialogue("q", "a"),), ("mixed.jsonl:0",))]


def test_sequences_and_large_lists_of_turns_are_lists_of_turns(tmp_path):
    columns = {"from": ["human", "gpt"], "value": ["<image>q", "a"]}
    turn = {"from": TEXT, "value": TEXT}
    turns = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]
    for name, feature, value in (
        ("sequence", datasets.Sequence(turn), columns),
        ("list", datasets.List(turn), turns),
        ("large", datasets.LargeList(turn), turns),
    ):
        features = datasets.Features({"image": datasets.Image(), "conversations": feature})
        table = datasets.Dataset.from_list([{"image": cell(1), "conversations": value}], features=features)
        table.to_parquet(tmp_path / f"{name}.parquet")
        samples, report = read(tmp_path / f"{name}.parquet")
        assert [sample.conversations for sample in samples] == [(dialogue("q", "a"),)], report.table()
        assert image_of(samples[0]) == png(1)


def test_recordings_in_turns_are_bytes_or_files(tmp_path):
    (tmp_path / "b.wav").write_bytes(b"RIFF")
    for value, expected in (({"bytes": b"wav", "path": None}, b"wav"), ({"path": "b.wav"}, File(f"{tmp_path}/b.wav"))):
        turns = datasets.List({"role": TEXT, "content": TEXT, "speech": IMAGE})
        messages = [{"role": "user", "content": "q", "speech": value}, {"role": "assistant", "content": "a"}]
        table = datasets.Dataset.from_list([{"messages": messages}], features=datasets.Features({"messages": turns}))
        (sample,) = read_table(table, MediaFolder(tmp_path), Report())
        assert sample.conversations[0][0] == Turn("user", "q", speech=expected)


def test_parquet_that_datasets_did_not_write_has_images_all_the_same(tmp_path):
    """No Image feature says that these are images: a column of bytes, and a struct of bytes and path."""
    for name, feature, value in (("raw", datasets.Value("binary"), png(4)), ("struct", IMAGE, cell(4))):
        features = datasets.Features({"image": feature, "caption": TEXT})
        table = datasets.Dataset.from_list([{"image": value, "caption": "c"}], features=features)
        table.to_parquet(tmp_path / f"{name}.parquet")
        samples, _ = read(tmp_path / f"{name}.parquet")
        assert [image_of(sample) for sample in samples] == [png(4)]


def test_images_are_found_in_the_right_file_of_many_and_in_slices(tmp_path):
    (tmp_path / "many").mkdir()
    for shard in range(3):
        captions(range(4 * shard, 4 * shard + 4)).to_parquet(tmp_path / "many" / f"train-{shard}.parquet")
    captions(range(12)).save_to_disk(tmp_path / "saved", num_shards=3)
    glob, folder, saved = tmp_path / "many" / "train-*.parquet", tmp_path / "many", tmp_path / "saved"
    for path in (glob, folder, saved):
        for split, numbers in (
            ("train", range(12)),
            ("train[:25%]", range(3)),
            ("train[5:9]", range(5, 9)),
            ("train[10:]+train[:5]", [10, 11, 0, 1, 2, 3, 4]),
        ):
            samples, _ = read(path, split=split)
            assert [sample.conversations[0][0].text for sample in samples] == [str(number) for number in numbers]
            assert [image_of(sample) for sample in samples] == [png(number) for number in numbers]
            assert [sample.origins[0] for sample in samples] == [f"{path.name}:{row}" for row in range(len(samples))]
    assert len({sample.image.path for sample in read(saved)[0]}) == 3


def test_columns_of_bytes_may_have_slashes_in_their_names(tmp_path):
    rows = [{"image": cell(n), "mask/png": png(99), "all/masks": [cell(n)], "caption": f"{n}"} for n in (1, 2)]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "train.parquet")
    for column, number in (("image", 2), ("mask/png", 99), ("all/masks", 2)):
        layout = Layout({"image": column, "caption": "caption"})
        samples, _ = read(tmp_path / "train.parquet", layout=layout)
        assert image_of(samples[1]) == png(number) and len(samples) == 2


def test_an_arrow_file_is_a_table(tmp_path):
    captions([1, 2]).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    assert [image_of(sample) for sample in read(file)[0]] == [png(1), png(2)]


def test_a_split_of_a_saved_dict_is_chosen_by_name(tmp_path):
    both = datasets.DatasetDict({"train": captions([1]), "test": captions([2])})
    both.save_to_disk(tmp_path / "both")
    assert [image_of(sample) for sample in read(tmp_path / "both", split="test")[0]] == [png(2)]


def test_shuffled_filtered_and_renamed_tables_keep_image_and_text_together(tmp_path):
    captions(range(20)).to_parquet(tmp_path / "c.parquet")
    table = open_table(str(tmp_path / "c.parquet"))
    renamed = table.rename_column("image", "jpg")
    new = captions([50]).cast_column("image", datasets.Image(decode=False))
    joined = datasets.concatenate_datasets([table.select([7, 3]), new, table.select(range(9, 11))])
    for changed in (table.shuffle(seed=1), table.select([3, 3, 19]), table.select(range(4, 9)), renamed, joined):
        samples = list(read_table(changed, MediaFolder(tmp_path), Report()))
        texts = [int(sample.conversations[0][0].text) for sample in samples]
        assert texts == [int(caption[0]) for caption in changed["caption"]]
        images = [sample.image if isinstance(sample.image, bytes) else sample.image.read() for sample in samples]
        assert images == [png(number) for number in texts]


def test_a_table_in_memory_gives_the_bytes_themselves(tmp_path):
    assert [sample.image for sample in read_table(captions([1, 2]), MediaFolder(tmp_path), Report())] == [
        png(1),
        png(2),
    ]
    table = datasets.Dataset.from_list([vsft(3)], features=VSFT)
    assert [sample.image for sample in read_table(table, MediaFolder(tmp_path), Report())] == [png(3)]


def test_nothing_is_decoded(tmp_path):
    """Nested ones included: what is not an image would raise in PIL."""
    rows = [{"messages": vsft(1)["messages"], "images": [{"bytes": b"no image", "path": None}]}]
    datasets.Dataset.from_list(rows, features=VSFT).to_parquet(tmp_path / "bad.parquet")
    table = open_table(str(tmp_path / "bad.parquet"))
    assert table[0]["images"] == rows[0]["images"]
    assert next(iter(open_table(str(tmp_path / "bad.parquet"), streaming=True)))["images"] == rows[0]["images"]


def test_webdataset_of_images_and_texts(tmp_path):
    members = {f"{n}.{kind}": content for n in range(3) for kind, content in (("png", png(n)), ("txt", b"text %d" % n))}
    write_tar(tmp_path / "web.tar", members)
    samples, report = read(tmp_path / "web.tar")
    assert [sample.conversations for sample in samples] == [((Turn("assistant", f"text {n}"),),) for n in range(3)]
    assert [image_of(sample) for sample in samples] == [png(n) for n in range(3)]
    assert report == Report(records=3)


def test_webdataset_with_conversations_in_json_that_names_the_image_too(tmp_path):
    record = {"image": "coco/1.jpg", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    (tmp_path / "web").mkdir()
    write_tar(tmp_path / "web" / "0.tar", {"1.jpg": png(1), "1.json": json.dumps(record).encode()})
    samples, report = read(tmp_path / "web")
    assert [sample.conversations for sample in samples] == [(dialogue("q", "a"),)]
    assert [image_of(sample) for sample in samples] == [png(1)]
    assert samples[0].origins == ("web:0",)
    assert report.repaired == {"image without <image> in the text was put first": 1}


def test_imagefolder_with_metadata_points_to_the_files(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(2):
        (folder / f"{number}.png").write_bytes(png(number))
    write_lines(folder / "metadata.jsonl", [{"file_name": f"{n}.png", "text": f"number {n}"} for n in range(2)])
    samples, _ = read(folder)
    assert samples == [
        Sample(File(str(folder / f"{n}.png")), ((Turn("assistant", f"number {n}"),),), (f"pictures:{n}",))
        for n in range(2)
    ]


def test_a_text_beside_the_images_of_a_folder_is_left_out_and_counted(tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("0.png", "1.HEIC", "2.avif"):
        (folder / name).write_bytes(png(1))
    (folder / "notes.txt").write_text("not a caption")
    lines = [{"file_name": name, "text": f"image {name}"} for name in ("0.png", "1.HEIC", "2.avif")]
    write_lines(folder / "metadata.jsonl", lines)
    samples, report = read(folder)
    assert [sample.conversations[0][0].text for sample in samples] == ["image 0.png", "image 1.HEIC", "image 2.avif"]
    assert not report.skipped and f"{folder}: 1 files are left out: 1 x .txt" in capsys.readouterr().err


def test_csv_names_images_that_may_be_missing(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "c.csv").write_text("image,caption\na.png,one\nb.png,two\n,three\n")
    samples, report = read(tmp_path / "c.csv")
    origin = ("c.csv:0",)
    assert samples == [Sample(File(str(tmp_path / "a.png")), ((Turn("assistant", "one"),),), origin)]
    assert report.skipped == {"missing image": 1, "caption without an image": 1}


def test_a_folder_called_like_a_format_is_a_folder(tmp_path, monkeypatch):
    (tmp_path / "parquet").mkdir()
    captions([1]).to_parquet(tmp_path / "parquet" / "x.parquet")
    monkeypatch.chdir(tmp_path)
    assert len(open_table("parquet")) == 1


def test_damaged_rows_are_counted_each_under_its_kind(tmp_path):
    rows = [vsft(n) for n in range(7)]
    rows[1]["images"] = []
    rows[2]["messages"] = None
    rows[3]["messages"][0]["role"] = "robot"
    rows[4]["images"] = [cell(1), cell(2)]
    rows[5]["images"] = [{"bytes": b"", "path": None}]
    rows[6]["images"] = None
    datasets.Dataset.from_list(rows, features=VSFT).to_parquet(tmp_path / "damaged.parquet")
    expected = {
        "<image> without an image": 2,
        "no conversation, question or caption": 1,
        "unknown speaker": 1,
        "<image> not once for each image": 1,
        "image is empty": 1,
    }
    samples, report = read(tmp_path / "damaged.parquet")
    assert [sample.origins for sample in samples] == [("damaged.parquet:0",)]
    assert (report.records, report.skipped) == (7, expected)
    streamed = Report()
    stream = stream_table(str(tmp_path / "damaged.parquet"), MediaFolder(tmp_path), streamed)
    assert [sample.image for sample in islice(stream, 3)] == [png(0)] * 3
    assert (streamed.records, streamed.skipped) == (7, expected)


def test_a_null_image_is_no_image(tmp_path):
    rows = [{"image": None, "caption": ["c"], "id": "0"}, {"image": {"bytes": None, "path": None}}]
    features = datasets.Features(COCO | {"image": IMAGE})
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "null.parquet")
    samples, report = read(tmp_path / "null.parquet")
    assert samples == []
    assert report.skipped == {"caption without an image": 1, "no conversation, question or caption": 1}


@pytest.mark.parametrize("streaming", [False, True])
def test_what_cannot_be_opened_is_told_in_one_line(tmp_path, streaming):
    captions([1]).to_parquet(tmp_path / "good.parquet")
    captions([1]).save_to_disk(tmp_path / "saved")
    (tmp_path / "broken.parquet").write_bytes((tmp_path / "good.parquet").read_bytes()[:-40])
    (tmp_path / "broken.tar").write_bytes(b"this is no archive" * 1000)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.log").write_text("nothing")
    (tmp_path / "text.txt").write_text("nothing")
    for name, split, kind, message in (
        ("nobody/nothing", "train", OSError, "on the Hub (OfflineModeIsEnabled); there is no such folder"),
        ("good.parquet", "validation", ValueError, "['train']"),
        ("saved", "validation", ValueError, "['train']"),
        ("broken.parquet", "train", ValueError, "corrupted"),
        ("broken.tar", "train", ValueError, "is incomplete"),
        ("no*.parquet", "train", OSError, "no such file"),
        ("folder", "train", OSError, "data files"),
        ("text.txt", "train", ValueError, "*.parquet, *.arrow"),
    ):
        path = name if "/" in name else str(tmp_path / name)
        with pytest.raises(kind) as raised:
            next(iter(open_table(path, split=split, streaming=streaming)))
        text = str(raised.value)
        assert path in text and repr(split) in text and message in text and "\n" not in text, text


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("size", [1024 * 9, 1024 * 9 + 100, 1024 * 9 + 700])
def test_a_tar_that_breaks_off_is_refused_wherever_it_does(tmp_path, size, streaming):
    """Between two members, in a header, in a content: for tarfile the first two are ends like any other."""
    write_tar(tmp_path / "web.tar", {f"{n}.png": png(n) for n in range(20)})
    (tmp_path / "web.tar").write_bytes((tmp_path / "web.tar").read_bytes()[:size])
    for path in (tmp_path / "*.tar", tmp_path):
        with pytest.raises(ValueError, match="web.tar is incomplete"):
            open_table(str(path), streaming=streaming)


def texts_of(samples) -> list[int]:
    samples = list(samples)
    for sample in samples:
        assert sample.image == png(int(sample.conversations[0][0].text))
    return [int(sample.conversations[0][0].text) for sample in samples]


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, path, **options):
        self.path, self.options = str(path), options

    def __iter__(self):
        return stream_table(self.path, MediaFolder("."), Report(), **self.options)


def streamed(path, number: int, workers: int = 0, **options) -> list[int]:
    loader = torch.utils.data.DataLoader(Stream(path, **options), batch_size=None, num_workers=workers)
    return texts_of(islice(loader, number))


def write_shards(folder, shards: int, rows: int) -> None:
    folder.mkdir()
    for shard in range(shards):
        captions(range(rows * shard, rows * shard + rows)).to_parquet(folder / f"train-{shard}.parquet")


def test_a_stream_is_endless_shuffled_anew_each_pass_and_the_same_for_a_seed(tmp_path):
    write_shards(tmp_path / "many", 2, 10)
    passes = streamed(tmp_path / "many", 60)
    parts = [passes[:20], passes[20:40], passes[40:]]
    assert all(sorted(part) == list(range(20)) for part in parts)
    assert len({tuple(part) for part in parts} | {tuple(range(20))}) == 4
    assert streamed(tmp_path / "many", 60) == passes
    assert streamed(tmp_path / "many", 60, seed=1) != passes


@pytest.mark.parametrize("shards, workers", [(4, 0), (4, 2), (3, 0), (2, 2), (1, 0), (1, 2)])
def test_two_ranks_see_every_row_once_in_a_pass(tmp_path, shards, workers):
    """4 files: each worker has one. 3: ranks take turns in rows. 2 or 1: a worker is left without, and ends."""
    write_shards(tmp_path / "many", shards, 12 // shards)
    ranks = [streamed(tmp_path / "many", 12, workers, rank=rank, world_size=2) for rank in range(2)]
    for turn in (slice(0, 6), slice(6, 12)):
        assert sorted(ranks[0][turn] + ranks[1][turn]) == list(range(12)), ranks


def test_saved_tables_stream_too(tmp_path):
    captions(range(8)).save_to_disk(tmp_path / "saved")
    assert sorted(streamed(tmp_path / "saved", 8)) == list(range(8))
    assert sorted(streamed(tmp_path / "saved", 2, split="train[6:]")) == [6, 7]


def test_streams_report_the_first_pass_and_name_rows_by_their_key(tmp_path):
    captions(range(3)).to_parquet(tmp_path / "c.parquet")
    report = Report()
    stream = stream_table(str(tmp_path / "c.parquet"), MediaFolder(tmp_path), report)
    assert {sample.origins[0] for sample in islice(stream, 9)} == {f"c.parquet:k{n}" for n in range(3)}
    assert report == Report(records=6)


def test_a_stream_without_a_usable_row_does_not_spin(tmp_path):
    write_lines(tmp_path / "bad.jsonl", [{"caption": "no image"}])
    with pytest.raises(ValueError, match="caption without an image"):
        next(stream_table(str(tmp_path / "bad.jsonl"), MediaFolder(tmp_path), Report()))
    write_shards(tmp_path / "few", 1, 1)
    with pytest.raises(ValueError, match="rank 2 of 3"):
        next(stream_table(str(tmp_path / "few"), MediaFolder(tmp_path), Report(), rank=2, world_size=3))
