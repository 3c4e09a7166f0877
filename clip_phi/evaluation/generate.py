"""Held-out loss and generated answers of a model, in batches."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image

from ..batching.packing import PackedBatch

Prompt = tuple[list[dict[str, Any]], Image.Image | None]


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

    prompts: conversations that end with a user's turn, each with the image that its {"type": "image"} stands for.
    Raises ValueError if a prompt and its answer do not fit the decoder's context."""
    inputs = encode_prompts(processor, prompts).to(model.device)
    length = inputs["input_ids"].shape[1]
    refuse_too_long(model, length, max_new_tokens)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=num_beams)
    rows = output[:, length:].tolist()
    texts = processor.batch_decode(rows, skip_special_tokens=True)
    end = processor.tokenizer.eos_token_id
    lengths = [row.index(end) + 1 if end in row else len(row) for row in rows]
    return [
        GeneratedAnswer(text.strip(), length, row[length - 1 : length] == [end])
        for text, row, length in zip(texts, rows, lengths, strict=True)
    ]


def generate_texts(
    model: Any, processor: Any, prompts: Sequence[Prompt], max_new_tokens: int = 64, batch_size: int = 64
) -> list[str]:
    """The text of the greedy answer to each prompt, batch by batch; see generate_answers."""
    batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    answers = (answer for batch in batches for answer in generate_answers(model, processor, batch, max_new_tokens))
    return [answer.text for answer in answers]


def encode_prompts(processor: Any, prompts: Sequence[Prompt]) -> Any:
    """The processor's tensors for a batch of prompts, padded on the left.

    A bare caption without its image is asked for by the end token alone: generation needs something to begin from."""
    end = processor.tokenizer.eos_token
    texts = [processor.apply_chat_template(messages, add_generation_prompt=True) or end for messages, _ in prompts]
    images = [image for _, image in prompts if image is not None]
    return processor(text=texts, images=images or None, padding=True, return_tensors="pt")


def refuse_too_long(model: Any, num_tokens: int, max_new_tokens: int) -> None:
    """Raises ValueError if so many tokens of prompt and answer do not fit the decoder's context."""
    context = getattr(model.config.text_config, "max_position_embeddings", None)
    if context is not None and num_tokens + max_new_tokens > context:
        raise ValueError(
            f"a prompt of {num_tokens} tokens (image included) and an answer of up to {max_new_tokens} do not fit "
            f"the context of {context} tokens: shorten the prompt or lower --max_new_tokens"
        )
