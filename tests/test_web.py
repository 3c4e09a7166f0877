"""transformers.js in a headless Chromium gives the answers of the demo's model, offline: make test-web."""

import copy
import http.server
import io
import shutil
import threading
from functools import partial

import numpy as np
import pytest
import torch
from helpers import ROOT, demo_questions
from kinds_of_tokenizers import TOKENIZERS
from PIL import Image
from PIL.Image import Resampling
from transformers import CLIPImageProcessorPil

from clip_phi.cli import main
from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

pytestmark = pytest.mark.web
DEMO = ROOT / "outputs/demo"
PACKAGES = ROOT / ".venv-web/node_modules"
ANSWER = "document.getElementById('answer').ariaBusy === 'false'"


@pytest.fixture(scope="module")
def requests():
    """100 unseen scenes: a question about each of 80, and a caption of each of 20."""
    return [(path, question if number < 80 else "") for number, ([path], question) in enumerate(demo_questions(100, 0))]


@pytest.fixture(scope="module")
def expected(requests):
    """By generate, one request at a time."""
    model = ClipPhiForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)
    processor = ClipPhiProcessor.from_pretrained(DEMO / "model")
    answers = []
    for path, question in requests:
        text = {"type": "text", "text": question or model.config.caption_instruction}
        prompt = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}, text]}])
        inputs = processor(images=[Image.open(path).convert("RGB")], text=prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=256, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.decode(ids, skip_special_tokens=True).strip())
    return answers


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    assert chromium, "apt-get install chromium"
    arguments = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """Exports with a dtype, once."""
    folders = {}

    def export(dtype):
        if dtype not in folders:
            folder = tmp_path_factory.mktemp("web") / dtype
            command = ["export", str(DEMO / "model"), str(folder), "--to", "web", "--dtype", dtype]
            assert main([*command, "--packages", str(PACKAGES)]) == 0
            folders[dtype] = folder
        return folders[dtype]

    return export


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def open_page(browser):
    """Serves a folder on this machine and opens its page; nothing may be asked of another machine."""
    servers, outside, context = [], [], browser.new_context(permissions=["camera"])

    def open_page(folder):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        here = f"http://127.0.0.1:{server.server_port}/"

        def only_here(route):
            if route.request.url.startswith((here, "blob:", "data:")):
                return route.continue_()
            outside.append(route.request.url)
            return route.abort()

        context.route("**/*", only_here)
        page = context.new_page()
        page.set_default_timeout(120_000)
        page.goto(here)
        page.wait_for_function("/ready|Error|cannot/.test(document.getElementById('status').textContent)")
        return page

    yield open_page
    context.close()
    for server in servers:
        server.shutdown()
    assert outside == []


def ask(page, question):
    page.fill("#question", question)
    page.click("button[type=submit]")
    page.wait_for_function(ANSWER)
    return page.inner_text("#answer")


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
def test_the_page_gives_the_answers_of_python(dtype, export, open_page, requests, expected, capsys):
    page = open_page(export(dtype))
    assert "ready" in page.inner_text("#status"), page.inner_text("#status")
    answers = []
    for path, question in requests:
        page.set_input_files("#file", path)
        page.wait_for_function("!document.getElementById('image').hidden")
        answers.append(ask(page, question))
    equal = sum(ours == theirs for ours, theirs in zip(expected, answers, strict=True))
    size = sum(path.stat().st_size for path in (export(dtype) / "onnx").iterdir())
    with capsys.disabled():
        print(f"\ntransformers.js, {dtype}: {equal} of {len(expected)} answers equal; {size / 1e6:.1f} MB, ", end="")
        print(page.inner_text("#speed"))
    assert len(set(expected)) > 10
    assert equal == 100 or dtype != "float32"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_prompts_are_those_of_python_for_any_kind_of_tokenizer(kind, export, open_page, model, processor, tmp_path):
    """BOS once, image tokens, unusual characters, and the decoded text."""
    from clip_phi.export.web import write_page

    own = copy.deepcopy(processor)
    if TOKENIZERS[kind]:
        own = ClipPhiProcessor(processor.image_processor, TOKENIZERS[kind](), num_image_tokens=4)
    folder = shutil.copytree(export("float32"), tmp_path / "site")
    write_page(model, own, folder, "float32")
    texts = ["a red circle?", "  b\n\nc ", "123 4567", "don't", "\u00e9\u4e2d \U0001f600", ""]
    image, wanted = Image.new("RGB", (40, 30), "red"), []
    for text in texts:
        content = [{"type": "image"}, *([{"type": "text", "text": text}] if text else [])]
        prompt = own.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        ids = own(images=[image], text=prompt, return_tensors="pt")["input_ids"][0].tolist()
        wanted.append([ids, own.decode(ids, skip_special_tokens=True)])
    script = """async (texts) => {
        const { AutoProcessor, RawImage, env } = await import("./lib/transformers.min.js");
        Object.assign(env, { allowLocalModels: true, allowRemoteModels: false, useBrowserCache: false });
        const processor = await AutoProcessor.from_pretrained(".");
        const image = new RawImage(new Uint8ClampedArray(40 * 30 * 4), 40, 30, 4);
        const found = [];
        for (const text of texts) {
            const content = [{ type: "image" }, ...(text ? [{ type: "text", text }] : [])];
            const prompt = processor.apply_chat_template([{ role: "user", content }], { add_generation_prompt: true });
            const { add_special_tokens, clean_up_tokenization_spaces } = processor.config;
            const { input_ids } = await processor(image, prompt, { add_special_tokens });
            const ids = input_ids.tolist()[0];
            const decoding = { skip_special_tokens: true, clean_up_tokenization_spaces };
            found.push([ids.map(Number), processor.decode(ids, decoding)]);
        }
        return found;
    }"""
    found = open_page(folder).evaluate(script, texts)
    assert found == wanted


