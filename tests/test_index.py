"""The tokenised index: what is cached is what would be read, and it is void when anything it depends on changes."""

import copy
import json
import os
import pickle
import shutil
import time

import numpy as np
import pytest
from fork_server import run_forked
from helpers import make_index
from PIL import Image

from clip_phi.batching import index as index_module
from clip_phi.batching.index import load_index
from clip_phi.data.files import MediaFolder
from clip_phi.data.report import Report
from clip_phi.data.sample import File, Sample, Turn
from clip_phi.data.source import parse_source
from clip_phi.data.synthetic import write_dataset
from clip_phi.training.arguments import parse_arguments
from clip_phi.training.data import hold_out, holdout_size


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf/clip_phi"


@pytest.fixture
def data(tmp_path):
    write_dataset(tmp_path / "data", num_train=6, num_val=2)
    return tmp_path / "data"


@pytest.fixture
def source(data):
    return parse_source(f"llava:{data}/llava_instruct_train.json,images={data}/train2017")


@pytest.fixture
def reads(monkeypatch):
    """Counts how often a source is really read."""
    counted = []
    original = index_module._tokenise

    def tokenise(*arguments):
        counted.append(1)
        return original(*arguments)

    monkeypatch.setattr(index_module, "_tokenise", tokenise)
    return counted


def test_index_holds_every_sample_and_its_encoding(source, processor):
    report = Report()
    samples = list(source.read(MediaFolder(source.images), report))
    index = load_index(source, processor, 400)
    in_memory = make_index(samples, processor, 400)
    assert [index.sample(number) for number in range(len(index))] == samples
    for number in range(len(index)):
        assert index.encoded(number) == in_memory.encoded(number)
        assert index.shared_prefix_sample(number) == in_memory.shared_prefix_sample(number)
        assert index.num_tokens()[number] == 4 + sum(len(conversation.ids) for conversation in index.encoded(number))
    assert index.report.records == report.records == sum(len(sample.conversations) for sample in samples)


def test_samples_of_every_form_survive_the_index(processor):
    samples = [
        Sample(b"\0\xff bytes", ((Turn("assistant", "a"),),), ("f:0",)),
        Sample(File("a.zip", "b/c.jpg"), ((Turn("system", "s"), Turn("user", "q"), Turn("assistant", "a")),), ("f:1",)),
        Sample(
            None, ((Turn("user", "q", "t", File("a.wav")), Turn("assistant", "é", references=("x", "y"))),), ("f:2",)
        ),
        Sample(None, ((Turn("user", "q", "t", b"\1wav"), Turn("assistant", "a")),), ("f:3",)),
    ]
    index = make_index(samples, processor, 200)
    assert [index.sample(number) for number in range(4)] == samples
    assert [index.has_image(number) for number in range(4)] == [True, True, False, False]
    assert index.image_names() == [None, "a.zip!b/c.jpg", None, None]


def test_any_number_of_workers_makes_the_same_index(data, processor, cache, monkeypatch):
    monkeypatch.setattr(index_module, "CHUNK", 1)
    records = json.loads((data / "llava_instruct_train.json").read_text())
    records[3]["conversations"][1]["value"] = "<|endoftext|>"
    (data / "llava_instruct_train.json").write_text(json.dumps(records))
    source = parse_source(f"llava:{data}/llava_instruct_train.json,images={data}/train2017")
    alone = load_index(source, processor, 200)
    table = alone.table.combine_chunks()
    shutil.rmtree(cache)
    together = load_index(source, processor, 200, num_workers=2)
    assert together.table.combine_chunks().equals(table)
    assert together.report.as_dict() == alone.report.as_dict() and together.report.num_skipped == 1


def test_second_start_reads_nothing_and_gives_the_same_report(source, processor, data, reads):
    (data / "train2017/000000000003.jpg").unlink()
    first, second = load_index(source, processor, 200), load_index(source, processor, 200)
    assert len(reads) == 1
    assert first.report.as_dict() == second.report.as_dict() and first.report.skipped == {"missing image": 2}
    assert first.table.equals(second.table)


def touch_annotations(data, source, processor):
    path = data / "llava_instruct_train.json"
    path.write_text(json.dumps(json.loads(path.read_text())[:-1]))
    return source, processor, 200


def remove_image(data, source, processor):
    (data / "train2017/000000000002.jpg").unlink()
    return source, processor, 200


def shorten(data, source, processor):
    return source, processor, 150


def other_images(data, source, processor):
    (data / "train2017").rename(data / "elsewhere")
    return parse_source(f"llava:{source.path},images={data}/elsewhere"), processor, 200


def other_tokenizer(data, source, processor):
    other = copy.deepcopy(processor)
    other.tokenizer.add_tokens(["circle"])
    return source, other, 200


def other_template(data, source, processor):
    other = copy.deepcopy(processor)
    other.chat_template = processor.chat_template.replace("Instruct: ", "Question: ")
    return source, other, 200


@pytest.mark.parametrize(
    "change", [touch_annotations, remove_image, shorten, other_images, other_tokenizer, other_template]
)
def test_index_is_made_anew_when_what_it_depends_on_changes(change, data, source, processor, reads):
    before = load_index(source, processor, 200)
    time.sleep(0.01)  # a file system's clock may be coarse
    after = load_index(*change(data, source, processor))
    assert len(reads) == 2
    assert not after.table.equals(before.table) or change is shorten


def test_name_and_weight_do_not_make_another_index(source, processor, reads):
    load_index(source, processor, 200)
    load_index(parse_source(f"llava:{source.path},images={source.images},name=a,weight=3"), processor, 200)
    assert len(reads) == 1


