"""Pushing to a Hub and loading from it: against a server on this machine."""

import configparser
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from helpers import run_clean, stage2
from hub_server import File, HubServer
from huggingface_hub import ModelCard
from PIL import Image

from clip_phi.cli import main
from clip_phi.data.synthetic import write_dataset
from clip_phi.hub import push as pushing
from clip_phi.hub import retry
from clip_phi.hub.card import merge_cards, scrub
from clip_phi.hub.push import check_push, push
from clip_phi.hub.retry import load_with_retries
from clip_phi.training.arguments import parse_arguments
from clip_phi.training.guards import write_run
from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

ROOT = Path(__file__).parent.parent
ONLINE = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_alice"}


@pytest.fixture(scope="module")
def hub(vision_backbone, text_backbone):
    """With both backbones on it; huggingface_hub of this process talks to it, and does not wait between its tries."""
    with HubServer(multipart=40_000) as server, pytest.MonkeyPatch.context() as patch:
        constants = huggingface_hub.constants
        patch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        hurried = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})
        for module in (huggingface_hub.utils._http, huggingface_hub.file_download):
            patch.setattr(module, "time", hurried)
        patch.setattr(retry, "WAITS", (0.0, 0.0, 0.0))
        patch.setattr(retry, "LOAD_WAITS", (0.0, 0.0))
        patch.setenv("HF_TOKEN", "hf_alice")
        patch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        server.put("acme/tower", Path(vision_backbone))
        server.put("acme/decoder", Path(text_backbone))
        yield server


@pytest.fixture(autouse=True)
def no_faults_left(hub):
    yield
    hub.faults.clear()