def test_images_are_resized_as_pillow_does_it(export, open_page):
    """Portrait and landscape, larger and smaller than the model's images."""
    page, random = open_page(export("float32")), np.random.default_rng(0)
    script = """async ([bytes, config]) => {
        const { preparePixels } = await import("./pixels.js");
        const blob = new Blob([new Uint8Array(bytes)], { type: "image/png" });
        const { data, width, height } = preparePixels(await createImageBitmap(blob), config);
        return [width, height, Array.from(data.filter((_, place) => place % 4 < 3))];
    }"""
    shortest, box = {"shortest_edge": 32}, {"height": 32, "width": 32}
    cases = [((211, 90), Resampling.BICUBIC, shortest), ((45, 120), Resampling.BICUBIC, shortest)]
    cases += [((20, 31), Resampling.BILINEAR, shortest), ((100, 70), Resampling.LANCZOS, box)]
    for size, resample, target in cases:
        image = Image.fromarray(random.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
        options = {"size": target, "resample": resample, "do_center_crop": target is shortest}
        processor = CLIPImageProcessorPil(**options, crop_size=box, do_rescale=False, do_normalize=False)
        wanted = processor(image, return_tensors="pt")["pixel_values"][0].permute(1, 2, 0)
        file = io.BytesIO()
        image.save(file, "PNG")
        config = options | {"do_resize": True, "crop_size": box, "resample": int(resample)}
        width, height, found = page.evaluate(script, [list(file.getvalue()), config])
        assert (width, height) == (32, 32)
        assert np.array_equal(np.reshape(found, (32, 32, 3)), wanted.numpy()), (size, resample)


def test_camera_streaming_stop_and_errors(export, open_page, requests, tmp_path):
    page = open_page(export("float32"))
    page.click("button[type=submit]")
    assert page.inner_text("#status") == "Choose an image first."
    (tmp_path / "no.png").write_bytes(b"no image")
    page.set_input_files("#file", tmp_path / "no.png")
    page.wait_for_function("/no image/.test(document.getElementById('status').textContent)")
    page.click("#camera")
    page.click("#shoot")
    page.wait_for_function("!document.getElementById('image').hidden")
    assert ask(page, "What does the image show?")
    page.set_input_files("#file", requests[0][0])
    page.evaluate(
        "window.seen = []; new MutationObserver(() => seen.push(document.getElementById('answer').textContent))"
        ".observe(document.getElementById('answer'), {childList: true, characterData: true, subtree: true})"
    )
    answer = ask(page, "What does the image show?")
    parts = [text for text in page.evaluate("seen") if text and text != answer]
    assert len(parts) > 2 and all(answer.startswith(part.strip()) for part in parts), "words come one after the other"
    assert "tokens/s" in page.inner_text("#speed")
    page.evaluate("document.querySelector('[type=submit]').click(); document.getElementById('stop').click()")
    page.wait_for_function(ANSWER)
    assert len(page.inner_text("#answer")) < len(answer)


def test_the_page_fits_a_phone_and_says_what_is_missing(export, open_page, tmp_path):
    folder = shutil.copytree(export("float32"), tmp_path / "site")
    shutil.rmtree(folder / "lib")
    page = open_page(folder)
    assert "lib/ lacks transformers.js" in page.inner_text("#status")
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
