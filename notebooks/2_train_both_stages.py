# %% [markdown]
# # 2. Train both stages
#
# Notebook 1 showed that a single matrix connects a vision tower with a language model. Here you train it:
#
# - **Stage 1** trains the projector alone, on captions. Tower and language model are frozen: their weights do not
#   change.
# - **Stage 2** continues on questions and answers. It trains the projector and **LoRA**, a small addition to the
#   weights of the language model.
#
# This is the method of [LLaVA](https://arxiv.org/abs/2304.08485).
#
# **One switch decides what is trained.** With `REAL = False`, the small model of drawn shapes is trained in about two
# minutes, on a CPU. With `REAL = True`, TinyCLIP and phi-2 are trained on COCO's photos. That needs a GPU: on Colab a
# T4, an L4 or an A100 (menu *Runtime*, *Change runtime type*).

# %%
from course import demo_model, run, show

REAL = False  # True: TinyCLIP, phi-2 and photos, on a GPU
print("This notebook trains", "the real model, on COCO." if REAL else "the small model, on drawn scenes.")

# %% [markdown]
# ## How long will it take?
#
# `clip-phi plan` computes memory and time of the *real* training for a GPU, without having one. A free Colab session
# ends after some hours. So both stages write training checkpoints and can continue from them.

# %%
run("clip-phi plan --gpu t4 --stage 1")  # or l4, a100-40
run("clip-phi plan --gpu t4 --stage 2")

# %% [markdown]
# ## The data
#
# The demo draws its data: scenes of one to three shapes, with captions, questions and answers. They are written in the
# same file formats as COCO 2017 and LLaVA-Instruct. With `REAL = True`, the photos are downloaded instead (20 GB).
# Checkpoints go to your Google Drive, which stays when the Colab machine is gone.

# %%
if REAL:
    from google.colab import drive

    drive.mount("/content/drive")
    OUTPUT = "/content/drive/MyDrive/clip-phi"
    run("clip-phi download coco-val")
    run("clip-phi download coco --keep_zip")
    run("clip-phi download llava-instruct --keep_zip")
    DATA = "coco:data/coco/annotations/captions_val2017.json,images=data/coco/val2017"
    PICTURES = "data/coco/val2017"
else:
    demo_model()  # it also draws the scenes
    OUTPUT = "outputs/course/train"
    DATA = "coco:outputs/demo/data/annotations/captions_train2017.json,images=outputs/demo/data/train2017"
    PICTURES = "outputs/demo/data/val2017"
print(f"data: {DATA}\nunseen images: {PICTURES}\nthe trained models go to {OUTPUT}")

# %% [markdown]
# Look at the data before you train on them. `clip-phi inspect` prints a sample as the model gets it. Only what is
# marked as supervised is learnt: the caption, and the end token after it.

# %%
run(f"clip-phi inspect {DATA} --num 2")

# %% [markdown]
# ## Before training
#
# The projector starts with random numbers. The language model is good at its language, but the projected image is
# noise to it.

# %%
import json
from pathlib import Path

from clip_phi.batching.images import load_image
from clip_phi.evaluation.generate import generate_texts
from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

UNSEEN = sorted(Path(PICTURES).glob("*.jpg"))[:4]
if REAL:
    show(UNSEEN)  # the large model is loaded only where it is trained and used
else:
    parts = ("examples/demo_backbones/vision", "examples/demo_backbones/text")
    processor = ClipPhiProcessor.from_backbones(*parts)
    model = ClipPhiForCausalLM.from_backbones(*parts, image_token_id=processor.image_token_id)
    prompt = [{"role": "user", "content": [{"type": "image"}]}]  # in stage 1, an image alone asks for its caption
    texts = generate_texts(model, processor, [(prompt, load_image(path)) for path in UNSEEN], max_new_tokens=24)
    show(UNSEEN, texts)
    print("\n".join(texts))

# %% [markdown]
# ## Stage 1: the projector
#
# One command trains. `accelerate launch` reads *where* the training runs from a yaml file, a CPU or a GPU. All else is
# an option of `train_accelerate.py`, also readable from a recipe.
#
# For the real training, `--max_tokens_per_batch auto` fills the GPU's memory, and a bare `--resume_from_checkpoint`
# continues the newest training checkpoint, or starts if there is none. So after a break you run this cell again.

# %%
if REAL:
    run(
        f"accelerate launch -q --config_file accelerate_config.yaml train_accelerate.py --stage 1"
        f" --output_dir {OUTPUT}/stage1 --max_tokens_per_batch auto --save_steps 200 --resume_from_checkpoint"
    )
