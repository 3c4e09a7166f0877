"""Layouts of data as people have them: each is read, or refused by name; no question is dropped, no image is lost."""

import base64
import io
import json
import re
import unicodedata
from pathlib import Path

import datasets
import pytest
from PIL import Image

from clip_phi.batching.index import load_index
from clip_phi.cli import main
from clip_phi.data.hf_dataset import stream_table
from clip_phi.data.report import Report
from clip_phi.data.sample import Turn
from clip_phi.data.source import parse_source
from clip_phi.data.synthetic import write_dataset
from clip_phi.evaluation.report import format_comparison

DOCS = (Path(__file__).parent.parent / "docs/data.md").read_text(encoding="utf-8")
A = {"image": "a.jpg"}
UNREAD = "ambiguous columns"
SAID = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "yes"}]
TURNS = [
    {"user": "red?", "assistant": "no"},
    {"user": "blue?", "assistant": "yes"},
    {"user": "big?", "assistant": "no"},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf_home"))
    for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, tmp_path / "cache" / name)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def checkpoint(processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    processor.save_pretrained(folder)
    return str(folder)


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(file, "jpeg")
    return file.getvalue()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    (folder / "sub").mkdir()
    for name in ("a.jpg", "sub/b c.jpg", unicodedata.normalize("NFD", "é.jpg"), "12.jpg", "000000000042.jpg"):
        (folder / name).write_bytes(jpeg())
    return folder


@pytest.fixture
def read(images, tmp_path):
    """(conversations, images, report) of rows, as (role, text)."""

    def call(*rows, options="", name="rows.json"):
        path = tmp_path / name
        path.write_text(json.dumps(rows))
        source, report = parse_source(f"llava:{path},images={images}{options}"), Report()
        samples = list(source.read(source.media(), report))
        said = [[(turn.role, turn.text) for turn in each] for sample in samples for each in sample.conversations]
        return said, [sample.image for sample in samples], report

    return call


@pytest.fixture
def inspect(checkpoint, capsys):
    """(exit status, summary or None, stdout, stderr) of clip-phi inspect."""

    def call(*options):
        capsys.readouterr()
        status = main(["inspect", *map(str, options), "--model", checkpoint, "--num_workers", "0"])
        printed = capsys.readouterr()
        summary = json.loads(printed.out) if "--json" in options and printed.out else None
        return status, summary, printed.out, printed.err

    return call


def asked(question, answer, *before):
    return [[*before, ("user", question), ("assistant", answer)]]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (A | {"query": "Q?", "response": "R", "history": [], "system": None}, asked("Q?", "R")),
        (
            A | {"query": "Q?", "response": "R", "history": [["q", "a"]], "system": "S"},
            asked("Q?", "R", ("system", "S"), ("user", "q"), ("assistant", "a")),
        ),
        (A | {"prefix": "Q?", "suffix": "R"}, asked("Q?", "R")),
        (A | {"prefix": "", "suffix": "a cat"}, [[("assistant", "a cat")]]),
        (A | {"instruction": "I", "input": "X", "output": "O"}, asked("I\nX", "O")),
        (A | {"instruction": "I", "input": "", "output": "O"}, asked("I", "O")),
        (A | {"input": "Q", "output": "O"}, asked("Q", "O")),
        (A | {"prompt": "Q?", "response": "R"}, asked("Q?", "R")),
        (A | {"Question": "Q?", "Answer": "R"}, asked("Q?", "R")),
        (A | {"question": "Q?", "answer": True}, asked("Q?", "yes")),
        (A | {"question": "Q?", "answer": 0}, asked("Q?", "0")),
        (A | {"question": "Q?", "answer": 2.0}, asked("Q?", "2")),
        (A | {"question": "Q?", "answer": 2.5}, asked("Q?", "2.5")),
        (A | {"question": "Q?", "answers": [2, 2, 3]}, asked("Q?", "2")),
        (A | {"question": "Q?", "answers": [{"answer": 3, "answer_id": 1}]}, asked("Q?", "3")),
        (A | {"question": "Q?", "answers": {"answer": ["b", "b"], "answer_id": [1, 2]}}, asked("Q?", "b")),
        (A | {"question": "Q?", "multiple_choice_answer": "net"}, asked("Q?", "net")),
        (A | {"question": "Q?", "label": "cat"}, asked("Q?", "cat")),
        (A | {"query": "Q?", "label": ["14"]}, asked("Q?", "14")),
        (A | {"text": "Is it?", "label": "YES"}, asked("Is it?", "yes")),
        (A | {"text": "Is it?", "label": " no. "}, asked("Is it?", "no")),
        (A | {"text": "Is it?", "label": 1}, asked("Is it?", "yes")),
        (A | {"text": "Is it?", "label": "0"}, asked("Is it?", "no")),
        (A | {"text": "Is it?", "label": False}, asked("Is it?", "no")),
        (A | {"text": "Is it?", "question_id": 0, "answer": "no"}, asked("Is it?", "no")),
        (A | {"text": "Is it?", "question_id": 0, "category": "x"}, [[("user", "Is it?")]]),
        (A | {"question": "Q?"}, [[("user", "Q?")]]),
        (A | {"question": "Q?", "answer": None}, [[("user", "Q?")]]),
        (A | {"texts": TURNS[:1]}, asked("red?", "no")),
        ({"image": "", "conversations": SAID}, asked("Hi", "yes")),
        ({"images": [], "conversations": SAID}, asked("Hi", "yes")),
        ({"image": None, "video": None, "conversations": SAID}, asked("Hi", "yes")),
        (A | {"caption": "a cat", "question": None, "id": 1, "source": "x", "width": 3}, [[("assistant", "a cat")]]),
        (A | {"caption": "a cat", "instruction": " "}, [[("assistant", "a cat")]]),
    ],
)
def test_a_row_is_read_with_its_question(read, row, said):
    found, files, report = read(row)
    assert found == said and not report.skipped
    assert [file is not None for file in files] == [row.get("image") == "a.jpg"]


