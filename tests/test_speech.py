"""Speech without its extra: interfaces, caches, counted skips, and a worker with a fake WhisperX."""

import json
import os
import signal
import subprocess
import sys
import wave
from contextlib import closing

import numpy as np
import pytest
from PIL import Image

from clip_phi.batching.index import load_index
from clip_phi.cli import main
from clip_phi.data.report import Report
from clip_phi.data.sample import SPOKEN_INSTRUCTION, File, Sample, Turn, as_messages
from clip_phi.data.source import parse_source
from clip_phi.data.transcripts import AsrSettings, Transcripts
from clip_phi.serving.engine import Engine, as_prompt
from clip_phi.serving.text_to_image import TextToImage
from clip_phi.speech import spoken_data as speech_data
from clip_phi.speech import whisperx
from clip_phi.speech.asr import make_transcriber
from clip_phi.speech.audio import AudioClip, audio_from_array, load_audio
from clip_phi.speech.transcript import Segment, Transcript
from clip_phi.speech.tts import (
    Speech,
    TextToSpeech,
    make_tts,
    split_sentences,
    write_wav,
)
from clip_phi.training.data import _stream


@pytest.fixture(scope="module")
def image_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "red.png"
    Image.new("RGB", (40, 30), "red").save(path)
    return str(path)


# --- What is missing is named ---


@pytest.mark.parametrize(
    ("module", "call", "extra"),
    [
        ("av", lambda: load_audio(b"RIFF"), "speech"),
        ("av", lambda: audio_from_array(np.ones(100, np.float32), 16_000), "speech"),
        ("faster_whisper", lambda: make_transcriber(), "speech"),
        ("hibari", lambda: make_tts(), "speech"),
        ("diffusers", lambda: TextToImage("user/name"), "draw"),
    ],
)
def test_a_missing_package_names_its_extra(module, call, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"pip install 'clip-phi\[{extra}\]'"):
        call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "kaldi"}, "no speech recognition engine 'kaldi': choose faster-whisper or whisperx"),
        ({"device": "tpu"}, "runs on cpu or cuda, not on 'tpu'"),
        ({"model": "./nowhere"}, "no Whisper model in ./nowhere"),
    ],
)
def test_a_transcriber_that_cannot_be_is_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        make_transcriber(**options)


