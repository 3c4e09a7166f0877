"""The HTTP API under 200 clients for a minute: `make test-load`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clip_phi.serving.engine import Engine, as_prompt

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.load


def test_200_clients_that_disconnect_or_send_garbage_are_all_answered_and_leave_nothing_behind(tmp_path):
    command = [sys.executable, "benchmarks/serving.py", "--clients", "200", "--seconds", "60", "--hostile"]
    command += ["--requests", "64", "--repeats", "1", "--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["errors"] == found["server_5xx"] == found["places_left"] == 0, done.stdout
    assert found["answered"] > 200 and found["gone_away"] > 20 and found["refused_malformed"] > 20
    assert found["memory_growth_mb"] < 150 and found["peak_mb"] < 2000, done.stdout
    assert found["attacks"] > 10 and found["health_99_ms"] < 1000, done.stdout
    assert found["throughput_vs_sequential"] > 2  # 4 and more on a machine that does nothing else


def test_compiled_steps_give_the_same_texts_whichever_requests_join_and_leave(model, processor):
    """Here because it takes half a minute of the C++ compiler."""
    with Engine(model, processor) as plain, Engine(model, processor, compiled=True) as compiled:
        for count in (1, 5, 3, 12):
            asked = [as_prompt(f"star {number}", None)[0] for number in range(count)]
            answers = [
                [engine.submit(messages, max_new_tokens=4 + number) for number, messages in enumerate(asked)]
                for engine in (plain, compiled)
            ]
            texts = [[answer.result() for answer in each] for each in answers]
            assert texts[0] == texts[1] and all(texts[0])
