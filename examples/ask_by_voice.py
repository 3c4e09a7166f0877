"""Ask about an image with a recording, and write the spoken answer.

    python examples/ask_by_voice.py IMAGE QUESTION.wav ANSWER.wav [--model outputs/demo/model]

The same from the command line: clip-phi ask IMAGE --speech QUESTION.wav --speak ANSWER.wav
It needs pip install 'clip-phi[speech]'. --speech_model takes the name or folder of a Whisper model.
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
    parser.add_argument("image")
    parser.add_argument("question", help="a recording; its first ten seconds are transcribed")
    parser.add_argument("answer", help="the wav file to write")
    parser.add_argument("--model", default="outputs/demo/model", help="folder or repository (default: %(default)s)")
    parser.add_argument("--speech_model", default="base.en", help="Whisper model (default: %(default)s)")
    arguments = parser.parse_args()

    image, audio = load_image(arguments.image), load_audio(arguments.question)
    with closing(make_transcriber(model=arguments.speech_model)) as transcriber:
        question = transcriber.transcribe(audio).text
    if not question:
        raise SystemExit(f"{arguments.question} contains no speech")
    print(f"question: {question}")

    engine, tts = Engine.from_pretrained(arguments.model), make_tts()
    words = engine.stream(SPOKEN_INSTRUCTION, image, max_new_tokens=64, transcript=question)
    sentences = []
    for speech in tts.stream(words):  # the first sentence is synthesised while the model generates the second
        sentences.append(speech)
        print(f"{speech.seconds:.1f} s of speech")
    write_wav(arguments.answer, join(sentences))
    print(f"wrote {arguments.answer}")


if __name__ == "__main__":
    main()
