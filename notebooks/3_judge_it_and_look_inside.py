# %% [markdown]
# # 3. Judge it and look inside
#
# "The model answers 90 % correctly." Is that good? A model that never looks at the image also answers "Is there ...?"
# correctly half of the time. So a score alone says little. In this notebook you
#
# 1. compare the score with two **controls**, the same model without the image and with wrong images,
# 2. compute how certain the score is, a **confidence interval**,
# 3. break a model on purpose, and see that the controls catch it,
# 4. compare two models,
# 5. look inside: which part of the image leads to which word?

# %%
import json
from pathlib import Path

import numpy as np
from course import demo_model, run, show

MODEL = demo_model()
OUTPUT = "outputs/course/judge"
DATA = "llava:outputs/demo/data/llava_instruct_val.json,images=outputs/demo/data/val2017"

# %% [markdown]
# ## A score and its controls
#
# `clip-phi evaluate` asks the model each question about the unseen scenes three times:
#
# - with the image,
# - **blind**: the same question without any image,
# - **shuffled**: with the image of another question.
#
# A model that uses the image must be better than both.

# %%
run(f"clip-phi evaluate {MODEL} --task vqa --data {DATA} --num_images 200 --output_dir {OUTPUT}/model")

# %%
import matplotlib.pyplot as plt

result = json.loads(Path(OUTPUT, "model/vqa.json").read_text())
names = ("score", "blind", "shuffled")
print({name: round(result[name], 3) for name in names})
low, high = result["margin_ci95"]
print(f"margin over the better control: {result['margin']:.3f}, with 95 % confidence between {low:.3f} and {high:.3f}")

figure, axes = plt.subplots(figsize=(4, 3))
axes.bar(names, [result[name] for name in names], color=["tab:green", "tab:gray", "tab:gray"])
axes.set(ylim=(0, 1), ylabel="accuracy")
plt.show()

# %% [markdown]
# How can a model answer without an image? It guesses what is frequent: "yes", or the most common number. Look at a few
# questions with all three answers.

# %%
lines = Path(OUTPUT, "model/vqa.samples.jsonl").read_text().splitlines()
samples = [json.loads(line) for line in lines]
print(f"{'question':45} {'right':10} {'model':10} {'blind':10} shuffled")
for sample in samples[:12]:
    answers = [sample["references"][0], sample["answer"], sample["blind_answer"], sample["shuffled_answer"]]
    print(f"{sample['question']:45} " + " ".join(f"{answer:10}" for answer in answers))

# %% [markdown]
# ## How certain is a score?
#
# There are only so many test images. With others, the score would be a little different. The **bootstrap** estimates
# how much: draw as many images as there are, *with* repetition, compute the score again, and do this 2,000 times.
# The middle 95 % of these scores are the interval.
#
# Draw images and not questions. Questions about one image are not independent: if the model does not recognise a
# shape, it fails in all of them.

# %%
images = sorted({sample["image"] for sample in samples})
place = {name: number for number, name in enumerate(images)}
right, count = np.zeros(len(images)), np.zeros(len(images))
for sample in samples:
    right[place[sample["image"]]] += sample["score"]
    count[place[sample["image"]]] += 1

chance = np.random.default_rng(0)


def interval(number_of_images):
    """The 95 % interval of the accuracy on so many images."""
    draws = chance.integers(0, len(images), (2000, number_of_images))
    return np.percentile(right[draws].sum(1) / count[draws].sum(1), [2.5, 97.5])


for number in (10, 50, len(images)):
    low, high = interval(number)
    print(f"{number:4} images: accuracy {right.sum() / count.sum():.3f}, 95 % interval {low:.3f} to {high:.3f}")

# %% [markdown]
# With few images, a good and a very good model cannot be told apart. Four times as many images give an interval
# of half the width.

# %% [markdown]
# ## A broken model
#
# Set the projector to zero. Then every image gives the same features, and the model cannot see. It still answers in
# good English, and some answers are right. Would you notice it from ten answers?

# %%
import torch

from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

broken = ClipPhiForCausalLM.from_pretrained(MODEL)
with torch.no_grad():
    broken.model.projector.weight.zero_()
broken.save_pretrained(f"{OUTPUT}/broken_model", merged=True)
ClipPhiProcessor.from_pretrained(MODEL).save_pretrained(f"{OUTPUT}/broken_model")
run(f"clip-phi evaluate {OUTPUT}/broken_model --task vqa --data {DATA} --num_images 200 --output_dir {OUTPUT}/broken")

# %% [markdown]
# The evaluation prints **NO MARGIN**: the broken model is not better than without the image. Its accuracy alone looks
# like that of a weak model. Only the controls show that it does not use the image at all.
#
# ## Compare two models
#
# Both models answered the same questions. So compare them question by question: the interval of the *difference* is
# narrower than the two intervals suggest.

# %%
run(f"clip-phi compare {OUTPUT}/model/vqa.json {OUTPUT}/broken/vqa.json")

# %% [markdown]
# ## Look at the mistakes
#
# Which questions does the model get wrong? Look at the images. A pattern in the mistakes says more than a number.

# %%
wrong = [sample for sample in samples if sample["score"] < 1]
print(f"{len(wrong)} of {len(samples)} answers are wrong")
shown = wrong[:4] or samples[:4]
titles = [f"{each['question']}\n{each['answer']} (right: {each['references'][0]})" for each in shown]
print("\n".join(title.replace("\n", " ") for title in titles))
show([f"outputs/demo/data/val2017/{each['image']}" for each in shown], titles)

