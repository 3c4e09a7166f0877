"""The chat page in a real headless Chromium: images, microphone, several turns, stop, reload; nothing leaves the
machine. `make test-browser`; with ARGS='--screenshots docs/chat' it also takes the screenshots of the documentation."""

import io
import json
import math
import mimetypes
import os
import random
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
import wave
from pathlib import Path

import httpx2 as httpx
import numpy as np
import pytest
from PIL import Image
from scene_scores import mentioned_objects

from clip_phi.cli import main
from clip_phi.data.synthetic import NUMBERS, draw_scene, sample_scene
from clip_phi.evaluation.explain import explain
from clip_phi.serving.engine import Engine, Limits, as_prompt
from clip_phi.serving.modalities import Modalities, load_modalities
from clip_phi.speech.tts import Speech

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parent.parent
DEMO = ROOT / "outputs" / "demo" / "model"
TIMEOUT = 120_000  # milliseconds, against hanging


class FakeModels:
    """Modalities without another package, which record their inputs."""

    def __init__(self):
        self.recordings: list[bytes] = []
        self.drawn: list[str] = []
        self.fails = False

    def transcribe(self, path):
        self.recordings.append(Path(path).read_bytes())
        return "is it red"

    def synthesize(self, text):
        if self.fails:
            raise ValueError("the voice has no sound for this")
        yield Speech(np.sin(np.arange(8_000) / 20).astype(np.float32), 16_000)

    def draw(self, text, seed):
        self.drawn.append(text)
        return Image.new("RGB", (64, 64), "green")


@pytest.fixture(scope="module")
def engine():
    """With the demo's model, which make test-browser makes first."""
    assert DEMO.is_dir(), f"no model in {DEMO}: run make demo"
    with Engine.from_pretrained(str(DEMO), "cpu", limits=Limits(gather_seconds=0)) as engine:
        yield engine


@pytest.fixture(scope="module")
def fakes():
    return FakeModels()


@pytest.fixture(scope="module")
def address(engine, fakes):
    from clip_phi.serving.chat import launch

    modalities = Modalities(
        fakes.transcribe, fakes.synthesize, fakes.draw, ["no singing: pip install 'clip-phi[song]'"]
    )
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    page = launch(engine, modalities, "127.0.0.1", port, block=False)
    yield f"http://127.0.0.1:{port}"
    page.close()


def save_scene(rng, path):
    """Draw a scene of three or more different shapes. Returns its objects and their number, in words."""
    scene = sample_scene(rng, "val")
    while len(scene.composition) < 3:
        scene = sample_scene(rng, "val")
    draw_scene(scene).resize((120, 120), Image.Resampling.LANCZOS).save(path)
    return scene.composition, NUMBERS[len(scene.objects)]


def answered(engine, path):
    """The objects that the model describes, and their number as it counts them."""
    turns = [("Describe the image.", path), ("How many shapes are there?", None)]
    return mentioned_objects(expected(engine, turns[0])), expected(engine, *turns)


@pytest.fixture(scope="module")
def files(engine, tmp_path_factory):
    """Images, a recording for the fake microphone, and a file that is no image."""
    folder, rng = tmp_path_factory.mktemp("files"), random.Random(16)
    right = (save_scene(rng, folder / "one.png") == answered(engine, folder / "one.png") for _ in range(100))
    assert any(right), "the model answers right about none of 100 scenes"  # the screenshots show the first
    save_scene(rng, folder / "two.png")
    (folder / "bad.png").write_text("no image")
    with wave.open(str(folder / "voice.wav"), "wb") as file:
        file.setparams((1, 2, 44_100, 0, "NONE", ""))
        file.writeframes(b"".join(struct.pack("<h", int(9000 * math.sin(i / 15))) for i in range(44_100 * 3)))
    return folder


@pytest.fixture(scope="module")
def browser(files):
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert chromium, "apt-get install chromium"
    arguments = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    arguments += [
        f"--use-file-for-fake-audio-capture={files / 'voice.wav'}",
        "--autoplay-policy=no-user-gesture-required",
    ]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(params=["desktop", "phone"])
def size(request):
    return request.param