def test_whisperx_that_is_not_installed_is_an_error_and_no_other_engine(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CLIP_PHI_WHISPERX", str(tmp_path))
    with pytest.raises(whisperx.WorkerError, match="run 'clip-phi speech install'"):
        make_transcriber("whisperx", "tiny.en")


# --- Arrays ---


@pytest.mark.parametrize(
    ("samples", "rate", "message"),
    [
        (np.zeros((0,)), 16_000, "the array is empty"),
        (np.zeros((2, 3, 4)), 16_000, "neither"),
        (np.zeros((2, 16_000)), 16_000, "neither"),
        (np.full(10, np.nan), 16_000, "not finite"),
        (np.full(10, 20_000.0), 16_000, "goes up to 20000"),
        (np.zeros(10, np.complex64), 16_000, "dtype complex64"),
        (np.zeros(10), 0, "0 Hz"),
    ],
)
def test_an_array_that_is_no_sound_is_one_line(samples, rate, message):
    with pytest.raises(ValueError, match=message):
        audio_from_array(samples, rate)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_a_clip_of_no_length_is_refused(seconds):
    with pytest.raises(ValueError, match="max_seconds must be a number above 0"):
        audio_from_array(np.zeros(10), 16_000, seconds)


# --- Text to speech ---


def test_sentences_are_given_as_soon_as_they_are_complete():
    taken = []

    def pieces():
        for piece in ("Hello Dr. Sm", "ith. Ho", "w are you", '? "I am 3.5 m', '. tall." e.g', ". this!", "\nA line"):
            taken.append(piece)
            yield piece

    sentences = split_sentences(pieces())
    assert next(sentences) == "Hello Dr. Smith." and len(taken) == 2
    assert next(sentences) == "How are you?" and len(taken) == 4
    assert list(sentences) == ['"I am 3.5 m. tall." e.g. this!', "A line"]


class Toy(TextToSpeech):
    """One sample for each letter; none for z, and silence for y."""

    voice, sampling_rate = "toy", 8_000

    def __init__(self):
        self.sentences = []

    def _synthesize(self, sentence):
        self.sentences.append(sentence)
        kept = [letter for letter in sentence if letter != "z"]
        return Speech(np.array([0.0 if "y" in sentence else 0.5 for _ in kept], np.float32), self.sampling_rate)


def test_speech_streams_by_sentences_and_silence_is_an_error():
    toy = Toy()
    stream = toy.stream(iter(["One. Tw", "o. ", "Three"]))
    assert len(next(stream).samples) == 4 and toy.sentences == ["One."]
    assert [len(speech.samples) for speech in stream] == [4, 5]
    assert toy.synthesize("One!\n?\nTwo").samples.shape == (7,)  # a mark alone has no words
    for text in ("zzz", "yes"):
        with pytest.raises(ValueError, match=f"the voice toy produces no sound for '{text}'"):
            toy.synthesize(text)
    for text in ("", "  ", "?!", "\N{GRINNING FACE}"):
        with pytest.raises(ValueError, match="there are no words in"):
            toy.synthesize(text)


def test_wav_holds_what_was_spoken(tmp_path):
    write_wav(tmp_path / "a.wav", Speech(np.array([0, 0.5, -1, 2], np.float32), 8_000))
    with wave.open(str(tmp_path / "a.wav")) as sound:
        assert (sound.getframerate(), sound.getnchannels(), sound.getsampwidth()) == (8_000, 1, 2)
        assert np.frombuffer(sound.readframes(9), "<i2").tolist() == [0, 16384, -32767, 32767]


@pytest.fixture(scope="module")
def vits(tmp_path_factory):
    """A tiny voice of random weights, which knows the letters a to e."""
    from transformers import VitsConfig, VitsModel, VitsTokenizer

    folder = tmp_path_factory.mktemp("vits")
    (folder / "vocab.json").write_text(json.dumps({"<pad>": 0, "a": 1, "b": 2, "c": 3, "d": 4, "e": 5, " ": 6}))
    tokenizer = VitsTokenizer(str(folder / "vocab.json"), pad_token="<pad>", unk_token="<pad>", phonemize=False)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "ffn_dim": 16, "flow_size": 16, "spectrogram_bins": 9}
    small |= {"posterior_encoder_num_wavenet_layers": 1, "prior_encoder_num_flows": 1, "upsample_initial_channel": 16}
    small |= {"prior_encoder_num_wavenet_layers": 1, "duration_predictor_num_flows": 2, "resblock_kernel_sizes": [3]}
    small |= {"resblock_dilation_sizes": [[1]], "depth_separable_num_layers": 1, "upsample_rates": [4, 2]}
    small |= {"upsample_kernel_sizes": [8, 4], "vocab_size": 7, "num_attention_heads": 2, "sampling_rate": 8_000}
    VitsModel(VitsConfig(**small)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_model_of_the_pipeline_gives_the_same_speech_twice(vits):
    tts = make_tts(vits)
    first, second = tts.synthesize("abc de"), tts.synthesize("abc de")
    assert first.sampling_rate == tts.sampling_rate == 8_000
    assert first.samples.ndim == 1 and first.samples.dtype == np.float32 and len(first.samples) > 10
    assert np.array_equal(first.samples, second.samples)


# --- Data with speech ---


def test_a_spoken_turn_without_text_gets_the_instruction(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"sound")
    rows = [
        [{"from": "human", "value": text, **said}, {"from": "gpt", "value": "b"}]
        for text, said in (
            ("", {"speech": "a.wav"}),
            (" ", {"transcript": "what is it"}),
            ("Say.", {"speech": "a.wav"}),
        )
    ]
    rows.append([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "speech": "a.wav"}])
    (tmp_path / "data.json").write_text(json.dumps([{"conversations": row} for row in rows]))
    source, report = parse_source(f"llava:{tmp_path}/data.json"), Report()
    first = [sample.conversations[0][0] for sample in source.read(source.media(), report)]
    assert [turn.text for turn in first] == [SPOKEN_INSTRUCTION, SPOKEN_INSTRUCTION, "Say."]
    assert first[0].speech == File(str(tmp_path / "a.wav")) and report.skipped == {"speech outside a question": 1}


