"""Where a model looked: what each patch of an image adds to the log-likelihood of an answer, and of each of its words.

METHODS: occlusion leaves patches out and measures the likelihood that is lost: the causal reference. gradient is
gradient x input on the projected features. integrated is its mean on the way from the image's mean feature (arXiv
1703.01365). attention is the mean attention from the answer to the patches. docs/explain.md compares them."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate, one_hot

from ..batching.attention import decoder_attention
from ..batching.images import put_beside
from ..data.sample import user_message
from .generate import answer_span, generate_answers, refuse_too_long

METHODS = ("occlusion", "gradient", "integrated", "attention")
DEFAULT_METHOD = "occlusion"
SHOWN_SIZE = 256  # pixels: smaller images are enlarged
Box = tuple[float, ...]  # left, top, right, bottom


@dataclass(frozen=True)
class Explanation:
    """maps: float32 (words, images, rows, columns), in nats (attention: in shares of 1), negative where a patch makes
    the word less likely; their sum over the words is the answer's. boxes: of the maps in each image, in its pixels."""

    answer: str
    words: list[str]
    method: str
    maps: np.ndarray
    boxes: list[Box]

    def draw(self, images: Sequence[Image.Image]) -> Image.Image:
        """The images beside each other: in color where the answer's map is high, and dark gray where it is 0, negative,
        or where the image is cropped."""
        shown = []
        for image, heat, box in zip(images, self.maps.sum(0), self.boxes, strict=True):
            scale = max(1, -(-SHOWN_SIZE // min(image.size)))
            image = image.convert("RGB").resize((image.width * scale, image.height * scale))
            left, top, right, bottom = (round(edge * scale) for edge in box)
            levels = Image.fromarray((heat.clip(0) / max(heat.max(), 1e-12) * 255).astype(np.uint8))
            mask = Image.new("L", image.size)
            mask.paste(levels.resize((right - left, bottom - top), Image.Resampling.NEAREST), (left, top))
            gray = image.convert("L").point(lambda level: level // 4).convert("RGB")
            shown.append(Image.composite(image, gray, mask))
        return put_beside(shown)


def explain(
    model: Any, processor: Any, images: Image.Image | Sequence[Image.Image], question: str | Sequence[dict] | None,
    answer: str | None = None, method: str = DEFAULT_METHOD, max_new_tokens: int = 64,
) -> Explanation:  # fmt: skip
    """The maps of an answer, by default the model's own. model: in eval mode; it stays as it is.

    question: text; None for a bare caption; or a conversation that ends with a user's turn. images: RGB, in the order
    of their places there. Raises ValueError if the answer has no word or is too long, or the tower's features are no
    grid. So it does if the image processor does more than resize and crop, or the model does not have the method."""
    images = [images] if isinstance(images, Image.Image) else list(images)
    messages = [user_message(question, len(images))] if question is None or isinstance(question, str) else question
    if answer is None:
        answer = generate_answers(model, processor, [(list(messages), images)], max_new_tokens)[0].text
    target = Target(model, processor, messages, images, answer)
    boxes = [crop_box(processor.image_processor, image.size) for image in images]
    return Explanation(answer, target.words, method, target.maps(method), boxes)


class Target:
    """The log-likelihood of the words of one answer, as a function of the image features.

    window: rows and columns of patches that occlusion leaves out at once; a patch gets the mean of its windows.
    steps: of integrated gradients. grid: rows, columns of patches. features: float (images, patches, text hidden)."""

    window, steps, batch_size = 2, 16, 32

    def __init__(self, model: Any, processor: Any, messages: Sequence[dict], images: Sequence[Any], answer: str):
        if not images or not answer.split():
            raise ValueError(f"there is no {'word in the answer' if images else 'image'}, so there is nothing to show")
        said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        ids, labels = processor.encode([*messages, said])
        self.start, end = answer_span(labels)
        refuse_too_long(model, end, 0)
        self.model, self.ids = model, torch.tensor([ids[:end]], device=model.device)
        texts = [processor.tokenizer.decode(ids[self.start : place]) for place in range(self.start + 1, end + 1)]
        self.words = texts[-1].split()
        places = torch.tensor([len(text.split()) for text in texts]).clamp(1, len(self.words)) - 1  # of each token
        self.word_of = one_hot(places, len(self.words)).to(model.device, torch.float32)
        self.pixels = processor.image_processor(list(images), return_tensors="pt")["pixel_values"].to(model.device)
        self.features = self._encode(self.pixels)
        self.grid = patch_grid(self.features.shape[1], *self.pixels.shape[2:])

    @torch.no_grad()
    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.model.get_image_features(pixels, return_dict=True).pooler_output)

    def _run(self, features: torch.Tensor, **options: Any) -> Any:
        encoded = {"image": SimpleNamespace(pooler_output=features.flatten(0, 1))}
        options["logits_to_keep"] = torch.arange(self.start - 1, self.ids.shape[1] - 1, device=self.ids.device)
        return self.model(self.ids.expand(len(features), -1), mm_encoder_outputs=encoded, use_cache=False, **options)

    def score(self, features: torch.Tensor) -> torch.Tensor:
        """Log-likelihood in nats, float32 (rows, words), of features (rows, images, patches, text hidden)."""
        likely = self._run(features).logits.float().log_softmax(-1)
        return likely.gather(-1, self.ids[:, self.start :, None].expand(len(features), -1, -1))[..., 0] @ self.word_of

    @torch.no_grad()
    def score_without(self, image: int, left_out: torch.Tensor) -> torch.Tensor:
        """score(), float32 (masks, words), with patches of one image in its mean color: bool (masks, rows, columns)."""
        return torch.cat([self.score(self.leave_out(image, masks)) for masks in left_out.split(self.batch_size)])

    def leave_out(self, image: int, masks: torch.Tensor) -> torch.Tensor:
        """The features without patches: of the pixels, since the tower mixes what is beside each other."""
        pixels, features = self.pixels[image], self.features.repeat(len(masks), 1, 1, 1)
        covered = interpolate(masks[:, None].to(pixels), size=pixels.shape[1:], mode="nearest") > 0
        features[:, image] = self._encode(torch.where(covered, pixels.mean((1, 2), keepdim=True), pixels))
        return features

    def maps(self, method: str) -> np.ndarray:
        """Those of Explanation."""
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}: it is one of {', '.join(METHODS)}")
        maps = getattr(self, f"_{method}")().unflatten(-1, self.grid)
        if not maps.isfinite().all():
            raise ValueError(f"the {method} maps are not finite: load the model in bfloat16 or float32")
        return np.asarray(maps.cpu())

    @torch.no_grad()
    def _occlusion(self) -> torch.Tensor:
        inside = [torch.arange(1 - self.window, side)[:, None] - torch.arange(side) for side in self.grid]
        by_row, by_column = ((offset <= 0) & (offset > -self.window) for offset in inside)  # (windows, side)
        masks = (by_row[:, None, :, None] & by_column[None, :, None]).flatten(0, 1).to(self.ids.device)
        whole = self.score(self.features[None])
        lost = torch.stack([whole - self.score_without(image, masks) for image in range(len(self.features))])
        return torch.einsum("imw,mp->wip", lost, masks.flatten(1).float()) / self.window**2

    def _gradient(self, start: Any = 0, steps: int = 1) -> torch.Tensor:
        if any(buffer.dtype == torch.int8 for buffer in self.model.buffers()):
            raise ValueError("int8 layers have no gradient: use the method occlusion, or load without quantization")
        difference = self.features - start
        maps = torch.zeros(len(self.words), *difference.shape[:2], device=difference.device)
        shares = (torch.arange(1, steps + 1) - (steps > 1) / 2).to(difference).view(-1, 1, 1, 1) / steps
        for inputs in (start + shares * difference).split(self.batch_size):
            with torch.enable_grad():
                for word, score in enumerate(self.score(inputs.requires_grad_()).sum(0)):
                    (gradient,) = torch.autograd.grad(score, inputs, retain_graph=True)
                    maps[word] += (gradient.float() * difference.float()).sum((0, -1)) / steps
        return maps

    def _integrated(self) -> torch.Tensor:
        return self._gradient(self.features.mean(1, keepdim=True), self.steps)

    @torch.no_grad()
    def _attention(self) -> torch.Tensor:
        with decoder_attention(self.model, "eager"):
            layers = self._run(self.features[None], output_attentions=True).attentions
        if not layers or any(layer is None for layer in layers):
            raise ValueError("this decoder does not return its attention: use another method")
        weights = sum(layer[0].float().mean(0) for layer in layers) / len(layers)  # (queries, keys)
        images = (self.word_of.T @ weights[self.start - 1 : -1])[:, self.ids[0] == self.model.config.image_token_id]
        return images.unflatten(1, self.features.shape[:2])


def patch_grid(count: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of an image's features. Raises ValueError if they are no grid of its shape, as with CLS."""
    rows = max(1, round((count * height / width) ** 0.5))
    columns = count // rows
    if count == 1 or rows * columns != count or abs(rows * width - columns * height) >= max(width, height):
        raise ValueError(f"{count} features of {width} x {height} pixels are no grid of patches, so there is no map")
    return rows, columns


def crop_box(image_processor: Any, size: tuple[int, int]) -> Box:
    """The part of an image of this size (width, height) that the model gets, in its pixels.

    Found by images whose gray level is the place. Raises ValueError if they are not only resized and cropped."""
    edges = []
    for axis, length in enumerate(size):
        # the other axis adds up to half a level: the image processor's rounding then averages out
        ramp = np.add.outer(np.linspace(0, 255, length), np.linspace(-0.5, 0.5, size[1 - axis])).round().clip(0, 255)
        image = Image.fromarray((ramp if axis else ramp.T).astype(np.uint8)).convert("RGB")
        pixels = image_processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
        levels = pixels.astype(np.float64).mean((0, 1 + axis))
        middle = np.arange(len(levels) // 4, len(levels) - len(levels) // 4)  # what is near the edges is rounded
        slope, first = np.polyfit(middle + 0.5, levels[middle], 1)
        if slope <= 0 or np.abs(first + slope * (middle + 0.5) - levels[middle]).max() > 2:
            raise ValueError("the image processor does more than resize and crop: no map can be laid over the image")
        edges.append([float(level * (length - 1) / 255 + 0.5) for level in (first, first + slope * len(levels))])
    return edges[0][0], edges[1][0], edges[0][1], edges[1][1]
