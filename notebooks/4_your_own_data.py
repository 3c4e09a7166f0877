# %% [markdown]
# # 4. Your own data, to the Hub and a Space
#
# The demo's model knows shapes. Here you teach it something of your own, and give it to others:
#
# 1. make pictures, questions and answers, and write them to a file,
# 2. look at what the training would use, and find a mistake in the data,
# 3. train, and compare before and after,
# 4. push the model to the Hugging Face **Hub** with a model card, and load it from there,
# 5. make a **Space** of it, a web page where everybody can ask it.
#
# On Colab this uses the real Hub. Nothing is pushed before you log in with your own account. Elsewhere it uses a small
# hub on this machine, so that you can try everything without an account.

# %%
import sys

from course import demo_model, local_hub, run, show

REAL_HUB = "google.colab" in sys.modules  # True: huggingface.co, after your login
if REAL_HUB:
    from huggingface_hub import notebook_login

    notebook_login()  # paste a token with write access from huggingface.co/settings/tokens
else:
    local_hub("outputs/course/hub")
MODEL = demo_model()

# %% [markdown]
# ## Pictures, questions and answers
#
# The example is a traffic light. The pictures are drawn here, so that you need none. A question is about the light, or
# about what to do.
#
# To use **your own photos**, put them into a folder and write one line for each question. 50 to 200 questions are
# enough for a first try with a good model.

# %%
import random
from pathlib import Path

from PIL import Image, ImageDraw

OUTPUT = "outputs/course/own"
LAMPS = {"red": (225, 30, 35), "yellow": (245, 205, 40), "green": (30, 160, 70)}


def draw_light(lit, rng):
    """A traffic light, 64 x 64 pixels, at a random place."""
    picture = Image.new("RGB", (64, 64), tuple(rng.randint(200, 250) for _ in range(3)))
    pen = ImageDraw.Draw(picture)
    radius = rng.randint(6, 8)
    left, top = rng.randint(4, 60 - 2 * radius), rng.randint(2, 62 - 6 * radius - 4)
    pen.rectangle((left - 2, top, left + 2 * radius + 2, top + 6 * radius + 4), fill=(70, 70, 75))
    for number, (name, color) in enumerate(LAMPS.items()):
        y = top + 2 + 2 * radius * number
        pen.ellipse((left, y, left + 2 * radius, y + 2 * radius), fill=color if name == lit else (45, 45, 50))
    return picture