def test_recordings_have_a_folder_of_their_own(tmp_path):
    (tmp_path / "sound").mkdir()
    (tmp_path / "sound/a.wav").write_bytes(b"sound")
    media = parse_source(f"llava:{tmp_path}/x.json,images={tmp_path},recordings={tmp_path}/sound").media()
    assert media.find("a.wav", what="speech") == File(f"{tmp_path}/sound/a.wav")


@pytest.mark.parametrize(
    ("options", "message"),
    [("engine=kaldi", "engine is faster-whisper or whisperx"), ("max_speech_seconds=0", "must be a number above 0")],
)
def test_asr_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        parse_source(f"llava:x.json,{options}")


def test_asr_settings_have_transcripts_of_their_own(tmp_path):
    ways = [
        AsrSettings(),
        AsrSettings(engine="whisperx"),
        AsrSettings(model="small"),
        AsrSettings(language="en"),
        AsrSettings(max_seconds=5),
    ]
    assert len({Transcripts(way, tmp_path).path for way in ways}) == len(ways)
    source = parse_source("llava:x.json,engine=whisperx,speech_model=small,language=en,max_speech_seconds=5")
    assert source.asr_settings == AsrSettings("whisperx", "small", "en", 5.0)


def spoken_sample(*recordings, text=SPOKEN_INSTRUCTION):
    conversations = tuple((Turn("user", text, speech=each), Turn("assistant", "yes")) for each in recordings)
    return Sample(None, conversations, tuple(f"d:{number}" for number in range(len(conversations))))


def test_known_transcripts_are_filled_in_and_the_rest_is_counted(tmp_path):
    transcripts = Transcripts(AsrSettings(), tmp_path)
    transcripts.add(b"one", text="is it red")
    transcripts.add(b"silent", text="")
    transcripts.add(b"broken", error="not a sound")
    again = Transcripts(AsrSettings(), tmp_path)
    report = Report()
    (sample,) = again.fill([spoken_sample(b"one", b"silent", b"broken", b"unheard", File("/nowhere"))], report)
    assert [conversation[0].transcript for conversation in sample.conversations] == ["is it red", None]
    assert sample.origins == ("d:0", "d:3")
    assert report.skipped == {"no speech in the recording": 1, "recording cannot be decoded": 1, "missing speech": 1}
    (sample,) = again.fill([spoken_sample(b"silent", text="Is it red?")], report)  # it has a text of its own
    assert sample.conversations[0][0] == Turn("user", "Is it red?")
    assert report.repaired == {"no speech in the recording, which was left out": 1}


def test_a_line_torn_by_a_kill_costs_only_itself(tmp_path):
    transcripts = Transcripts(AsrSettings(), tmp_path)
    transcripts.add(b"one", text="a")
    with open(transcripts.path, "ab") as file:
        file.write(b'{"audio": "12')
    again = Transcripts(AsrSettings(), tmp_path)
    again.add(b"two", text="b")
    last = Transcripts(AsrSettings(), tmp_path)
    assert [last.get(each) and last.get(each)["text"] for each in (b"one", b"two", b"three")] == ["a", "b", None]


def test_a_line_that_has_changed_on_disk_costs_only_itself(tmp_path):
    transcripts = Transcripts(AsrSettings(), tmp_path)
    transcripts.add(b"one", text="a red cat")
    transcripts.add(b"two", text="b")
    good = transcripts.path.read_bytes()
    for place in range(good.index(b"\n")):
        transcripts.path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        again = Transcripts(AsrSettings(), tmp_path)
        assert again.get(b"one") is None and again.get(b"two")["text"] == "b"


