"""A page to talk to a model in, by gradio: pictures, speech and text in; text, speech and pictures out.

The page needs nothing but this machine: fonts and scripts come from the gradio package, and nothing is reported.
"""

import functools
import html
import mimetypes
import os
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..batching.images import load_image
from ..data.sample import user_message
from ..data.synthetic import draw_scene, sample_scene
from .batch_captions import find_pictures
from .engine import Answer, Busy, Engine
from .modalities import Parts

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
try:
    import gradio as gr
except ImportError as error:
    raise ImportError("the chat page needs gradio: pip install 'clip-phi[chat]'") from error

FAULTS = (ValueError, OSError, ImportError, RuntimeError)
ERROR = "⚠️ "  # how an answer begins that is none
QUESTIONS = ("Describe the image.", "How many shapes are there?", "What can you see?")
SHOWN_SIZE = 256  # pixels; drawn scenes are smaller than a thumb
CSS = """
.gradio-container {width: 100% !important; max-width: 880px !important; margin: 0 auto !important}
.gradio-container > main, .gradio-container main.contain {width: 100%}
#conversation .placeholder-content, #conversation .placeholder {text-align: center; align-items: center; width: 100%}
#conversation button[title="Share"] {display: none}
#status p {font-size: 0.85rem; opacity: 0.75; text-align: center; min-height: 1.2em; margin: 0}
#missing p, #missing li {font-size: 0.85rem; opacity: 0.8}
@media (max-width: 640px) {
  .gradio-container main {padding: 8px !important}
  #conversation {height: 60dvh !important}
  .gradio-container h1 {font-size: 1.3rem !important; margin: 0}
}
"""


def launch(engine: Engine, parts: Parts, host: str, port: int, examples: Path | None) -> None:
    """Serve the page until Ctrl-C. Raises OSError if the port cannot be had."""
    page = make_page(engine, parts, examples)
    page.queue(default_concurrency_limit=None)  # the engine's queue is the only one
    print(f"the page is at http://{host}:{port}", file=sys.stderr, flush=True)
    page.launch(
        server_name=host, server_port=port, share=False, ssr_mode=False, quiet=True, footer_links=[], show_error=True,
        theme=_theme(), css=CSS,
    )  # fmt: skip


def _theme() -> Any:
    return gr.themes.Default(primary_hue="indigo", secondary_hue="indigo", neutral_hue="slate", radius_size="lg")


def make_page(engine: Engine, parts: Parts, examples: Path | None = None) -> gr.Blocks:
    """examples: a folder of pictures to begin with; None for drawn scenes."""
    hear = None if parts.hear is None else functools.lru_cache(maxsize=256)(parts.hear)

    def respond(
        message: dict[str, Any],
        history: list[dict[str, Any]],
        temperature: float,
        max_new_tokens: float,
        speak: bool,
        draw: bool,
    ) -> Iterator[tuple[Any, str]]:
        try:
            yield from _respond(engine, parts, hear, message, history, temperature, int(max_new_tokens), speak, draw)
        except FAULTS as error:  # in one line, and the page goes on
            yield ERROR + _literal(" ".join(str(error).split())), ""

    with gr.Blocks(title="Clip-Phi", delete_cache=(3600, 24 * 3600)) as page:
        status = gr.Markdown("", elem_id="status", render=False)
        sources = ["upload", "microphone"] if hear is not None else ["upload"]
        textbox = gr.MultimodalTextbox(
            sources=sources,  # type: ignore[arg-type]
            file_types=["image", "audio"] if hear is not None else ["image"],
            file_count="multiple",
            placeholder="Attach, paste or drop a picture, and ask about it",
            show_label=False,
            stop_btn=True,
            max_plain_text_length=4000,
            render=False,
        )
        placeholder = "### What is in the picture?\nTake a picture, ask, and ask again. Or begin with one of these."
        chatbot = gr.Chatbot(
            show_label=False, elem_id="conversation", height="56dvh", placeholder=placeholder, buttons=["copy"],
            render_markdown=False, render=False,
        )  # fmt: skip
        settings = gr.Accordion("Settings", open=False, render=False)
        options = _options(engine, parts)
        gr.Markdown("# Clip-Phi")
        gr.ChatInterface(
            respond,
            multimodal=True,
            chatbot=chatbot,
            textbox=textbox,
            additional_inputs=options,  # type: ignore[arg-type]
            additional_inputs_accordion=settings,
            additional_outputs=[status],
            examples=[[example] for example in _examples(examples)],
            cache_examples=False,
            concurrency_limit=None,
            api_name="chat",
            fill_height=False,
        )
        status.render()
        with gr.Accordion("Webcam", open=False):
            camera = gr.Image(sources=["webcam"], type="filepath", show_label=False, height=280)
            camera.input(_attach, [camera, textbox], textbox, api_visibility="private", show_progress="hidden")
        if parts.missing:
            with gr.Accordion("What this page cannot do", open=False):
                gr.Markdown("\n".join(f"- {line}" for line in parts.missing), elem_id="missing")
    return page


