"""The benchmarks run, compare equal work, and give the figures that they promise."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.benchmarks
ROOT = Path(__file__).parent.parent


def run(name, *options, tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / name), *options, "--json", str(tmp_path / "out.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((tmp_path / "out.json").read_text())


def test_training_compares_equal_work_and_keeps_its_counts(tmp_path):
    tiny = ("--hidden", "64", "--layers", "1", "--images", "2", "--repeats", "1", "--log-mean", "3")
    found = run("training.py", *tiny, tmp_path=tmp_path)
    ratios = {"stage1_vs_padded", "stage1_vs_token_loop", "stage1_vs_llava", "stage2_vs_padded"}
    assert ratios <= found.keys() and all(found[name] > 1 for name in ratios)
    assert found["loss_rel_diff"] <= 1e-6 and found["grad_rel_diff"] <= 1e-5
    # Of true size, by count: these do not depend on the machine.
    assert found["flops_ratio_true_size"] >= 2.9
    assert found["activations_mb_per_token"] <= 2.5
    assert found["pack_fill"] >= 0.95
    assert set(found["levers"]["stage1"]) == {"all on", "all off"} | {
        f"no {lever}" for lever in ("sharing", "packing", "kept_logits", "fused_gelu")
    }


def test_training_at_true_size_compares_equal_work(tmp_path):
    found = run("training.py", "--true-size", "--hidden", "64", "--layers", "1", tmp_path=tmp_path)
    assert found["true_size_vs_padded"] > 1
    assert found["loss_rel_diff"] <= 1e-6 and found["grad_rel_diff"] <= 1e-5
    assert found["parameters"] > 59_000_000  # the tower's size is the true one


def test_images_are_exact_or_nearly_so_and_the_cache_is_read(tmp_path):
    found = run("images.py", "--images", "4", "--repeats", "1", "--rows", "200", tmp_path=tmp_path)
    assert found["max_level_diff"] <= 1 and found["differing_share"] <= 0.01
    assert min(found[name] for name in ("exact_ratio", "fast_ratio", "cache_reads_per_s")) > 0


def test_the_gpu_script_runs_whole_without_one(tmp_path):
    found = run("gpu.py", "--device", "cpu", "--tiny", tmp_path=tmp_path)
    assert json.dumps(found).count("samples_per_second") >= 10


def test_generation_gives_the_tokens_of_transformers_for_the_same_flops(tmp_path):
    tiny = ("--hidden", "64", "--layers", "1", "--batch", "2", "--new_tokens", "4", "--repeats", "1")
    found = run("generation.py", *tiny, tmp_path=tmp_path)
    assert found["tokens_identical"] and found["flops_ratio"] <= 1.0
    assert found["generation_ratio"] > 0 and found["int8_speed_ratio"] > 0 and found["int8_logit_error"] < 0.1


def test_time_to_loss_trains_both_until_the_same_loss(tmp_path):
    found = run("time_to_loss.py", "--seconds", "1", "--num_train", "16", "--num_val", "4", tmp_path=tmp_path)
    assert found["loss"] < found["loss_before"] and found["our_loss"] <= found["loss"] and found["time_ratio"] > 0
    assert found["recipe"][0][3] == found["ours"][0][3] == found["loss_before"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="it forks")
def test_a_killed_run_goes_on_as_if_it_had_never_stopped(tmp_path):
    found = run("kill_and_resume.py", "--kills", "20", tmp_path=tmp_path)
    assert found["kills"] == 20 and found["bit_equal"]
    assert found["torn_checkpoints_passed_over"] >= found["checkpoints_cut"] > 0


def test_serving_gives_the_texts_of_generate_and_answers_every_client(tmp_path):
    tiny = ("--requests", "12", "--concurrent", "4", "--repeats", "1", "--new_tokens", "6", "--clients", "4")
    found = run("serving.py", *tiny, "--seconds", "2", "--hostile", tmp_path=tmp_path)
    assert found["texts_identical"] == 1 and found["throughput_vs_sequential"] > 0 and found["first_token_ms"] > 0
    assert found["errors"] == found["server_5xx"] == found["places_left"] == 0 and found["answered"] > 0
    parts = ("refused_malformed", "gone_away", "answered", "busy", "attacks")
    assert sum(found[name] for name in parts) == found["requests"]
    assert 0 < found["health_99_ms"] <= found["worst_health_ms"] and found["peak_mb"] >= found["memory_mb"]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://127.0.0.1:1", "no process that you may see listens at http://127.0.0.1:1"),
        ("http://example.com:80", "not http://example.com:80"),
        ("https://127.0.0.1:80", "not https://127.0.0.1:80"),
        ("http://127.0.0.1:port", "not http://127.0.0.1:port"),
        ("tgi", "--beside is llamacpp, vllm or an address like http://127.0.0.1:8000, not tgi"),
    ],
)
def test_serving_beside_what_cannot_be_measured_is_refused_in_a_line(address, message):
    command = [sys.executable, str(ROOT / "benchmarks/serving.py"), "--beside", address]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1]


def test_serving_beside_another_server_of_ours_finds_it_by_its_address(tmp_path):
    """With the demo's model, which make test-demo makes first."""
    model = str(ROOT / "outputs/demo/model")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    command = [sys.executable, "-m", "clip_phi.cli", "serve", model, "--device", "cpu", "--port", port]
    server = subprocess.Popen(command, cwd=ROOT)
    try:
        while server.poll() is None and socket.socket().connect_ex(("127.0.0.1", int(port))):
            time.sleep(0.2)
        work = ("--requests", "8", "--concurrent", "4", "--repeats", "1", "--seconds", "1", "--model", model)
        found = run("serving.py", *work, "--beside", f"http://127.0.0.1:{port}/v1", tmp_path=tmp_path)
    finally:
        server.terminate()
        server.wait(timeout=60)
    assert found["captions_identical"] == found["questions_identical"] == 8
    assert found["questions_tokens_ours"] == found["questions_tokens_theirs"] > 0 and found["questions_ratio"] > 0