@pytest.fixture(scope="module")
def trained(hub, tmp_path_factory):
    """A run of stage 1 on the Hub's backbones, which pushed itself to alice/trained; its folder and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    write_dataset(folder / "data", num_train=6, num_val=4)
    options = [
        "--stage",
        1,
        "--vision_backbone",
        "acme/tower",
        "--text_backbone",
        "acme/decoder",
        "--dataloader_num_workers",
        0,
    ]
    options += ["--data", f"coco:{folder}/data/annotations/captions_train2017.json,images={folder}/data/train2017"]
    options += ["--eval_data", f"coco:{folder}/data/annotations/captions_val2017.json,images={folder}/data/val2017"]
    options += [
        "--per_device_train_batch_size",
        3,
        "--max_new_tokens",
        4,
        "--output_dir",
        folder / "run",
        "--logging_steps",
        1,
    ]
    options += ["--push_to_hub", "alice/trained"]
    done = subprocess.run(
        [sys.executable, ROOT / "train_accelerate.py", *map(str, options)],
        env=os.environ | ONLINE | {"HF_ENDPOINT": hub.url},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stdout


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the trained run, to be changed at will."""
    shutil.copytree(trained[0], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    return tmp_path / "run"


def history(hub, repo_id: str, ref: str = "main") -> list[str]:
    return list(hub.repo(repo_id).refs.get(ref, []))


def card_of(hub, repo_id: str, ref: str = "main") -> str:
    return hub.repo(repo_id).files(ref)["README.md"].data.decode()


WEIGHTS = {"config.json", "generation_config.json", "model.safetensors"}
CODE = {"backbones.py"} | {f"{name}_clip_phi.py" for name in ("configuration", "modeling", "processing")}
PROCESSOR = {"chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
CARD = {"README.md", "curve.png", *(f"samples/{number}.jpg" for number in range(1, 5))}


# ------------------------------------------------------------------ the repository after a push


def test_training_pushes_its_checkpoint_in_one_commit_that_a_tag_names(trained, hub):
    repo = hub.repo("alice/trained")
    assert set(repo.files()) == {".gitattributes"} | WEIGHTS | CODE | PROCESSOR | CARD
    first, head = history(hub, "alice/trained")
    assert list(repo.tags.values()) == [head] and not repo.private
    (tag,) = repo.tags
    assert f"pushed to {hub.url}/alice/trained, commit {head[:12]}; load it with revision='{tag}'" in trained[1]


def test_unchanged_push_makes_no_commit(trained, hub):
    before = history(hub, "alice/trained")
    pushed = push(trained[0], "alice/trained")
    assert history(hub, "alice/trained") == before
    assert (pushed.changed, pushed.commit) == (False, before[-1])


def test_nothing_of_this_machine_is_pushed(trained, hub, vision_backbone, text_backbone):
    """Every byte on the hub; run.json, metrics and pictures are full of this machine's folders."""
    folder = trained[0]
    assert str(folder.parent) in (folder / "run.json").read_text()
    whole = folder.parent / "whole"
    local = ClipPhiForCausalLM.from_backbones(vision_backbone, text_backbone)
    local.save_pretrained(whole)
    ClipPhiProcessor.from_backbones(vision_backbone, text_backbone).save_pretrained(whole)
    for name in ("run.json", "samples.jsonl", "data_report.json"):
        shutil.copy(folder / name, whole / name)
    push(whole, "alice/whole", merged=True)
    private = [str(folder.parent), vision_backbone, text_backbone, str(ROOT), str(Path.home()) + "/", "hf_alice"]
    files = hub.repo("alice/trained").files() | hub.repo("alice/whole").files()
    for name, file in files.items():
        for secret in private:
            assert secret.encode() not in file.data, f"{name} holds {secret}"


def test_card_reports_the_run(trained, hub):
    text = card_of(hub, "alice/trained")
    data = ModelCard(text).data.to_dict()
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "image-text-to-text"
    assert data["base_model"] == ["acme/tower", "acme/decoder"] and "custom_code" in data["tags"]
    record = json.loads((trained[0] / "run.json").read_text())
    assert f"{record['trainable_parameters']:,} of {record['parameters']:,} parameters were trained" in text
    for row in ("| learning_rate | 0.001 |", "| steps | 2 |", f"fingerprint `{record['data']['fingerprint']}`"):
        assert row in text
    (tag,) = hub.repo("alice/trained").tags
    assert f'pipeline("image-text-to-text", model="alice/trained", revision="{tag}", trust_remote_code=True)' in text
    for sample in map(json.loads, (trained[0] / "samples.jsonl").read_text().splitlines()):
        assert sample["written"] in text
    assert "![](samples/1.jpg)" in text and "![training and held-out loss](curve.png)" in text
    assert "Not evaluated yet." in text
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    bounds = re.search(r"^transformers (.*)$", setup["options"]["install_requires"], re.M)[1].replace(" ", "")
    (command,) = re.findall(r"^pip install .*$", text, re.M)
    assert f'"transformers{bounds}"' in command and '"torch>=' in command and '"pillow>=' in command


EVALUATION = {
    "task": "vqa",
    "metric": "accuracy",
    "score": 0.8125,
    "blind": 0.25,
    "shuffled": 0.3,
    "margin": 0.5125,
    "margin_ci95": [0.4, 0.6],
    "metrics": {"accuracy": {"score": 0.8125, "blind": 0.25, "shuffled": 0.3}},
    "data": {"source": "vqa:/home/someone/vqa.json,images=/data", "fingerprint": "f" * 32, "images": 4, "samples": 9},
    "checkpoint": {"name": "run", "sha256": "0" * 64},
    "command": ["/home/someone/.venv/bin/clip-phi", "evaluate", "--data", "vqa:/home/someone/vqa.json"],
    "seed": 0,
    "environment": {},
}  # fmt: skip


def test_evaluations_are_in_the_model_index_with_set_size_and_command(run, hub):
    (run / "evaluation").mkdir()
    (run / "evaluation/vqa.json").write_text(json.dumps(EVALUATION))
    push(run, "alice/judged")
    text = card_of(hub, "alice/judged")
    (result,) = ModelCard(text).data.to_dict()["model-index"][0]["results"]
    values = {metric["name"]: metric["value"] for metric in result["metrics"]}
    assert values == {"accuracy": 0.8125, "accuracy without the image": 0.25, "accuracy with another's image": 0.3}
    assert result["dataset"]["args"] == {"images": 4, "samples": 9, "fingerprint": "f" * 32}
    assert "| vqa | accuracy | **0.8125** | 0.25 | 0.3 | 0.5125 (0.4 to 0.6) | 9 samples of 4 images of" in text
    assert "clip-phi evaluate --data vqa:vqa.json" in text and "someone" not in text


def test_stage_2_starts_from_a_hub_id(trained, hub, tmp_path, monkeypatch):
    data = trained[0].parent / "data"
    options = stage2(data, "alice/trained", tmp_path / "two", "--max_steps", 1, "--num_sample_texts", 0)
    arguments = parse_arguments(list(map(str, options)))
    arguments.check()
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    runpy.run_path(str(ROOT / "train_accelerate.py"))["train"](arguments)
    AcceleratorState._reset_state(reset_partial_state=True)
    model = ClipPhiForCausalLM.from_pretrained(tmp_path / "two")
    assert model.config.adapter == "adapter" and model.config.text_backbone == "acme/decoder"


def test_what_a_person_wrote_into_the_card_stays(run, hub):
    push(run, "alice/edited")
    repo = hub.repo("alice/edited")
    text = card_of(hub, "alice/edited")
    edited = text.replace("license: other", "license: cc-by-nc-4.0\nthumbnail: me.png")
    edited = edited.replace("- clip-phi\n", "- clip-phi\n- mine\n")
    edited = "\n\nMy own words.\n\n".join(edited.split("\n\n<!-- clip-phi:use"))
    edited = edited.replace("\n\nMy own words.\n\n", "\n\nMy own words.\n\n<!-- clip-phi:use") + "\nAnd my last ones.\n"
    edited = re.sub(r"<!-- clip-phi:limits.*?clip-phi:end -->", "", edited, flags=re.S)
    repo.commit("main", "by hand", repo.files() | {"README.md": File(edited.encode(), False)})
    by_hand = history(hub, "alice/edited")
    push(run, "alice/edited")
    assert history(hub, "alice/edited") == by_hand, "an edited card alone is no reason for a commit"

    (run / "evaluation").mkdir()
    (run / "evaluation/vqa.json").write_text(json.dumps(EVALUATION))
    push(run, "alice/edited")
    text = card_of(hub, "alice/edited")
    assert len(history(hub, "alice/edited")) == len(by_hand) + 1
    assert "My own words." in text and text.endswith("And my last ones.\n") and "0.8125" in text
    assert "## Limits" not in text, "a block that was taken out stays out"
    data = ModelCard(text).data.to_dict()
    assert data["license"] == "cc-by-nc-4.0" and data["thumbnail"] == "me.png" and "mine" in data["tags"]


def test_card_without_our_marks_keeps_all_its_text():
    new = "---\nlibrary_name: transformers\ntags:\n- clip-phi\n---\n\n"
    new += "<!-- clip-phi:use: x -->\nours\n<!-- clip-phi:end -->\n"
    old = "---\r\ntags: mine # a comment\r\n---\r\n# My model\r\nwords\r\n"
    both = merge_cards(old, new)
    assert "# My model\r\nwords\r\n" in both and both.rstrip().endswith("<!-- clip-phi:end -->")
    assert yaml.safe_load(both.split("---")[1]) == {"tags": ["mine", "clip-phi"], "library_name": "transformers"}
    assert merge_cards(both, new) == both
    assert merge_cards("no front matter", new).startswith("---\nlibrary_name: transformers")
    assert merge_cards(None, new) == new
    assert merge_cards("This model card has been automatically generated.", new) == new


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("coco:/home/me/a.json,images=/data/b", "coco:a.json,images=b"),
        ("see https://a.org/b/c and ~/secret/d", "see https://a.org/b/c and d"),
        (r"C:\Users\me\x.json and/or samples/1.jpg", "x.json and/or samples/1.jpg"),
        ("with hf_abcdefghijklmnopqrstuvwxyz", "with (a token)"),
        ("coco://home/me/a.json or file:///home/me/b", "coco:a.json or file:b"),
        ("from ../../me/a.json, ~me/b and //home/me/c", "from a.json, b and c"),
    ],
)
def test_scrub_leaves_no_absolute_path_and_no_token(text, clean):
    assert scrub(text) == clean


