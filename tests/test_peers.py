"""The comparison with TRL runs whole, on equal work and with equal losses."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT

pytestmark = pytest.mark.trl


def test_peers_compares_whole_programs_on_equal_work(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/peers.py"), "--tiny", "--json", str(tmp_path / "out.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["loss_rel_diff"] <= 1e-6
    for name in ("stage1_vs_trl", "stage2_vs_trl", "stage2_vs_trl_grouped"):
        assert found[f"{name}_pairs"] == [found[name]] and found[name] > 1
    for stage in ("stage1", "stage2"):
        runs = found[stage]
        assert len({run["samples"] for each in runs.values() for run in each}) == 1
        (ours,) = runs["ours"]
        assert 0 <= ours["padding"] < 0.02 < runs["TRL"][0]["padding"] and ours["tokens"] < runs["TRL"][0]["tokens"]
        assert all(run[part] > 0 for each in runs.values() for run in each for part in ("start", "steady", "end"))
    assert found["stage2"]["TRL grouped"][0]["padding"] < found["stage2"]["TRL"][0]["padding"]