else:
    run(
        f"accelerate launch -q --config_file examples/configs/cpu.yaml train_accelerate.py"
        f" --config examples/recipes/demo_stage1.yaml --output_dir {OUTPUT}/stage1 --max_steps 150 --eval_steps 150"
    )

# %% [markdown]
# The loss is the mean of -log p over the words of the captions, where p is the probability that the model gave to the
# right next token. Zero is perfect. The curve falls steeply, then slowly: a projector learns fast, since the tower and
# the language model know their parts already.


# %%
def losses(folder):
    """Step and loss of each line of a training log."""
    records = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


print("step, loss:", [(step, round(loss, 3)) for step, loss in losses(f"{OUTPUT}/stage1")])
show([f"{OUTPUT}/stage1/curve.png"], columns=1, width=6)

# %%
run(f"clip-phi caption {' '.join(map(str, UNSEEN))} --model {OUTPUT}/stage1")

# %% [markdown]
# **What has changed?** Compare the model of stage 1 with the frozen parts that it started from. Every weight of tower
# and language model is equal, bit by bit. Only the projector moved.

# %%
if not REAL:
    trained = ClipPhiForCausalLM.from_pretrained(f"{OUTPUT}/stage1")
    before = dict(model.named_parameters())
    moved = [name for name, weight in trained.named_parameters() if not weight.equal(before[name])]
    print(f"{len(moved)} of {len(before)} tensors have changed:", moved)
size = Path(f"{OUTPUT}/stage1/model.safetensors").stat().st_size
print(f"The saved model has only the trained weights: {size / 1e3:,.0f} KB. The frozen parts are loaded by name.")

# %% [markdown]
# ## Stage 2: questions and answers
#
# Stage 1 taught captions. For questions, the language model must change a little too. LoRA adds to a weight matrix `W`
# the product of two thin matrices, `W + B A`, and trains only these.
#
# The next cell also shows what happens when a machine is taken away. After 50 steps the training gets a stop signal,
# as a cloud sends it. It finishes its step, writes a training checkpoint and ends.

# %%
if REAL:
    STAGE2 = (
        f"accelerate launch -q --config_file accelerate_config.yaml train_accelerate.py --stage 2"
        f" --init_from {OUTPUT}/stage1 --output_dir {OUTPUT}/stage2"
        f" --max_tokens_per_batch auto --save_steps 200"
    )
else:
    STAGE2 = (
        f"accelerate launch -q --config_file examples/configs/cpu.yaml train_accelerate.py"
        f" --config examples/recipes/demo_stage2.yaml --init_from {OUTPUT}/stage1 --output_dir {OUTPUT}/stage2"
        f" --max_steps 200 --eval_steps 200"
    )
    run(STAGE2, stop_at="step 50/")

# %% [markdown]
# The same command with `--resume_from_checkpoint` continues after the last finished step. On a CPU, the losses and the
# weights are bit-equal to those of a training without a break.

# %%
run(f"{STAGE2} --resume_from_checkpoint")

# %% [markdown]
# ## Ask the model
#
# `clip-phi ask` answers a question about an image.

# %%
IMAGE, QUESTIONS = "outputs/demo/data/val2017/000000004012.jpg", ["How many shapes are there?", "Is there a red star?"]
if REAL:
    IMAGE, QUESTIONS = "data/coco/val2017/000000039769.jpg", ["How many animals are there?", "What are they doing?"]
show([IMAGE], columns=1)
for question in QUESTIONS:
    run(f"clip-phi ask {IMAGE} '{question}' --model {OUTPUT}/stage2")

# %% [markdown]
# ## Exercises
#
# 1. **Fewer steps.** Train stage 1 with `--max_steps 20` and another `--output_dir`. *Expect:* sentences of the right
#    form with wrong colors or shapes.
# 2. **Learning rate.** Add `--learning_rate 1e-5`, then `--learning_rate 1`. *Expect:* with the first the loss hardly
#    falls. With the second it jumps and stays high.
# 3. **Skip stage 1.** Train stage 2 without it: leave out `--init_from` and the recipe, and look at the error. Then
#    think: what would LoRA have to learn that the projector now does?
# 4. **Rank.** Train stage 2 with `--lora_r 1` and `--lora_r 64`. *Expect:* another number of trained parameters in the
#    output, and on this simple data nearly the same loss.
# 5. **The real model.** Set `REAL = True` on a Colab GPU. *Expect:* about 1.4 hours for stage 1 on a T4 and 20 minutes
#    on an A100, as `clip-phi plan` says. Stop the runtime in between, and continue.
