"""clip-phi caption, ask and explain: captions and answers as text, as speech or as an image, and maps of an image."""

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..data.files import read_json, replace_file
from ..data.report import plain
from .common import load_engine
from .speech import transcribe


def run_caption(arguments: argparse.Namespace) -> int:
    if arguments.resume and arguments.output is None:
        raise ValueError("--resume requires --output FILE")
    if arguments.output is not None or any(Path(name).is_dir() for name in arguments.images):
        return _caption_many(arguments)
    from ..batching.images import load_image

    images = [(name, load_image(name)) for name in arguments.images]  # errors come before the model is loaded
    with load_engine(arguments) as engine:
        for name, image in images:
            if len(images) > 1 and not arguments.json:
                print(plain(f"{name}: "), end="", flush=True)
            caption = "".join(_printed(engine.caption(image, arguments.max_new_tokens), [], quiet=arguments.json))
            if arguments.json:
                print(json.dumps({"image": name, "caption": caption.strip()}), flush=True)
    return 0


def _caption_many(arguments: argparse.Namespace) -> int:
    """Returns 1 if there was a bad image, else 0."""
    from ..serving.batch_captions import caption_files, find_images

    names = find_images(arguments.images)
    if arguments.output is not None and arguments.output.exists() and not arguments.resume:
        raise ValueError(f"{arguments.output} exists already: --resume continues it")
    with load_engine(arguments) as engine:
        counts = caption_files(engine, names, arguments.output, arguments.max_new_tokens)
    return int(any(kind not in ("captioned", "done before") for kind in counts))


def run_ask(arguments: argparse.Namespace) -> None:
    from ..batching.images import load_image
    from ..data.sample import SPOKEN_INSTRUCTION

    if arguments.question is None and arguments.speech is None:
        raise ValueError("no question: write one, or give a recording of it with --speech")
    if arguments.draw and not arguments.drawing_model:
        raise ValueError("--draw requires --drawing_model: folder or Hub id of a text-to-image model of diffusers")
    if arguments.schema and arguments.choices:
        raise ValueError("--schema and --choices: give one of them")
    if arguments.schema and arguments.abstain_below is not None:
        raise ValueError("--abstain_below and --schema: give one of them, since the sentence is no json")
    form: dict[str, Any] = {} if arguments.schema is None else {"schema": read_json(arguments.schema)}
    if arguments.choices:
        form = {"choice": [each.strip() for each in arguments.choices.split(",")]}
    for path in filter(None, (arguments.speak, arguments.draw)):  # before minutes of work
        if not Path(path).absolute().parent.is_dir():
            raise ValueError(f"cannot write {path}: there is no such folder")
    image, speaker, drawer = load_image(arguments.image), None, None
    if arguments.speak is not None:
        from ..speech.tts import join, make_tts, write_wav

        speaker = make_tts(arguments.voice)
    if arguments.draw is not None:
        from ..serving.text_to_image import TextToImage

        drawer = TextToImage(arguments.drawing_model, arguments.device)
    question, transcript, answer = arguments.question, None, list[str]()
    record: dict[str, Any] = {"image": arguments.image, "question": question}
    if arguments.speech is not None:
        found = transcribe(arguments.speech, arguments)
        if question is None and not found.text:
            raise ValueError(f"no speech in {arguments.speech}: write the question, or record it again")
        question, transcript = question or SPOKEN_INSTRUCTION, found.text or None
        record |= {"transcript": found.text, "engine": found.engine}
        record |= {"seconds": found.seconds, "truncated": found.truncated}
    with load_engine(arguments) as engine:
        from ..evaluation.confidence import describe
        from ..serving.engine import as_prompt

        try:
            grammar = engine.grammars.compile(**form) if form else None
        except ValueError as error:
            raise ValueError(f"{arguments.schema or '--choices'} {error}") from error
        judged = arguments.confidence or arguments.abstain_below is not None
        messages, images = as_prompt(question, image, transcript)
        options: Any = {"grammar": grammar, "top_logprobs": 0 if judged else None}
        completion = engine.submit(messages, images, max_new_tokens=arguments.max_new_tokens, **options)
        if judged:
            completion.result()
            record["confidence"] = engine.confidence(completion, messages, arguments.abstain_below)
        printed = _printed([completion.text] if judged else completion, answer, quiet=arguments.json)
        if speaker is not None:
            write_wav(arguments.speak, join(speaker.stream(printed)))
            record["speak"] = arguments.speak
        "".join(printed)  # prints what the speaker has not read: all of it, if there is none
        if arguments.confidence and not arguments.json:
            print(describe(record["confidence"]), flush=True)
    if drawer is not None:
        drawer.generate("".join(answer), arguments.seed, arguments.size).save(arguments.draw, format="PNG")
        record["draw"] = arguments.draw
    if arguments.json:
        print(json.dumps(record | {"answer": "".join(answer).strip()}), flush=True)


def run_explain(arguments: argparse.Namespace) -> None:
    output = arguments.output
    if output and (output.suffix not in (".png", ".html") or not output.absolute().parent.is_dir()):
        raise ValueError(f"cannot write {output}: --output is a .png or .html file in a folder that exists")
    from ..batching.images import load_image
    from ..evaluation.explain import explain
    from ..templates import render

    images = [load_image(name) for name in arguments.images]
    options = {name: getattr(arguments, name) for name in ("question", "answer", "method", "max_new_tokens")}
    with load_engine(arguments) as engine:
        found = explain(engine.model, engine.processor, images, **options)
    record = {"images": arguments.images, "question": arguments.question, **vars(found), "maps": found.maps.tolist()}
    if output and output.suffix == ".html":
        page = render("explain.html", title="Where did it look?", pictures=images, **record)
        replace_file(output, plain("".join(page)))
    elif output:
        found.draw(images).save(output)
    print(json.dumps(record) if arguments.json else plain(found.answer))


def _printed(pieces: Iterable[str], collected: list[str], quiet: bool) -> Iterator[str]:
    """The pieces, each of which is appended to `collected` and, unless quiet, printed."""
    for piece in pieces:
        collected.append(piece)
        if not quiet:
            print(plain(piece), end="", flush=True)
        yield piece
    if not quiet:
        print(flush=True)
