"""The benchmark of reading COCO, on a small corpus: it runs, and its figures can be true."""

import json
import os
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parent.parent / "benchmarks/data_index.py"
FIGURES = {
    *("images", "captions", "annotations_mb", "seconds", "read_peak_mb", "index_seconds", "peak_mb", "imports_mb"),
    *("index_mb", "warm_seconds", "samples_per_second", "worker_mb"),
}


def run(*options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARK), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ)


def test_it_reads_all_captions_and_every_figure_is_plausible(tmp_path):
    done = run("--images", 200, "--json", tmp_path / "result.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert set(result) == FIGURES
    assert result["images"] == 200 and result["captions"] == 1001  # as many captions an image as COCO has
    assert all(value >= 0 for value in result.values())
    assert result["warm_seconds"] < result["index_seconds"] < 10 and result["seconds"] < result["index_seconds"]
    assert 50 < result["imports_mb"] <= result["peak_mb"] < 1500
    assert result["read_peak_mb"] < result["peak_mb"]
    assert 0 < result["index_mb"] < 5 and result["worker_mb"] < 100
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(result)


def test_it_refuses_a_number_of_images_that_coco_cannot_have():
    done = run("--images", 0)
    assert done.returncode == 2
    assert "--images must be between 1 and 581929, not 0" in done.stderr