@pytest.fixture
def llava(tmp_path, monkeypatch):
    """Four questions, of which two are alike."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    talks = [("Is it red?", "yes"), ("<image>\nIs it\nred?", "no"), ("What is it?", "A dog."), ("zzz", "no")]
    records = [
        {"id": str(number), "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]}
        for number, (text, answer) in enumerate(talks)
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path / "data.json"


def test_each_distinct_question_is_recorded_once_and_those_without_sound_stay_text(llava):
    toy, output = Toy(), llava.with_name("spoken.json")
    found = speech_data.synthesize_questions(llava, output, toy)
    assert (found.questions, found.spoken, found.recordings, found.new, found.unspeakable) == (4, 3, 2, 2, 1)
    turns = [record["conversations"][0] for record in json.loads(output.read_text())]
    assert [turn["value"] for turn in turns] == [
        SPOKEN_INSTRUCTION,
        f"<image>\n{SPOKEN_INSTRUCTION}",
        SPOKEN_INSTRUCTION,
        "zzz",
    ]
    assert turns[0]["speech"] == turns[1]["speech"] != turns[2]["speech"] and "speech" not in turns[3]
    assert {path.name for path in (llava.parent / "spoken").iterdir()} == {turn["speech"] for turn in turns[:3]}
    toy.sentences.clear()
    assert speech_data.synthesize_questions(llava, output, toy).new == 0 and toy.sentences == ["zzz"]


def test_a_share_is_chosen_by_the_seed(llava):
    def spoken(share, seed):
        output = llava.with_name("part.json")
        speech_data.synthesize_questions(llava, output, Toy(), share, seed)
        return ["speech" in record["conversations"][0] for record in json.loads(output.read_text())]

    assert spoken(0.5, 1) == spoken(0.5, 1) and not any(spoken(0, 0))
    assert len({tuple(spoken(0.5, seed)) for seed in range(8)}) > 1
    for share, output, message in ((2, "x.json", "between 0 and 1"), (1, "data.json", "must be another file")):
        with pytest.raises(ValueError, match=message):
            speech_data.synthesize_questions(llava, llava.with_name(output), Toy(), share)


class ToyTranscriber:
    """The text of a recording is its length."""

    engine, model = "faster-whisper", "base.en"

    def __init__(self, stop_after=99):
        self.lengths, self.stop_after = [], stop_after

    def transcribe(self, clip):
        if len(self.lengths) == self.stop_after:
            raise KeyboardInterrupt
        self.lengths.append(len(clip.samples))
        text = f"of {len(clip.samples)}"
        return Transcript(text, (Segment(text, 0.0, 1.0),), "en", self.engine, clip.seconds, clip.truncated)

    def close(self):
        pass


@pytest.fixture
def spoken(llava, monkeypatch):
    output = llava.with_name("spoken.json")
    speech_data.synthesize_questions(llava, output, Toy())
    monkeypatch.setattr(speech_data, "load_audio", lambda file, seconds: AudioClip(np.zeros(len(file.read())), False))
    return f"llava:{output},recordings={output.with_suffix('')}"


def test_transcribing_continues_where_it_was_stopped(spoken, monkeypatch):
    first, second = ToyTranscriber(stop_after=1), ToyTranscriber()
    monkeypatch.setattr(speech_data, "make_transcriber", lambda *options: first)
    with pytest.raises(KeyboardInterrupt):
        speech_data.transcribe_source(parse_source(spoken))
    monkeypatch.setattr(speech_data, "make_transcriber", lambda *options: second)
    found, report = speech_data.transcribe_source(parse_source(spoken))
    assert (found.recordings, found.new, found.bad) == (2, 1, 0) and report.records == 4
    assert len(first.lengths) == len(second.lengths) == 1 and first.lengths != second.lengths
    monkeypatch.setattr(speech_data, "make_transcriber", lambda *options: pytest.fail("all is known"))
    assert speech_data.transcribe_source(parse_source(spoken))[0].new == 0


def test_training_skips_and_counts_until_the_recordings_are_transcribed(spoken, processor, monkeypatch, capsys):
    index = load_index(parse_source(spoken), processor, 200)
    assert len(index) == 1 and index.report.skipped == {"speech without a transcript": 2, "<image> without an image": 1}
    assert "run 'clip-phi speech transcribe --data DATA' first" in index.report.table()
    monkeypatch.setattr(speech_data, "make_transcriber", lambda *options: ToyTranscriber())
    assert main(["speech", "transcribe", "--data", spoken, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["new"] == 2 and record["model"] == "base.en" and record["engine"] == "faster-whisper"
    index = load_index(parse_source(spoken), processor, 200)  # made anew, since there are transcripts now
    assert len(index) == 3 and index.report.skipped == {"<image> without an image": 1}
    text = processor.decode(index.encoded(0)[0].ids)
    assert text == f"Speech: of 64\nInstruct: {SPOKEN_INSTRUCTION}\nOutput: yes<|endoftext|>"
    assert index.sample(0).conversations[0][0].transcript == "of 64"
    other = load_index(parse_source(f"{spoken},speech_model=small.en"), processor, 200)
    assert other.report.skipped["speech without a transcript"] == 2


def test_a_stream_reads_transcripts_too(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": "a", "speech": None}]
    rows = [{"messages": [turns[0] | {"speech": f"{number}.wav"}, turns[1]]} for number in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number in range(2):
        (tmp_path / f"{number}.wav").write_bytes(b"sound %d" % number)
    source, report = parse_source(f"dataset:{tmp_path}/rows.jsonl,streaming=true"), Report()
    source.transcripts().add(b"sound 1", text="is it red")
    stream = _stream(source, 0, 0, 1, report)
    assert {next(stream).conversations[0][0].transcript for _ in range(2)} == {None, "is it red"}
    with pytest.raises(ValueError, match="is a stream"):
        speech_data.transcribe_source(source)


# --- Asking ---


def test_ask_puts_the_transcript_before_the_instruction(image_file, checkpoint, monkeypatch, capsys):
    speech = {"text": "what color"}

    def transcribe(file, arguments):
        return Transcript(speech["text"], (), "en", "faster-whisper", 1.5, True)

    monkeypatch.setattr("clip_phi.commands.generate.transcribe", transcribe)
    ask = ["ask", image_file, "--speech", "q.wav", "--model", checkpoint, "--max_new_tokens", "6", "--json"]
    asked = []
    monkeypatch.setattr(
        "clip_phi.serving.engine.as_prompt",
        lambda text, image, transcript: asked.append((text, transcript)) or as_prompt(text, image, transcript),
    )
    monkeypatch.setattr("clip_phi.serving.engine.Engine.submit", lambda *args, **options: iter(["a ", "b"]))
    assert main(ask) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["transcript"] == "what color" and record["truncated"] and record["engine"] == "faster-whisper"
    assert record["answer"] == "a b"
    assert main([*ask, "Is it red?"]) == 0
    speech["text"] = ""
    assert main([*ask, "Is it red?"]) == 0
    assert main(ask) == 2 and "no speech in q.wav" in capsys.readouterr().err
    assert asked == [(SPOKEN_INSTRUCTION, "what color"), ("Is it red?", "what color"), ("Is it red?", None)]


def test_a_spoken_question_is_asked_as_it_was_trained(checkpoint, image_file, monkeypatch):
    trained = as_messages((Turn("user", SPOKEN_INSTRUCTION, transcript="is it red"), Turn("assistant", "yes")), True)
    engine, asked = Engine.from_pretrained(checkpoint), []
    encode = engine.processor.encode

    def noted(messages, **options):
        asked.append(messages)
        return encode(messages, **options)

    monkeypatch.setattr(engine.processor, "encode", noted)
    assert "".join(engine.stream(SPOKEN_INSTRUCTION, Image.open(image_file), 6, transcript="is it red"))
    assert asked == [trained[:1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no question"),
        (["Why?", "--draw", "a.png"], "--draw requires --drawing_model"),
        (["Why?", "--speak", "/nowhere/a.wav"], "cannot write /nowhere/a.wav"),
    ],
)
def test_ask_refuses_in_one_line_what_it_cannot_do(options, message, capsys):
    assert main(["ask", "none.png", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("clip-phi: error: ") and message in line


# --- The worker, with a fake WhisperX ---

WHISPERX = """
import os, sys, time
import numpy as np