def test_run_json_contains_no_token(tmp_path):
    write_run(tmp_path / "run.json", {"command": ["--data", "https://me:hf_abcdefghijklmnopqrst@a.org/x.json"]})
    assert json.loads((tmp_path / "run.json").read_text())["command"][1] == "https://me:(a token)@a.org/x.json"


def test_merged_push_over_a_delta_leaves_none_of_its_files(run, hub, model):
    (run / "adapter").mkdir()
    (run / "adapter/adapter_config.json").write_text("{}")
    push(run, "alice/both")
    repo = hub.repo("alice/both")
    repo.commit("main", "by hand", repo.files() | {"notes.txt": File(b"mine", False)})
    shutil.rmtree(run / "adapter")
    push(run, "alice/both", merged=True)
    files = repo.files()
    assert "adapter/adapter_config.json" not in files and files["notes.txt"].data == b"mine"
    assert not json.loads(files["config.json"].data)["delta"]
    assert len(files["model.safetensors"].data) > hub.multipart, "the multipart way was taken"
    assert "This repository contains all weights" in files["README.md"].data.decode()
    ClipPhiForCausalLM.from_pretrained(run).save_pretrained(run, merged=True)
    for merged in (True, False):  # a whole one is pushed as it is
        push(run, "alice/both", merged=merged)
        assert repo.files()["model.safetensors"] == files["model.safetensors"]
        assert set(repo.files()) == set(files)


