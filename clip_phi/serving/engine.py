"""One checkpoint, loaded for answering."""

from collections.abc import Iterator
from threading import Thread
from typing import Any

import torch
from PIL import Image
from transformers import TextIteratorStreamer
from transformers.utils import logging

from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

from ..evaluation.generate import encode_prompts, refuse_too_long
from .int8 import quantize_decoder


class Engine:
    """A model and its processor on one device: CUDA if there is one, else the CPU (in float32, which is faster there).

    int8: on the CPU, hold the decoder in 8 bits: a quarter of the memory, faster, and not quite the same answers.
    Raises ValueError or OSError if the checkpoint cannot be loaded."""

    def __init__(self, checkpoint: str, device: str | None = None, int8: bool = False):
        logging.disable_progress_bar()
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if int8 and self.device.type != "cpu":
            raise ValueError(f"8 bits are for the CPU here, and this is {self.device}: --device cpu")
        dtype = torch.float32 if self.device.type == "cpu" else "auto"
        self.model = ClipPhiForCausalLM.from_pretrained(checkpoint, dtype=dtype).to(self.device)
        self.processor = ClipPhiProcessor.from_pretrained(checkpoint)
        if int8:
            quantize_decoder(self.model)

    def stream(
        self, text: str | None, image: Image.Image | None, max_new_tokens: int = 128, transcript: str | None = None
    ) -> Iterator[str]:
        """The greedy answer, piece by piece as it comes. text: the instruction; None to ask for a bare caption.
        transcript: what is said before the instruction; for a spoken question, text is SPOKEN_INSTRUCTION.

        Raises ValueError if prompt and answer do not fit the decoder's context."""
        content: list[dict[str, Any]] = [{"type": "image"}] if image is not None else []
        if transcript is not None:
            content.append({"type": "transcript", "text": transcript})
        if text is not None:
            content.append({"type": "text", "text": text})
        inputs = encode_prompts(self.processor, [([{"role": "user", "content": content}], image)]).to(self.device)
        refuse_too_long(self.model, inputs["input_ids"].shape[1], max_new_tokens)
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failures: list[BaseException] = []

        def generate() -> None:
            try:
                self.model.generate(**inputs, streamer=streamer, max_new_tokens=max_new_tokens, do_sample=False)
            except BaseException as error:
                failures.append(error)
                streamer.end()

        thread = Thread(target=generate, daemon=True)
        thread.start()
        first = True
        for piece in streamer:
            piece = piece.lstrip() if first else piece
            first = first and not piece
            if piece:
                yield piece
        thread.join()
        if failures:
            raise failures[0]

    def caption(self, image: Image.Image, max_new_tokens: int = 64) -> Iterator[str]:
        """The caption, asked for in the way this checkpoint was trained to give one."""
        return self.stream(self.model.config.caption_instruction, image, max_new_tokens)
