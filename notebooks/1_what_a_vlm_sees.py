# %% [markdown]
# # 1. What a vision-language model sees
#
# A vision-language model answers questions about images. Inside, there is no image any more, only rows of numbers.
# In this notebook you follow one image through the model:
#
# 1. The image is cut into **patches**.
# 2. A **vision tower** turns each patch into a vector, its *feature*.
# 3. A **projector**, one matrix, turns each feature into a vector that looks like a word to the language model.
# 4. A **language model** reads these vectors and the words of the question, and writes the answer.
#
# You write steps 3 and 4 by hand, in 30 lines of PyTorch. The result is compared with the real model: the numbers are
# equal. You need Python and a little linear algebra. No GPU is needed.
#
# This course uses a small model of drawn shapes, which a laptop can train. TinyCLIP and phi-2, the model for photos,
# have the same structure with larger numbers.

# %% [markdown]
# ## The model and an image
#
# The model is the one that the project's demo trains. The image is one of the demo's *unseen* scenes: no scene with
# these objects was in the training data.

# %%
import torch
from course import demo_model, show

from clip_phi.batching.images import load_image
from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

MODEL = demo_model()
model = ClipPhiForCausalLM.from_pretrained(MODEL).eval()
processor = ClipPhiProcessor.from_pretrained(MODEL)
image = load_image("outputs/demo/data/val2017/000000004012.jpg")
print(f"{image.width} x {image.height} pixels, three colors each: {image.width * image.height * 3:,} numbers")
show([image], ["an unseen scene"], columns=1)

# %% [markdown]
# ## Patches
#
# The tower does not look at single pixels. It cuts the image into squares of equal size, the patches.

# %%
size = model.config.vision_config.patch_size
rows = image.height // size
boxes = [(x * size, y * size, (x + 1) * size, (y + 1) * size) for y in range(rows) for x in range(rows)]
print(f"{rows} x {rows} = {len(boxes)} patches of {size} x {size} pixels, so {3 * size * size} numbers for a patch")
show([image.crop(box) for box in boxes], [f"patch {number}" for number in range(len(boxes))], columns=rows, width=1.5)

# %% [markdown]
# The first layer of the tower multiplies each patch with a matrix. Code often writes this as a convolution whose step
# is as large as its filter. Both are the same:

# %%
pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]  # (1, 3, 64, 64), normalised
first_layer = model.model.vision_tower.embeddings.patch_embedding
cut = pixels.unfold(2, size, size).unfold(3, size, size)  # (1, 3, rows, rows, size, size)
vectors = cut.permute(0, 2, 3, 1, 4, 5).reshape(len(boxes), -1)  # one row for a patch
with torch.no_grad():
    by_matrix = vectors @ first_layer.weight.flatten(1).T
    by_convolution = first_layer(pixels)[0].flatten(1).T
print("patches:", tuple(vectors.shape), "-> embedded patches:", tuple(by_matrix.shape))
print(f"largest difference between matrix and convolution: {(by_matrix - by_convolution).abs().max():.1e}")

# %% [markdown]
# ## Features
#
# The tower is a transformer: in each layer every patch looks at all others. After it, the feature of a patch also
# contains what is around it. The tower adds one more vector at the front, CLS, for the whole image. The projector uses
# only the patches, from the layer before the last, as [LLaVA](https://arxiv.org/abs/2304.08485) does.

# %%
with torch.no_grad():
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
features = states[-2][:, 1:]  # without CLS
print("hidden states of the tower:", len(states), "of shape", tuple(states[-2].shape))
print("features:", tuple(features.shape), "= (images, patches, numbers for a patch)")

# %% [markdown]
# Which patches have similar features? The map shows the cosine similarity of one patch with all others. A patch of an
# object is similar to the patches of the same object, and the background is similar to itself.

# %%
import matplotlib.pyplot as plt