@pytest.fixture
def open_page(browser, address):
    """Opens the page in a window of its own; afterwards: was anything asked of another machine?"""
    outside, contexts = [], []

    def open_page(size="desktop"):
        phone = size == "phone"
        context = browser.new_context(
            viewport={"width": 390, "height": 844} if phone else {"width": 1120, "height": 860},
            is_mobile=phone,
            has_touch=phone,
            permissions=["microphone", "camera"],
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(TIMEOUT)
        page.on("request", lambda request: outside.append(request.url) if _is_outside(request.url, address) else None)
        page.goto(address)
        page.get_by_test_id("textbox").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert outside == []


def _is_outside(url, address):
    return not url.startswith((address, "data:", "blob:"))


def ask(page, text, *paths):
    for number, path in enumerate(paths):
        page.locator("input[data-testid=file-upload]").first.set_input_files(str(path))
        page.wait_for_function(f"document.querySelectorAll('.thumbnails .thumbnail-item').length > {number}")
    page.get_by_test_id("textbox").fill(text)
    page.get_by_test_id("submit-button").click()


def answers(page):
    return [each.inner_text().strip() for each in page.get_by_test_id("bot").all()]


def wait_for_answers(page, count):
    """The answers, when the last of so many is complete: the page can be written to again."""
    page.wait_for_function(f"document.querySelectorAll('[data-testid=bot]').length >= {count}")
    for _ in range(2):  # the page empties the box a moment after the answer
        page.get_by_test_id("submit-button").wait_for()
        page.wait_for_function("!document.querySelector('[data-testid=textbox]').disabled")
        page.wait_for_timeout(300)
    return answers(page)


def expected(engine, *turns):
    """What the engine answers to (question, image path) turns, one after the other."""
    messages, images, found = [], [], ""
    for question, path in turns:
        if found:
            messages.append({"role": "assistant", "content": found})
        image = Image.open(path).convert("RGB") if path else None
        asked, more = as_prompt(question, image)
        messages, images = messages + asked, images + more
        found = engine.submit(messages, images, max_new_tokens=128).result()
    return found


@pytest.fixture
def shoot(request):
    folder = request.config.getoption("--screenshots")

    def shoot(page, name):
        if folder is None:
            return
        page.wait_for_timeout(600)
        image = Image.open(io.BytesIO(page.screenshot())).convert("P", palette=Image.Palette.ADAPTIVE, colors=200)
        Path(folder).mkdir(parents=True, exist_ok=True)
        image.save(Path(folder) / f"{name}.png", optimize=True)

    return shoot


def test_an_image_is_asked_about_over_several_turns(open_page, size, engine, files, shoot):
    page = open_page(size)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), (
        "the page is wider than the screen"
    )
    shoot(page, f"{size}_begin")
    ask(page, "Describe the image.", files / "one.png")
    first = wait_for_answers(page, 1)[0]
    assert first == expected(engine, ("Describe the image.", files / "one.png"))
    ask(page, "How many shapes are there?")
    second = wait_for_answers(page, 2)[1]
    turns = [("Describe the image.", files / "one.png"), ("How many shapes are there?", None)]
    assert second == expected(engine, *turns)
    shoot(page, size)
    ask(page, "What can you see?", files / "two.png")
    third = wait_for_answers(page, 3)[2]
    assert third == expected(engine, *turns, ("What can you see?", files / "two.png"))
    status = page.locator("#status").inner_text()
    assert re.fullmatch(r"\d+ tokens · \d+ tokens/s · first token after \d+\.\d\d s · likelihood .*", status), status


def test_the_page_shows_where_it_looked(open_page, size, engine, files, shoot):
    page = open_page(size)
    page.get_by_role("button", name="Where did it look?").click()
    page.locator("#status").get_by_text("there is no answer yet").wait_for()
    ask(page, "How many shapes are there?", files / "one.png")
    answer = wait_for_answers(page, 1)[0]
    page.get_by_role("button", name="Where did it look?").click()
    image = page.locator("#overlay img")
    image.wait_for()
    assert page.locator("#overlay").get_by_text(f"Where it looked: “{answer}”").count() == 1
    shown = np.asarray(Image.open(io.BytesIO(httpx.get(image.get_attribute("src")).content)).convert("RGB"), float)
    picture = Image.open(files / "one.png").convert("RGB")
    drawn = explain(engine.model, engine.processor, picture, "How many shapes are there?", answer).draw([picture])
    assert np.abs(shown - np.asarray(drawn, float)).mean() < 8, "the picture is compressed, and no other one"
    box = image.bounding_box()
    assert box["width"] > 200 and page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    image.scroll_into_view_if_needed()
    shoot(page, f"{size}_overlay")


def test_the_page_of_an_answer_shows_the_map_of_each_word(browser, files, tmp_path, capsys):
    path = tmp_path / "map.html"
    arguments = ["explain", files / "one.png", "Describe the image.", "--answer", "a <b> circle", "--model", DEMO]
    assert main([*map(str, arguments), "--output", str(path), "--json"]) == 0
    maps = np.array(json.loads(capsys.readouterr().out)["maps"])[:, 0]
    context = browser.new_context(viewport={"width": 390, "height": 844}, offline=True)
    page = context.new_page()
    page.goto(path.as_uri())
    cells = page.locator(".map i")
    assert cells.count() == 16 and page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    for word, heat in (("(all words)", maps.sum(0)), ("<b>", maps[1]), ("circle", maps[2])):
        page.get_by_role("button", name=word, exact=True).click()
        shown = [float(cell.get_attribute("title")) for cell in cells.all()]
        assert np.allclose(shown, heat.flatten(), rtol=0.01, atol=1e-4), word
        darkness = [
            float(cell.evaluate("cell => cell.style.backgroundColor").split(",")[3][:-1]) for cell in cells.all()
        ]
        assert np.argmin(darkness) == heat.argmax() and min(darkness) == 0, word
        assert page.locator("[aria-pressed=true]").inner_text() == word
    context.close()


