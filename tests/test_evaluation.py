"""clip-phi evaluate and compare: items and prompts, saved answers, controls, and evaluation during training."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fork_server import run_forked
from helpers import make_index, metrics, run, stage1
from PIL import Image

from clip_phi.cli import main
from clip_phi.data.report import Report
from clip_phi.data.sample import SPOKEN_INSTRUCTION, File, Sample, Turn
from clip_phi.data.source import parse_source
from clip_phi.data.synthetic import write_dataset
from clip_phi.evaluation import answers as answers_module
from clip_phi.evaluation.answers import Decoding, Question, prompt_for
from clip_phi.evaluation.bootstrap import by_group, margin_interval
from clip_phi.evaluation.evaluate import derange, evaluate_answers, repeats_itself
from clip_phi.evaluation.generate import encode_prompts, generate_answers
from clip_phi.evaluation.tasks import make_eval_set, read_samples
from clip_phi.hub.card import Run, portable
from clip_phi.training.checkpoint import EarlyStopping
from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

# What LLaVA-1.5 (arXiv 2310.03744, section 3.3) adds, and docs/evaluation.md names.
SHORT_ANSWER = "{question}\nAnswer the question using a single word or phrase."

ROOT = Path(__file__).parent.parent
AGREED = {"task", "metric", "score", "blind", "shuffled", "margin", "margin_ci95", "metrics", "data", "checkpoint"}
AGREED |= {"command", "seed", "prompt", "environment", "answers", "tables"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, num_train=12, num_val=6)
    return folder


@pytest.fixture(scope="module")
def sources(data):
    return {
        "captions": f"coco:{data}/annotations/captions_val2017.json,images={data}/val2017",
        "vqa": f"llava:{data}/llava_instruct_val.json,images={data}/val2017",
    }


@pytest.fixture
def checkpoint(model, processor, tmp_path):
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def evaluate(checkpoint, task, source, *options, expect=0):
    words = ["evaluate", checkpoint, "--task", task, "--data", source, "--max_new_tokens", 6, "--batch_size", 4]
    assert main([str(word) for word in (*words, *options)]) == expect
    return None if expect else json.loads((checkpoint / "evaluation" / f"{task}.json").read_text())


def read_eval_set(task, sources, **options):
    report = Report()
    return make_eval_set(task, read_samples(sources, report), report, **options)


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# Items and prompts


@pytest.mark.parametrize(
    ("text", "with_image", "blind"),
    [
        (None, "<image>", "<|endoftext|>"),
        (
            "Describe the image.",
            "<image>Instruct: Describe the image.\nOutput:",
            "Instruct: Describe the image.\nOutput:",
        ),
        ("Is it red?", "<image>Instruct: Is it red?\nOutput:", "Instruct: Is it red?\nOutput:"),
        (
            SHORT_ANSWER.format(question="Is it red?"),
            "<image>Instruct: Is it red?\nAnswer the question using a single word or phrase.\nOutput:",
            "Instruct: Is it red?\nAnswer the question using a single word or phrase.\nOutput:",
        ),
    ],
)
def test_the_prompt_of_each_task_is_fixed(text, with_image, blind, processor, data):
    image = next((data / "val2017").glob("*.jpg")).read_bytes()
    for picture, expected in ((image, with_image), (None, blind)):
        ids = encode_prompts(processor, [prompt_for(Question("", picture, text))])["input_ids"][0]
        written = processor.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        assert re.sub(r"(<image>)+", "<image>", written) == expected


def test_a_task_takes_its_items_from_the_data_and_counts_the_rest(data, sources):
    captions = read_eval_set("captions", [parse_source(sources["captions"])])
    assert len(captions.items) == len(captions.images) == 6
    assert {len(item.references) for item in captions.items} == {5} and captions.items[0].question is None
    records = json.loads((data / "llava_instruct_val.json").read_text())
    said = [turn["value"] for record in records for turn in record["conversations"][1::2]]
    short = [answer for answer in said if len(answer.split()) <= 3]
    vqa = read_eval_set("vqa", [parse_source(sources["vqa"])])
    assert sorted(item.references[0] for item in vqa.items) == sorted(short)
    assert vqa.left_out["answer is longer than 3 words"] == len(said) - len(short) > 0
    yes_no = [answer for answer in said if answer in ("yes", "no")]
    pope = read_eval_set("pope", [parse_source(sources["vqa"])])
    assert sorted(item.references[0] for item in pope.items) == sorted(yes_no)
    assert pope.left_out["answer is not yes or no"] == len(said) - len(yes_no)
    with pytest.raises(ValueError, match="captions: these data have no item for this task"):
        read_eval_set("captions", [parse_source(sources["vqa"])])


def test_the_file_of_pope_is_read_as_it_is(data, tmp_path):
    names = sorted(path.name for path in (data / "val2017").iterdir())
    rows = [
        {"question_id": n, "image": name, "text": "Is there a dog in the image?", "label": "yes" if n else "no"}
        for n, name in enumerate(names)
    ]
    (tmp_path / "coco_pope.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    eval_set = read_eval_set("pope", [parse_source(f"llava:{tmp_path}/coco_pope.json,images={data}/val2017")])
    assert [(item.question, item.references) for item in eval_set.items] == [
        ("Is there a dog in the image?", (row["label"],)) for row in rows
    ]


def test_ten_answers_of_vqav2_are_all_references(data, tmp_path):
    ids = [int(path.stem) for path in sorted((data / "val2017").iterdir())]
    questions = [{"question_id": n, "image_id": image, "question": "what?"} for n, image in enumerate(ids)]
    people = [{"answer": answer} for answer in ["red"] * 7 + ["blue"] * 3]
    (tmp_path / "q.json").write_text(json.dumps({"data_subtype": "val2014", "questions": questions}))
    (tmp_path / "a.json").write_text(
        json.dumps({"annotations": [{"question_id": n, "answers": people} for n in range(len(ids))]})
    )
    source = f"vqa:{tmp_path}/q.json,annotations={tmp_path}/a.json,images={data}/val2017"
    eval_set = read_eval_set("vqa", [parse_source(source)])
    assert len(eval_set.items) == 6 and eval_set.items[0].references == ("red",) * 7 + ("blue",) * 3


def test_a_damaged_image_is_left_out_and_counted(data, tmp_path):
    shutil.copytree(data / "val2017", tmp_path / "val2017")
    bad = min((tmp_path / "val2017").iterdir())
    bad.write_bytes(bad.read_bytes()[:200])
    source = parse_source(f"coco:{data}/annotations/captions_val2017.json,images={tmp_path}/val2017")
    eval_set = read_eval_set("captions", [source], max_bad_fraction=0.5)
    assert len(eval_set.items) == 5 and dict(eval_set.report.skipped) == {"damaged image": 5}
    with pytest.raises(ValueError, match="more than --max_bad_fraction 0.01 allows"):
        read_eval_set("captions", [source])


def test_a_spoken_question_has_its_transcript_in_the_prompt_and_one_without_is_counted(data, model, processor):
    pictures = sorted((data / "val2017").glob("*.jpg"))[:2]
    said = [Turn("user", SPOKEN_INSTRUCTION, transcript="what is it"), Turn("assistant", "a star")]
    unheard = [Turn("user", SPOKEN_INSTRUCTION, speech=b"a recording"), Turn("assistant", "a ring")]
    samples = [
        Sample(File(str(picture)), (tuple(said), tuple(unheard)), (f"{picture}:0", f"{picture}:1"))
        for picture in pictures
    ]
    eval_set = make_eval_set("vqa", samples, Report())
    assert [(item.question, item.transcript) for item in eval_set.items] == [(SPOKEN_INSTRUCTION, "what is it")] * 2
    assert (
        dict(eval_set.left_out)["speech without a transcript: run 'clip-phi speech transcribe --data DATA' first"] == 2
    )
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            answers_module,
            "generate_answers",
            lambda model, processor, prompts, *options: (
                asked.extend(
                    processor.apply_chat_template(messages, add_generation_prompt=True) for messages, _ in prompts
                )
                or generate_answers(model, processor, prompts, *options)
            ),
        )
        rows = evaluate_answers(model, processor, eval_set, Decoding(max_new_tokens=2)).samples
    text = f"Speech: what is it\nInstruct: {SPOKEN_INSTRUCTION}\nOutput:"
    assert sorted(set(asked)) == sorted({f"<image>{text}", text})
    assert [row["transcript"] for row in rows] == ["what is it"] * 2 and rows[0]["type"] == "what is"


def test_every_image_is_replaced_by_another_and_no_two_by_the_same():
    partners = [derange([str(n) for n in range(9)], seed=1, number=number) for number in range(3)]
    assert all(sorted(each) == list(range(9)) for each in partners)
    assert all(each[n] != n for each in partners for n in range(9))
    assert all(a != b for a, b in zip(partners[0], partners[1], strict=True))
    copies = ["a", "b", "a", "a"]  # three files of one picture
    assert all(copies[other] != copies[n] for n, other in enumerate(derange(copies)))
    with pytest.raises(ValueError, match="all images are the same"):
        derange(["a", "a"])


# Results


def test_a_result_has_all_keys_and_no_local_folder(checkpoint, sources, tmp_path):
    found = evaluate(checkpoint, "vqa", sources["vqa"], "--output", tmp_path / "out.json")
    assert found.keys() >= AGREED
    assert json.loads((tmp_path / "out.json").read_text()) == found
    assert found["margin"] == pytest.approx(found["score"] - max(found["blind"], found["shuffled"]))
    low, high = found["margin_ci95"]
    assert low <= found["margin"] <= high
    assert found["metrics"]["vqa_accuracy"] == {key: found[key] for key in ("score", "blind", "shuffled")}
    assert found["question_only"]["score"] >= 0 and found["data"]["images"] == 6
    assert found["answers"]["score"].keys() == {"empty", "cut", "never_ended", "mean_tokens"}
    assert sum(row["samples"] for row in found["tables"]["by_question_type"].values()) == found["data"]["samples"]
    folder = checkpoint / "evaluation"
    for path in (folder / "vqa.json", folder / "vqa.samples.jsonl", *folder.glob("vqa.answers/*")):
        assert str(tmp_path) not in path.read_text() and not re.search(r'"[^"<]*[ ="]/\w+/', path.read_text()), path
    page = (folder / "vqa.html").read_text()
    assert page.count("<section>") > 4 and "shuffled images" in page and '<img src="data:image/jpeg' in page
    assert (folder / "vqa.png").read_bytes().startswith(b"\x89PNG")
    assert len(found["checkpoint"]["sha256"]) == 64


ESCAPE = "\x1b[2J\x9b31m\u202e"  # two ways to clear or color a terminal, and one to turn its text around


def test_nothing_from_the_data_controls_a_terminal(checkpoint, data, tmp_path, capfd):
    """In captions, and in the names of images and of the file, of good records and of bad ones."""
    content = json.loads((data / "annotations/captions_val2017.json").read_text())
    shutil.copytree(data / "val2017", tmp_path / "val2017")
    for image in content["images"][:3]:
        name = f"{ESCAPE}{image['file_name']}"
        (tmp_path / "val2017" / image["file_name"]).rename(tmp_path / "val2017" / name)
        image["file_name"] = name
    for caption in content["annotations"]:
        caption["caption"] = f"{ESCAPE}{caption['caption']} \u00e9"
    content["images"][3]["file_name"] = f"{ESCAPE}gone.jpg"
    path = tmp_path / f"captions{ESCAPE}.json"
    path.write_text(json.dumps(content))
    source = f"coco:{path},images={tmp_path}/val2017"
    evaluate(checkpoint, "captions", source, "--max_bad_fraction", 0.5)
    assert main(["inspect", source, "--summary", "--num_workers", "0", "--model", str(checkpoint)]) == 0
    assert main(["inspect", source, "--model", str(checkpoint)]) == 0
    assert main(["inspect", f"coco:{ESCAPE}.json"]) == 2
    texts = [*capfd.readouterr(), *(each.read_text() for each in (checkpoint / "evaluation").glob("captions*.*l"))]
    texts += [(checkpoint / "evaluation/captions.json").read_text()]
    assert len(texts) == 5 and "gone.jpg" in texts[0] + texts[1]
    for text in texts:
        assert not set("\x1b\x9b\u202e") & set(text)
    rows = read_lines(checkpoint / "evaluation/captions.samples.jsonl")
    assert rows[0]["image"].startswith(ESCAPE) and rows[0]["references"][0].startswith(ESCAPE)
    assert "\u00e9" in texts[3] or "\u00e9" in texts[2]  # letters are as they are


def test_paths_lose_their_folders(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for word, expected in {
        f"coco:{tmp_path}/a/b.json,images=/other/c/d": "coco:a/b.json,images=d",
        "coco:/home/me/my data/x.json,images=/home/me/y z/w": "coco:x.json,images=w",
        "coco://home/me/x.json": "coco:x.json",
        "//home/me/x.json": "x.json",
        "--data=llava:/home/me/x, y.json,weight=2": "--data=llava:x, y.json,weight=2",
        "--output_dir=/home/me/out": "--output_dir=out",
        "file:///home/me/x.png": "file:x.png",
        "llava:../../me/x.json": "llava:x.json",
        f"dataset:{tmp_path}/d:split=train[:10%]": "dataset:d:split=train[:10%]",
        "dataset:hf://datasets/u/n/x.parquet": "dataset:hf://datasets/u/n/x.parquet",
        f"{tmp_path}": ".",
        "user/name": "user/name",
        "https://x.org/a/b": "https://x.org/a/b",
        "What is in /home/me/x.png?": "What is in x.png?",
        "a/b/../c": "a/c",
        "C:/Users/me/x.json": "x.json",
    }.items():
        assert portable(word) == expected
    monkeypatch.chdir("/")
    assert portable("coco:/home/me/x.json") == "coco:home/me/x.json"


def test_captions_are_generated_once_and_shuffled_ones_are_those_of_other_images(checkpoint, sources):
    found = evaluate(checkpoint, "captions", sources["captions"])
    rows = read_lines(checkpoint / "evaluation/captions.samples.jsonl")
    lines = (checkpoint / "evaluation/captions.answers/rank-0.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 6 + 1  # binding, images, blind
    assert sorted(row["answer"] for row in rows) == sorted(row["shuffled_answer"] for row in rows)
    assert len({row["blind_answer"] for row in rows}) == 1
    assert found["prompt"] == "<image>" and found["metric"] == "CIDEr-D"
    assert {"BLEU-4", "ROUGE-L", "CIDEr"} <= found["metrics"].keys()
    assert "CLIPScore" in found["metrics"] or "vision" in str(checkpoint)


def test_beams_and_greedy_answers_are_those_of_generate(checkpoint, model, processor, sources, data):
    evaluate(checkpoint, "captions", sources["captions"], "--num_beams", 3)
    rows = read_lines(checkpoint / "evaluation/captions.samples.jsonl")
    for row in rows[:2]:
        image = Image.open(data / "val2017" / row["image"]).convert("RGB")
        inputs = encode_prompts(processor, [([{"role": "user", "content": [{"type": "image"}]}], image)])
        output = model.generate(**inputs, max_new_tokens=6, num_beams=3, do_sample=False)
        text = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert row["answer"] == text


def test_cut_empty_and_repetitive_answers_are_distinguished(model, processor, data, fresh_model):
    image = Image.open(next((data / "val2017").glob("*.jpg"))).convert("RGB")
    prompt = ([{"role": "user", "content": [{"type": "image"}]}], image)
    end = processor.tokenizer.eos_token_id
    with torch.no_grad():
        fresh_model.lm_head.bias[end] = 1e4
    assert generate_answers(fresh_model, processor, [prompt], 5) == [("", 1, True)]
    with torch.no_grad():
        fresh_model.lm_head.bias[end] = -1e4
    (answer,) = generate_answers(fresh_model, processor, [prompt], 5)
    assert (answer.tokens, answer.ended) == (5, False)
    assert repeats_itself("a vase and a. and a. and a.") and repeats_itself("so so so")
    assert not repeats_itself("so so") and not repeats_itself("a dog and a cat and a bird")


def test_bad_options_are_one_line(checkpoint, sources, capsys):
    evaluate(checkpoint, "vqa", sources["vqa"], "--prompt", "what?", expect=2)
    assert "must contain {question}, which is replaced by the question" in capsys.readouterr().err
    evaluate(checkpoint, "pope", sources["captions"], expect=2)
    assert "pope: these data have no item for this task" in capsys.readouterr().err
    evaluate(checkpoint, "captions", "coco:/nowhere.json", expect=2)
    assert "not found" in capsys.readouterr().err
    for task, option in (("vqa", ["--meteor"]), ("pope", ["--clip", "folder"]), ("loss", ["--prompt", "{question}"])):
        evaluate(checkpoint, task, "coco:/nowhere.json", *option, expect=2)  # before the data are read
        said = capsys.readouterr().err
        assert f"{option[0]} requires --task captions" in said and f", not {task}" in said
    for output in (".", ""):
        evaluate(checkpoint, "vqa", "coco:/nowhere.json", "--output", output, expect=2)
        assert "--output . is a folder" in capsys.readouterr().err
    assert main(["evaluate", str(checkpoint), "--task", "vqa"]) == 2
    assert "--data is required" in capsys.readouterr().err


# What evaluation servers and the scripts of others read


@pytest.fixture
def questions(data, tmp_path):
    """VQAv2's two files, POPE's file and its labels, about the same images in an order that is not grouped by image."""
    names = sorted(path.name for path in (data / "val2017").iterdir())
    asked = [(number, names[number % 6], f"Is it {number // 3}?") for number in range(12)]
    asked += [(100, names[0], "Is it 0?")]  # an equal question of another id
    content = {
        "data_subtype": "val2017",
        "questions": [
            {"question_id": 1000 - number, "image_id": int(name[:12]), "question": text} for number, name, text in asked
        ],
    }
    (tmp_path / "questions.json").write_text(json.dumps(content))
    answers = [{"question_id": 1000 - number, "answers": [{"answer": "yes"}] * 10} for number, _, _ in asked]
    (tmp_path / "annotations.json").write_text(json.dumps({"annotations": answers}))
    lines = [{"question_id": number, "image": name, "text": text, "label": "no"} for number, name, text in asked]
    (tmp_path / "pope.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path, content["questions"], lines


@pytest.mark.parametrize("annotated", [True, False])
def test_vqa_writes_the_official_results_file_with_every_question_id(checkpoint, data, questions, annotated, capsys):
    folder, asked, _ = questions
    source = f"vqa:{folder}/questions.json,images={data}/val2017"
    source += f",annotations={folder}/annotations.json" if annotated else ""
    words = ["evaluate", checkpoint, "--task", "vqa", "--data", source, "--max_new_tokens", 4, "--json"]
    assert main([str(word) for word in words]) == 0
    found = json.loads(capsys.readouterr().out)
    results = json.loads((checkpoint / "evaluation/vqa.results.json").read_text())
    assert [row["question_id"] for row in results] == [row["question_id"] for row in asked]
    assert all(set(row) == {"question_id", "answer"} and isinstance(row["answer"], str) for row in results)
    same = {row["answer"] for row in results if row["question_id"] in (1000, 900)}
    assert len(same) == 1  # one image, one question
    if annotated:
        rows = read_lines(checkpoint / "evaluation/vqa.samples.jsonl")
        assert {row["question_id"]: row["answer"] for row in rows} == {
            row["question_id"]: row["answer"] for row in results
        }
        assert found["data"]["samples"] == 13 and "score" in found
    else:
        assert "score" not in found and found["data"]["without_reference"] == 13 and found["data"]["samples"] == 0
        assert {path.name for path in (checkpoint / "evaluation").iterdir()} == {"vqa.answers", "vqa.results.json"}
        run = Run.read(checkpoint)
        assert run.evaluations == []


def test_questions_with_and_without_answers_share_a_results_file(checkpoint, data, questions):
    folder, asked, _ = questions
    (folder / "some.json").write_text(json.dumps({"data_subtype": "val2017", "questions": asked[:4]}))
    (folder / "rest.json").write_text(json.dumps({"data_subtype": "val2017", "questions": asked[4:]}))
    sources = [f"vqa:{folder}/some.json,images={data}/val2017,annotations={folder}/annotations.json"]
    found = evaluate(checkpoint, "vqa", sources[0], "--data", f"vqa:{folder}/rest.json,images={data}/val2017")
    assert (found["data"]["samples"], found["data"]["without_reference"]) == (4, 9)
    results = json.loads((checkpoint / "evaluation/vqa.results.json").read_text())
    assert sorted(row["question_id"] for row in results) == sorted(row["question_id"] for row in asked)


def test_questions_without_answers_are_not_trained_on(data, questions, processor):
    source = parse_source(f"vqa:{questions[0]}/questions.json,images={data}/val2017")
    report = Report()
    make_index(source.read(source.media(), Report()), processor, 100, report)
    assert report.skipped == {"question without an answer": 13}


def test_captions_write_cocos_results_file(checkpoint, data, sources, capsys):
    evaluate(checkpoint, "captions", sources["captions"])
    results = json.loads((checkpoint / "evaluation/captions.results.json").read_text())
    listed = json.loads((data / "annotations/captions_val2017.json").read_text())["images"]
    assert sorted(row["image_id"] for row in results) == sorted(image["id"] for image in listed)
    rows = read_lines(checkpoint / "evaluation/captions.samples.jsonl")
    assert {row["image_id"]: row["answer"] for row in rows} == {row["image_id"]: row["caption"] for row in results}
    names = {image["id"]: image["file_name"] for image in listed}
    assert all(names[row["image_id"]] == row["image"] for row in rows)


def test_images_without_captions_get_cocos_results_file_and_no_score(checkpoint, data, tmp_path, processor, capsys):
    """As those of COCO's test sets, which its server evaluates."""
    content = json.loads((data / "annotations/captions_val2017.json").read_text())
    path = tmp_path / "image_info_val2017.json"
    path.write_text(json.dumps({"images": content["images"], "categories": []}))
    words = ["evaluate", checkpoint, "--task", "captions", "--max_new_tokens", 4, "--json", "--data"]
    assert main([str(word) for word in (*words, f"coco:{path},images={data}")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "score" not in found and found["data"]["without_reference"] == 6
    results = json.loads((checkpoint / "evaluation/captions.results.json").read_text())
    assert [row["image_id"] for row in results] == [image["id"] for image in content["images"]]
    source, report = parse_source(f"coco:{path},images={data}/val2017"), Report()
    make_index(source.read(source.media(), Report()), processor, 100, report)
    assert report.skipped == {"image without a caption": 6}


def test_pope_writes_its_answers_file_in_the_order_of_its_questions(checkpoint, data, questions, capsys):
    folder, _, lines = questions
    evaluate(checkpoint, "pope", f"llava:{folder}/pope.json,images={data}/val2017")
    answers = read_lines(checkpoint / "evaluation/pope.results.jsonl")
    assert [(row["question_id"], row["question"]) for row in answers] == [
        (line["question_id"], line["text"]) for line in lines
    ]
    assert all(isinstance(row["answer"], str) for row in answers)


def test_data_without_ids_have_no_results_file_and_a_line_says_so(checkpoint, sources, capsys):
    (checkpoint / "evaluation").mkdir()
    (checkpoint / "evaluation/vqa.results.json").write_text("[]")  # of other data
    evaluate(checkpoint, "vqa", sources["vqa"])
    assert "no results file for an evaluation server" in capsys.readouterr().err
    assert not list((checkpoint / "evaluation").glob("*.results.*"))


# Saved answers


def test_a_killed_evaluation_continues_to_the_result_of_an_uninterrupted_one(
    checkpoint, sources, tmp_path, monkeypatch
):
    whole = tmp_path / "whole"
    shutil.copytree(checkpoint, whole)
    expected = evaluate(whole, "vqa", sources["vqa"])
    asked = []

    def dying(model, processor, prompts, *options):
        asked.append(len(prompts))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return generate_answers(model, processor, prompts, *options)

    monkeypatch.setattr(answers_module, "generate_answers", dying)
    with pytest.raises(KeyboardInterrupt):
        evaluate(checkpoint, "vqa", sources["vqa"])
    file = checkpoint / "evaluation/vqa.answers/rank-0.jsonl"
    assert len(file.read_text().splitlines()) == 1 + 8
    with open(file, "a") as opened:
        opened.write('["torn')
    found = evaluate(checkpoint, "vqa", sources["vqa"])
    all_asked = len((whole / "evaluation/vqa.answers/rank-0.jsonl").read_text().splitlines()) - 1
    assert sum(asked[3:]) == all_asked - 8
    same = AGREED - {"checkpoint", "command", "environment"}
    assert {key: found[key] for key in same} == {key: expected[key] for key in same}
    asked.clear()
    evaluate(checkpoint, "vqa", sources["vqa"])
    assert asked == []
    lines = file.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2][:50] + b"\xff" + lines[2][51:]
    file.write_bytes(b"".join(lines))
    assert evaluate(checkpoint, "vqa", sources["vqa"])["score"] == expected["score"] and sum(asked) == 1


@pytest.mark.parametrize("change", ["weights", "prompt", "decoding", "data"])
def test_answers_of_another_model_data_prompt_or_decoding_are_never_used(
    change, checkpoint, sources, data, tmp_path, capsys
):
    evaluate(checkpoint, "vqa", sources["vqa"])
    source, options = sources["vqa"], []
    if change == "weights":
        model = ClipPhiForCausalLM.from_pretrained(checkpoint)
        with torch.no_grad():
            next(model.model.projector.parameters()).mul_(2)
        model.save_pretrained(checkpoint)
    elif change == "prompt":
        options = ["--prompt", SHORT_ANSWER]
    elif change == "decoding":
        options = ["--num_beams", "2"]
    else:
        shutil.copytree(data / "val2017", tmp_path / "val2017")
        picture = min((tmp_path / "val2017").iterdir())
        Image.new("RGB", (64, 64), "red").save(picture)
        source = source.replace(f"images={data}", f"images={tmp_path}")
    capsys.readouterr()
    evaluate(checkpoint, "vqa", source, *options)
    printed = capsys.readouterr().err
    assert "are of another model, data, prompt or decoding, and are not used" in printed
    assert "are there already" not in printed


def test_two_processes_share_the_work_and_give_the_result_of_one(checkpoint, sources, tmp_path):
    alone = tmp_path / "alone"
    shutil.copytree(checkpoint, alone)
    expected = evaluate(alone, "vqa", sources["vqa"])
    words = [
        "evaluate",
        checkpoint,
        "--task",
        "vqa",
        "--data",
        sources["vqa"],
        "--max_new_tokens",
        6,
        "--batch_size",
        4,
    ]
    done = run_forked("clip_phi.cli", words, ROOT, os.environ | {"ACCELERATE_USE_CPU": "true"}, processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((checkpoint / "evaluation/vqa.json").read_text())
    same = AGREED - {"checkpoint", "command", "environment"}
    assert {key: found[key] for key in same} == {key: expected[key] for key in same} and found["processes"] == 2
    sizes = [len(path.read_text().splitlines()) for path in sorted((checkpoint / "evaluation").glob("vqa.answers/*"))]
    assert len(sizes) == 2 and abs(sizes[0] - sizes[1]) <= 1
    assert done.stdout.count("vqa on 6 images") == 1


# Comparison


def test_the_interval_of_a_margin_is_that_of_a_plain_bootstrap_over_images():
    rng = np.random.default_rng(3)
    groups = rng.integers(0, 40, 200)
    groups = np.unique(groups, return_inverse=True)[1]
    scores = np.stack([rng.random(200) + 0.2, rng.random(200), rng.random(200)], axis=1)
    sums, counts = by_group(scores, groups)
    low, high = margin_interval(sums, counts, seed=1)
    assert (low, high) == margin_interval(sums, counts, seed=1) != margin_interval(sums, counts, seed=2)
    plain = []
    for _ in range(1000):
        drawn = rng.integers(0, len(counts), len(counts))
        means = np.concatenate([scores[groups == group] for group in drawn]).mean(axis=0)
        plain.append(means[0] - means[1:].max())
    assert (low, high) == pytest.approx(np.percentile(plain, [2.5, 97.5]).tolist(), abs=0.03)
    assert margin_interval(np.ones((9, 2)), np.ones(9)) == (0.0, 0.0)


def test_compare_pairs_sample_by_sample_and_refuses_other_data(checkpoint, sources, data, tmp_path, capsys):
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    evaluate(checkpoint, "vqa", sources["vqa"])
    for folder in (first, second):
        shutil.copytree(checkpoint, folder)
    rows = read_lines(first / "evaluation/vqa.samples.jsonl")
    for folder, score in ((first, 1.0), (second, 0.25)):
        changed = [json.dumps(row | {"score": score}) + "\n" for row in rows]
        (folder / "evaluation/vqa.samples.jsonl").write_text("".join(changed))
        result = json.loads((folder / "evaluation/vqa.json").read_text())
        (folder / "evaluation/vqa.json").write_text(json.dumps(result | {"score": score}))
    assert main(["compare", str(first), str(second), "--output", str(tmp_path / "c.json")]) == 0
    found = json.loads((tmp_path / "c.json").read_text())
    assert (found["difference"], found["difference_ci95"]) == (0.75, [0.75, 0.75])
    assert found["samples"] == {"a_better": len(rows), "equal": 0, "b_better": 0}
    assert main(["compare", str(first), str(first / "evaluation/vqa.json")]) == 0
    assert "the interval contains 0" in capsys.readouterr().out
    shutil.copytree(checkpoint, third)
    evaluate(third, "vqa", sources["vqa"], "--num_images", 3)
    assert main(["compare", str(first), str(third)]) == 2
    assert "are of different data" in capsys.readouterr().err
    evaluate(third, "exact", sources["vqa"])
    assert main(["compare", str(first), str(third)]) == 2
    assert "has several results (exact, vqa): give --task" in capsys.readouterr().err
    assert main(["compare", str(first), str(tmp_path)]) == 2
    assert "run clip-phi evaluate first" in capsys.readouterr().err


# Controls


def broken(folder, name):
    """The same checkpoint with a projector that gives nothing."""
    model = ClipPhiForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.model.projector.parameters():
            parameter.zero_()
    model.save_pretrained(name)
    ClipPhiProcessor.from_pretrained(folder).save_pretrained(name)


@pytest.mark.demo
def test_the_controls_catch_a_zeroed_projector_and_training_on_shuffled_images(tmp_path, capsys):
    """Stage 1 between the shipped backbones, for a minute of a true run's time: it learns to look, and they do not."""
    write_dataset(tmp_path, num_train=240, num_val=60)
    annotations = tmp_path / "annotations/captions_train2017.json"
    content = json.loads(annotations.read_text())
    names = [image["file_name"] for image in content["images"]]
    for image, other in zip(content["images"], names[1:] + names[:1], strict=True):
        image["file_name"] = other
    (tmp_path / "annotations/captions_shuffled.json").write_text(json.dumps(content))
    val = f"coco:{tmp_path}/annotations/captions_val2017.json,images={tmp_path}/val2017"
    backbones = (ROOT / "examples/demo_backbones/vision", ROOT / "examples/demo_backbones/text")
    options = ["--max_steps", 60, "--num_train_epochs", 9, "--learning_rate", 2e-3, "--per_device_train_batch_size", 8]
    options += ["--gradient_accumulation_steps", 1, "--max_eval_images", 4, "--num_sample_texts", 1]
    found = {}
    for name, data in (("true", "train2017"), ("shuffled", "shuffled")):
        source = f"coco:{tmp_path}/annotations/captions_{data}.json,images={tmp_path}/train2017"
        run(*stage1(tmp_path, backbones, tmp_path / name, *options, "--data", source))
    broken(tmp_path / "true", tmp_path / "zeroed")
    capsys.readouterr()
    for name in ("true", "shuffled", "zeroed"):
        for task in ("captions", "loss"):
            words = ["evaluate", str(tmp_path / name), "--task", task, "--data", val, "--max_new_tokens", "24"]
            assert main(words) == 0
            found[name, task] = json.loads((tmp_path / name / f"evaluation/{task}.json").read_text())
            says_no = "NO MARGIN" in capsys.readouterr().out
            assert says_no == (name != "true"), (name, task)
    for task, least in (("captions", 1.0), ("loss", 0.3)):
        assert found["true", task]["margin_ci95"][0] > least
        for name in ("shuffled", "zeroed"):
            low, high = found[name, task]["margin_ci95"]
            assert low <= 0 and found[name, task]["margin"] < 0.2 * found["true", task]["margin"], (name, task)
    assert found["zeroed", "captions"]["score"] == found["zeroed", "captions"]["shuffled"]
    clip = found["true", "captions"]["metrics"]["CLIPScore"]  # by the text half of the vision tower's CLIP
    assert clip["score"] > clip["shuffled"] + 0.2 and clip["score"] > clip["blind"] + 0.2


# During training


def test_the_best_is_kept_by_the_chosen_metric_and_patience_counts_what_is_not_better():
    best = EarlyStopping("loss", patience=2)
    assert [best.update(step, {"loss": loss}) for step, loss in enumerate([3.0, 2.0, 2.0, float("nan")], start=1)] == [
        *(True, True, False, False)
    ]
    assert (best.step, best.value, best.exhausted) == (2, 2.0, True)
    again = EarlyStopping("loss", patience=2)
    again.load_state_dict(json.loads(json.dumps(best.state_dict())))
    assert again == best
    other = EarlyStopping("CIDEr-D", patience=2)
    other.load_state_dict(best.state_dict())
    assert other.value is None and other.update(1, {"CIDEr-D": 0.0}) and not other.update(2, {"CIDEr-D": 0.0})
    assert not EarlyStopping().update(1, {"loss": 1.0}) and not EarlyStopping().exhausted


@pytest.fixture(scope="module")
def backbones(vision_backbone, text_backbone):
    return vision_backbone, text_backbone


def test_training_evaluates_and_stops_early_and_so_does_a_resumed_run(data, backbones, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = (
        "--eval_task",
        "captions",
        "--eval_task_images",
        4,
        "--eval_steps",
        1,
        "--save_steps",
        2,
        "--num_sample_texts",
        1,
    )
    options += (
        "--max_steps",
        9,
        "--num_train_epochs",
        9,
        "--metric_for_best_model",
        "CIDEr-D",
        "--early_stopping_patience",
        2,
        "--save_total_limit",
        9,
    )
    options += ("--learning_rate", 1e-12)  # so that nothing can get better after the first evaluation
    line = "early stopping: no improvement since step 1 (CIDEr-D "
    assert run(*stage1(data, backbones, whole, *options)).stdout.count(line) == 1
    assert list(metrics(whole, "loss")) == [1, 2, 3]
    scores = metrics(whole, "eval/CIDEr-D")
    assert list(scores) == [1, 2, 3] == list(metrics(whole, "eval/CIDEr-D/shuffled"))
    state = json.loads((whole / "run.json").read_text())["best"]
    assert state == {"metric": "CIDEr-D", "value": scores[1], "step": 1, "misses": 2}
    ClipPhiForCausalLM.from_pretrained(whole / "best")
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints/step-00000003")
    for folder in (cut, whole):  # from step 2, and from the end
        assert run(*stage1(data, backbones, folder, *options, "--resume_from_checkpoint")).stdout.count(line) == 1
        assert list(metrics(folder, "loss")) == [1, 2, 3]
        assert metrics(folder, "eval/CIDEr-D") == scores
        assert json.loads((folder / "run.json").read_text())["best"] == state


def test_an_unknown_metric_and_patience_alone_are_named(data, backbones, tmp_path):
    done = run(*stage1(data, backbones, tmp_path, "--metric_for_best_model", "f1", "--debug", False), expect=2)
    assert "--metric_for_best_model f1: choose from none, loss; with --eval_task, its metrics too" in done.stderr
    done = run(*stage1(data, backbones, tmp_path, "--early_stopping_patience", 2, "--debug", False), expect=2)
    assert "--early_stopping_patience has no effect without --metric_for_best_model" in done.stderr


def test_each_best_metric_is_one_that_its_task_gives(model, processor, data):
    from clip_phi.training.arguments import METRICS as BY_TASK

    images = [path.read_bytes() for path in sorted((data / "val2017").iterdir())[:2]]
    turns = {"captions": (Turn("assistant", "a star"),), "vqa": (Turn("user", "is it?"), Turn("assistant", "yes"))}
    for task, names in BY_TASK.items():
        conversation = turns["captions" if task == "captions" else "vqa"]
        eval_set = make_eval_set(task, [Sample(image, (conversation,), ("x:0",)) for image in images], Report())
        outcome = evaluate_answers(model, processor, eval_set, Decoding(max_new_tokens=2))
        assert set(names) <= outcome.result["metrics"].keys(), task
