"""clip-phi serve, chat and space: their options, their output, and their exit."""

import os
import signal
import socket
import subprocess
import sys
import time

import httpx2 as httpx
import pytest
import yaml

from clip_phi.cli import main


@pytest.fixture(scope="module")
def checkpoint(model, processor, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    model.save_pretrained(path, merged=True)
    processor.save_pretrained(path)
    return str(path)


def test_serve_answers_under_its_key_and_name_and_ends_on_sigterm(checkpoint):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    command = [sys.executable, "-m", "clip_phi.cli", "serve", checkpoint, "--port", port, "--quantization", "int8"]
    process = subprocess.Popen(
        [*command, "--max_tokens", "5"],
        env=os.environ | {"CLIP_PHI_API_KEY": "secret"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}", headers={"Authorization": "Bearer secret"}, timeout=60
        ) as client:
            while True:
                try:
                    assert client.get("/health").json()["model"] == "tiny"
                    break
                except httpx.TransportError:
                    assert process.poll() is None
                    time.sleep(0.1)
            body = {"model": "tiny", "messages": [{"role": "user", "content": "a star?"}], "max_tokens": 5}
            assert client.post("/v1/chat/completions", json=body).json()["usage"]["completion_tokens"] == 5
            cut = client.post("/v1/chat/completions", json=body | {"max_tokens": 6})
            assert cut.json()["usage"]["completion_tokens"] == 5
            headers = {"Host": "rebound.example"}  # with a key any name will do
            assert client.post("/v1/chat/completions", json=body, headers=headers).status_code == 200
            assert client.get("/v1/models", headers={"Authorization": "Bearer no"}).status_code == 401
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    assert process.returncode in (0, -signal.SIGTERM) and "Traceback" not in errors, errors
    assert f"model 'tiny' at http://127.0.0.1:{port}/v1" in errors


def test_space_writes_what_a_space_needs(checkpoint, tmp_path, capsys):
    folder = tmp_path / "talk"
    assert main(["space", "user/talk", "--model", "user/model", "--output_dir", str(folder)]) == 0
    assert str(folder) in capsys.readouterr().out
    matter = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    assert (matter["sdk"], matter["app_file"], matter["models"]) == ("gradio", "app.py", ["user/model"])
    assert len(matter["short_description"]) <= 60
    app = (folder / "app.py").read_text()
    compile(app, "app.py", "exec")
    assert "Engine.from_pretrained('user/model')" in app
    requirements = (folder / "requirements.txt").read_text().split()
    assert any(line.startswith("torch>=") for line in requirements) and not any(
        "pytest" in line for line in requirements
    )
    where = "import clip_phi, modeling_clip_phi; print(clip_phi.__file__, modeling_clip_phi.__file__)"
    done = subprocess.run([sys.executable, "-c", where], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(path.startswith(str(folder)) for path in done.stdout.split()), done.stdout


def test_space_copies_a_merged_checkpoint_and_refuses_a_delta(checkpoint, model, tmp_path, capsys):
    assert main(["space", "user/talk", "--model", checkpoint, "--output_dir", str(tmp_path / "talk")]) == 0
    assert "Engine.from_pretrained('model')" in (tmp_path / "talk/app.py").read_text()
    assert (tmp_path / "talk/model/model.safetensors").is_file()
    model.save_pretrained(tmp_path / "delta", merged=False)
    assert main(["space", "user/talk", "--model", str(tmp_path / "delta"), "--output_dir", str(tmp_path / "two")]) == 2
    assert "save it with merged=True" in capsys.readouterr().err and not (tmp_path / "two").exists()


def test_space_pushes_its_folder(tmp_path, monkeypatch, capsys):
    calls = []

    class FakeApi:
        def create_repo(self, repo_id, **options):
            calls.append((repo_id, options))
            return f"https://huggingface.co/spaces/{repo_id}"

        def upload_folder(self, **options):
            calls.append((options["repo_id"], sorted(path.name for path in options["folder_path"].iterdir())))

    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    options = ["--model", "user/model", "--output_dir", str(tmp_path / "talk"), "--push", "--private"]
    assert main(["space", "user/talk", *options]) == 0
    created = {"repo_type": "space", "space_sdk": "gradio", "private": True, "exist_ok": True}
    names = ["README.md", "app.py", "clip_phi", "modeling_clip_phi", "requirements.txt"]
    assert calls == [("user/talk", created), ("user/talk", names)]
    assert "https://huggingface.co/spaces/user/talk" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["space", "talk", "--model", "user/model"], "a Space id is user/name, not 'talk'"),
        (["space", "user/talk", "--model", "user/model", "--private"], "--private requires --push"),
        (["space", "user/talk", "--model", "user/model", "--output_dir", "."], "exists already"),
        (["serve", "/nowhere/model"], "no model /nowhere/model"),
        (["serve", "{checkpoint}", "--port", "{port}"], "try another --port"),
        (["chat", "/nowhere/model"], "no model /nowhere/model"),
        (["chat", "{checkpoint}", "--auth", "ann"], "--auth is USER:PASSWORD"),
    ],
)
def test_bad_requests_are_one_line(arguments, message, checkpoint, capsys):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert main([each.format(checkpoint=checkpoint, port=port) for each in arguments]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
