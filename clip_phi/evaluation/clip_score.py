"""CLIPScore: how well a text fits an image, by the embeddings of a CLIP model, without any reference."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

PREFIX = "A photo depicts "
WEIGHT = 2.5
BATCH_SIZE = 32


class ClipScorer:
    """Scores texts against images: 2.5 times the cosine between their embeddings, or 0 if it is negative (arXiv
    2104.08718).

    clip: folder or Hub id of a CLIP model with its text half, tokenizer and image processor. If it is the one that the
    evaluated model's vision tower is from, CLIPScore misses what the model misses."""

    def __init__(self, clip: str, device: Any = "cpu", **options: Any):
        """options: of from_pretrained."""
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        self.name = clip
        self.model = AutoModel.from_pretrained(clip, **options).float().to(device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(clip, padding_side="right", **options)
        self.tokenizer.pad_token = self.tokenizer.eos_token
        self.image_processor = AutoImageProcessor.from_pretrained(clip, backend="pil", **options)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], images: Iterable[Image.Image]) -> np.ndarray:
        """float64 (texts,). images: RGB, one for each text."""
        scores, images = [], iter(images)
        for start in range(0, len(texts), BATCH_SIZE):
            batch = [PREFIX + text for text in texts[start : start + BATCH_SIZE]]
            pixels = self.image_processor([next(images) for _ in batch], return_tensors="pt")["pixel_values"]
            output = self.model(**self._tokens(batch), pixel_values=pixels.to(self.model.device))
            cosine = (output.text_embeds * output.image_embeds).sum(-1)  # both have length 1
            scores.append(WEIGHT * cosine.clamp(min=0).double().cpu().numpy())
        return np.concatenate(scores)

    def _tokens(self, texts: Sequence[str]) -> Any:
        """Each with one end token, where CLIP takes the embedding; only some tokenizers add it themselves."""
        end = self.tokenizer.eos_token_id
        most = self.model.config.text_config.max_position_embeddings - 1
        rows = [ids[:-1] if ids[-1] == end else ids for ids in self.tokenizer(list(texts))["input_ids"]]
        rows = [[*ids[:most], end] for ids in rows]
        return self.tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(self.model.device)


def local_clip(config: Any, device: Any, log: Callable[[str], Any]) -> ClipScorer | None:
    """The scorer of the CLIP model that the vision tower is from, if this machine has it with its text half."""
    from transformers import AutoConfig

    if (source := config.vision_backbone) is None:
        return None
    try:
        has_text = getattr(AutoConfig.from_pretrained(source, local_files_only=True), "text_config", None) is not None
        return ClipScorer(source, device, local_files_only=True) if has_text else None
    except (OSError, ValueError, ImportError) as error:
        log(f"no CLIPScore: {source} cannot be loaded with its text half ({' '.join(str(error).split())[:200]})")
        return None
