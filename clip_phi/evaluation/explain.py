"""Where a model looked: what each patch of an image adds to the log-likelihood of an answer, and of each of its words.

METHODS: occlusion leaves patches out and measures the likelihood that is lost: the causal reference. gradient is
gradient x input on the projected features. integrated is its mean on the way from the image's mean feature (integrated
gradients, arXiv 1703.01365). attention is the mean attention from the answer to the patches, which need not be a cause.
docs/explain.md has the measured comparison."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from string import punctuation
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate, one_hot

from ..batching.images import put_beside
from ..data.sample import user_message
from ..templates import render
from .generate import generate_answers, refuse_too_long

METHODS = ("occlusion", "gradient", "integrated", "attention")
DEFAULT_METHOD = "occlusion"
LEAVE_OUT = ("pixels", "mean", "zero")
SHOWN_SIZE = 256  # pixels: smaller images are enlarged
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Explanation:
    """maps: float32 (words, images, rows, columns), in nats (attention: in shares of 1); negative where a patch speaks
    against the word. The answer's map is their sum over the words. boxes: where the map of each image lies, in its
    pixels, since the image processor may crop it."""

    answer: str
    words: list[str]
    method: str
    maps: np.ndarray
    boxes: list[Box]

    def heat(self, word: str | None = None) -> np.ndarray:
        """Float32 (images, rows, columns), of the answer or of the first such word. Raises ValueError without one."""
        if word is None:
            return self.maps.sum(0)
        words = [each.strip(punctuation).casefold() for each in self.words]
        if (wanted := word.strip(punctuation).casefold()) not in words:
            raise ValueError(f"the answer has no word {word!r}: {self.answer}")
        return self.maps[words.index(wanted)]

    def draw(self, images: Sequence[Image.Image], word: str | None = None) -> Image.Image:
        """overlay() of each image beside each other."""
        return put_beside([overlay(*each) for each in zip(images, self.heat(word), self.boxes, strict=True)])

    def page(self, images: Sequence[Image.Image], question: str) -> str:
        """An HTML page in which the words can be chosen; it needs no other file."""
        maps = np.concatenate([self.heat()[None], self.maps]).round(6).tolist()
        values = {"title": "Where did it look?", "question": question, "found": self, "images": images, "maps": maps}
        return "".join(render("explain.html", **values))


def explain(
    model: Any, processor: Any, images: Image.Image | Sequence[Image.Image], question: str | Sequence[dict] | None,
    answer: str | None = None, method: str = DEFAULT_METHOD, *, max_new_tokens: int = 64, **options: Any,
) -> Explanation:  # fmt: skip
    """The maps of an answer, by a model in eval mode, which stays as it is.

    Args:
        images: RGB, one or several, in the order of their places in the question.
        question: text; None for a bare caption; or a conversation that ends with a user's turn, for the chat template.
        answer: None for the greedy one.
        method: of METHODS.
        options: of Target.

    Raises ValueError if the answer has no words or is too long, if the tower's features are no grid of patches, if the
    image processor does more than resize and crop, or if the method cannot be used with this model."""
    images = [images] if isinstance(images, Image.Image) else list(images)
    messages = [user_message(question, len(images))] if question is None or isinstance(question, str) else question
    boxes = [crop_box(processor.image_processor, image.size) for image in images]
    if answer is None:
        answer = generate_answers(model, processor, [(list(messages), images)], max_new_tokens)[0].text
    target = Target(model, processor, messages, images, answer, **options)
    return Explanation(answer, target.words, method, target.maps(method), boxes)


class Target:
    """The log-likelihood of the words of one answer, as a function of the image features.

    Args:
        messages: a conversation that ends with a user's turn. images: of its places, RGB.
        leave_out: what replaces a patch. "pixels": the image's mean color, before the tower mixes the patches; "mean",
            "zero": the image's mean feature or 0, after the tower.
        window: rows and columns of patches that occlusion leaves out at once; a patch gets the mean of its windows.
        steps: of integrated gradients.
        batch_size: of forward passes.

    Attributes: words; grid: rows and columns of patches; features: float (images, features, text hidden), the last of
    which are the patches in reading order: CLS and registers, if the model uses them, come first."""

    def __init__(
        self, model: Any, processor: Any, messages: Sequence[dict], images: Sequence[Image.Image], answer: str,
        *, leave_out: str = "pixels", window: int = 2, steps: int = 16, batch_size: int = 32,
    ):  # fmt: skip
        if leave_out not in LEAVE_OUT or min(window, steps, batch_size) < 1:
            raise ValueError(f"leave_out is {', '.join(LEAVE_OUT)}; window, steps and batch_size are at least 1")
        if not images or not answer.split():
            raise ValueError(f"there is no {'word in the answer' if images else 'image'}, so there is nothing to show")
        self.model, self.leave_out, self.window = model, leave_out, window
        self.steps, self.batch_size = steps, batch_size
        said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        ids, labels = processor.encode([*messages, said])
        end = max(place for place, label in enumerate(labels) if label >= 0)  # the end token
        self.start = max(place for place in range(end) if labels[place] < 0) + 1
        refuse_too_long(model, end, 0)
        self.ids = torch.tensor([ids[:end]], device=model.device)
        texts = [processor.tokenizer.decode(ids[self.start : place]) for place in range(self.start + 1, end + 1)]
        self.words = texts[-1].split()
        places = torch.tensor([len(text.split()) for text in texts]).clamp(1, len(self.words)) - 1  # of each token
        self.word_of = one_hot(places, len(self.words)).to(model.device, torch.float32)
        self.pixels = processor.image_processor(list(images), return_tensors="pt")["pixel_values"].to(model.device)
        with torch.no_grad():
            self.features = self._encode(self.pixels)
        self.grid = patch_grid(model.config.vision_config, self.features.shape[1], *self.pixels.shape[2:])
        self.extra = self.features.shape[1] - math.prod(self.grid)

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.model.get_image_features(pixels, return_dict=True).pooler_output)

    def _run(self, features: torch.Tensor, **options: Any) -> Any:
        encoded = {"image": SimpleNamespace(pooler_output=features.flatten(0, 1))}
        options |= {"logits_to_keep": torch.arange(self.start - 1, self.ids.shape[1] - 1, device=self.ids.device)}
        return self.model(self.ids.expand(len(features), -1), mm_encoder_outputs=encoded, use_cache=False, **options)

    def score(self, features: torch.Tensor) -> torch.Tensor:
        """Log-likelihood in nats, float32 (rows, words), of features (rows, images, features, text hidden)."""
        likely = self._run(features).logits.float().log_softmax(-1)
        return likely.gather(-1, self.ids[:, self.start :, None].expand(len(features), -1, -1))[..., 0] @ self.word_of

    @torch.no_grad()
    def score_without(self, image: int, left_out: torch.Tensor) -> torch.Tensor:
        """score() with patches of one image left out: bool (masks, rows, columns). Float32 (masks, words)."""
        found = []
        for masks in left_out.to(self.ids.device).split(self.batch_size):
            features = self.features.repeat(len(masks), 1, 1, 1)
            if self.leave_out == "pixels":
                pixels = self.pixels[image]
                covered = interpolate(masks[:, None].float(), size=pixels.shape[1:], mode="nearest") > 0
                features[:, image] = self._encode(torch.where(covered, pixels.mean((1, 2), keepdim=True), pixels))
            else:
                patches = features[:, image, self.extra :]
                patches[masks.flatten(1)] = self.features[image, self.extra :].mean(0) * (self.leave_out == "mean")
            found.append(self.score(features))
        return torch.cat(found)

    def maps(self, method: str) -> np.ndarray:
        """Those of Explanation. Raises ValueError as explain()."""
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}: it is one of {', '.join(METHODS)}")
        if method == "occlusion":
            maps = self._occlusion()
        else:
            maps = self._attention() if method == "attention" else self._gradient(method == "integrated")
            maps = maps[..., self.extra :].unflatten(-1, self.grid)
        if not maps.isfinite().all():
            raise ValueError(f"the {method} maps are not finite: load the model in bfloat16 or float32")
        return maps.cpu().numpy()

    def _occlusion(self) -> torch.Tensor:
        (rows, columns), size = self.grid, self.window
        places = [(row, column) for row in range(1 - size, rows) for column in range(1 - size, columns)]
        masks = torch.zeros(len(places), rows, columns, dtype=torch.bool, device=self.ids.device)
        for mask, (row, column) in zip(masks, places, strict=True):
            mask[max(row, 0) : row + size, max(column, 0) : column + size] = True
        with torch.no_grad():
            whole = self.score(self.features[None])
        lost = torch.stack([whole - self.score_without(image, masks) for image in range(len(self.features))])
        return torch.einsum("imw,mrc->wirc", lost, masks.float()) / size**2

    def _gradient(self, integrated: bool) -> torch.Tensor:
        if any(buffer.dtype == torch.int8 for buffer in self.model.buffers()):
            raise ValueError("int8 layers have no gradient: use the method occlusion, or load without quantization")
        start = self.features.mean(1, keepdim=True) if integrated else torch.zeros_like(self.features)
        difference = self.features - start
        shares = (torch.arange(self.steps) + 0.5) / self.steps if integrated else torch.ones(1)
        pairs = torch.cartesian_prod(torch.arange(len(self.words)).float(), shares).to(self.ids.device)
        maps = difference.new_zeros(len(self.words), *self.features.shape[:2], dtype=torch.float32)
        for words, along in (pair.T for pair in pairs.split(self.batch_size)):
            with torch.enable_grad():
                inputs = (start + along.to(start).view(-1, 1, 1, 1) * difference).requires_grad_()
                likely = self.score(inputs).gather(1, words.long()[:, None])
                (gradient,) = torch.autograd.grad(likely.sum(), inputs)
            maps.index_add_(0, words.long(), (gradient.float() * difference.float()).sum(-1) / len(shares))
        return maps

    @torch.no_grad()
    def _attention(self) -> torch.Tensor:
        own = self.model.model.language_model.config._attn_implementation
        try:
            self.model.set_attn_implementation({"text_config": "eager"})
            layers = self._run(self.features[None], output_attentions=True).attentions or [None]
        finally:
            self.model.set_attn_implementation({"text_config": own})
        if any(layer is None for layer in layers):
            raise ValueError("this decoder does not return its attention: use another method")
        weights = sum(layer[0].float().mean(0) for layer in layers) / len(layers)  # (queries, keys)
        images = (self.word_of.T @ weights[self.start - 1 : -1])[:, self.ids[0] == self.model.config.image_token_id]
        return images.unflatten(1, self.features.shape[:2])


def patch_grid(vision: Any, count: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the `count` features that a tower's config gives for pixels of this size; patches may be
    merged (Swin) or a feature map. Raises ValueError if the features are no grid."""
    size = getattr(vision, "patch_size", None) or 1
    patch = (size, size) if isinstance(size, int) else size
    rows, columns = height // patch[0], width // patch[1]
    step = max(1, round(math.sqrt(rows * columns / count)))  # patches, or pixels, of one feature's side
    rows, columns = -(-rows // step), -(-columns // step)
    if not 1 < rows * columns <= count or (step > 1 and rows * columns < count):
        raise ValueError(f"the {count} features of this {vision.model_type!r} tower are no grid of patches: no map")
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
    (left, right), (top, bottom) = edges
    return left, top, right, bottom


def overlay(image: Image.Image, heat: np.ndarray, box: Box) -> Image.Image:
    """The image, in color where a map (rows, columns) is high, and dark gray where it is 0, negative, or cropped."""
    scale = max(1, -(-SHOWN_SIZE // min(image.size)))
    image = image.convert("RGB").resize((image.width * scale, image.height * scale))
    left, top, right, bottom = (round(edge * scale) for edge in box)
    levels = Image.fromarray((heat.clip(0) / max(heat.max(), 1e-12) * 255).astype(np.uint8))
    mask = Image.new("L", image.size)
    mask.paste(levels.resize((right - left, bottom - top), Image.Resampling.NEAREST), (left, top))
    return Image.composite(image, image.convert("L").point(lambda level: level // 4).convert("RGB"), mask)