@pytest.mark.parametrize(
    ("row", "kind", "way_out"),
    [
        (A | {"question": "Q?", "caption": "a cat"}, UNREAD, "caption beside question: "),
        (A | {"prompt": "Q?", "text": "a cat"}, UNREAD, "text beside prompt: "),
        (A | {"text": "a cat", "label": 3}, "label is not yes or no", "question=text,answer=label"),
        (A | {"text": "a cat", "label": 1}, "label is not yes or no", "1"),
        (A | {"caption": "a cat", "label": 3}, UNREAD, "label beside caption: "),
        (A | {"caption": "a cat", "question_id": 3}, UNREAD, "question_id beside caption: "),
        (A | {"caption": "a cat", "user_prompt": "x"}, UNREAD, "user_prompt beside caption: "),
        (A | {"text": "a cat", "caption": "a dog"}, UNREAD, "text beside caption: "),
        (A | {"instruction": "I", "question": "Q?", "answer": "x"}, UNREAD, "instruction beside question, answer: "),
        (A | {"question": "Q?", "choices": ["x", "y"], "answer": 1}, UNREAD, "choices beside question, answer: "),
        (A | {"question": "Q?", "A": "x", "B": "y", "answer": "A"}, UNREAD, "a, b beside question, answer: "),
        (A | {"conversations": SAID, "question": "Red?"}, UNREAD, "question beside conversations: "),
        ({"video": "v.mp4", "conversations": SAID}, "video or audio", "column video"),
        (A | {"videos": ["v.mp4"], "question": "Q?", "answer": "x"}, "video or audio", "column videos"),
        ({"video": "v.mp4", "caption": "c"}, "video or audio", "column video"),
        ({"conversations": [{"from": "human", "value": "<video>\nHi"}, SAID[1]]}, "<video> in a question", "image"),
        ({"photo": "a.jpg", "question": "Q?", "answer": "x"}, "image column of an unknown name", ",image=photo"),
        (
            {"imagename": "a.jpg", "question": "Q?", "answer": "x"},
            "image column of an unknown name",
            ",image=imagename",
        ),
        ({"file": "a.jpg", "conversations": SAID}, "image column of an unknown name", ",image=file"),
        ({"image": "http://x.org/a.jpg", "caption": "c"}, "image is a URL", "download it"),
        ({"image": "data:image/png;base64,!!", "caption": "c"}, "image is not valid base64", ""),
        ({"image": "A.JPG", "caption": "c"}, "missing image", "(there is 'a.jpg')"),
        ({"image": "C:\\photos\\a.jpg", "caption": "c"}, "missing image", "without a folder)"),
        ({"image": "no/z.jpg", "caption": "c"}, "missing image", "(there is no folder"),
        ({"image_id": 7, "question": "Q?", "answer": "x"}, "missing image", "7.jpg"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "path": "z.jpg"}]}, SAID[1]]} | A,
            "several images",
            "a.jpg and z.jpg",
        ),
    ],
)
def test_a_row_is_refused_by_name_with_the_way_out(read, row, kind, way_out):
    found, _, report = read(row)
    assert found == [] and dict(report.skipped) == {kind: 1}
    assert way_out in report.examples[kind][0]