def test_metrics_give_the_reference_figures_and_their_seconds(tmp_path):
    found = run("metrics.py", "--images", "200", tmp_path=tmp_path)
    assert found["largest_difference"] < 1e-6 and 0 < found["seconds"] < 10


def test_the_data_index_holds_all_captions_and_every_figure_is_plausible(tmp_path):
    found = run("data_index.py", "--images", "200", tmp_path=tmp_path)
    assert set(found) == {
        *("images", "captions", "annotations_mb", "seconds", "read_peak_mb", "index_seconds", "peak_mb", "imports_mb"),
        *("index_mb", "warm_seconds", "samples_per_second", "worker_mb"),
    }
    assert found["warm_seconds"] < found["index_seconds"] < 10 and found["seconds"] < found["index_seconds"]
    assert found["images"] == 200 and found["captions"] == 1001  # as many captions an image as COCO has
    assert all(value >= 0 for value in found.values())
    assert 50 < found["imports_mb"] <= found["peak_mb"] < 1500
    assert found["read_peak_mb"] < found["peak_mb"]
    assert 0 < found["index_mb"] < 5 and found["worker_mb"] < 100


def test_the_data_index_refuses_a_number_of_images_that_coco_cannot_have():
    command = [sys.executable, str(ROOT / "benchmarks/data_index.py"), "--images", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--images must be between 1 and 581929, not 0" in done.stderr


def test_the_first_step_is_done_in_one_and_a_half_times_what_the_imports_take(tmp_path):
    found = run("first_step.py", tmp_path=tmp_path)
    assert found["first_step_ratio"] <= 1.5, found


def test_explain_writes_the_figures_of_every_map_into_the_page(tmp_path):
    """With the demo's model, which make test-demo makes first."""
    page, written = tmp_path / "explain.md", (ROOT / "docs/explain.md").read_text()
    page.write_text(written)
    picture = tmp_path / "explain.png"
    files = ("--page", str(page), "--picture", str(picture))
    found = run("explain.py", "--num_images", "3", *files, tmp_path=tmp_path)
    methods = ["occlusion", "gradient", "integrated", "attention", "random", "centre", "shuffled"]
    assert list(found["hit_rate"]) == list(found["methods"]) == methods and found["default"] == "occlusion"
    assert found["hit_rate"]["occlusion"] >= 0.8 and 0.1 < found["random"] < 0.3
    assert {"ece", "accuracy_at_80", "centre", "leave_out"} <= found.keys() and picture.read_bytes()[1:4] == b"PNG"
    texts = page.read_text(), written
    labels = [re.findall(r"^\| ([^|]+) \|", text.partition("<!-- measured -->")[2], re.M) for text in texts]
    assert labels[0] == labels[1], "the page has the same rows"
    assert f"| occlusion | {found['hit_rate']['occlusion']:.3f} |" in texts[0]