def test_a_newer_index_replaces_an_older_one_and_a_failed_one_leaves_nothing(data, source, processor, cache):
    load_index(source, processor, 200)
    load_index(*touch_annotations(data, source, processor))
    assert len(list(cache.iterdir())) == 1
    (data / "llava_instruct_train.json").write_text("{")
    with pytest.raises(ValueError, match="is not json"):
        load_index(source, processor, 200)
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("name", ["index.arrow", "about.json"])
def test_an_index_whose_bytes_have_changed_on_disk_is_made_anew(source, processor, reads, cache, name, capsys):
    """One bit at 40 places from the first byte to the last, a page of zeros, and cut files."""
    table = load_index(source, processor, 200).table.combine_chunks().to_pydict()
    (path,) = cache.rglob(name)
    good = path.read_bytes()
    places = sorted({round(step * (len(good) - 1) / 39) for step in range(40)})
    damaged = [good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :] for place in places]
    damaged += [good[: len(good) // 2], b"", bytes(len(good))]
    damaged += [good[:start] + bytes(200) + good[start + 200 :] for start in range(0, len(good) - 200, len(good) // 5)]
    for number, content in enumerate(damaged, start=2):
        path.write_bytes(content)
        index = load_index(source, processor, 200)
        assert index.table.to_pydict() == table and len(reads) == number
        assert index.report.records == sum(map(len, table["origins"]))
        assert "is damaged" in capsys.readouterr().err and path.read_bytes() == good
    assert load_index(source, processor, 200).table.to_pydict() == table and len(reads) == number


def test_index_goes_to_workers_as_the_name_of_its_file(source, processor):
    index = load_index(source, processor, 200).take(np.array([4, 1]))
    sent = pickle.dumps(index)
    assert len(sent) < 3000
    arrived = pickle.loads(sent)
    assert [arrived.sample(number) for number in range(2)] == [index.sample(number) for number in range(2)]
    assert arrived.shared_prefix_sample(1) == index.shared_prefix_sample(1)


SCRIPT = """
import sys
from clip_phi.batching.index import load_index
from clip_phi.data.source import parse_source
from modeling_clip_phi import ClipPhiProcessor
print(len(load_index(parse_source(sys.argv[1]), ClipPhiProcessor.from_pretrained(sys.argv[2]), 400)))
"""


def test_processes_that_make_the_same_index_at_once_do_not_harm_each_other(source, processor, tmp_path):
    processor.save_pretrained(tmp_path / "processor")
    spec = f"llava:{source.path},images={source.images}"
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"HF_HOME": str(tmp_path / "shared")}
    words = [spec, tmp_path / "processor"]
    done = run_forked(tmp_path / "script.py", words, tmp_path, environment, processes=3)
    assert (done.returncode, done.stdout) == (0, "6\n" * 3), done.stderr
    assert len(list((tmp_path / "shared/clip_phi").iterdir())) == 1


def test_held_out_images_leave_every_source(processor, tmp_path):
    paths = [File(str(tmp_path / f"{number}.png")) for number in range(10)]
    for path in paths:
        Image.new("RGB", (8, 8)).save(path.path)

    def index(numbers):
        samples = [
            Sample(
                paths[number] if number is not None else None, ((Turn("user", "q"), Turn("assistant", "a")),), ("x",)
            )
            for number in numbers
        ]
        return make_index(samples, processor, 100)

    captions, conversations = index(range(10)), index([None, 9, 8, 3, None])
    (kept_captions, kept_conversations), held_out = hold_out([captions, conversations], num_images=3)
    assert held_out.image_names() == [str(paths[8]), str(paths[9]), None]
    assert kept_captions.image_names() == [str(path) for path in paths[:8]]
    assert kept_conversations.image_names() == [None, str(paths[3])]
    with pytest.raises(AssertionError, match="view"):  # else it takes other samples
        hold_out([kept_captions], num_images=3)


def test_the_usual_hold_out_is_at_most_a_tenth_of_the_images():
    usual = parse_arguments(["--stage", "1", "--data", "x.json"])
    assert [holdout_size(usual, total) for total in (1, 9, 40, 20_000)] == [1, 1, 4, 500]
    given = parse_arguments(["--stage", "1", "--data", "x.json", "--holdout_images", "8"])
    assert [holdout_size(given, total) for total in (5, 40)] == [5, 8]


def test_lengths_are_those_of_the_longest_conversations(processor):
    chance, samples = np.random.default_rng(0), []
    for number in range(40):
        answers = [Turn("assistant", "a " * int(length)) for length in chance.integers(1, 20, 1 + number % 5)]
        talks = tuple((Turn("user", "q"), answer) for answer in answers)
        samples.append(Sample(b"pixels" if number % 3 else None, talks, ("a",) * len(talks)))
    index = make_index(samples, processor, 200).take(np.array([7, 30, 3, 0, 39, 12]))
    for taken in (None, 1, 2, 9):
        expected = []
        for number in range(len(index)):
            lengths = sorted((len(each.ids) for each in index.encoded(number)), reverse=True)[:taken]
            expected.append(len(index.prefix(number)) + sum(lengths) - len(lengths))
        assert index.packed_lengths(taken).tolist() == expected
        assert taken is not None or expected == [
            len(index.shared_prefix_sample(number).input_ids) for number in range(len(index))
        ]


def test_a_view_counts_its_images_and_conversations(processor):
    captions = tuple((Turn("assistant", text),) for text in ("a red circle", "one circle"))
    talk = (Turn("user", "a star?"), Turn("assistant", "no"))
    samples = [
        Sample(b"pixels", captions, ("a", "b")),
        Sample(None, (talk,), ("c",)),
        Sample(b"other", (talk,), ("d",)),
    ]
    index = make_index(samples, processor, 200)
    assert index.count() == (2, 2, 2)
    assert index.take(np.array([1, 2])).count() == (1, 0, 2)