def test_images_are_found_by_what_names_them(read, images):
    encoded = base64.b64encode(jpeg()).decode()

    def inside(**item):
        return {"messages": [{"role": "user", "content": [item, {"type": "text", "text": "Hi"}]}, SAID[1]]}

    names = {
        "sub\\b%20c.jpg": "sub/b c.jpg",
        "sub/b%20c.jpg": "sub/b c.jpg",
        f"file://{images}/sub/b%20c.jpg": "sub/b c.jpg",
        "é.jpg": unicodedata.normalize("NFD", "é.jpg"),
    }
    for name, found in names.items():
        assert read({"image": name, "caption": "c"})[1][0].path == str(images / found), name
    for number in (42, "000000000042", 12):
        assert read({"image_id": number, "question": "Q?", "answer": "x"})[1][0].path.endswith(f"{number}.jpg")
    for content in (
        {"image": f"data:image/jpeg;base64,{encoded}", "caption": "c"},
        {"image": encoded, "caption": "c"},
        inside(type="image_url", image_url={"url": f"data:image/jpeg;base64,{encoded}"}),
    ):
        assert read(content)[1] == [jpeg()]
    for key in ("image", "path", "url"):
        assert read(inside(type="image", **{key: "a.jpg"}))[1][0].path == str(images / "a.jpg")


def test_a_home_folder_is_expanded(images, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(images))
    (tmp_path / "rows.json").write_text(json.dumps([{"image": "~/a.jpg", "caption": "c"}]))
    source = parse_source(f"llava:{tmp_path}/rows.json,images=~")
    assert source.images == images and [s.image.path for s in source.read(source.media(), Report())] == [
        f"{images}/a.jpg"
    ]


def test_a_row_without_an_image_is_text_only(read):
    row = {"question": "Which file?", "answer": "a.jpg", "num_images": 0, "image_size": 3, "meta": {"path": "x"}}
    assert read(row)[1] == [None]


# The table of the docs


def layouts() -> dict[str, dict]:
    return {name: json.loads(row) for name, row in re.findall(r"^\| (.+?) \| `(\{.*\})` \|$", DOCS, re.MULTILINE)}