class Pipeline:
    def __init__(self, language):
        self.language = language
        self.model = type("", (), {"model": type("", (), {"is_multilingual": "multi" in sys.argv[1]})})

    def transcribe(self, audio, batch_size, language):
        print("WhisperX prints what it likes")
        what = int(round(float(audio[0]) * 100))
        if what == 13 or (what == 14 and not os.path.exists(sys.argv[1])):
            open(sys.argv[1], "w").close()
            print("no more memory", file=sys.stderr, flush=True)
            os._exit(9)
        if what == 15:
            time.sleep(60)
        if what == 16:
            raise RuntimeError("odd\\nsound")
        assert audio.flags.writeable and audio.dtype == np.float32
        text = f" {len(audio)} samples, {os.environ['PYANNOTE_METRICS_ENABLED']} "
        return {"segments": [{"text": text, "start": 0, "end": np.float32(1.5)}], "language": language or "fr"}

def load_model(model, device, device_index, compute_type, language, threads, vad_method):
    assert (device, device_index, compute_type, vad_method) == ("cuda", 1, "int8", "pyannote")
    if "bad" in model:
        raise ValueError("no such\\nmodel")
    if "slow" in model:
        time.sleep(60)
    print("loaded")
    return Pipeline(language)

def load_align_model(language, device):
    return language, {}