def test_an_answer_streams_and_stops(open_page, engine, files):
    page, forward, steps = open_page(), engine.forward, []

    def slow(**inputs):
        steps.append(time.monotonic())
        time.sleep(0.25)
        return forward(**inputs)

    ends, engine.ends = engine.ends, set()  # it would talk for 128 tokens
    engine.forward = slow
    try:
        ask(page, "Describe the image.", files / "one.png")
        page.wait_for_function("document.querySelector('[data-testid=bot]')?.innerText.trim().length > 2")
        early = answers(page)[0]
        page.wait_for_function(
            "length => document.querySelector('[data-testid=bot]').innerText.trim().length > length", arg=len(early)
        )
        assert engine.num_running == 1
        page.get_by_role("button", name="Stop", exact=True).click()
        deadline = time.monotonic() + 120
        while engine.num_running and time.monotonic() < deadline:
            time.sleep(0.05)
        assert engine.num_running == 0 and len(steps) < 120
    finally:
        engine.forward, engine.ends = forward, ends
    page.get_by_test_id("submit-button").wait_for()
    stopped = answers(page)[0]
    assert early and stopped.startswith(early[:3])
    ask(page, "How many shapes are there?")
    assert len(wait_for_answers(page, 2)) == 2


def test_the_microphone_is_transcribed_and_the_transcript_is_shown(open_page, fakes, engine, files):
    page = open_page()
    page.locator("input[data-testid=file-upload]").first.set_input_files(str(files / "one.png"))
    page.locator(".thumbnails .thumbnail-item").first.wait_for()
    page.get_by_test_id("microphone-button").click()
    page.get_by_role("button", name="Start recording").click()
    page.wait_for_timeout(1500)
    page.get_by_role("button", name="Stop recording").click()
    page.get_by_role("button", name="Attach audio").click()
    page.get_by_test_id("submit-button").click()
    wait_for_answers(page, 1)
    assert "speech: “is it red”" in page.locator("#status").inner_text()
    assert len(fakes.recordings) == 1 and len(fakes.recordings[0]) > 20_000
    ask(page, "How many shapes are there?")
    wait_for_answers(page, 2)
    assert len(fakes.recordings) == 1, "the recording of an earlier turn is transcribed once"


def test_answers_are_spoken_and_drawn_on_request(open_page, fakes, files):
    page = open_page()
    page.get_by_role("button", name="Settings").click()
    for label in ("Speak the answer", "Draw the answer"):
        page.get_by_label(label).check()
    ask(page, "Describe the image.", files / "one.png")
    page.locator(
        "#conversation audio, #conversation [data-testid*=waveform], #conversation .audio-container"
    ).first.wait_for(state="attached")
    page.wait_for_function("document.querySelectorAll('#conversation .bot img').length > 0")
    assert fakes.drawn and fakes.drawn[0] in answers(page)[0]
    wait_for_answers(page, 1)
    fakes.fails = True
    try:
        ask(page, "How many shapes are there?")
        page.get_by_text("⚠️ the voice has no sound for this").wait_for()
        assert wait_for_answers(page, 2)[-1] and "⚠️" not in answers(page)[-1]  # the answer itself stays
    finally:
        fakes.fails = False


def test_errors_are_one_line_and_the_conversation_goes_on(open_page, files, engine):
    page = open_page()
    ask(page, "Describe the image.", files / "bad.png")
    found = wait_for_answers(page, 1)[0]
    assert found.startswith("⚠️ not an image: bad.png: ") and "\n" not in found and "Traceback" not in page.content()
    ask(page, "Describe an <image>", files / "one.png")
    assert "contains <image>" in wait_for_answers(page, 2)[1]
    ask(page, "Describe the image.", files / "two.png")
    third = wait_for_answers(page, 3)[2]
    assert third == expected(engine, ("Describe the image.", files / "two.png"))


def test_answers_are_made_again_and_missing_modalities_are_named(open_page, engine, files):
    page = open_page()
    ask(page, "Describe the image.", files / "one.png")
    first = wait_for_answers(page, 1)
    tokens = engine.counts["tokens"]
    page.get_by_title("Retry").click()
    deadline = time.monotonic() + 120
    while engine.counts["tokens"] == tokens and time.monotonic() < deadline:
        page.wait_for_timeout(50)
    assert engine.counts["tokens"] > tokens and wait_for_answers(page, 1) == first
    page.get_by_role("button", name="Not available").click()
    page.get_by_text("no singing: pip install 'clip-phi[song]'").wait_for()