# %% [markdown]
# ## Look inside: which patch matters?
#
# Cover a part of the image with its mean color and look at the probability of the answer. If it falls, this part
# mattered. This is called **occlusion**. A single patch is too little here: a ring lies on several patches, and each of
# them has its color. So cover windows of 2 x 2 patches. A patch gets the mean of the windows that it is in.

# %%
from PIL import Image

from clip_phi.batching.images import load_image

model = ClipPhiForCausalLM.from_pretrained(MODEL).eval()
processor = ClipPhiProcessor.from_pretrained(MODEL)
IMAGE, QUESTION = "outputs/demo/data/val2017/000000004012.jpg", "What color is the ring?"
image = load_image(IMAGE)
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)


@torch.no_grad()
def log_probabilities(images):
    """The log-probabilities of the next token, float (images, vocabulary)."""
    inputs = processor(images=images, text=[prompt] * len(images), return_tensors="pt")
    return model(**inputs).logits[:, -1].log_softmax(-1)


first = log_probabilities([image])[0]
answer = first.argmax()
size = model.config.vision_config.patch_size
rows = image.height // size
mean_color = tuple(int(value) for value in np.asarray(image).mean((0, 1)))


def cover(patches):
    """A copy of the image with these patches, pairs of row and column, in its mean color."""
    copy = image.copy()
    for y, x in patches:
        copy.paste(mean_color, (x * size, y * size, (x + 1) * size, (y + 1) * size))
    return copy


windows = [[(y, x), (y, x + 1), (y + 1, x), (y + 1, x + 1)] for y in range(rows - 1) for x in range(rows - 1)]
losses = first[answer] - log_probabilities([cover(window) for window in windows])[:, answer]
heat, count = np.zeros((rows, rows)), np.zeros((rows, rows))
for window, loss in zip(windows, losses.tolist(), strict=True):
    for place in window:
        heat[place] += loss
        count[place] += 1
heat /= count
print(QUESTION, processor.decode(answer), f"with probability {first[answer].exp():.3f}")
print("What the log-probability of the answer loses without each patch:")
print(np.round(heat, 2))

figure, axes = plt.subplots(1, 2, figsize=(7, 3))
axes[0].imshow(image)
axes[1].imshow(image.resize((256, 256), Image.Resampling.NEAREST))
axes[1].imshow(heat, extent=(0, 256, 256, 0), cmap="Reds", alpha=0.6)
for each in axes:
    each.axis("off")
plt.show()

# %% [markdown]
# **Is the explanation right?** Test it. Cover the four most important patches, and then the four least important ones.
# If the map is right, the first takes away the answer, and the second changes little.

# %%
order = np.argsort(-heat, axis=None)
tests = {"nothing": [], "the four most important": order[:4], "the four least important": order[-4:]}
images = [cover([divmod(int(number), rows) for number in patches]) for patches in tests.values()]
for name, each in zip(tests, log_probabilities(images), strict=True):
    guess = processor.decode(each.argmax())
    print(f"covered {name:25}{processor.decode(answer)}: {each[answer].exp():.3f}, now answered:{guess}")
show(images, list(tests))

# %% [markdown]
# The project has this as a function. It explains each word of a whole text, and it also knows faster methods, such as
# gradients. The map of a word says how many nats its log-probability loses without each patch. Its windows also reach
# over the edge of the image, so patches at the edge get smaller numbers than above.

# %%
from dataclasses import replace

from clip_phi.evaluation.explain import explain

found = explain(model, processor, image, "Describe the image.")
print(found.answer)
for word, heat in zip(found.words, found.maps, strict=True):
    print(f"{word:10} at most {heat.max():.2f} nats")
chosen = np.argsort(-found.maps.max((1, 2, 3)))[:4]
maps = [replace(found, maps=found.maps[[number]]).draw([image]) for number in chosen]
show([image, *maps], ["image", *(found.words[number] for number in chosen)])

# %% [markdown]
# The words on which a choice depends have large maps. A word that the text before it already decides has an empty map:
# the image is not needed for it again. So an empty map of a word does not mean that the model guessed it.
#
# The same as a command. The page shows the map of each word that you choose.

# %%
run(f"clip-phi explain {IMAGE} '{QUESTION}' --model {MODEL} --output {OUTPUT}/explained.html")

# %% [markdown]
# ## Exercises
#
# 1. **Fewer images.** Evaluate with `--num_images 10`. *Expect:* a wide interval of the margin, and still above zero.
# 2. **Half broken.** Instead of zero, set the projector to `weight * 0.5`, or exchange its rows:
#    `weight.copy_(weight[torch.randperm(len(weight))])`. *Expect:* the first model is weaker or nearly as good. The
#    second is not better than its controls: all numbers are there, in the wrong places.
# 3. **Captions.** Evaluate `--task captions`. *Expect:* a CIDEr-D far above its controls. It can be above 1: it is no
#    share.
# 4. **Two good models.** Train notebook 2's stage 2 with another `--seed`, evaluate both and compare them. *Expect:* an
#    interval of the difference that contains zero: the two cannot be told apart.
# 5. **A question about nothing.** Ask for the color of an object that is not there. *Expect:* an answer with a high
#    probability. A model can be wrong while sounding confident.
