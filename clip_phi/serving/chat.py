"""The chat page, made with gradio: images, speech and text in; text, speech and images out.

The page needs no network: fonts and scripts are in the gradio package, and analytics are off.
"""

import functools
import html
import os
import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..batching.images import load_image
from ..data.sample import user_message
from ..data.synthetic import draw_scene, sample_scene
from ..evaluation.confidence import describe
from ..evaluation.explain import explain
from ..speech.tts import join
from ..templates import render
from .batch_captions import find_images
from .engine import Completion, Engine, QueueFullError
from .modalities import Modalities

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
try:
    import gradio as gr
    from starlette.middleware import Middleware

    from .server import Gate, ServerLimits
except ImportError as error:
    raise ImportError("the chat page needs gradio: pip install 'clip-phi[chat]'") from error

ERRORS = (ValueError, OSError, ImportError, RuntimeError)
ERROR = "⚠️ "  # prefix of an error in place of an answer
QUESTIONS = ("Describe the image.", "How many shapes are there?", "What can you see?")
# Endings of recordings. Gradio's own kind "audio" would depend on /etc/mime.types.
AUDIO = "aac aif aiff amr 3gp flac m4a mka mkv mov mp3 mp4 mpeg oga ogg opus wav weba webm wma"
AUDIO_SUFFIXES = tuple(f".{name}" for name in AUDIO.split())
LOCAL = ("127.0.0.1", "localhost", "::1")
SHOWN_SIZE = 256  # pixels; drawn scenes are very small