def write_sources(folder: Path) -> dict[str, str]:
    """A source of each kind of the docs' first table, by its kind."""
    write_dataset(folder, num_train=2, num_val=1)
    train = folder / "train2017"
    names = sorted(path.name for path in train.iterdir())
    entries = [
        {"filepath": "train2014", "filename": "x.jpg", "cocoid": int(Path(name).stem), "split": "test"}
        | {"sentences": [{"raw": "a red circle"}]}
        for name in names
    ]
    (folder / "dataset_coco.json").write_text(json.dumps({"images": entries}))
    questions = [
        {"question_id": n, "image_id": int(Path(name).stem), "question": "red?"} for n, name in enumerate(names)
    ]
    (folder / "q.json").write_text(json.dumps({"data_subtype": "train2014", "questions": questions}))
    people = [{"question_id": n, "answers": [{"answer": "no"}] * 10} for n in range(len(names))]
    (folder / "ann.json").write_text(json.dumps({"annotations": people}))
    rows = {"image": [{"bytes": jpeg(), "path": None}], "caption": ["a red circle"]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(folder / "rows.parquet")
    return {
        "coco": f"coco:{folder}/annotations/captions_train2017.json,images={train}",
        "karpathy": f"karpathy:{folder}/dataset_coco.json,images={folder},split=test",
        "llava": f"llava:{folder}/llava_instruct_train.json,images={train}",
        "vqa": f"vqa:{folder}/q.json,annotations={folder}/ann.json,images={folder}",
        "dataset": f"dataset:{folder}/rows.parquet,split=train",
    }


def test_every_kind_and_layout_of_the_docs_is_read_whole(inspect, images, tmp_path):
    sources = write_sources(tmp_path / "kinds")
    assert re.findall(r"^\| `(\w+):.*,.*=", DOCS, re.MULTILINE) == list(sources)
    for number, row in enumerate(layouts().values()):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(row) + "\n")
        sources[number] = f"llava:{tmp_path}/{number}.jsonl,images={images}"
    assert len(sources) > 15
    for source in sources.values():
        status, summary, _, error = inspect(source, "--summary", "--json")
        assert status == 0 and summary["samples"] == summary["images"] > 0, (source, error)
        assert summary["skipped"] == {} and summary["repaired"] == {} and summary["records"] > 0


# Columns of other names


def test_an_unknown_layout_names_its_columns_and_the_option_that_reads_it_in_every_file_format(
    inspect, images, tmp_path
):
    row = {"photo": "a.jpg", "q": "Is it red?", "a": "yes", "note": ""}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "rows.csv").write_text("photo,q,a,note\na.jpg,Is it red?,yes,\n")
    (tmp_path / "rows.tsv").write_text("photo\tq\ta\tnote\na.jpg\tIs it red?\tyes\t\n")
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "names.parquet")
    with_bytes = [row | {"photo": {"bytes": jpeg(), "path": None}}]
    datasets.Dataset.from_list(with_bytes).to_parquet(tmp_path / "bytes.parquet")
    for name in ("rows.json", "rows.jsonl", "rows.csv", "rows.tsv", "names.parquet", "bytes.parquet"):
        source = f"{tmp_path}/{name},images={images}"
        for options in ((), ("--summary",), ("--summary", "--json")):
            status, summary, printed, error = inspect(source, *options)
            assert status == 2 and "columns photo, q, a" in error, (name, error)
            option = re.search(r",image=\S+?(?=\)| |$)", error)[0]
            assert "no conversation, question or caption" in printed
        assert summary["skipped"] == {"no conversation, question or caption": 1}
        status, summary, _, _ = inspect(source + option, "--summary", "--json")
        assert status == 0 and summary["images"] == summary["conversations"] == 1 and not summary["skipped"], name
        source = parse_source(source + option)
        (sample,) = source.read(source.media(), Report())
        assert sample.conversations == ((Turn("user", "Is it red?"), Turn("assistant", "yes")),)
    streamed = next(stream_table(source.path, source.media(), Report(), source.layout))
    assert streamed.conversations == sample.conversations and streamed.image == jpeg()


