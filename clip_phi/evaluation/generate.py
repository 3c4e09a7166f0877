"""Held-out loss and generated answers of a model, in batches."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from ..batching.attention import context_length
from ..batching.packing import PackedBatch

Prompt = tuple[list[dict[str, Any]], Image.Image | Sequence[Image.Image] | None]


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, packs: Iterable[PackedBatch], device: torch.device) -> torch.Tensor:
    """Float64 tensor (2,): summed loss in nats, and number of supervised tokens; sum it over ranks, then divide.

    packs: on the device."""
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for pack in packs:
        loss = model(**pack.inputs, use_cache=False, skip_logits=True, num_items_in_batch=1).loss
        total += torch.stack([loss.double(), torch.tensor(pack.num_supervised, dtype=torch.float64, device=device)])
    return total


class GeneratedAnswer(NamedTuple):
    """tokens: their number, the end token included. ended: whether the end token was generated within the limit."""

    text: str
    tokens: int
    ended: bool


@torch.no_grad()
def generate_answers(
    model: Any, processor: Any, prompts: Sequence[Prompt], max_new_tokens: int = 64, num_beams: int = 1
) -> list[GeneratedAnswer]:
    """The model's answers to one batch of prompts, greedy or by beam search, stripped; in the order of the prompts.

    prompts: conversations that end with a user's turn, each with the image or images that their {"type": "image"} mean.
    Raises ValueError if a prompt and its answer do not fit the decoder's context."""
    inputs = encode_prompts(processor, prompts).to(model.device)
    length = inputs["input_ids"].shape[1]
    refuse_too_long(model, length, max_new_tokens)
    ends = end_tokens(model, processor)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": num_beams}
    output = model.generate(**inputs, **options, eos_token_id=sorted(ends))
    answers = []
    for tokens in output[:, length:].tolist():
        end = next((place for place, token in enumerate(tokens) if token in ends), None)
        text = processor.decode(tokens[:end], skip_special_tokens=True).strip()
        answers.append(GeneratedAnswer(text, len(tokens) if end is None else end + 1, end is not None))
    return answers


def generate_texts(
    model: Any, processor: Any, prompts: Sequence[Prompt], max_new_tokens: int = 64, batch_size: int = 64
) -> list[str]:
    """The text of the greedy answer to each prompt, batch by batch; see generate_answers."""
    batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    answers = (answer for batch in batches for answer in generate_answers(model, processor, batch, max_new_tokens))
    return [answer.text for answer in answers]


def encode_prompts(processor: Any, prompts: Sequence[Prompt]) -> Any:
    """The model's inputs for a batch of prompts, padded on the left.

    A request for a bare caption without its image is the end token alone, if there is no BOS: generation needs a token
    to begin from."""
    encoded = processor.encode_batch([messages for messages, _ in prompts], add_generation_prompt=True)
    end = processor.tokenizer.eos_token_id
    inputs = processor.tokenizer.pad({"input_ids": [ids or [end] for ids, _ in encoded]}, return_tensors="pt")
    inputs.update(_pixel_values(processor, prompts))
    return inputs


def _pixel_values(processor: Any, prompts: Sequence[Prompt]) -> Any:
    images = [each for _, image in prompts for each in ([image] if isinstance(image, Image.Image) else image or ())]
    return processor.image_processor(images, return_tensors="pt") if images else {}


@torch.no_grad()
def answer_logprobs(model: Any, processor: Any, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
    """The log-probability in nats of each text as the answer to its prompt, with its end token.

    In one forward pass, padded on the right. Raises ValueError as encode_batch."""
    pairs = zip(prompts, answers, strict=True)
    encoded = processor.encode_batch([[*prompt, {"role": "assistant", "content": text}] for (prompt, _), text in pairs])
    for _, row in encoded:  # earlier answers of the conversation are a part of the prompt
        start, _ = answer_span(row)
        row[:start] = [-100] * start
    pad = processor.tokenizer.pad_token_id
    ids = pad_sequence([torch.tensor(row) for row, _ in encoded], batch_first=True, padding_value=pad)
    labels = pad_sequence([torch.tensor(row) for _, row in encoded], batch_first=True, padding_value=-100)
    supervised = labels[:, 1:] >= 0
    places = supervised.int().argsort(dim=1, descending=True, stable=True)[:, : int(supervised.sum(1).max())]
    inputs = {"input_ids": ids, "logits_to_keep": places, **_pixel_values(processor, prompts)}
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    logits = model(**inputs, use_cache=False).logits.float()
    targets = labels[:, 1:].gather(1, places).to(logits.device)
    return (-cross_entropy(logits.transpose(1, 2), targets, reduction="none").sum(1)).tolist()


def answer_span(labels: Sequence[int]) -> tuple[int, int]:
    """The places of the last answer's first token, and of its end token, which text of the template may follow."""
    end = max(place for place, label in enumerate(labels) if label >= 0)
    return max((place for place in range(end) if labels[place] < 0), default=-1) + 1, end


def end_tokens(model: Any, processor: Any) -> set[int]:
    """Token ids that end an answer: those of the generation config, and the tokenizer's, which training teaches."""
    ends = model.generation_config.eos_token_id
    ends = model.config.get_text_config().eos_token_id if ends is None else ends
    return {processor.tokenizer.eos_token_id, *([ends] if isinstance(ends, int) else ends or ())}


def refuse_too_long(model: Any, num_tokens: int, max_new_tokens: int) -> None:
    """Raises ValueError if so many tokens of prompt and answer do not fit the decoder's context."""
    context = context_length(model.config)
    if context is not None and num_tokens + max_new_tokens > context:
        both = f"a prompt of {num_tokens} tokens (image included) and an answer of up to {max_new_tokens} do not fit"
        raise ValueError(f"{both} the context of {context} tokens: shorten the prompt or lower --max_new_tokens")
