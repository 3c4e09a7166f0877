import copy
import gc
import json
import logging
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import accelerate
import pytest
import torch
from conftest import TEXT, VISION, save_tokenizer
from packaging.version import Version
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModel,
    AutoTokenizer,
    CLIPVisionConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    SiglipVisionConfig,
)
from transformers import logging as transformers_logging
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import find_labels

from modeling_clip_phi import ClipPhiConfig, ClipPhiForCausalLM, ClipPhiModel, ClipPhiProcessor

LINEARS = ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"]


def picture(seed: int) -> Image.Image:
    pixels = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.fixture
def inputs(processor):
    return processor(images=[picture(0)], text=["<image>Instruct: a circle?\nOutput:"], return_tensors="pt")


@torch.no_grad()
def logits(model, inputs) -> torch.Tensor:
    return model(**inputs).logits


@pytest.fixture
def delta(model, tmp_path) -> Path:
    model.save_pretrained(tmp_path / "delta")
    return tmp_path / "delta"


@pytest.fixture
def merged(model, tmp_path) -> Path:
    model.save_pretrained(tmp_path / "merged", merged=True)
    return tmp_path / "merged"


@pytest.fixture
def adapted(fresh_model):
    from peft import LoraConfig

    fresh_model.add_adapter(LoraConfig(r=4, target_modules=LINEARS, init_lora_weights=False))
    return fresh_model.eval()


def edit_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# ---------------------------------------------------------------------------------------------------------- forward


def test_backbones_are_loaded_bit_equal(model, vision_backbone, text_backbone):
    state = model.state_dict()
    clip = load_file(Path(vision_backbone) / "model.safetensors")
    names = [name for name in clip if name.startswith("vision_model.")]
    assert len(names) > 50
    for name in names:
        ours = name.replace("vision_model.", "model.vision_tower.")
        assert torch.equal(state[ours], clip[name]), name
    phi = PhiForCausalLM.from_pretrained(text_backbone, dtype=torch.float32).state_dict()
    for name, value in phi.items():
        ours = name if name.startswith("lm_head") else name.replace("model.", "model.language_model.", 1)
        assert torch.equal(state[ours], value), name
    assert len(state) == len(phi) + len(names) + 2


def test_image_features_take_the_places_of_image_tokens(model, inputs):
    tower = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
    features = model.model.projector(tower.hidden_states[-2][:, 1:])
    assert torch.equal(model.get_image_features(inputs["pixel_values"]).pooler_output[0], features[0])
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    embeddings[0, :4] = features[0]
    expected = model.lm_head(model.model.language_model(inputs_embeds=embeddings).last_hidden_state)
    assert torch.equal(logits(model, inputs), expected)
    outputs = model(**inputs, output_hidden_states=True)
    assert len(outputs.hidden_states) == TEXT["num_hidden_layers"] + 1


def test_text_only_call_is_the_plain_decoder(model, text_backbone, processor):
    plain = PhiForCausalLM.from_pretrained(text_backbone, dtype=torch.float32)
    same_gelu = PhiForCausalLM.from_pretrained(text_backbone, dtype=torch.float32, hidden_act="gelu_pytorch_tanh")
    ids = processor(text=["Instruct: hi\nOutput:"], return_tensors="pt")
    assert torch.equal(logits(model, ids), logits(same_gelu, ids))
    assert torch.allclose(logits(model, ids), logits(plain, ids), rtol=0, atol=1e-6)  # the last bit, on some CPUs


def test_several_images_stand_in_the_order_given(model, processor):
    text = "<image>a<image>b"
    first, second = picture(1), picture(2)
    both = processor(images=[first, second], text=[text], return_tensors="pt")
    swapped = processor(images=[second, first], text=[text], return_tensors="pt")
    assert both["input_ids"].tolist() == swapped["input_ids"].tolist()
    places = (both["input_ids"][0] == processor.image_token_id).nonzero().flatten().tolist()
    assert places == [0, 1, 2, 3, 5, 6, 7, 8]
    assert (logits(model, both) - logits(model, swapped)).abs().max() > 1e-3
    one = processor(images=[first], text=["<image>a"], return_tensors="pt")
    torch.testing.assert_close(logits(model, both)[:, :5], logits(model, one), rtol=1e-5, atol=1e-6)


def test_embeddings_instead_of_ids_give_the_same_logits(model, inputs):
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    embedded = {"inputs_embeds": embeddings, "pixel_values": inputs["pixel_values"]}
    assert torch.equal(logits(model, embedded), logits(model, inputs))


def test_prompt_and_images_that_do_not_match_are_refused(model, inputs):
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    with pytest.raises(ValueError, match="3 <image> tokens but 4 image features: was the prompt truncated"):
        model(input_ids=ids[:, 1:], pixel_values=pixels)
    with pytest.raises(ValueError, match="4 <image> tokens but 8 image features"):
        model(input_ids=ids, pixel_values=pixels.repeat(2, 1, 1, 1))
    for call in (model, partial(model.generate, max_new_tokens=2)):  # the embedding may have a row for <image>
        with pytest.raises(ValueError, match="4 <image> tokens but 0 image features"):
            call(input_ids=ids)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(pixel_values=pixels)
    with pytest.raises(ValueError, match="Input image size"):
        model(input_ids=ids, pixel_values=pixels[..., :16])


def test_four_dimensional_mask_needs_a_dense_attention(fresh_model, inputs):
    length = inputs["input_ids"].shape[1]
    fresh_model.model.language_model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="'flex_attention' takes no mask of four dimensions: use 'sdpa' or 'eager'"):
        fresh_model(**dict(inputs) | {"attention_mask": torch.ones(1, 1, length, length, dtype=torch.bool)})


# ------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("num_items", [None, 5])
def test_loss_equals_the_plain_loss_over_all_logits(model, processor, num_items):
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a?"}]}]
    ids, labels = processor.encode([*messages, {"role": "assistant", "content": "a red circle"}])
    ids, labels = torch.tensor([ids]), torch.tensor([labels])
    pixels = processor.image_processor(picture(0), return_tensors="pt")["pixel_values"]
    outputs = model(input_ids=ids, pixel_values=pixels, labels=labels, num_items_in_batch=num_items)
    options = {} if num_items is None else {"num_items_in_batch": num_items}
    plain = model.loss_function(logits=outputs.logits, labels=labels, vocab_size=TEXT["vocab_size"], **options)
    torch.testing.assert_close(outputs.loss, plain, rtol=1e-6, atol=0)
    total = cross_entropy(outputs.logits[0, :-1], labels[0, 1:], reduction="sum")
    torch.testing.assert_close(outputs.loss, total / (num_items or (labels != -100).sum()), rtol=1e-6, atol=0)


def test_trainer_finds_one_column_of_labels():
    assert find_labels(ClipPhiForCausalLM) == ["labels"]