def _options(engine: Engine, parts: Parts) -> list[Any]:
    most = min(1024, engine.context // 2)
    return [
        gr.Slider(0, 1.5, value=0, step=0.1, label="Temperature", info="0: always the likeliest word", render=False),
        gr.Slider(8, most, value=min(128, most), step=8, label="Longest answer, in tokens", render=False),
        gr.Checkbox(label="Speak the answer", visible=parts.speak is not None, render=False),
        gr.Checkbox(label="Draw the answer", visible=parts.draw is not None, render=False),
    ]


def _attach(picture: str | None, message: dict[str, Any] | None) -> dict[str, Any]:
    """A picture of the webcam, among the files of the next question."""
    message = message or {"text": "", "files": []}
    return {"text": message["text"], "files": [*message["files"], *([picture] if picture else [])]}


def _examples(folder: Path | None) -> list[dict[str, Any]]:
    if folder is not None:
        return [{"text": QUESTIONS[0], "files": [path]} for path in find_pictures([str(folder)])[:6]]
    choose, examples = random.Random(1), []
    where = Path(tempfile.mkdtemp(prefix="clip-phi-examples-"))
    for number, question in enumerate(QUESTIONS):
        path = where / f"scene{number}.png"
        scene = sample_scene(choose, "val")
        while len(scene.objects) < 2:
            scene = sample_scene(choose, "val")
        draw_scene(scene).resize((SHOWN_SIZE, SHOWN_SIZE), Image.Resampling.LANCZOS).save(path)
        examples.append({"text": question, "files": [str(path)]})
    return examples


def _respond(
    engine: Engine, parts: Parts, hear: Any, message: dict[str, Any], history: list[dict[str, Any]],
    temperature: float, max_new_tokens: int, speak: bool, draw: bool,
) -> Iterator[tuple[Any, str]]:  # fmt: skip
    """The answer so far, and the line below it."""
    messages, images, heard = _conversation(message, history, hear)
    heard = f"heard: “{heard}”" if heard else ""
    yield "", heard
    try:
        answer = engine.submit(
            engine.completed(messages), images, max_new_tokens=max_new_tokens, temperature=temperature
        )
    except Busy as error:
        raise ValueError(f"many are talking to this model at once: try again in {error.retry_after} s") from error
    text = ""
    for piece in answer:
        text += piece
        yield _literal(text), _line(heard, answer)
    shown: list[Any] = [_literal(text) or "(no words)"]
    yield shown[0], _line(heard, answer)
    told = _line(heard, answer)
    try:
        if speak and parts.speak is not None and text:
            sentences = list(parts.speak(text))
            samples = np.concatenate([each for _, each in sentences])
            spoken = (np.clip(samples, -1, 1) * 32767).astype(np.int16)
            shown.append(gr.Audio((sentences[0][0], spoken), autoplay=True, show_label=False))
            yield shown, told
        if draw and parts.draw is not None and text:
            shown.append(gr.Image(parts.draw(text, random.randrange(2**31)), show_label=False))
            yield shown, told
    except FAULTS as error:  # the answer itself stays
        yield shown, f"{told} · {ERROR}{_literal(' '.join(str(error).split()))}"


def _literal(text: str) -> str:
    """For gradio, which takes what looks like a tag for one, in plain text too."""
    return html.escape(text, quote=False)


def _line(heard: str, answer: Answer) -> str:
    parts = [heard] if heard else []
    parts.append(f"{answer.num_tokens} tokens")
    if answer.tokens_per_second is not None:
        parts.append(f"{answer.tokens_per_second:.0f} a second")
    if answer.first_token_seconds is not None:
        parts.append(f"the first after {answer.first_token_seconds:.2f} s")
    return " · ".join(parts)


def _conversation(
    message: dict[str, Any], history: Sequence[dict[str, Any]], hear: Any
) -> tuple[list[dict[str, Any]], list[Image.Image], str]:
    """Messages and images for the engine, and what was heard in the newest message.

    Turns without an answer (stopped before its first word, or failed) are left out: they would be part of the next."""
    turns: list[tuple[list[str], str, str]] = []  # files, text, answer
    asked: tuple[list[str], str] | None = None
    for entry in history:
        files, text = _content(entry)
        if entry["role"] == "user":
            asked = (files, text)
        elif asked is not None and text:  # a spoken or drawn answer has no text of its own
            if not text.startswith(ERROR):
                turns.append((*asked, html.unescape(text)))
            asked = None
    newest = [each if isinstance(each, str) else each["path"] for each in message.get("files") or []]
    turns.append((newest, (message.get("text") or "").strip(), ""))
    messages: list[dict[str, Any]] = []
    images: list[Image.Image] = []
    heard = ""
    for files, question, answer in turns:
        transcripts, seen = [], len(images)
        heard = ""
        for path in files:
            if (mimetypes.guess_type(path)[0] or "").startswith(("audio/", "video/")):
                if hear is None:
                    raise ValueError("this page has no way to hear")
                heard = hear(path)
                transcripts.append(heard)
            else:
                images.append(load_image(path))
        if not (files or question):
            raise ValueError("there is no question: write one, or attach a picture")
        messages.append(user_message(question, len(images) - seen, *transcripts))
        if answer:
            messages.append({"role": "assistant", "content": answer})
    return messages, images, heard


def _content(entry: dict[str, Any]) -> tuple[list[str], str]:
    """Paths of the files and the text of one message of gradio's history."""
    content = entry["content"] if isinstance(entry["content"], list) else [entry["content"]]
    paths, texts = [], []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif part.get("type") == "text":
            texts.append(part["text"])
        elif part.get("type") == "file":
            paths.append(part["file"]["path"])
    return paths, " ".join(texts).strip()