def align(segments, model, about, audio, device):
    words = [{"word": "12", "start": np.float64(0.5), "end": 1.0}, {"word": "?", "start": float("nan")}]
    return {"segments": [segment | {"words": words} for segment in segments]}
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whisperx") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    (site / "borrowed.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    (site / "whisperx.py").write_text(WHISPERX.replace("\\\\", "\\"))
    (site / "whisperx-9.9.dist-info").mkdir()
    (site / "whisperx-9.9.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: whisperx\nVersion: 9.9\n")
    (folder / whisperx.ABOUT).write_text(json.dumps({"form": "full", "version": "9.9"}))
    return folder


def make_worker(environment, model="tiny", language=None, words=False):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIP_PHI_WHISPERX", str(environment))
        return whisperx.WhisperXTranscriber(model, "cuda:1", language, "int8", words)


def sound(kind=0, length=160):
    return AudioClip(np.full(length, kind / 100, np.float32), False)


def test_the_worker_transcribes_whatever_whisperx_prints_and_sends_no_telemetry(environment):
    with closing(make_worker(environment)) as transcriber:
        found = transcriber.transcribe(sound(1))
        assert found == Transcript(
            "160 samples, false", (Segment("160 samples, false", 0.0, 1.5),), "en", "whisperx", 0.01, False
        )
        assert transcriber.transcribe(sound(1, 170_000)).text == "170000 samples, false"  # longer than a pipe holds
        assert transcriber.transcribe(sound(0)).text == "" and transcriber.starts == 1
        process = transcriber._process
    assert process.poll() == 0
    with pytest.raises(ValueError, match="this transcriber is closed"):
        transcriber.transcribe(sound(1))


def test_words_have_timestamps_and_languages_are_detected(environment):
    with closing(make_worker(environment, "multi", words=True)) as transcriber:
        found = transcriber.transcribe(sound(1))
    assert found.language == "fr" and found.segments[0].words == (("12", 0.5, 1.0), ("?", None, None))
    with pytest.raises(ValueError, match="WhisperX cannot load tiny: .*supports English only, not 'de'"):
        make_worker(environment, language="de")


def test_a_worker_that_exits_is_restarted_once_a_clip(environment, tmp_path):
    with closing(make_worker(environment, str(tmp_path / "model"))) as transcriber:
        assert transcriber.transcribe(sound(14)).text == "160 samples, false" and transcriber.starts == 2
        os.kill(transcriber._process.pid, signal.SIGKILL)
        assert transcriber.transcribe(sound(1)).text == "160 samples, false" and transcriber.starts == 3
        with pytest.raises(whisperx.WorkerError, match="exited twice during one clip: exit status 9: no more memory"):
            transcriber.transcribe(sound(13))
        assert transcriber.transcribe(sound(1)).text == "160 samples, false"