def test_texts_of_csv_and_tsv_are_read_as_they_are(images, tmp_path):
    (tmp_path / "rows.tsv").write_text(
        "image\tquestion\tanswer\na.jpg\tWho?\tNone\na.jpg\tWhich?\t007\na.jpg\tWhat?\tNA\n", encoding="utf-8-sig"
    )
    (tmp_path / "lists.csv").write_text("image,question,answers\na.jpg,Who?,\"['he', 'she', 'she']\"\n")
    encoded = base64.b64encode(jpeg()).decode()
    (tmp_path / "encoded.tsv").write_text(f"index\timage\tcaption\n0\t{encoded}\ta cat\n")
    said = {}
    for name in ("rows.tsv", "lists.csv", "encoded.tsv"):
        source = parse_source(f"{tmp_path}/{name},images={images}")
        samples = list(source.read(source.media(), Report()))
        said[name] = [turns[-1].text for sample in samples for turns in sample.conversations]
    assert said == {"rows.tsv": ["None", "007", "NA"], "lists.csv": ["she"], "encoded.tsv": ["a cat"]}
    assert samples[0].image == jpeg()


def test_column_options_read_what_is_named_and_nothing_else(read):
    row = A | {"question": "Q?", "caption": "a cat", "video": "v.mp4", "label": 3, "talk": SAID}
    assert read(row, options=",question=question,answer=caption")[0] == asked("Q?", "a cat")
    assert read(row, options=",caption=caption")[0] == [[("assistant", "a cat")]]
    assert read(row, options=",question=question,answer=label")[0] == asked("Q?", "3")
    assert read(row, options=",conversations=talk")[0] == asked("Hi", "yes")
    found, _, report = read(row, options=",question=qestion,answer=caption")
    assert found == [] and dict(report.skipped) == {"no column 'qestion'": 1}
    for options in (",answer=a", ",caption=a,question=b"):
        with pytest.raises(ValueError, match="name the columns question and answer, or caption, or conversations"):
            read(row, options=options)
    with pytest.raises(ValueError, match="turns is conversation or independent"):
        read(row, options=",turns=single")


