"""Ask about a picture aloud, and hear the answer.

    python examples/ask_by_voice.py PICTURE QUESTION.wav ANSWER.wav [--model outputs/demo/model]

The same from the command line: clip-phi ask PICTURE --speech QUESTION.wav --speak ANSWER.wav
It needs pip install 'clip-phi[speech]'; a Whisper model of another name or folder is given with --speech_model.
"""

import argparse
from contextlib import closing

from clip_phi.batching.images import load_image
from clip_phi.data.sample import SPOKEN_INSTRUCTION
from clip_phi.serving.engine import Engine
from clip_phi.speech.asr import make_transcriber
from clip_phi.speech.audio import load_audio
from clip_phi.speech.tts import join, make_tts, write_wav


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("picture")
    parser.add_argument("question", help="a recording; its first ten seconds are heard")
    parser.add_argument("answer", help="the sound file to be written")
    parser.add_argument("--model", default="outputs/demo/model")
    parser.add_argument("--speech_model", default="base.en")
    arguments = parser.parse_args()

    picture, clip = load_image(arguments.picture), load_audio(arguments.question)
    with closing(make_transcriber(model=arguments.speech_model)) as transcriber:
        question = transcriber.transcribe(clip).text
    if not question:
        raise SystemExit(f"nobody speaks in {arguments.question}")
    print(f"heard: {question}")

    engine, tts = Engine.from_pretrained(arguments.model), make_tts()
    words = engine.stream(SPOKEN_INSTRUCTION, picture, max_new_tokens=64, transcript=question)
    sentences = []
    for speech in tts.stream(words):  # the first sentence is spoken while the second is being written
        sentences.append(speech)
        print(f"said {speech.seconds:.1f} s")
    write_wav(arguments.answer, join(sentences))
    print(f"the answer is in {arguments.answer}")


if __name__ == "__main__":
    main()