def test_a_tag_that_fails_says_that_the_commit_stays(run, hub, monkeypatch, capsys):
    def fail(*args, **options):
        raise OSError("no tags today")

    monkeypatch.setattr("huggingface_hub.HfApi.create_tag", fail)
    assert main(["push", str(run), "alice/untagged", "--tag", "v1"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    commit = history(hub, "alice/untagged")[-1]
    assert f"pushed as {commit[:12]}, which stays, but without the tag v1: " in line and "no tags today" in line


def test_branch_tag_private_and_command_line(run, hub, capsys):
    words = ["push", str(run), "alice/options", "--private", "--revision", "draft", "--tag", "v1", "--json"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    repo = hub.repo("alice/options")
    assert repo.private and list(repo.files("main")) == [".gitattributes"]
    assert repo.tags == {"v1": told["commit"]} == {"v1": history(hub, "alice/options", "draft")[-1]}
    assert 'revision="v1"' in card_of(hub, "alice/options", "draft")
    assert main(words) == 0  # the same again
    (run / "generation_config.json").write_text('{"max_length": 9}')
    repo.commit("draft", "another", repo.files("draft"))
    capsys.readouterr()
    assert main(words) == 2
    assert "already has a tag v1" in capsys.readouterr().err


def test_pull_request_is_opened_once_and_continued(run, hub):
    hub.create("other/model")
    first = push(run, "other/model", create_pr=True)
    assert first.pull_request == f"{hub.url}/other/model/discussions/1"
    assert list(hub.repo("other/model").files()) == [".gitattributes"], "main is theirs"
    assert set(hub.repo("other/model").files("refs/pr/1")) >= WEIGHTS | CODE | PROCESSOR
    assert push(run, "other/model", create_pr=True).changed is False
    (run / "curve.png").unlink()
    assert push(run, "other/model", create_pr=True).pull_request == first.pull_request
    assert len(hub.repo("other/model").pulls) == 1 and len(history(hub, "other/model", "refs/pr/1")) == 2


# ------------------------------------------------------------------ refusals, in one line


@pytest.mark.parametrize(
    ("repo_id", "token", "words"),
    [
        ("alice/new", None, "no token for the Hub"),
        ("alice/new", "hf_wrong", "does not accept this token"),
        ("alice/new", "hf_reader", "may only read"),
        (
            "bob/new",
            "hf_alice",
            "bob is not a namespace of this token (it has alice, readers, team): push to alice/new",
        ),
        ("readers/new", "hf_alice", "alice may read in readers and not write"),
        ("alice/a/b", "hf_alice", "is no repository id"),
        ("alice/--x", "hf_alice", "is no repository id"),
    ],
)
def test_missing_rights_are_reported_in_one_line(repo_id, token, words, trained, hub, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(pushing, "get_token", lambda: os.environ.get("HF_TOKEN"))
    before = len(hub.repos)
    assert main(["push", str(trained[0]), repo_id]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and "hf_wrong" not in said
    assert len(hub.repos) == before, "nothing was created"


def test_org_with_the_right_to_write_is_pushed_to(trained, hub):
    assert push(trained[0], "team/model").changed


def test_what_cannot_be_pushed_is_refused_in_one_line(
    run, trained, hub, vision_backbone, text_backbone, tmp_path, monkeypatch
):
    def refused(words: str, folder: Path) -> None:
        with pytest.raises(ValueError, match=words):
            push(folder, "alice/refused")

    refused("contains no model", tmp_path / "nothing")
    ClipPhiForCausalLM.from_backbones(vision_backbone, text_backbone).save_pretrained(tmp_path / "local")
    refused("a local folder that nobody else has: push all weights with --merged", tmp_path / "local")
    config = json.loads((tmp_path / "local/config.json").read_text())
    with pytest.raises(ValueError, match="push all weights with --merged"):  # before training
        check_push("alice/refused", config, False, tmp_path / "local")
    with pytest.raises(ValueError, match="bob is not a namespace"):
        check_push("bob/refused", config, True, tmp_path / "local")
    (run / "chat_template.jinja").write_text(f"{Path.cwd()}/secret")
    refused("must not be pushed", run)
    (run / "chat_template.jinja").write_text("hf_abcdefghijklmnopqrstuvwx")
    refused("contains an access token", run)
    (run / "model.safetensors").rename(run / "pytorch_model.bin")
    refused("is a pickle, which can run any code", run)
    (run / "pytorch_model.bin").unlink()
    refused("contains no weights", run)
    (run / "config.json").write_text('{"model_type": "llava"}')
    refused("contains a 'llava' model", run)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    shutil.copy(trained[0] / "config.json", run)
    shutil.copy(trained[0] / "model.safetensors", run)
    refused("HF_HUB_OFFLINE is set", run)
    assert ("model", "alice/refused") not in hub.repos


# ------------------------------------------------------------------ loading, where the package is not installed

LOAD = """
import sys, torch
from huggingface_hub import hf_hub_download
from PIL import Image
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, pipeline
expected, image, *repos = sys.argv[1:]
expected, picture = torch.load(expected), Image.open(image)
for repo, revision in zip(repos[::2], repos[1::2]):
    options = {"revision": revision, "trust_remote_code": True}
    processor = AutoProcessor.from_pretrained(repo, **options)
    inputs = processor(images=[picture], text=["<image>Instruct: a?\\nOutput:"], return_tensors="pt")
    for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
        model = auto_class.from_pretrained(repo, **options)
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, expected), (repo, auto_class)
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1]:]
    pipe = pipeline("image-text-to-text", model=repo, **options)
    messages = [{"role": "user", "content": [{"type": "image", "path": image}, {"type": "text", "text": "a?"}]}]
    answer = pipe(text=messages, max_new_tokens=4, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert answer == processor.decode(ids, skip_special_tokens=True)
    card = open(hf_hub_download(repo, "README.md", revision=revision)).read()
    picture.save("image.jpg")
    exec(card.split("```python\\n")[1].split("```")[0])  # the snippet, as it stands there
assert "modeling_clip_phi" not in sys.modules
"""


def test_both_forms_load_in_a_clean_process_with_equal_logits_and_offline_afterwards(
    trained, hub, tmp_path, monkeypatch
):
    pushed = [push(trained[0], "alice/delta")]
    pushed.append(push(trained[0], "alice/merged", private=True, merged=True))
    model = ClipPhiForCausalLM.from_pretrained(trained[0])
    processor = ClipPhiProcessor.from_pretrained(trained[0])
    Image.effect_noise((40, 30), 60).convert("RGB").save(tmp_path / "image.png")
    picture = Image.open(tmp_path / "image.png")
    inputs = processor(images=[picture], text=["<image>Instruct: a?\nOutput:"], return_tensors="pt")
    with torch.no_grad():
        torch.save(model(**inputs).logits, tmp_path / "expected.pt")
    words = [tmp_path / "expected.pt", tmp_path / "image.png"]
    words += [word for each in pushed for word in (each.repo_id, each.revision)]
    for name, value in (ONLINE | {"HF_ENDPOINT": hub.url}).items():
        monkeypatch.setenv(name, value)
    downloads = hub.requests["cdn"]
    run_clean(LOAD, tmp_path, *words)
    # of each backbone and of each form one file of weights (the decoder is in shards), and the pictures' never
    weights = [
        name
        for repo_id in ("acme/tower", "acme/decoder", "alice/delta", "alice/merged")
        for name in hub.repo(repo_id).files()
        if name.endswith(".safetensors")
    ]
    assert hub.requests["cdn"] - downloads == len(weights), "each file is fetched once"
    asked = hub.requests.total()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("HF_TOKEN")
    run_clean(LOAD, tmp_path, *words)
    assert hub.requests.total() == asked, "offline nothing is asked for"


@pytest.fixture(scope="module")
def saved(hub, tmp_path_factory):
    """A model on the Hub's backbones and its processor, with a generation config of their own: at the root of
    alice/saved and in the subfolder "sub" of alice/nested, which is private."""
    model = ClipPhiForCausalLM.from_backbones("acme/tower", "acme/decoder")
    model.generation_config.max_length = 77
    processor = ClipPhiProcessor.from_backbones("acme/tower", "acme/decoder")
    folder = tmp_path_factory.mktemp("saved")
    for place in (folder / "root", folder / "nested/sub"):
        model.save_pretrained(place)
        processor.save_pretrained(place)
    hub.put("alice/saved", folder / "root")
    hub.create("alice/nested", private=True)
    hub.put("alice/nested", folder / "nested")
    return model, processor


def same(model, saved) -> bool:
    state, expected = model.state_dict(), saved[0].state_dict()
    return (
        state.keys() == expected.keys()
        and all(torch.equal(state[name], value) for name, value in expected.items())
        and model.generation_config.max_length == 77
    )


def test_installed_package_needs_no_remote_code_and_options_reach_every_file(saved, hub, tmp_path, monkeypatch):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    monkeypatch.setenv("HF_TOKEN", "")
    first = hub.repo("alice/nested").find("main")
    hub.repo("alice/nested").commit("main", "all gone", {})
    place = {"revision": first, "subfolder": "sub", "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(OSError):
        AutoModelForImageTextToText.from_pretrained("alice/nested", **place)
    place["token"] = "hf_alice"
    model = AutoModelForImageTextToText.from_pretrained("alice/nested", dtype="bfloat16", device_map="cpu", **place)
    assert type(model) is ClipPhiForCausalLM and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    processor = AutoProcessor.from_pretrained("alice/nested", **place)
    assert processor.tokenizer.get_vocab() == saved[1].tokenizer.get_vocab()
    held = {path.name for path in (tmp_path / "cache").iterdir()}
    assert held >= {"models--alice--nested", "models--acme--tower", "models--acme--decoder"}
    asked = hub.requests.total()
    again = AutoModelForImageTextToText.from_pretrained("alice/nested", local_files_only=True, **place)
    assert same(again, saved) and hub.requests.total() == asked


@pytest.mark.parametrize(
    ("route", "what", "places"),
    [("head", "cut", 14), ("head", 503, 4), ("download", 500, 6), ("download", "half", 6), ("cdn", 503, 4)]
    + [("cdn", "half", 4), ("cdn", "slow", 1), ("info", 500, 2), ("tree", "cut", 1)],
)
def test_every_failure_of_loading_passes(route, what, places, saved, hub, tmp_path):
    """Wherever it comes: never a model without some of its files."""
    for place in range(places):
        hub.fail(route, what, after=place)
        options = {"cache_dir": str(tmp_path / f"cache{place}")}
        model = load_with_retries(ClipPhiForCausalLM.from_pretrained, "alice/saved", **options)
        assert same(model, saved), f"after {what} at request {place} of {route}"
        hub.faults.clear()


@pytest.mark.parametrize(("route", "what"), [("head", 403), ("head", "cut"), ("download", 500), ("cdn", "half")])
def test_lasting_failures_of_loading_are_reported_and_damage_no_cache(route, what, saved, hub, tmp_path):
    cache = {"cache_dir": str(tmp_path / "cache")}
    hub.fail(route, what, times=1000)
    with pytest.raises(OSError, match="alice/saved|acme/tower|connect to"):
        load_with_retries(ClipPhiForCausalLM.from_pretrained, "alice/saved", **cache)
    hub.faults.clear()
    assert same(ClipPhiForCausalLM.from_pretrained("alice/saved", **cache), saved)


def test_every_command_that_loads_from_the_hub_tries_again(
    saved, hub, vision_backbone, text_backbone, tmp_path, capsys
):
    """Each from repositories that are in no cache yet."""
    for part in saved:
        part.save_pretrained(tmp_path / "saved")
    for name in ("planned", "inspected"):
        hub.put(f"alice/{name}", tmp_path / "saved")
    hub.put("acme/first", Path(vision_backbone))
    hub.put("acme/second", Path(text_backbone))
    torch.save(saved[0].model.projector.state_dict(), tmp_path / "projector.pt")
    write_dataset(tmp_path / "data", num_train=2, num_val=1)
    data = f"coco:{tmp_path}/data/annotations/captions_train2017.json,images={tmp_path}/data/train2017"
    imported = ["import-projector", tmp_path / "projector.pt", tmp_path / "model", "--vision_backbone", "acme/first"]
    for name, command in {
        "alice/planned": ["plan", "--gpu", "l4-24", "--model", "alice/planned"],
        "alice/inspected": ["inspect", data, "--model", "alice/inspected"],
        "acme/first and acme/second": [*imported, "--text_backbone", "acme/second"],
    }.items():
        hub.fail("download", 500, after=2 if "acme" in name else 0)  # the first two are files that may be absent
        assert main([*map(str, command)]) == 0, name
        assert f"loading {name}: the Hub answered 500" in capsys.readouterr().err


def test_another_tokenizer_and_other_shapes_are_refused_by_name(saved, hub, text_backbone, tmp_path):
    shutil.copytree(text_backbone, tmp_path / "other")
    vocabulary = json.loads((tmp_path / "other/tokenizer.json").read_text())
    entries = vocabulary["model"]["vocab"]
    first, second = list(entries)[:2]
    entries[first], entries[second] = entries[second], entries[first]
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(vocabulary))
    hub.put("acme/swapped", tmp_path / "other")
    with pytest.raises(ValueError, match="alice/saved was trained with another tokenizer than that of acme/swapped"):
        ClipPhiForCausalLM.from_pretrained("alice/saved", text_backbone="acme/swapped")
    assert same(ClipPhiForCausalLM.from_pretrained("alice/saved", text_backbone=text_backbone), saved)
    config = json.loads((tmp_path / "other/config.json").read_text()) | {"hidden_size": 16}
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="was trained on .*other with hidden_size 32, which now has hidden_size 16"):
        ClipPhiForCausalLM.from_pretrained("alice/saved", text_backbone=str(tmp_path / "other"))


def test_pickled_weights_are_not_opened(saved, tmp_path):
    saved[0].save_pretrained(tmp_path, merged=True)
    torch.save(saved[0].state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"no file named .*model\.safetensors"):
        ClipPhiForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("merged", [False, True])
def test_push_to_hub_of_the_model_can_be_pushed_over_and_leaves_a_card_that_is_there(merged, saved, hub, run):
    model, processor = saved
    repo_id = f"alice/by-hand-{merged}"
    model.push_to_hub(repo_id, merged=merged)
    processor.push_to_hub(repo_id)
    assert json.loads(hub.repo(repo_id).files()["config.json"].data)["delta"] is not merged
    assert same(ClipPhiForCausalLM.from_pretrained(repo_id), saved)
    push(run, repo_id, merged=merged)
    whole = card_of(hub, repo_id)
    assert whole.count("## How to use it") == 1 and "automatically generated" not in whole
    assert ModelCard(whole).data.pipeline_tag == "image-text-to-text"
    assert ModelCard(whole).data.base_model == ["acme/tower", "acme/decoder"]
    model.push_to_hub(repo_id, merged=merged)
    assert card_of(hub, repo_id) == whole, "a card that is there stays"


def test_push_to_hub_of_a_delta_on_local_backbones_is_refused(model, hub):
    with pytest.raises(ValueError, match=r"is a local folder: push a whole model, with merged=True"):
        model.push_to_hub("alice/local")
    assert ("model", "alice/local") not in hub.repos


DATASET = """
import sys
from itertools import islice
from datasets import Dataset, Image
from clip_phi.data.files import MediaFolder
from clip_phi.data.report import Report
from clip_phi.data.hf_dataset import open_table, read_table, stream_table
rows = {"image": sys.argv[1:], "captions": [["a cat"], ["a dog", "dogs"]]}
Dataset.from_dict(rows).cast_column("image", Image()).push_to_hub("alice/pictures")
whole = read_table(open_table("alice/pictures"), MediaFolder("."), Report())
stream = islice(stream_table("alice/pictures", MediaFolder("."), Report()), 2)
for samples in (whole, stream):
    print(sorted([turns[-1].text for turns in sample.conversations] for sample in samples))
"""


def test_data_set_is_pushed_and_read_whole_and_as_a_stream(hub, tmp_path):
    for number in (1, 2):
        Image.new("RGB", (40, 30)).save(tmp_path / f"{number}.png")
    done = subprocess.run(
        [sys.executable, "-c", DATASET, tmp_path / "1.png", tmp_path / "2.png"],
        cwd=ROOT,
        env=os.environ | ONLINE | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf_home")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[['a cat'], ['a dog', 'dogs']]\n" * 2, done.stderr


def test_example_pushes_and_reloads_without_a_difference(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "examples/push_and_reload.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"(?:\w+: [\d.]+ MB on the hub, largest logit difference 0\n){2}", done.stdout), done.stderr


# ------------------------------------------------------------------ failures at every route of a push

PUSH_ROUTES = ["whoami", "create", "branch", "info", "head", "download", "validate-yaml", "preupload", "lfs-batch"]
PUSH_ROUTES += ["lfs-put", "lfs-part", "lfs-complete", "lfs-verify", "commit", "refs", "tag", "discussions"]


@pytest.mark.parametrize("route", PUSH_ROUTES)
def test_every_failure_of_a_push_passes_or_is_reported_and_leaves_nothing_half_changed(route, run, hub):
    """Once: the push goes through. Always: one line, and the branch is what it was, or all of what it should be."""
    repo_id = f"alice/fails-at-{route}"
    complete = {".gitattributes"} | WEIGHTS | CODE | PROCESSOR | CARD
    options = {"branch": "draft", "tag": "v1"}
    hub.create(repo_id)
    ref = "draft"
    if route == "discussions":
        options, ref = {"create_pr": True}, "refs/pr/1"
    if route in ("head", "download"):
        hub.repo(repo_id).commit("main", "a card", {"README.md": File(b"---\ntags: [x]\n---\nwords\n", False)})
        complete -= {".gitattributes"}
    weights = (run / "model.safetensors").read_bytes()

    def change() -> None:  # so that the bytes are not on the hub yet, and too many for one part if need be
        (run / "model.safetensors").write_bytes(weights[:-8] + os.urandom(8))
        hub.multipart = len(weights) - 1 if route in ("lfs-part", "lfs-complete") else 10**9

    for what in (429, 503, "cut", "lost", "half"):
        change()
        before = hub.requests[route]
        hub.fail(route, what)
        assert push(run, repo_id, **options).changed, what
        assert hub.requests[route] > before and not any(times for _, _, times, _ in hub.faults), (
            f"{route} was not asked"
        )
        assert set(hub.repo(repo_id).files(ref)) == complete
        commits = len(history(hub, repo_id, ref))
        assert push(run, repo_id, **options).changed is False, "an answer that was lost is not asked for twice"
        assert len(history(hub, repo_id, ref)) == commits
        hub.repo(repo_id).tags.clear()
    passes = {"create": [403], "branch": [403], "lfs-verify": [500, "cut"]}  # what is there already is taken as it is
    for what in (403, 500, "cut"):
        change()
        before = history(hub, repo_id, ref)
        hub.fail(route, what, times=1000)
        if what not in passes.get(route, []):
            with pytest.raises((ValueError, OSError)) as caught:
                push(run, repo_id, **options)
            assert "\n" not in str(caught.value) and "hf_alice" not in str(caught.value), what
            assert history(hub, repo_id, ref) == before or route in ("tag", "refs")
        hub.faults.clear()
        push(run, repo_id, **options)
        assert set(hub.repo(repo_id).files(ref)) == complete
        hub.repo(repo_id).tags.clear()


def test_two_pushes_at_once_lose_nothing(run, hub, monkeypatch):
    """Between our look at the repository and our commit another one comes: 412, and a second look."""
    push(run, "alice/raced")
    repo = hub.repo("alice/raced")
    (run / "curve.png").unlink()
    merge, edits = pushing.merge_cards, iter([b"---\ntags: [x]\n---\nedited meanwhile\n"])

    def meanwhile(old, new):
        for edited in edits:
            repo.commit("main", "by hand", repo.files() | {"README.md": File(edited, False)})
        return merge(old, new)

    monkeypatch.setattr(pushing, "merge_cards", meanwhile)
    push(run, "alice/raced")
    assert "edited meanwhile" in card_of(hub, "alice/raced") and "curve.png" not in repo.files()
    assert [repo.commits[sha][0] for sha in history(hub, "alice/raced")[-2:]] == ["by hand", "Delta checkpoint"]


def test_killed_push_continues_with_what_was_uploaded(run, hub):
    """SIGKILL while the commit is on its way: the files are on the hub, the branch is as it was."""
    (run / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:-8] + os.urandom(8))
    hub.fail("commit", "hang")
    process = subprocess.Popen(
        [sys.executable, "-m", "clip_phi.cli", "push", run, "alice/killed"],
        cwd=ROOT,
        env=os.environ | ONLINE | {"HF_ENDPOINT": hub.url},
    )
    while not hub.hanging.is_set():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert len(history(hub, "alice/killed")) == 1, "the first commit, which the hub itself makes"
    uploads = hub.requests["lfs-put"] + hub.requests["lfs-part"]
    assert push(run, "alice/killed").changed
    assert hub.requests["lfs-put"] + hub.requests["lfs-part"] == uploads, "nothing was uploaded twice"