def test_json_files_of_gqa_and_of_one_list_in_an_object_are_read(images, tmp_path, checkpoint, inspect):
    gqa = {
        "0011": {"imageId": "12", "question": "Red?", "answer": "no", "fullAnswer": "No, it is not.", "semantic": []}
    }
    files = {
        "train_balanced_questions.json": gqa,
        "textvqa.json": {"dataset_type": "train", "data": [A | {"question": "Red?", "answers": ["no", "no"]}]},
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
        source = parse_source(f"{tmp_path}/{name},images={images}")
        (sample,) = source.read(source.media(), Report())
        assert source.kind == "llava" and [turn.text for turn in sample.conversations[0]] == ["Red?", "no"]
        place = "0011" if name.startswith("train") else "data:0"
        assert sample.origins == (f"{tmp_path}/{name}:{place}",)
    (tmp_path / "lines.json").write_text(f"{json.dumps(A | {'caption': 'x'})}\n" * 2)
    assert parse_source(f"{tmp_path}/lines.json").kind == "llava"


def test_questions_without_answers_are_refused_in_training_and_by_inspect(inspect, images, tmp_path):
    rows = [A | {"question_id": n, "text": f"Is it {n}?"} for n in range(3)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    status, summary, _, error = inspect(f"llava:{tmp_path}/questions.jsonl,images={images}", "--summary", "--json")
    assert status == 2 and summary["skipped"] == {"question without an answer": 3}
    assert "it can be evaluated on, not trained on" in error


# Turns


def test_independent_turns_cost_no_token_of_the_image(processor, inspect, images, tmp_path):
    rows = [A | {"images": None, "texts": TURNS}, {"image": "12.jpg", "texts": TURNS[:2]}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    source = f"llava:{tmp_path}/rows.json,images={images}"
    together = load_index(parse_source(source), processor, 200)
    apart = load_index(parse_source(f"{source},turns=independent"), processor, 200)
    assert together.count() == (2, 0, 2) and apart.count() == (2, 0, 5)
    assert apart.num_tokens().tolist() == together.num_tokens().tolist()
    assert [[turn.text for turn in each] for each in apart.sample(0).conversations] == [
        ["red?", "no"],
        ["blue?", "yes"],
        ["big?", "no"],
    ]
    packed = apart.shared_prefix_sample(0)  # no turn sees another
    assert sorted(set(packed.conversation_ids)) == [0, 1, 2, 3]
    for options, hinted in (("", True), (",turns=independent", False)):
        _, summary, _, _ = inspect(source + options, "--summary", "--json")
        assert ("turns=independent" in str(summary.get("hints"))) is hinted and summary["turns"] == 10
    assert "hint" in inspect(source, "--summary")[2]


def test_a_system_text_precedes_each_independent_turn(read):
    said = [{"from": "system", "value": "S"}, *SAID, *SAID]
    found, _, report = read(A | {"conversations": said}, options=",turns=independent")
    assert found == [[("system", "S"), ("user", "Hi"), ("assistant", "yes")]] and report.records == 2
    assert dict(report.skipped) == {"duplicate record": 1}


def test_turns_below_a_rating_are_left_out_and_counted(read, inspect, images, tmp_path):
    names = ("relevance", "visual_dependency", "image_correspondence", "formatting")
    ratings = {f"{name}_ratings": [5, 4, None if name == "formatting" else 5] for name in names}
    row = {"images": ["a.jpg"], "texts": TURNS} | ratings
    found, _, report = read(row, options=",min_rating=4")
    assert found == [[(role, turn[role]) for turn in TURNS[:2] for role in ("user", "assistant")]]
    assert dict(report.filtered) == {"turn with a rating below the least one": 1} and report.records == 1
    assert read(row, options=",min_relevance=5")[2].filtered.total() == 1
    assert read(row, options=",min_rating=6")[2].as_dict()["filtered"] == {"turn with a rating below the least one": 3}
    assert dict(read(A | {"texts": TURNS}, options=",min_rating=4")[2].skipped) == {"no ratings": 1}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    printed = inspect(f"llava:{tmp_path}/rows.json,images={images},min_rating=4", "--summary")[2]
    assert re.search(r"^left out +1$", printed, re.MULTILINE)


# Words


def test_images_of_two_sources_are_shared_and_numbers_of_another_drawn_set_are_no_leak(inspect, tmp_path):
    for seed in (0, 1):
        write_dataset(tmp_path / str(seed), num_train=6, num_val=1, seed=seed)
    first = tmp_path / "0"
    llava = f"llava:{first}/llava_instruct_train.json,images={first}/train2017"
    status, _, printed, _ = inspect(first, llava, "--eval_data", tmp_path / "1", "--summary")
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert status == 0 and f"data {first}: 6 images, 30 captions, 0 records skipped" in lines
    assert f"data {llava}: 6 images, 12 conversations, 0 records skipped" in lines
    assert lines[3:7] == ["records 42", "captions 30", "conversations 12", "samples 12"]
    assert "duplicates 0 images equal another one" in lines
    assert "shared images 6 samples are about the image of another sample, in this source or another" in lines
    assert lines[-1] == "leakage 0 of 6 validation images are trained on"


@pytest.mark.parametrize(
    ("difference", "interval", "line"),
    [
        (0.15, [0.05, 0.25], "A is better by 0.1500, 95 %: +0.0500 to +0.2500"),
        (-0.15, [-0.25, -0.05], "B is better by 0.1500, 95 %: +0.0500 to +0.2500"),
        (0.0, [0.0, 0.0], "A and B have the same score"),
        (-1e-9, [-0.01, 0.02], "A and B have the same score"),
    ],
)
def test_compare_says_which_is_better(difference, interval, line):
    found = {"task": "vqa", "metric": "m", "a": "x", "b": "y", "score_a": 0.5, "score_b": 0.5, "same_prompt": True}
    found |= {"difference": difference, "difference_ci95": interval}
    text = format_comparison(found | {"samples": {"a_better": 1, "equal": 1, "b_better": 1}})
    assert line in text and "by +" not in text and "by -" not in text