def launch(
    engine: Engine, modalities: Modalities, host: str, port: int, examples: Path | None = None, block: bool = True,
    auth: str | None = None, max_body: int = ServerLimits.max_body,
) -> gr.Blocks:  # fmt: skip
    """Serve the page. Raises OSError if the port is not available.

    examples: folder of example images; None for drawn scenes.
    block: until Ctrl-C.
    auth: USER:PASSWORD that the page asks for.
    max_body: bytes of an uploaded file."""
    transcribe = modalities.transcribe and functools.lru_cache(maxsize=256)(modalities.transcribe)

    def respond(*inputs: Any) -> Iterator[tuple[Any, str]]:
        try:
            yield from _respond(engine, modalities, transcribe, *inputs)
        except ERRORS as error:  # one line, and the page stays usable
            yield _error(error), ""

    with gr.Blocks(title="Clip-Phi", delete_cache=(3600, 24 * 3600)) as page:
        status = gr.Markdown("", elem_id="status", render=False)
        textbox = gr.MultimodalTextbox(
            sources=["upload", "microphone"] if transcribe else ["upload"],
            file_types=["image", ".avif", ".jfif", *AUDIO_SUFFIXES] if transcribe else ["image", ".avif", ".jfif"],
            placeholder="Attach, paste or drop an image, and ask about it",
            file_count="multiple", show_label=False, stop_btn=True, max_plain_text_length=4000, render=False,
        )  # fmt: skip
        placeholder = "### What is in the image?\nAttach an image, ask, and ask again. Or start with an example.\n\n"
        placeholder += "Later answers of a conversation are a little less accurate than the first one."
        chatbot = gr.Chatbot(
            show_label=False, elem_id="conversation", height="56dvh", placeholder=placeholder, buttons=["copy"],
            render_markdown=False, render=False,
        )  # fmt: skip
        longest = min(1024, engine.context // 2)
        greedy, length = "0: always the likeliest token", "Maximum answer length, in tokens"
        options = [
            gr.Slider(0, 1.5, value=0, step=0.1, label="Temperature", info=greedy, render=False),
            gr.Slider(8, longest, value=min(128, longest), step=8, label=length, render=False),
            gr.Checkbox(label="Speak the answer", visible=modalities.synthesize is not None, render=False),
            gr.Checkbox(label="Draw the answer", visible=modalities.draw is not None, render=False),
        ]
        gr.Markdown("# Clip-Phi")
        gr.ChatInterface(
            respond, chatbot=chatbot, textbox=textbox, additional_inputs=options, additional_outputs=[status],
            additional_inputs_accordion=gr.Accordion("Settings", open=False, render=False),
            examples=[[example] for example in _examples(examples)],
            multimodal=True, cache_examples=False, concurrency_limit=None, api_name="chat", fill_height=False,
        )  # fmt: skip
        status.render()
        look = gr.Button("Where did it look?", size="sm", elem_id="look")
        overlay = gr.Image(visible=False, elem_id="overlay", buttons=[])
        explains = functools.partial(_explain, engine, transcribe)
        look.click(explains, chatbot, [overlay, status], api_visibility="private", concurrency_limit=1)
        with gr.Accordion("Webcam", open=False):
            camera = gr.Image(sources=["webcam"], type="filepath", show_label=False, height=280)
            camera.input(_attach, [camera, textbox], textbox, api_visibility="private", show_progress="hidden")
        if modalities.missing:
            with gr.Accordion("Not available", open=False):
                gr.Markdown("\n".join(f"- {line}" for line in modalities.missing), elem_id="missing")
    page.queue(default_concurrency_limit=None)  # the engine's queue is the only one
    theme = gr.themes.Default(primary_hue="indigo", secondary_hue="indigo", neutral_hue="slate", radius_size="lg")
    print(f"the page is at http://{host}:{port}", file=sys.stderr, flush=True)
    hosts = () if auth is None and host in LOCAL else ("*",)
    page.launch(
        server_name=host, server_port=port, share=False, ssr_mode=False, quiet=True, footer_links=[], show_error=True,
        theme=theme, css="".join(render("chat.css")), prevent_thread_lock=not block, max_file_size=max_body,
        auth=auth and tuple(auth.split(":", 1)),
        app_kwargs={"middleware": [Middleware(Gate, limits=ServerLimits(max_body), hosts=hosts, same_origin=True)]},
    )  # fmt: skip
    return page


def _attach(image: str | None, message: dict[str, Any] | None) -> dict[str, Any]:
    """The next message, with the webcam's image among its files."""
    message = message or {"text": "", "files": []}
    return message | {"files": [*message["files"], *filter(None, [image])]}


def _examples(folder: Path | None) -> list[dict[str, Any]]:
    if folder is not None:
        return [{"text": QUESTIONS[0], "files": [path]} for path in find_images([str(folder)])[:6]]
    choose, examples = random.Random(1), []
    where = Path(tempfile.mkdtemp(prefix="clip-phi-examples-"))
    for number, question in enumerate(QUESTIONS):
        path = where / f"scene{number}.png"
        while len((scene := sample_scene(choose, "val")).objects) < 2:
            pass
        draw_scene(scene).resize((SHOWN_SIZE, SHOWN_SIZE), Image.Resampling.LANCZOS).save(path)
        examples.append({"text": question, "files": [str(path)]})
    return examples


def _respond(
    engine: Engine, modalities: Modalities, transcribe: Any, message: dict[str, Any], history: list[dict[str, Any]],
    temperature: float, max_new_tokens: float, speak: bool, draw: bool,
) -> Iterator[tuple[Any, str]]:  # fmt: skip
    """The answer so far, and the status line."""
    read = functools.partial(engine.read_image, max_pixels=ServerLimits.max_pixels)
    messages, images, transcript = _conversation(read, message, history, transcribe)
    status = f"speech: “{transcript}”" if transcript else ""
    yield "", status
    messages, length = engine.add_default_instructions(messages), int(max_new_tokens)
    try:
        completion = engine.submit(messages, images, max_new_tokens=length, temperature=temperature, top_logprobs=0)
    except QueueFullError as error:
        raise ValueError(f"too many people use this model now: try again in {error.retry_after} s") from error
    for _ in completion:
        yield _escape(completion.text), _status(status, completion)
    text, status = completion.text, _status(status, completion)
    shown: list[Any] = [_escape(text) or "(no words)"]
    yield shown[0], status
    try:
        status += f" · {describe(engine.confidence(completion, messages))}"
        yield shown[0], status
        if speak and modalities.synthesize is not None and text:
            speech = join(modalities.synthesize(text))
            samples = (speech.samples.clip(-1, 1) * 32767).astype(np.int16)
            shown.append(gr.Audio((speech.sampling_rate, samples), autoplay=True, show_label=False))
            yield shown, status
        if draw and modalities.draw is not None and text:
            shown.append(gr.Image(modalities.draw(text, random.randrange(2**31)), show_label=False))
            yield shown, status
    except ERRORS as error:  # the answer itself stays
        yield shown, f"{status} · {_error(error)}"


def _explain(engine: Engine, transcribe: Any, history: list[dict[str, Any]]) -> tuple[Any, str]:
    """The images with the map of the last answer, labelled by it; and the status line."""
    try:
        read = functools.partial(load_image, max_pixels=ServerLimits.max_pixels)
        messages, images, _ = _conversation(read, None, history, transcribe)
        if not messages:
            raise ValueError("there is no answer yet: attach an image, and ask about it")
        *asked, answer = engine.add_default_instructions(messages)
        found = explain(engine.model, engine.processor, images, asked, answer["content"])
        return gr.Image(found.draw(images), label=f"Where it looked: “{found.answer}”", visible=True), ""
    except ERRORS as error:
        return gr.Image(None, visible=False), _error(error)


def _error(error: BaseException) -> str:
    """One line, without the folders of this machine."""
    return ERROR + _escape(re.sub(r"(?<![\w:/])/(?:[^/\s]+/)+", "", " ".join(str(error).split())))


def _escape(text: str) -> str:
    """Escape tags, which gradio interprets in plain text too."""
    return html.escape(text, quote=False)


def _status(start: str, completion: Completion) -> str:
    rate, first = completion.tokens_per_second, completion.first_token_seconds
    parts = [start, f"{completion.num_tokens} tokens", f"{rate:.0f} tokens/s" if rate is not None else ""]
    parts.append(f"first token after {first:.2f} s" if first is not None else "")
    return " · ".join(filter(None, parts))


def _conversation(
    read: Callable[[str], Any], message: dict[str, Any] | None, history: Sequence[dict[str, Any]], transcribe: Any
) -> tuple[list[dict[str, Any]], list[Any], str]:
    """Messages for the chat template, images as `read` gives them, and the transcript of the newest message.

    Without a message they end with the last answer. Turns without one (stopped before the first word, or failed) are
    left out."""
    turns: list[tuple[list[str], str, str]] = []  # files, text, answer
    question: tuple[list[str], str] | None = None
    for entry in history:
        content = entry["content"] if isinstance(entry["content"], list) else [entry["content"]]
        parts: list[Any] = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
        parts = [part for part in parts if isinstance(part, dict)]  # over gradio's API also components, of answers
        files = [part["file"]["path"] for part in parts if part.get("type") == "file"]
        text = " ".join(part["text"] for part in parts if part.get("type") == "text").strip()
        if entry["role"] == "user":
            question = (files, text)
        elif question is not None and text:  # the speech or image of an answer has no text
            if not text.startswith(ERROR):
                turns.append((*question, html.unescape(text)))
            question = None
    if message is not None:
        newest = [each if isinstance(each, str) else each["path"] for each in message.get("files") or []]
        turns.append((newest, (message.get("text") or "").strip(), ""))
    messages: list[dict[str, Any]] = []
    images, transcripts = list[Any](), list[str]()
    for files, text, answer in turns:
        transcripts, before = [], len(images)
        for path in files:
            if path.lower().endswith(AUDIO_SUFFIXES):
                if transcribe is None:
                    raise ValueError("this page has no speech input")
                transcripts.append(transcribe(path))
            else:
                images.append(read(path))
        if not (files or text):
            raise ValueError("there is no question: write one, or attach an image")
        messages.append(user_message(text, len(images) - before, *transcripts))
        if answer:
            messages.append({"role": "assistant", "content": answer})
    return messages, images, transcripts[-1] if transcripts else ""