unit = torch.nn.functional.normalize(features[0], dim=-1)
figure, axes = plt.subplots(1, 4, figsize=(12, 3))
axes[0].imshow(image)
axes[0].set_title("image")
for place, number in zip(axes[1:], (0, 10, 13), strict=True):
    place.imshow((unit @ unit[number]).view(rows, rows), vmin=0, vmax=1)
    place.plot(number % rows, number // rows, "r+", markersize=14)
    place.set_title(f"similarity to patch {number}")
for place in axes:
    place.axis("off")
plt.show()

# %% [markdown]
# ## Tokens
#
# A language model reads numbers too: a **tokenizer** cuts the text into tokens, and each token has an id. The image
# needs places in this row of tokens. So the processor writes the special token `<image>` once for each patch.

# %%
question = "How many shapes are there?"
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(images=[image], text=[prompt], return_tensors="pt")
ids = inputs["input_ids"][0]
print("prompt:", repr(prompt))
print("tokens:", len(ids), "of which <image>:", int((ids == processor.image_token_id).sum()))
print("text  :", [(processor.tokenizer.decode([each]), int(each)) for each in ids if each != processor.image_token_id])

# %% [markdown]
# ## The projection by hand
#
# Here is the whole model after the tower. An *embedding* is the vector of a token: row number `id` of a matrix. The
# projector makes vectors of the same width from the features. They replace the embeddings of the `<image>` tokens.
# That is all that connects the two models.

# %%
weights = dict(model.named_parameters())


@torch.no_grad()
def by_hand(input_ids, pixel_values):
    """The logits, float (batch, tokens, vocabulary), from token ids and pixels."""
    # 1. The tower: pixels to features, without CLS.
    states = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
    features = states[-2][:, 1:]

    # 2. The projector: one matrix and a bias. It is all that stage 1 trains.
    projected = features @ weights["model.projector.weight"].T + weights["model.projector.bias"]

    # 3. The embeddings of the tokens, with the projected features where the <image> tokens are.
    embeddings = weights["model.language_model.embed_tokens.weight"]
    is_image = input_ids == processor.image_token_id
    hidden = embeddings[input_ids.masked_fill(is_image, 0)]
    hidden[is_image] = projected.flatten(0, 1)

    # 4. The language model: every position sees the positions before it.
    hidden = model.model.language_model(inputs_embeds=hidden).last_hidden_state

    # 5. The head: a score, the logit, for each token that may come next.
    return hidden @ weights["lm_head.weight"].T + weights["lm_head.bias"]


ours = by_hand(inputs["input_ids"], inputs["pixel_values"])
with torch.no_grad():
    real = model(**inputs).logits
print("logits:", tuple(ours.shape), "- largest difference from the model:", float((ours - real).abs().max()))
assert torch.allclose(ours, real, atol=1e-4)

# %% [markdown]
# ## The answer, token by token
#
# The logits of the last position say which token comes next. Take the best one, append it, and ask again, until the
# end token. This is called greedy decoding.

# %%
ids = inputs["input_ids"]
for _ in range(20):
    probabilities = by_hand(ids, inputs["pixel_values"])[0, -1].softmax(-1)
    best = probabilities.topk(3)
    tokens = [repr(processor.tokenizer.decode([each])) for each in best.indices]
    print("   ".join(f"{token} {chance:.3f}" for token, chance in zip(tokens, best.values, strict=True)))
    if best.indices[0] == processor.tokenizer.eos_token_id:
        break
    ids = torch.cat([ids, best.indices[:1, None]], dim=1)

answer = processor.decode(ids[0, inputs["input_ids"].shape[1] :])
generated = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
print(f"\n{question} by hand:{answer}; model.generate:", processor.decode(generated, skip_special_tokens=True).strip())

# %% [markdown]
# ## Which word does each patch look like?
#
# A projected feature and a word are vectors of the same space. So you can ask for the most similar word of each patch.
# The training asked only for captions and answers, and never for the name of a patch.
#
# The demo's language model was pretrained on texts that follow mixtures of word vectors, so its words are easy to read
# here. In a large model, the projected features are less like single words.

# %%
from PIL import Image

with torch.no_grad():
    projected = model.model.get_image_features(pixels).pooler_output[0]
words = weights["model.language_model.embed_tokens.weight"][: processor.tokenizer.vocab_size]
similarity = torch.nn.functional.normalize(projected, dim=-1) @ torch.nn.functional.normalize(words, dim=-1).T
nearest = [processor.tokenizer.decode([each]).strip() for each in similarity.argmax(-1)]
for row in range(rows):
    print("".join(f"{word:>12}" for word in nearest[row * rows : (row + 1) * rows]))

figure, axes = plt.subplots(figsize=(4, 4))
axes.imshow(image.resize((256, 256), Image.Resampling.NEAREST))
for number, word in enumerate(nearest):
    axes.text(number % rows * 64 + 32, number // rows * 64 + 32, word, ha="center", va="center", fontsize=8)
axes.axis("off")
plt.show()

# %% [markdown]
# ## How large is each part?
#
# Only the projector is new. Both other parts were trained before, by other people, and stay as they are in stage 1.

# %%
for name, part in (
    ("vision tower", model.model.vision_tower),
    ("projector", model.model.projector),
    ("language model", model.model.language_model),
    ("head", model.lm_head),
):
    count = sum(weight.numel() for weight in part.parameters())
    print(f"{name:15} {count:>10,} numbers, {count / model.num_parameters():6.1%} of the model")

# %% [markdown]
# ## Exercises
#
# 1. **Another image.** Change `000000004012.jpg` to another file of `outputs/demo/data/val2017` and run all cells
#    again. *Expect:* the words of the patches follow the objects.
# 2. **No image.** In `by_hand`, add `projected = projected * 0` after step 2. *Expect:* the model still answers in good
#    English, but the answer no longer depends on the image.
# 3. **Shuffled patches.** In `by_hand`, permute the patches: `features = features[:, torch.randperm(16)]`. Ask "Is the
#    orange ring left of the pink circle?" *Expect:* the answer stays. The tower adds a position to each patch, so a
#    feature also says where its patch was. The order of the `<image>` tokens hardly matters.
# 4. **Another layer.** Use `states[-1]` and then `states[0]` instead of `states[-2]`. *Expect:* the last layer gives
#    nearly the same answers: each layer adds only a little. The first gives wrong ones: there a patch is not yet
#    compared with the others.
# 5. **Count the tokens.** TinyCLIP has images of 224 pixels and patches of 32. How many `<image>` tokens does an image
#    need? *Expect:* 7 x 7 = 49.