def test_no_logits_are_made_in_training(fresh_model, inputs):
    sizes = []
    fresh_model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.shape))
    fresh_model.train()
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, -3:] = 7
    outputs = fresh_model(**inputs, labels=labels)
    assert outputs.logits is None and sizes == [(3, TEXT["vocab_size"])]
    assert fresh_model(**inputs, labels=labels, skip_logits=False).logits.shape == (
        1,
        labels.shape[1],
        TEXT["vocab_size"],
    )
    assert fresh_model(**inputs).logits is not None
    fresh_model.eval()
    assert fresh_model(**inputs, labels=labels).logits is not None
    assert fresh_model(**inputs, labels=labels, skip_logits=True).logits is None


@pytest.mark.parametrize("num_items", [None, 100])
@pytest.mark.parametrize("chunk", [1, 3, 4])
def test_loss_in_chunks_equals_the_loss_at_once_and_never_holds_more_logits(chunk, num_items, fresh_model, inputs):
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, -8:] = torch.arange(8)
    options = {"num_items_in_batch": num_items} if num_items else {}
    weight = fresh_model.model.projector.weight
    fresh_model.train()

    def loss_and_gradient():
        loss = fresh_model(**inputs, labels=labels, **options).loss
        return loss, torch.autograd.grad(loss, [weight])[0]

    expected, expected_gradient = loss_and_gradient()
    sizes = []
    fresh_model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    fresh_model.max_logits = chunk * TEXT["vocab_size"] + 1
    loss, gradient = loss_and_gradient()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert (gradient - expected_gradient).norm() / expected_gradient.norm() < 1e-5
    assert max(sizes) == chunk and sum(sizes) == 2 * 8  # once forwards, and again for the backward pass


class Largest(TorchDispatchMode):
    """Records the rows of every tensor as wide as the vocabulary."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        wide = isinstance(result, torch.Tensor) and result.shape[1:] == (TEXT["vocab_size"],)
        if wide and function.__name__ != "t.default":  # the transposed weight
            self.rows.append((function.__name__, len(result)))
        return result


@pytest.fixture
def frozen_head(fresh_model):
    """A model with a head of random weights and bias, hidden states, and labels of which some are ignored."""
    generator = torch.Generator().manual_seed(5)
    head = fresh_model.lm_head
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) / 4)
        head.bias.copy_(torch.randn(head.bias.shape, generator=generator))
    hidden_states = torch.randn(2, 9, head.in_features, generator=generator, requires_grad=True)
    labels = torch.randint(0, head.out_features, (2, 9), generator=generator)
    labels[0, :3] = labels[1, 4] = -100
    return fresh_model.train(), hidden_states, labels


def loss_of(model, hidden_states, labels, **options):
    """The model's loss of the hidden states of its decoder."""
    model.model.language_model.forward = lambda **inputs: BaseModelOutputWithPast(hidden_states)
    input_ids = torch.zeros(labels.shape, dtype=torch.long)
    return model(input_ids=input_ids, shift_labels=labels, **options).loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_items", [None, 40, torch.tensor(40)])
@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_a_frozen_head_gives_the_loss_and_gradient_of_plain_cross_entropy(chunk, num_items, dtype, frozen_head):
    model, hidden_states, labels = frozen_head
    model.max_logits = chunk * TEXT["vocab_size"]
    head, flat = model.lm_head, labels.flatten()

    def plain(dtype):
        logits = linear(hidden_states.to(dtype), head.weight.to(dtype), head.bias.to(dtype)).flatten(0, 1)
        summed = cross_entropy(
            logits.to(max(dtype, torch.float32, key=lambda each: each.itemsize)), flat, reduction="sum"
        )
        loss = summed / (14 if num_items is None else num_items)
        return loss, torch.autograd.grad(3 * loss, hidden_states)[0]

    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = loss_of(model, hidden_states, labels, num_items_in_batch=num_items)
    (gradient,) = torch.autograd.grad(3 * loss, hidden_states)  # scaled, as by a loss scaler or by several processes
    assert gradient.dtype == hidden_states.dtype and not gradient[labels == -100].any()
    (_, exact_gradient), (usual, usual_gradient) = plain(torch.float64), plain(dtype)
    torch.testing.assert_close(loss, usual, rtol=1e-6, atol=0)
    error, usual_error = ((each - exact_gradient).norm() / exact_gradient.norm() for each in (gradient, usual_gradient))
    assert error < 1e-6 if dtype == torch.float32 else error < 1.1 * usual_error


def test_a_label_that_is_no_token_is_an_error_with_a_frozen_head_too(frozen_head):
    """-1, which other programs use for what is not learnt, is not the first token."""
    model, hidden_states, labels = frozen_head
    labels[0, 0] = -1
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        loss_of(model, hidden_states, labels)


def test_a_frozen_head_computes_each_logit_once_and_keeps_none(frozen_head):
    model, hidden_states, labels = frozen_head
    model.max_logits = 5 * TEXT["vocab_size"]
    with Largest() as seen:
        loss = loss_of(model, hidden_states, labels)
    assert max(rows for _, rows in seen.rows) == 5
    assert sum(rows for name, rows in seen.rows if "addmm" in name) == labels.numel()
    with Largest() as seen:
        loss.backward()
    assert seen.rows == []


@pytest.mark.parametrize("kind", ["trained", "trained bias", "with a hook", "another loss", "another index"])
def test_another_head_or_loss_is_called_as_it_is(kind, frozen_head):
    model, hidden_states, labels = frozen_head
    model.max_logits = 5 * TEXT["vocab_size"]
    head, (expected,) = model.lm_head, torch.autograd.grad(loss_of(*frozen_head), hidden_states)
    calls, options = [], {}
    if "trained" in kind:
        (head.bias if "bias" in kind else head.weight).requires_grad_()
    elif kind == "another index":
        labels[labels == -100] = labels[0, 5] = -1
        expected[0, 5], options = 0, {"ignore_index": -1, "num_items_in_batch": 14}
    elif kind == "with a hook":
        head.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    else:
        plain = model.loss_function
        model.loss_function = lambda **inputs: calls.append(len(inputs["shift_labels"])) or 2 * plain(**inputs)
    loss_of(model, hidden_states, labels, **options).backward()
    factor = 2 if kind == "another loss" else 1
    torch.testing.assert_close(hidden_states.grad, factor * expected, rtol=1e-5, atol=1e-7)
    assert sorted(calls) == ([3, 3, 5, 5, 5, 5, 5, 5] if kind in ("with a hook", "another loss") else [])
    if "trained" in kind:
        plain = cross_entropy(head(hidden_states.detach()).flatten(0, 1), labels.flatten(), ignore_index=-100)
        (trained,) = (each for each in head.parameters() if each.requires_grad)
        (gradient,) = torch.autograd.grad(plain, trained)
        torch.testing.assert_close(trained.grad, gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("around", ["checkpoint", "compile"])
def test_a_frozen_head_can_be_checkpointed_and_compiled(around, frozen_head):
    model, hidden_states, labels = frozen_head
    model.max_logits = 5 * TEXT["vocab_size"]
    flat, targets = hidden_states[labels != -100], labels[labels != -100]
    expected = model._loss(flat, targets)
    (gradient,) = torch.autograd.grad(expected, hidden_states, retain_graph=True)
    if around == "compile":
        loss = torch.compile(model._loss, backend="aot_eager")(flat, targets)
    else:
        loss = checkpoint(lambda states: model._loss(2 * states / 2, targets), flat, use_reentrant=False)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden_states)[0], gradient, rtol=1e-6, atol=1e-8)