def test_an_example_is_asked_by_a_click_and_a_reloaded_page_begins_anew(open_page, files):
    page = open_page()
    page.get_by_text("How many shapes are there?").first.click()
    assert wait_for_answers(page, 1)[0]
    page.reload()
    page.get_by_text("What is in the image?").wait_for()
    assert answers(page) == []
    ask(page, "Describe the image.", files / "one.png")
    assert wait_for_answers(page, 1)[0]


def test_the_webcam_gives_an_image_to_ask_about(open_page, engine):
    page = open_page()
    page.get_by_role("button", name="Webcam").click()
    page.get_by_text("Click to Access Webcam").click()
    page.wait_for_function("document.querySelector('video')?.videoWidth > 0")
    page.get_by_role("button", name="capture photo").click()
    page.wait_for_function("document.querySelectorAll('.thumbnails .thumbnail-item').length > 0")
    images = engine.counts["images"]
    page.get_by_test_id("textbox").fill("Describe the image.")
    page.get_by_test_id("submit-button").click()
    assert wait_for_answers(page, 1)[0] and engine.counts["images"] == images + 1


def test_two_people_have_conversations_of_their_own(open_page, engine, files):
    pages = [open_page(), open_page()]
    for page, name in zip(pages, ("one.png", "two.png"), strict=True):
        ask(page, "Describe the image.", files / name)
    for page, name in zip(pages, ("one.png", "two.png"), strict=True):
        found = wait_for_answers(page, 1)
        assert found == [expected(engine, ("Describe the image.", files / name))]


def test_recordings_of_every_name_are_transcribed_without_a_table_of_mime_types(open_page, fakes, files):
    mimetypes.init([])
    page, before = open_page(), len(fakes.recordings)
    for number, suffix in enumerate(("webm", "mp4", "ogg", "amr", "OPUS"), start=1):
        shutil.copy(files / "voice.wav", files / f"voice.{suffix}")
        ask(page, "", files / f"voice.{suffix}")
        assert "⚠️" not in wait_for_answers(page, number)[-1]
        assert len(fakes.recordings) == before + number


def test_a_page_with_a_password_and_limits_refuses_strangers_large_files_and_other_origins(engine, tmp_path):
    from clip_phi.serving.chat import _error, launch

    def upload(size=100, **headers):
        return httpx.post(f"{address}/gradio_api/upload", files={"files": ("a.png", b"x" * size)}, headers=headers)

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    page = launch(engine, Modalities(), "127.0.0.1", port, block=False, max_body=1000)
    try:
        assert upload().status_code == upload(Origin=address).status_code == 200
        for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Host": "evil.example"}):
            assert upload(**headers).status_code == 403
        assert upload(size=2000).status_code == 413
    finally:
        page.close()
    page = launch(engine, Modalities(), "127.0.0.1", port, block=False, auth="ann:se:cret")
    try:
        assert upload().status_code == 401
        for password, status in (("wrong", 400), ("se:cret", 200)):
            found = httpx.post(f"{address}/login", data={"username": "ann", "password": password})
            assert found.status_code == status
        assert upload(Cookie=found.headers["set-cookie"].partition(";")[0]).status_code == 200
    finally:
        page.close()
    message = _error(ValueError("damaged image: /tmp/gradio/0a1/my photo.png: see https://a.b/c/d"))
    assert message == "⚠️ damaged image: my photo.png: see https://a.b/c/d"


def test_modalities_that_are_not_installed_or_not_asked_for_are_named():
    assert load_modalities(None, None, None, None).missing == [
        "no speech input: start with --speech_model",
        "no speech output: start with --voice",
        "no image output: start with --drawing_model",
    ]


def test_a_space_runs_by_itself(tmp_path, browser):
    """app.py of the folder that `clip-phi space` writes, in a process that finds the project's code in it alone."""
    assert main(["space", "user/talk", "--model", str(DEMO), "--output_dir", str(tmp_path / "talk")]) == 0
    app = tmp_path / "talk" / "app.py"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    app.write_text(app.read_text().replace("0.0.0.0", "127.0.0.1").replace("7860", str(port)))
    process = subprocess.Popen([sys.executable, "app.py"], cwd=app.parent, env=os.environ | {"PYTHONPATH": ""})
    try:
        page = browser.new_page()
        deadline = time.monotonic() + 120
        while True:
            try:
                page.goto(f"http://127.0.0.1:{port}")
                break
            except Exception:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.5)
        page.get_by_text("How many shapes are there?").first.click()
        page.wait_for_function("document.querySelector('[data-testid=bot]')?.innerText.trim().length > 1")
        page.close()
    finally:
        process.terminate()
        process.wait()