def make_rows(folder, number, seed):
    """Draw pictures into a folder. Returns rows of picture, question and answer."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    rng, rows = random.Random(seed), []
    for index in range(number):
        lit = rng.choice(list(LAMPS))
        name = f"{index:03}.png"
        draw_light(lit, rng).save(Path(folder, name))
        rows.append((name, "Which light is on?", lit))
        rows.append((name, "May I cross?", "yes" if lit == "green" else "no"))
    return rows


TRAIN, TEST = make_rows(f"{OUTPUT}/train", 150, seed=1), make_rows(f"{OUTPUT}/test", 50, seed=2)
print(f"{len(TRAIN)} questions to learn from, {len(TEST)} for the test; for example:")
shown = TRAIN[:8:2]
print(*shown, sep="\n")
show([f"{OUTPUT}/train/{name}" for name, _, _ in shown], [answer for _, _, answer in shown], width=2)

# %% [markdown]
# ## A file that training reads
#
# One json object a line (jsonl), or a table (csv). The names of the columns are yours, if you say which is which. The
# last line of the first file has a mistake on purpose: its picture does not exist.

# %%
import csv
import json

with open(f"{OUTPUT}/train.jsonl", "w") as file:
    for name, question, answer in [*TRAIN, ("missing.png", "Which light is on?", "red")]:
        file.write(json.dumps({"image": name, "question": question, "answer": answer}) + "\n")
with open(f"{OUTPUT}/test.csv", "w", newline="") as file:
    csv.writer(file).writerows([("photo", "q", "a"), *TEST])
TRAIN_DATA = f"llava:{OUTPUT}/train.jsonl,images={OUTPUT}/train"
TEST_DATA = f"dataset:{OUTPUT}/test.csv,images={OUTPUT}/test,image=photo,question=q,answer=a"
print(Path(OUTPUT, "train.jsonl").read_text()[:150], Path(OUTPUT, "test.csv").read_text()[:80], sep="\n")

# %% [markdown]
# `clip-phi inspect --summary` opens every picture and counts. It finds the mistake: one record is skipped, with its
# file, number and reason. A training counts it in the same way, and stops when more than 1 % of the records are bad.

# %%
run(f"clip-phi inspect {TRAIN_DATA} --summary")
run(f"clip-phi inspect {TEST_DATA} --num 1")

# %% [markdown]
# ## Before
#
# How good is the model before it has seen a traffic light?

# %%
run(f"clip-phi evaluate {MODEL} --task vqa --data {TEST_DATA} --output_dir {OUTPUT}/before")

# %% [markdown]
# ## Train
#
# Training continues from the demo's model with stage 2: the projector, and LoRA in the language model. With the real
# model this is the same command with `--init_from` and the name of a model on the Hub, on a GPU.

# %%
run(
    f"accelerate launch -q --config_file examples/configs/cpu.yaml train_accelerate.py --stage 2 --init_from {MODEL}"
    f" --data {TRAIN_DATA} --eval_data {TEST_DATA} --output_dir {OUTPUT}/model --max_tokens_per_batch 320"
    f" --per_device_eval_batch_size 8 --gradient_accumulation_steps 1 --max_steps 150 --eval_steps 150"
    f" --learning_rate 1e-3 --lora_learning_rate 1e-3 --logging_steps 25 --dataloader_num_workers 0"
)

# %% [markdown]
# ## After
#
# The same test, and the difference to the model before, with its interval.

# %%
run(f"clip-phi evaluate {OUTPUT}/model --task vqa --data {TEST_DATA} --output_dir {OUTPUT}/after")
run(f"clip-phi compare {OUTPUT}/after/vqa.json {OUTPUT}/before/vqa.json")

# %% [markdown]
# **What has it forgotten?** The model learnt from traffic lights alone. Test it on the shapes that it knew before.

# %%
run(f"clip-phi evaluate {OUTPUT}/model --task vqa --num_images 100 --output_dir {OUTPUT}/shapes"
    " --data llava:outputs/demo/data/llava_instruct_val.json,images=outputs/demo/data/val2017")  # fmt: skip

# %% [markdown]
# ## Push it to the Hub
#
# `clip-phi push` uploads the weights in one commit, with a model card that it makes from the records of the training
# and the evaluation. It refuses to upload access tokens and paths of your machine.

# %%
from huggingface_hub import HfApi, get_token

USER = HfApi().whoami()["name"] if get_token() else None
if USER:
    run(f"clip-phi push {OUTPUT}/model {USER}/traffic-light")
else:
    print("You are not logged in, so nothing is pushed. Log in at the top, and run this cell again.")

# %% [markdown]
# Everybody can now load it with transformers alone. `trust_remote_code` is needed, since the model's code is in the
# repository too.

# %%
from transformers import AutoModelForImageTextToText, AutoProcessor

if USER:
    name = f"{USER}/traffic-light"
    model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
    one_of_each = {answer: picture for picture, question, answer in TEST if answer in LAMPS}
    pictures = [Image.open(f"{OUTPUT}/test/{picture}") for picture in one_of_each.values()]
    content = [{"type": "image"}, {"type": "text", "text": "May I cross?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=pictures, text=[prompt] * len(pictures), return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    answers = [processor.decode(each, skip_special_tokens=True).strip() for each in output]
    print("May I cross?", dict(zip(one_of_each, answers, strict=True)))
    show(pictures, answers, width=2)
    card = Path(HfApi().hf_hub_download(name, "README.md")).read_text()
    print("\nThe model card begins:\n", card[:900])

# %% [markdown]
# ## A Space
#
# A Space is a web page on Hugging Face's machines. `clip-phi space` writes what it needs: the chat page, its
# requirements and this project's code. With `--push` it uploads them.

# %%
if USER:
    run(
        f"clip-phi space {USER}/traffic-light-chat --model {USER}/traffic-light --output_dir {OUTPUT}/space --push"
        " --private"
    )
    print(*sorted(path.name for path in Path(OUTPUT, "space").iterdir()))
    print(Path(OUTPUT, "space", "app.py").read_text())

# %% [markdown]
# ## Exercises
#
# 1. **Less data.** Train with the first 20 rows of `TRAIN`. *Expect:* the lit lamp may still be right, since the model
#    knew colors before. "May I cross?" needs more examples.
# 2. **A leak.** Use the training pictures as the test, too. *Expect:* a better score that says nothing about new
#    pictures. `clip-phi inspect TRAIN --eval_data TEST` finds such pictures, even after they were resized.
# 3. **Remember.** Train on both, traffic lights and shapes: give `--data` two sources. *Expect:* the shapes stay nearly
#    as good as before.
# 4. **Wrong answers.** Give a fifth of the training questions a wrong answer. *Expect:* the model follows the majority.
#    The loss stays higher.
# 5. **Your photos.** Replace `draw_light` with your own photos, and start from TinyCLIP and phi-2 as trained in
#    notebook 2.