def test_a_worker_that_does_not_answer_is_stopped(environment, monkeypatch):
    with closing(make_worker(environment)) as transcriber:
        transcriber.transcribe_seconds = 0.5
        with pytest.raises(whisperx.WorkerError, match="did not answer within 0.5 seconds, and was stopped"):
            transcriber.transcribe(sound(15))
        transcriber.transcribe_seconds = 60
        assert transcriber.transcribe(sound(1)).text == "160 samples, false" and transcriber.starts == 2
        os.kill(transcriber._process.pid, signal.SIGSTOP)
        process, transcriber.transcribe_seconds = transcriber._process, 0.2
        with pytest.raises(whisperx.WorkerError, match="did not answer within 0.2 seconds"):
            transcriber.transcribe(sound(1))
        assert process.poll() == -signal.SIGKILL
    monkeypatch.setattr(whisperx.WhisperXTranscriber, "start_seconds", 0.2)
    with pytest.raises(whisperx.WorkerError, match="did not start within 0.2 seconds"):
        make_worker(environment, "slow")


def test_what_whisperx_refuses_is_one_line_and_it_goes_on(environment):
    with closing(make_worker(environment)) as transcriber:
        with pytest.raises(ValueError, match="cannot transcribe this clip: RuntimeError: odd sound"):
            transcriber.transcribe(sound(16))
        assert transcriber.transcribe(sound(1)).text == "160 samples, false" and transcriber.starts == 1
    with pytest.raises(ValueError, match="WhisperX cannot load bad: ValueError: no such model"):
        make_worker(environment, "bad")


def test_an_incomplete_installation_is_an_error_with_the_command_that_repairs_it(environment, tmp_path):
    for content, message in ((None, "is not installed"), ("{", "is damaged"), ('{"form": "full"}', "is damaged")):
        if content is not None:
            (tmp_path / whisperx.ABOUT).write_text(content)
        with pytest.raises(whisperx.WorkerError, match=f"{message}.*run 'clip-phi speech install'"):
            whisperx.find_installation(tmp_path)
    (tmp_path / whisperx.ABOUT).write_text('{"form": "light", "version": "9.9"}')
    with pytest.raises(whisperx.WorkerError, match="has no .*run 'clip-phi speech install'"):
        whisperx.find_installation(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(sys.executable)
    with pytest.raises(ValueError, match="WhisperX's light form has no word timestamps"):
        make_worker(tmp_path, words=True)


def test_installing_never_overwrites_another_folder(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(whisperx.WorkerError, match="is no Python environment"):
        whisperx.install("light", tmp_path)
    with pytest.raises(ValueError, match="no form 'huge'"):
        whisperx.install("huge", tmp_path / "new")
    assert (tmp_path / "thesis.txt").exists()


def test_doctor_checks_the_environment_of_whisperx(tmp_path, monkeypatch):
    from clip_phi.tools.doctor import check_whisperx

    folder = tmp_path / "whisperx"
    monkeypatch.setenv("CLIP_PHI_WHISPERX", str(folder))
    [check] = check_whisperx()
    assert (check.status, check.remedy) == ("note", "clip-phi speech install")
    (folder / "bin").mkdir(parents=True)
    [check] = check_whisperx()
    assert (check.status, check.found) == ("problem", f"{folder} is incomplete")
    (folder / whisperx.ABOUT).write_text('{"form": "light", "version": "3.8.6"}')
    (folder / "bin/python").write_text("#!/bin/sh\necho 'No module named torch' >&2\nexit 1\n")
    (folder / "bin/python").chmod(0o755)
    [check] = check_whisperx()
    assert check.status == "problem" and check.found.endswith("import ended with status 1: No module named torch")
    for version, status in (("3.8.6", "ok"), ("3.9.0", "note")):
        (folder / "bin/python").write_text(
            f'#!/bin/sh\n[ "$3 $4" = "--check silero" ] && echo noise && echo {version}\n'
        )
        [check] = check_whisperx()
        assert (check.status, version in check.found) == (status, True)