def test_a_frozen_head_computes_no_gradient_that_is_not_wanted(frozen_head):
    model, hidden_states, labels = frozen_head
    expected = loss_of(*frozen_head)
    with torch.no_grad(), Largest() as seen:
        loss = loss_of(*frozen_head)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)
    assert not loss.requires_grad and not any("exp_" in name for name, _ in seen.rows)


def test_logits_to_keep_names_positions(model, inputs):
    everything = logits(model, inputs)
    for kept, expected in [
        (3, everything[:, -3:]),
        (torch.tensor([1, 4]), everything[:, [1, 4]]),
        (torch.tensor([[4, 4, 0]]), everything[:, [4, 4, 0]]),
    ]:
        torch.testing.assert_close(logits(model, {**inputs, "logits_to_keep": kept}), expected)
    labels = inputs["input_ids"].clone()
    expected = cross_entropy(everything[0, -3:-1], labels[0, -2:])
    torch.testing.assert_close(model(**inputs, labels=labels, logits_to_keep=3).loss, expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_tree_equals_its_branches_one_by_one(fresh_model, attention):
    fresh_model.set_attn_implementation(attention)
    image = [fresh_model.config.image_token_id] * 4
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    conversations = [[11, 12, 13, 0], [21, 0], [31, 32, 0]]
    prefix = [*image, 40]
    total = sum(len(conversation) for conversation in conversations)
    projector = fresh_model.model.projector

    plain = 0
    for conversation in conversations:
        ids, labels = torch.tensor([prefix + conversation]), torch.tensor([[-100] * len(prefix) + conversation])
        plain += fresh_model(input_ids=ids, pixel_values=pixels, labels=labels, num_items_in_batch=total).loss
    (plain_gradient,) = torch.autograd.grad(plain, [projector.weight])

    owner = torch.tensor(
        [0] * len(prefix) + [n for n, conversation in enumerate(conversations, 1) for _ in conversation[:-1]]
    )
    ids = torch.tensor([prefix + [token for conversation in conversations for token in conversation[:-1]]])
    positions = [
        *range(len(prefix)),
        *(len(prefix) + n for conversation in conversations for n in range(len(conversation) - 1)),
    ]
    kept, offset = [], len(prefix)
    for conversation in conversations:
        kept += [len(prefix) - 1, *range(offset, offset + len(conversation) - 1)]
        offset += len(conversation) - 1
    row, column = owner[:, None], owner[None, :]
    mask = ((column == 0) | (row == column)) & torch.ones(len(owner), len(owner), dtype=torch.bool).tril()
    loss = fresh_model(
        input_ids=ids,
        pixel_values=pixels,
        attention_mask=mask[None, None],
        position_ids=torch.tensor([positions]),
        logits_to_keep=torch.tensor([kept]),
        shift_labels=torch.tensor([sum(conversations, [])]),
        num_items_in_batch=total,
        use_cache=False,
    ).loss
    (gradient,) = torch.autograd.grad(loss, [projector.weight])
    assert abs(loss.item() / plain.item() - 1) < 1e-6
    assert (gradient - plain_gradient).norm() / plain_gradient.norm() < 1e-5


# ------------------------------------------------------------------------------------------------------- generation


def generate(model, inputs, **options):
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=6, min_new_tokens=6, **options)
    return ids[:, inputs["input_ids"].shape[1] :].tolist()


def test_generation_equals_argmax_over_the_whole_sequence_each_time(model, inputs):
    ids, forbidden = inputs["input_ids"], model.config.text_config.eos_token_id
    for _ in range(6):
        scores = logits(model, {"input_ids": ids, "pixel_values": inputs["pixel_values"]})[:, -1]
        scores[:, forbidden] = -torch.inf
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
    expected = ids[:, -6:].tolist()
    assert generate(model, inputs) == expected
    assert generate(model, inputs, use_cache=False) == expected
    assert generate(model, inputs, cache_implementation="static", disable_compile=True) == expected


def test_batch_with_left_padding_equals_one_by_one(model, processor):
    prompts = ["<image>Instruct: a\nOutput:", "<image>Instruct: a blue square and a star\nOutput:", "<image>"]
    images = [picture(seed) for seed in range(3)]
    batch = processor(images=images, text=prompts, padding=True, return_tensors="pt")
    assert batch["attention_mask"][:, 0].tolist() == [0, 1, 0]
    alone = [
        generate(model, processor(images=[image], text=[prompt], return_tensors="pt"))[0]
        for image, prompt in zip(images, prompts, strict=True)
    ]
    assert generate(model, batch) == alone


