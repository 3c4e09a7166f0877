"""Held-out loss and greedy answers of a model, in batches."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from PIL import Image

from ..batching.tree import Pack

Prompt = tuple[list[dict[str, Any]], Image.Image | None]


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, packs: Iterable[Pack], device: torch.device) -> torch.Tensor:
    """Float64 tensor (2,): summed loss in nats, and number of supervised tokens; sum it over ranks, then divide.

    packs: on the device."""
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for pack in packs:
        loss = model(**pack.inputs, use_cache=False, skip_logits=True, num_items_in_batch=1).loss
        total += torch.stack([loss.double(), torch.tensor(pack.num_supervised, dtype=torch.float64, device=device)])
    return total


@torch.no_grad()
def generate_texts(
    model: Any, processor: Any, prompts: Sequence[Prompt], max_new_tokens: int = 64, batch_size: int = 64
) -> list[str]:
    """The model's greedy answer to each prompt, stripped; in the order of the prompts.

    prompts: conversations that end with a user's turn, each with the image that its {"type": "image"} stands for.
    Raises ValueError if a prompt and its answer do not fit the decoder's context."""
    answers: list[str] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        inputs = encode_prompts(processor, batch).to(model.device)
        refuse_too_long(model, inputs["input_ids"].shape[1], max_new_tokens)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new_tokens, skip_special_tokens=True)]
    return answers


def encode_prompts(processor: Any, prompts: Sequence[Prompt]) -> Any:
    """The processor's tensors for a batch of prompts, padded on the left."""
    texts = [processor.apply_chat_template(messages, add_generation_prompt=True) for messages, _ in prompts]
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