@pytest.mark.parametrize(
    "options", [{"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3}]
)
def test_each_sequence_of_a_prompt_has_all_its_images_in_their_order(options, fresh_model, processor):
    """The oracle generates from embeddings that have the features already."""
    model = fresh_model
    with torch.no_grad():
        model.model.projector.weight.mul_(100)  # images, and their order, decide the answers
        for name, weight in model.model.language_model.named_parameters():
            weight.mul_(10 if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")) else 1)
    texts = ["<image><image>Instruct: a\nOutput:", "<image>Instruct: a star\nOutput:", "Instruct: a\nOutput:"]
    batch = processor(images=[picture(seed) for seed in range(3)], text=texts, padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        features = torch.cat(model.get_image_features(batch["pixel_values"]).pooler_output)
        embeds = model.get_input_embeddings()(ids)
        filled = embeds.masked_scatter((ids == processor.image_token_id).unsqueeze(-1), features)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False} | options

    def answers(**inputs) -> list[list[int]]:
        torch.manual_seed(0)
        return model.generate(**inputs, attention_mask=mask, **options)[:, -6:].tolist()

    expected = answers(inputs_embeds=filled)
    assert answers(input_ids=ids, pixel_values=batch["pixel_values"]) == expected
    assert answers(inputs_embeds=embeds, pixel_values=batch["pixel_values"]) == expected
    swapped = answers(input_ids=ids, pixel_values=batch["pixel_values"][[1, 0, 2]])
    assert swapped[: len(swapped) // 3] != expected[: len(swapped) // 3]
    assert swapped[len(swapped) // 3 :] == expected[len(swapped) // 3 :]


def test_a_text_only_model_assists_without_a_difference(model, processor, text_backbone):
    assistant = PhiForCausalLM.from_pretrained(text_backbone, dtype=torch.float32).eval()
    images, text = [picture(0), picture(1)], "<image><image>Instruct: a\nOutput:"
    inputs = processor(images=images, text=[text], return_tensors="pt")
    assert generate(model, inputs, assistant_model=assistant) == generate(model, inputs)
    # An assistant that is a Clip-Phi itself gets the ids alone; prompt lookup may propose <image> tokens.
    assert generate(model, inputs, assistant_model=copy.deepcopy(model)) == generate(model, inputs)
    assert generate(model, inputs, prompt_lookup_num_tokens=2) == generate(model, inputs)


def test_generation_stops_at_the_end_token(fresh_model, inputs):
    with torch.no_grad():
        fresh_model.lm_head.bias[fresh_model.config.text_config.eos_token_id] = 1e4
    ids = fresh_model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert ids[0, inputs["input_ids"].shape[1] :].tolist() == [fresh_model.config.text_config.eos_token_id]


@pytest.mark.parametrize(
    ("of_config", "of_generation", "expected"),
    [(0, None, 0), (None, None, 0), (7, None, [0, 7]), ([7, 8], 9, [0, 7, 8, 9])],
    ids=["same", "config names none", "config names another", "several"],
)
def test_generation_stops_at_the_end_tokens_of_tokenizer_and_configs(
    of_config, of_generation, expected, vision_backbone, text_backbone, inputs, tmp_path
):
    """What training learns as the end, the tokenizer's end token, is one of them."""
    shutil.copytree(text_backbone, tmp_path / "text")
    edit_config(tmp_path / "text", eos_token_id=of_config)
    if of_generation is not None:
        (tmp_path / "text/generation_config.json").write_text(json.dumps({"eos_token_id": of_generation}))
    else:
        (tmp_path / "text/generation_config.json").unlink(missing_ok=True)
    model = ClipPhiForCausalLM.from_backbones(vision_backbone, str(tmp_path / "text"))
    assert AutoTokenizer.from_pretrained(text_backbone).eos_token_id == 0
    model.save_pretrained(tmp_path / "delta")
    model.save_pretrained(tmp_path / "merged", merged=True)
    for made in (model, *map(ClipPhiForCausalLM.from_pretrained, (tmp_path / "delta", tmp_path / "merged"))):
        assert made.generation_config.eos_token_id == expected
        for end in [expected] if isinstance(expected, int) else expected:
            with torch.no_grad():
                made.lm_head.bias.zero_()
                made.lm_head.bias[end] = 1e4
            ids = made.generate(**inputs, max_new_tokens=6, do_sample=False)
            assert ids[0, inputs["input_ids"].shape[1] :].tolist() == [end]


def test_images_are_looked_at_once_while_generating(fresh_model, inputs):
    calls = []
    fresh_model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    generate(fresh_model, inputs)
    assert len(calls) == 1


def test_padding_token_is_the_processors(model, processor):
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id


# --------------------------------------------------------------------------------------------------------- freezing


def test_only_the_projector_is_trainable_and_it_alone_moves(fresh_model, inputs):
    trainable = {name for name, parameter in fresh_model.named_parameters() if parameter.requires_grad}
    assert trainable == {"model.projector.weight", "model.projector.bias"}
    before = {name: parameter.clone() for name, parameter in fresh_model.named_parameters()}
    fresh_model.train()
    optimizer = torch.optim.AdamW([p for p in fresh_model.parameters() if p.requires_grad], lr=1e-2)
    fresh_model(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    for name, parameter in fresh_model.named_parameters():
        assert torch.equal(before[name], parameter) == (name not in trainable), name


def test_frozen_model_in_train_mode_answers_the_same_twice(fresh_model, inputs):
    assert fresh_model.config.text_config.resid_pdrop == 0.1
    expected = logits(fresh_model, inputs)
    fresh_model.train()
    assert torch.equal(logits(fresh_model, inputs), expected)
    assert torch.equal(logits(fresh_model, inputs), expected)


def test_gradient_checkpointing_gives_the_same_gradient(fresh_model, inputs):
    fresh_model.train()
    gradients = []
    for _ in range(2):
        fresh_model.zero_grad()
        fresh_model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append(fresh_model.model.projector.weight.grad)
        fresh_model.gradient_checkpointing_enable({"use_reentrant": False})
    assert torch.equal(*gradients)


# ------------------------------------------------------------------------------------------------------ checkpoints


def test_delta_holds_the_projector_and_reloads_with_equal_logits(model, delta, inputs):
    assert set(load_file(delta / "model.safetensors")) == {"model.projector.weight", "model.projector.bias"}
    assert {path.name for path in delta.iterdir()} == {
        "backbones.py",
        "config.json",
        "configuration_clip_phi.py",
        "generation_config.json",
        "model.safetensors",
        "modeling_clip_phi.py",
    }
    reloaded, info = ClipPhiForCausalLM.from_pretrained(delta, output_loading_info=True)
    assert torch.equal(logits(reloaded, inputs), logits(model, inputs))
    assert not any(info.values()) and not reloaded.training
    assert reloaded.generation_config.pad_token_id == model.generation_config.pad_token_id
    assert {name for name, p in reloaded.named_parameters() if p.requires_grad} == {
        "model.projector.weight",
        "model.projector.bias",
    }
    headless = ClipPhiModel.from_pretrained(delta)
    assert torch.equal(headless(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)


def test_delta_is_one_file_however_small_the_shards_are(model, inputs, tmp_path):
    """from_pretrained reads one."""
    model.save_pretrained(tmp_path, max_shard_size="1KB")
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    assert torch.equal(logits(ClipPhiForCausalLM.from_pretrained(tmp_path), inputs), logits(model, inputs))


@pytest.mark.parametrize("kind", ["delta", "merged"])
def test_a_given_config_is_not_changed_by_loading(kind, request):
    folder = request.getfixturevalue(kind)
    config = ClipPhiConfig.from_pretrained(folder)
    before = config.to_json_string()
    first = ClipPhiForCausalLM.from_pretrained(folder, config=config, dtype="bfloat16", attn_implementation="eager")
    second = ClipPhiForCausalLM.from_pretrained(folder, config=config)
    assert config.to_json_string() == before and second.config is not first.config
    assert (first.dtype, second.dtype) == (torch.bfloat16, torch.float32)


def test_delta_saved_again_is_the_same_delta(delta, tmp_path):
    ClipPhiForCausalLM.from_pretrained(delta).save_pretrained(tmp_path / "again")
    first, second = (load_file(folder / "model.safetensors") for folder in (delta, tmp_path / "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert (delta / "config.json").read_text() == (tmp_path / "again/config.json").read_text()


def test_merged_checkpoint_needs_no_backbone(model, merged, inputs):
    config = json.loads((merged / "config.json").read_text())
    assert config["delta"] is False and model.config.delta
    edit_config(merged, vision_backbone="/nowhere", text_backbone="/nowhere")
    reloaded = ClipPhiForCausalLM.from_pretrained(merged)
    assert torch.equal(logits(reloaded, inputs), logits(model, inputs))
    reloaded.save_pretrained(merged.parent / "again")
    assert torch.equal(
        logits(ClipPhiForCausalLM.from_pretrained(merged.parent / "again"), inputs), logits(model, inputs)
    )


def test_adapter_is_saved_in_a_delta_and_folded_into_a_merged_checkpoint(adapted, inputs, tmp_path, model):
    expected = logits(adapted, inputs)
    assert (expected - logits(model, inputs)).abs().max() > 1e-2
    adapted.save_pretrained(tmp_path / "delta")
    assert {path.name for path in (tmp_path / "delta/adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    reloaded = ClipPhiForCausalLM.from_pretrained(tmp_path / "delta")
    assert torch.equal(logits(reloaded, inputs), expected)
    reloaded.save_pretrained(tmp_path / "delta again")
    again = ClipPhiForCausalLM.from_pretrained(tmp_path / "delta again")
    assert torch.equal(logits(again, inputs), expected)
    adapted.save_pretrained(tmp_path / "merged", merged=True)
    merged = ClipPhiForCausalLM.from_pretrained(tmp_path / "merged")
    assert not any("lora" in name for name in merged.state_dict())
    assert (logits(merged, inputs) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("place", ["../elsewhere", "/elsewhere"])
def test_an_adapter_outside_of_the_models_folder_is_refused(place, adapted, tmp_path):
    adapted.save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"adapter": "adapter"', f'"adapter": "{place}"'))
    with pytest.raises(ValueError, match=f"the adapter {place} of .* is not in its folder"):
        ClipPhiForCausalLM.from_pretrained(tmp_path / "model")


def test_adapter_without_peft_is_one_line(adapted, tmp_path, monkeypatch):
    adapted.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="holds a LoRA adapter: pip install peft"):
        ClipPhiForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["delta", "merged"])
def test_missing_weights_are_refused(kind, request):
    folder = request.getfixturevalue(kind)
    weights = load_file(folder / "model.safetensors")
    del weights["model.projector.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{folder} lacks 1 of the weights its config asks for: model.projector.bias"):
        ClipPhiForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["delta", "merged", "adapted"])
def test_missing_weights_are_reported_to_who_asks_for_them(kind, request, tmp_path):
    folder = request.getfixturevalue(kind)
    if kind == "adapted":
        folder.save_pretrained(tmp_path / kind)
        folder = tmp_path / kind
    model, info = ClipPhiForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not any(each.requires_grad for each in model.model.vision_tower.parameters())
    edit_weights(folder / "model.safetensors", lambda weights: weights.pop("model.projector.bias"))
    if kind == "adapted":
        edit_weights(folder / "adapter/adapter_model.safetensors", lambda weights: weights.pop(min(weights)))
    _, info = ClipPhiForCausalLM.from_pretrained(folder, output_loading_info=True)
    expected = {"model.projector.bias"}
    if kind == "adapted":
        expected.add("model.language_model.layers.0.mlp.fc1.lora_A.weight")
    assert info["missing_keys"] == expected
    with pytest.raises(ValueError, match="lacks . of the weights its config asks for: .*model.projector.bias"):
        ClipPhiForCausalLM.from_pretrained(folder)


def edit_weights(path: Path, edit) -> None:
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["model.projector.weight", "model.projector.bias"])
def test_projector_of_another_shape_is_refused(name, delta):
    """A weight of shape (1, n) could be broadcast, and would be a wrong one."""
    whole = load_file(delta / "model.safetensors")[name]
    edit_weights(delta / "model.safetensors", lambda weights: weights.update({name: whole[:1].contiguous()}))
    shapes = f"{name} has shape {(1, *whole.shape[1:])}, not {tuple(whole.shape)}"
    with pytest.raises(ValueError, match=re.escape(shapes)):
        ClipPhiForCausalLM.from_pretrained(delta)


def test_adapter_with_missing_unknown_or_other_weights_is_refused(adapted, tmp_path):
    """None of LoRA's weights is ever left at its random initialisation."""
    adapted.save_pretrained(tmp_path)
    file = tmp_path / "adapter/adapter_model.safetensors"
    first = "base_model.model.model.language_model.layers.0.mlp.fc1.lora_A.weight"
    whole = load_file(file)

    def refused(message: str, edit) -> None:
        save_file(whole, file, metadata={"format": "pt"})
        edit_weights(file, edit)
        with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/adapter{message}")):
            ClipPhiForCausalLM.from_pretrained(tmp_path)

    edit_weights(file, lambda weights: weights.pop(first))
    with pytest.raises(ValueError, match=f"{tmp_path} lacks 1 of the weights its config asks for: model.language"):
        ClipPhiForCausalLM.from_pretrained(tmp_path)
    extra = {first.replace("layers.0", "layers.9"): torch.zeros(4, 32)}
    refused(" holds 1 weights that the model has no place for: model.language", lambda weights: weights.update(extra))
    narrow = {first: torch.zeros(1, 32)}
    refused(": model.language_model.layers.0.mlp.fc1.lora_A.weight has shape (1, 32), not (4, 32)",
            lambda weights: weights.update(narrow))  # fmt: skip
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    save_file(whole, file, metadata={"format": "pt"})
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config | {"r": 8}))
    with pytest.raises(ValueError, match=r"lora_A.weight has shape \(4, 16\), not \(8, 16\)"):
        ClipPhiForCausalLM.from_pretrained(tmp_path)


def test_loaded_adapter_is_frozen_and_in_the_models_precision(adapted, tmp_path):
    adapted.save_pretrained(tmp_path)
    loaded = ClipPhiForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
    lora = {name: weight for name, weight in loaded.named_parameters() if "lora_" in name}
    assert lora.keys() == {name for name, _ in adapted.named_parameters() if "lora_" in name}
    assert {weight.dtype for weight in lora.values()} == {torch.bfloat16}
    assert not any(weight.requires_grad for weight in lora.values())


def test_second_adapter_is_refused(adapted):
    from peft import LoraConfig

    with pytest.raises(ValueError, match="the model has an adapter: save it with merged=True"):
        adapted.add_adapter(LoraConfig(r=4, target_modules=LINEARS), "other")


def test_adapter_that_cannot_be_folded_in_is_refused(fresh_model, tmp_path, inputs):
    from peft import LoraConfig

    fresh_model.add_adapter(LoraConfig(r=4, target_modules=LINEARS, use_dora=True))
    with pytest.raises(ValueError, match=r"layers.0.self_attn.k_proj cannot be folded in: it must be plain LoRA"):
        fresh_model.save_pretrained(tmp_path / "merged", merged=True)
    for name, weight in fresh_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    fresh_model.eval().save_pretrained(tmp_path / "delta")
    reloaded = ClipPhiForCausalLM.from_pretrained(tmp_path / "delta")
    assert torch.equal(logits(reloaded, inputs), logits(fresh_model, inputs))


@torch.no_grad()
def edit_row(model):
    model.get_input_embeddings().weight[5] += 1


def tune_and_freeze(model):
    model.lm_head.requires_grad_(True)
    optimizer = torch.optim.SGD(model.lm_head.parameters(), lr=1e-2)
    model(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    optimizer.step()
    model.lm_head.requires_grad_(False)


def merge_by_hand(model) -> int:
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        layer.merge()
    return len(layers)


def merge_and_unload(model):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=1, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    assert get_peft_model(model, config).merge_and_unload() is model


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        (lambda model: model.resize_token_embeddings(330), "3 .*embed_tokens.weight"),
        (merge_and_unload, f"{TEXT['num_hidden_layers']} .*q_proj.weight"),
        (tune_and_freeze, "2 .*lm_head.weight"),
        (edit_row, "1 .*embed_tokens.weight"),
        (lambda model: model.bfloat16().float(), None),
        (lambda model: model.to(torch.bfloat16), None),
    ],
    ids=["resized", "merged lora", "tuned", "edited row", "cast and back", "cast"],
)
def test_delta_that_would_lose_changed_backbone_weights_is_refused(change, lost, fresh_model, tmp_path, inputs):
    change(fresh_model)
    if lost is None:
        fresh_model.save_pretrained(tmp_path)
        return
    message = lost.replace(" ", r" trainable or changed backbone weights \(", 1) + ", ...*: save with merged=True"
    with pytest.raises(ValueError, match=f"a delta checkpoint would lose {message}"):
        fresh_model.save_pretrained(tmp_path / "delta")
    fresh_model.save_pretrained(tmp_path / "merged", merged=True)
    expected = logits(fresh_model.eval(), inputs)
    assert torch.equal(logits(ClipPhiForCausalLM.from_pretrained(tmp_path / "merged"), inputs), expected)


def test_adapter_merged_by_hand_is_refused_in_a_delta_and_folded_in_once(adapted, inputs, tmp_path):
    expected = logits(adapted, inputs)
    num_layers = merge_by_hand(adapted)
    with pytest.raises(ValueError, match=f"would lose {num_layers} trainable or changed backbone weights"):
        adapted.save_pretrained(tmp_path / "delta")
    adapted.save_pretrained(tmp_path / "merged", merged=True)
    merged = ClipPhiForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(merged, inputs) - expected).abs().max() < 1e-5


def test_model_with_random_backbones_cannot_be_a_delta(model, tmp_path):
    with pytest.raises(ValueError, match="was not made from backbones: save it with merged=True"):
        ClipPhiForCausalLM(model.config).save_pretrained(tmp_path)


def test_backbone_with_missing_weights_is_refused(vision_backbone, text_backbone, tmp_path):
    shutil.copytree(vision_backbone, tmp_path / "vision")
    weights = load_file(tmp_path / "vision/model.safetensors")
    del weights["vision_model.encoder.layers.0.mlp.fc1.bias"]
    save_file(weights, tmp_path / "vision/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="vision lacks 1 of the weights .*layers.0.mlp.fc1.bias"):
        ClipPhiForCausalLM.from_backbones(str(tmp_path / "vision"), text_backbone)


def test_other_architecture_is_refused(text_backbone):
    with pytest.raises(ValueError, match="holds a 'phi' model, not a 'clip_phi' one"):
        ClipPhiForCausalLM.from_pretrained(text_backbone)


def test_delta_whose_backbone_is_gone_says_so(delta):
    edit_config(delta, text_backbone="/nowhere/text")
    message = f"{delta} needs /nowhere/text, which was not found as a folder .*: put it back .*merged=True"
    with pytest.raises(OSError, match=message):
        ClipPhiForCausalLM.from_pretrained(delta)
    edit_config(delta, text_backbone="owner/name", text_backbone_revision="abc123")
    with pytest.raises(OSError, match="owner/name, which was not found on the Hub at abc123"):
        ClipPhiForCausalLM.from_pretrained(delta)


@pytest.mark.parametrize(("field", "value"), [("vocab_size", 321), ("hidden_size", 64)])
def test_delta_whose_decoder_has_changed_is_refused(delta, text_backbone, tmp_path, field, value):
    PhiConfig(**TEXT | {field: value}).save_pretrained(tmp_path / "text")
    edit_config(delta, text_backbone=str(tmp_path / "text"))
    with pytest.raises(ValueError, match=f"text with {field} {TEXT[field]}, which now has {field} {value}"):
        ClipPhiForCausalLM.from_pretrained(delta)


def test_delta_whose_tower_has_changed_is_refused(delta, tmp_path):
    CLIPVisionConfig(**VISION | {"hidden_size": 18}).save_pretrained(tmp_path / "vision")
    edit_config(delta, vision_backbone=str(tmp_path / "vision"))
    with pytest.raises(ValueError, match="with hidden_size 16, which now has hidden_size 18"):
        ClipPhiForCausalLM.from_pretrained(delta)


def test_trainable_backbone_is_not_lost_in_a_delta(fresh_model, tmp_path):
    fresh_model.lm_head.requires_grad_(True)
    with pytest.raises(ValueError, match=r"would lose 2 trainable or changed backbone weights \(lm_head.weight, ...\)"):
        fresh_model.save_pretrained(tmp_path)


def test_model_made_whole_cannot_be_a_delta(merged, tmp_path):
    edit_config(merged, vision_backbone=None, text_backbone=None)
    with pytest.raises(ValueError, match="was not made from backbones: save it with merged=True"):
        ClipPhiForCausalLM.from_pretrained(merged).save_pretrained(tmp_path / "x", merged=False)


def test_local_backbones_are_stored_as_absolute_paths(vision_backbone, text_backbone, monkeypatch):
    monkeypatch.chdir(Path(text_backbone).parent)
    model = ClipPhiForCausalLM.from_backbones(vision_backbone, Path(text_backbone).name)
    assert (model.config.text_backbone, model.config.text_backbone_revision) == (text_backbone, None)


def test_backbone_in_the_hub_cache_is_pinned_to_its_commit(vision_backbone, text_backbone, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--owner--name"
    shutil.copytree(text_backbone, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    model = ClipPhiForCausalLM.from_backbones(vision_backbone, "owner/name", cache_dir=str(tmp_path))
    assert (model.config.text_backbone, model.config.text_backbone_revision) == ("owner/name", commit)
    model.save_pretrained(tmp_path / "delta")
    (repository / "refs/main").unlink()
    reloaded = ClipPhiForCausalLM.from_pretrained(tmp_path / "delta", cache_dir=str(tmp_path))
    assert torch.equal(reloaded.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("tied", [False, True])
def test_decoder_without_a_spare_row_trains_generates_resizes_and_reloads(tied, vision_backbone, tmp_path):
    """SmolLM2 has 49,152 tokens and as many rows."""
    entries = len(save_tokenizer(tmp_path / "text"))
    text = {**TEXT, "vocab_size": entries, "num_key_value_heads": 1, "tie_word_embeddings": tied}
    text.pop("resid_pdrop")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**text, eos_token_id=0, bos_token_id=0)).save_pretrained(tmp_path / "text")
    backbones = vision_backbone, str(tmp_path / "text")
    processor = ClipPhiProcessor.from_backbones(*backbones)
    model = ClipPhiForCausalLM.from_backbones(*backbones)
    image, pad = processor.image_token_id, processor.tokenizer.pad_token_id
    assert (image, pad) == (entries, entries + 1) == (model.config.image_token_id, model.generation_config.pad_token_id)
    assert model.lm_head.weight.shape[0] == model.get_input_embeddings().weight.shape[0] == entries

    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[pad, pad, 9, 10, 11, 12, 13], [image] * 4 + [5, 6, 7]])
    inputs = {"input_ids": ids, "attention_mask": (ids != pad).long(), "pixel_values": pixels}
    alone = model(input_ids=ids[:1, 2:]).logits[0, -1, :entries]
    logits = model(**inputs).logits
    torch.testing.assert_close(logits[0, -1, :entries], alone)
    assert logits.shape[-1] == entries + 2 and logits.argmax(-1).max() < entries
    labels = ids.masked_fill(ids == pad, -100)
    assert torch.equal(
        model(**inputs, labels=labels).loss, model(**inputs, labels=labels.masked_fill(ids == image, -100)).loss
    )
    model(**inputs, labels=labels).loss.backward()
    assert next(model.model.projector.parameters()).grad.abs().sum() > 0
    for options in ({}, {"num_beams": 3}, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}):
        tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False, **options)[:, ids.shape[1] :]
        assert ((tokens < entries) | (tokens == pad)).all()
    with pytest.raises(ValueError, match="<image> has no row of the embedding to be found by: give input_ids"):
        model(inputs_embeds=torch.zeros(1, 4, 32), pixel_values=pixels)
    with pytest.raises(IndexError):  # of another tokenizer
        model(input_ids=torch.tensor([[entries + 2]]))

    for merged in (False, True):
        model.save_pretrained(tmp_path / str(merged), merged=merged)
        assert torch.equal(ClipPhiForCausalLM.from_pretrained(tmp_path / str(merged))(**inputs).logits, logits)
    model.resize_token_embeddings(entries + 8)
    torch.testing.assert_close(model(**inputs).logits[ids != pad][..., :entries], logits[ids != pad][..., :entries])
    model.save_pretrained(tmp_path / "resized", merged=True)
    found = ClipPhiForCausalLM.from_pretrained(tmp_path / "resized")
    assert torch.equal(found(**inputs).logits, model(**inputs).logits)
    assert (found.lm_head.weight.data_ptr() == found.get_input_embeddings().weight.data_ptr()) == tied


def test_image_token_defaults_to_the_first_spare_row(model, text_backbone):
    assert model.config.image_token_id == len(AutoTokenizer.from_pretrained(text_backbone))


def test_unused_text_half_is_not_reported_but_problems_are(vision_backbone, text_backbone, tmp_path, caplog):
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addHandler(caplog.handler)
    logging.getLogger("modeling_clip_phi.backbones").addHandler(caplog.handler)
    transformers_logging.set_verbosity_warning()
    try:
        ClipPhiForCausalLM.from_backbones(vision_backbone, text_backbone)
        assert "LOAD REPORT" not in caplog.text and "not used" not in caplog.text
        shutil.copytree(vision_backbone, tmp_path / "vision")
        weights = load_file(tmp_path / "vision/model.safetensors")
        weights["vision_model.surprise"] = torch.zeros(1)
        save_file(weights, tmp_path / "vision/model.safetensors", metadata={"format": "pt"})
        ClipPhiForCausalLM.from_backbones(str(tmp_path / "vision"), text_backbone)
        assert "surprise" in caplog.text and "weights that are not used" in caplog.text
        assert "text_model" not in caplog.text
    finally:
        transformers_logging.set_verbosity_error()
        logger.removeHandler(caplog.handler)
        logging.getLogger("modeling_clip_phi.backbones").removeHandler(caplog.handler)


# -------------------------------------------------------------------------------------------- placement, other parts


@pytest.mark.parametrize("kind", ["delta", "merged"])
@pytest.mark.parametrize(
    "device_map",
    ["auto", "sequential", {"": "cpu"}, dict.fromkeys(("model", "lm_head"), "cpu")],
    ids=["auto", "sequential", "cpu", "by_part"],
)
def test_device_map_on_cpu_gives_equal_logits(kind, device_map, model, inputs, request):
    placed = ClipPhiForCausalLM.from_pretrained(request.getfixturevalue(kind), device_map=device_map)
    assert torch.equal(logits(placed, inputs), logits(model, inputs))


OFFLOADED = {"model.vision_tower": "cpu", "model.projector": "disk", "model.language_model": "disk", "lm_head": "cpu"}


def test_delta_offloaded_to_disk_gives_equal_logits(adapted, inputs, tmp_path):
    """Projector and adapter are loaded before anything is moved to the disk."""
    with torch.no_grad():
        adapted.model.projector.weight += 1
    adapted.save_pretrained(tmp_path / "delta")
    expected = logits(adapted, inputs)
    placed = ClipPhiForCausalLM.from_pretrained(
        tmp_path / "delta", device_map=OFFLOADED, offload_folder=tmp_path / "offloaded"
    )
    assert placed.model.projector.weight.is_meta and any((tmp_path / "offloaded").iterdir())
    assert torch.equal(logits(placed, inputs), expected)
    # The part without the head alone keeps its files.
    options = {"device_map": OFFLOADED, "offload_folder": tmp_path / "base"}
    base = ClipPhiModel.from_pretrained(tmp_path / "delta", **options)
    gc.collect()
    assert torch.equal(base(**inputs).last_hidden_state, adapted.model(**inputs).last_hidden_state)
    with pytest.raises(ValueError, match="the adapter is offloaded: load the model without device_map to save it"):
        placed.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize("kilobytes", [0, 60, 150, 200], ids=str)
def test_delta_that_the_memory_holds_a_part_of_gives_equal_logits(kilobytes, adapted, inputs, tmp_path):
    """The rest is on the disk, or all of it: earlier releases of accelerate refuse that."""
    adapted.save_pretrained(tmp_path / "delta")
    options = {"max_memory": {"cpu": kilobytes * 1000}, "offload_folder": tmp_path / "offloaded"}
    load = partial(ClipPhiForCausalLM.from_pretrained, tmp_path / "delta", device_map="auto", **options)
    if kilobytes == 0 and Version(accelerate.__version__) < Version("1.15"):
        with pytest.raises(ValueError, match="offload the whole model to the disk"):
            load()
        return
    placed = load()
    assert any(weight.is_meta for weight in placed.parameters())
    assert torch.equal(logits(placed, inputs), logits(adapted, inputs))


def test_two_models_in_one_offload_folder_keep_their_own_weights(fresh_model, inputs, tmp_path):
    """accelerate reads what is in the folder already."""
    expected, placed, folder = [], [], tmp_path / "offloaded"
    for number in range(2):
        with torch.no_grad():
            fresh_model.model.projector.weight += number
        expected.append(logits(fresh_model, inputs))
        fresh_model.save_pretrained(tmp_path / str(number))
        options = {"device_map": OFFLOADED, "offload_folder": folder}
        placed.append(ClipPhiForCausalLM.from_pretrained(tmp_path / str(number), **options))
    assert all(torch.equal(logits(each, inputs), right) for each, right in zip(placed, expected, strict=True))
    assert len(list(folder.iterdir())) == 2
    del placed
    gc.collect()
    assert not list(folder.iterdir()), "the files of models that are gone were left"


def test_offloaded_delta_without_adapter_is_saved_again(model, delta, tmp_path):
    placed = ClipPhiForCausalLM.from_pretrained(delta, device_map=OFFLOADED, offload_folder=tmp_path / "offloaded")
    placed.save_pretrained(tmp_path / "again")
    first, second = (load_file(folder / "model.safetensors") for folder in (delta, tmp_path / "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["delta", "merged"])
def test_dtype_and_attention_reach_every_part(kind, request, inputs):
    folder = request.getfixturevalue(kind)
    loaded = ClipPhiForCausalLM.from_pretrained(folder, dtype="bfloat16", attn_implementation="eager")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.model.vision_tower.config._attn_implementation == "eager"
    assert loaded.model.language_model.config._attn_implementation == "eager"
    loaded.model.projector.float()  # as training holds it
    assert logits(loaded, inputs).dtype == torch.bfloat16
    parts = {"vision_config": "eager", "text_config": "sdpa"}
    loaded = ClipPhiForCausalLM.from_pretrained(folder, attn_implementation=parts)
    assert loaded.model.vision_tower.config._attn_implementation == "eager"
    assert loaded.model.language_model.config._attn_implementation == "sdpa"


@pytest.fixture(scope="module")
def wide_text_backbone(text_backbone, tmp_path_factory):
    """bitsandbytes' 4-bit blocks hold 64 numbers, so its rows must not be shorter."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(4)
    wide = {"hidden_size": 64, "intermediate_size": 128, "bos_token_id": 0, "eos_token_id": 0}
    PhiForCausalLM(PhiConfig(**TEXT | wide)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(text_backbone).save_pretrained(folder)
    return str(folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [4, 8])
def test_quantisation_is_for_the_decoder_alone(bits, vision_backbone, wide_text_backbone, inputs, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    quantised = {4: bitsandbytes.nn.Linear4bit, 8: bitsandbytes.nn.Linear8bitLt}[bits]
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    plain = ClipPhiForCausalLM.from_backbones(vision_backbone, wide_text_backbone)
    plain.save_pretrained(tmp_path / "delta")
    plain.save_pretrained(tmp_path / "merged", merged=True)
    expected = logits(plain, inputs)
    for folder in (tmp_path / "delta", tmp_path / "merged"):
        model = ClipPhiForCausalLM.from_pretrained(folder, quantization_config=config)
        modules = {name: type(module) for name, module in model.named_modules() if type(module) is quantised}
        assert len(modules) == 6 * TEXT["num_hidden_layers"]
        assert all(name.startswith("model.language_model.layers.") for name in modules)
        assert (logits(model, inputs) - expected).norm() / expected.norm() < {4: 0.3, 8: 0.03}[bits]
    assert config.llm_int8_skip_modules is None, "the caller's config was changed"
    with pytest.raises(ValueError, match="quantised weights cannot be merged: save the delta"):
        model.save_pretrained(tmp_path / "x", merged=True)

    model = ClipPhiForCausalLM.from_backbones(vision_backbone, wide_text_backbone, quantization_config=config)
    model.add_adapter(LoraConfig(r=2, target_modules="model.language_model.*q_proj", init_lora_weights=False))
    answer = logits(model.eval(), inputs)
    model.save_pretrained(tmp_path / "adapted")
    assert torch.equal(logits(model, inputs), answer), "saving changed the model"
    assert "quantization_config" not in (tmp_path / "adapted/config.json").read_text()
    again = ClipPhiForCausalLM.from_pretrained(tmp_path / "adapted", quantization_config=config)
    saved, loaded = model.state_dict(), again.state_dict()
    trained = [name for name in saved if "lora_" in name or "projector" in name]
    assert len(trained) == 2 * TEXT["num_hidden_layers"] + 2
    assert all(torch.equal(saved[name], loaded[name]) for name in trained)
    assert logits(ClipPhiForCausalLM.from_pretrained(tmp_path / "adapted"), inputs).isfinite().all()


DECODER = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("text_config", "tied"),
    [
        (LlamaConfig(**DECODER, intermediate_size=48, tie_word_embeddings=True), True),
        (LlamaConfig(**DECODER, intermediate_size=48, tie_word_embeddings=False), False),
        (GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=2), True),
    ],
    ids=["tied llama", "untied llama", "gpt2"],
)
def test_other_towers_and_decoders_survive_saving(text_config, tied, tmp_path):
    vision = dict(VISION)
    config = ClipPhiConfig(
        vision_config=SiglipVisionConfig(**vision),
        text_config=text_config,
        vision_feature_select_strategy="full",
        projector_type="mlp",
        image_token_id=98,
    )
    model = ClipPhiForCausalLM(config).eval()
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert len(model.model.projector) == 3
    inputs = {"input_ids": torch.tensor([[98] * 4 + [1, 2]]), "pixel_values": torch.ones(1, 3, 32, 32)}
    model.save_pretrained(tmp_path)
    reloaded = AutoModel.from_pretrained(tmp_path)
    assert type(reloaded) is ClipPhiForCausalLM
    assert torch.equal(logits(reloaded, inputs), logits(model, inputs))
    model.resize_token_embeddings(103)
    assert logits(model, inputs).shape == (1, 6, 103)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


def test_decoder_that_changes_its_logits_after_the_head_is_refused():
    text = Gemma2Config(**DECODER, intermediate_size=48, head_dim=16)
    with pytest.raises(ValueError, match=r"'gemma2' decoders are not supported: more than a head"):
        ClipPhiForCausalLM(ClipPhiConfig(vision_config=CLIPVisionConfig(**VISION), text_config=text, image_token_id=98))


def test_delta_takes_config_fields_as_keywords_and_refuses_unknown_ones(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="takes no torch_dtype"):  # beside dtype
        ClipPhiForCausalLM.from_pretrained(tmp_path, dtype="float32", torch_dtype="bfloat16")
    assert (
        ClipPhiForCausalLM.from_pretrained(tmp_path, caption_instruction="what?").config.caption_instruction == "what?"
    )
    with pytest.raises(TypeError, match="takes no projector_tipe"):
        ClipPhiForCausalLM.from_pretrained(tmp_path, projector_tipe="mlp")
