"""One model answering many requests at once: they join the running batch, and leave it, between two steps.

transformers' own continuous batching takes token ids alone (5.23), so no image can reach it. This is the method of Orca
(OSDI 2022, "iteration-level scheduling") over a cache in which every request has a row of its own length.
"""

import atexit
import itertools
import logging
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from transformers.utils import logging as transformers_logging

from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

from ..batching.images import Preprocessor, pixel_hash
from ..data.sample import SPOKEN_INSTRUCTION
from ..environment import quantization_config
from ..evaluation.generate import refuse_too_long
from .detokenizer import TextStream
from .int8 import fold_lora, quantize_decoder
from .kv_cache import RowCache, TensorCache

logger = logging.getLogger(__name__)
QUANTIZATIONS = ("nf4", "int8")
GB = 2**30


class Busy(RuntimeError):
    """The queue is full. retry_after: seconds after which there may be a place."""

    def __init__(self, waiting: int, retry_after: int):
        super().__init__(f"{waiting} requests are waiting already: try again in {retry_after} s")
        self.retry_after = retry_after


class Closed(RuntimeError):
    """The engine was closed before the answer was complete."""


@dataclass(frozen=True)
class Limits:
    """max_batch: requests that are answered at once. max_waiting: requests that may wait for that.
    cache_bytes: of keys and values of the batch, as many rows as its longest request; a request waits until it fits.
        None: half of the GPU's memory that is free when the engine starts, 2 GB on a CPU.
    image_bytes: of projected features of images, and of the keys and values of an image that begins several prompts.
    prefill_tokens: of prompts that join in one step, while the running answers pause.
    gather_seconds: how long a request may wait for others to join a running batch with, since their prompts are read
        together in little more time than one; fewer than a quarter of those running are waited with. Nobody waits if
        nothing is running.
    max_new_tokens: of an answer that was asked for without a number, if the context has room for so many."""

    max_batch: int = 32
    max_waiting: int = 256
    cache_bytes: int | None = None
    image_bytes: int = GB // 4
    prefill_tokens: int = 2048
    gather_seconds: float = 0.02
    max_new_tokens: int = 256


class Answer:
    """A request on its way. Iterate over it for its pieces of text; what it raises is what went wrong with it.

    text: all pieces so far. finish_reason: "stop" (end token or stop string), "length" or "cancelled"; None before.
    num_prompt_tokens, num_tokens: of the prompt (images included) and of the answer, its end token too.
    first_token_seconds: from submitting to the first token; tokens_per_second: of what came after it."""

    def __init__(self, deliver: Callable[[str | None], None] | None = None):
        self._pieces: SimpleQueue[str | None] = SimpleQueue()
        self._deliver = deliver or self._pieces.put
        self._cancelled = False
        self._submitted = time.perf_counter()
        self._first = self._last = 0.0
        self.finish_reason: str | None = None
        self.error: BaseException | None = None
        self.text = ""
        self.num_prompt_tokens = self.num_tokens = 0

    @property
    def first_token_seconds(self) -> float | None:
        return self._first - self._submitted if self._first else None

    @property
    def tokens_per_second(self) -> float | None:
        return (self.num_tokens - 1) / (self._last - self._first) if self.num_tokens > 1 else None

    def cancel(self) -> None:
        """Give up: its place is free after the step that is running."""
        self._cancelled = True

    def __iter__(self) -> Iterator[str]:
        try:
            while (piece := self._pieces.get()) is not None:
                yield piece
        finally:
            self.cancel()  # nobody reads on
        if self.error is not None:
            raise self.error

    def result(self) -> str:
        """Wait for the whole text."""
        return "".join(self)

    # -------------------------------------------------------------- called by the engine

    def _count_token(self) -> None:
        self._last = time.perf_counter()
        self._first = self._first or self._last
        self.num_tokens += 1

    def _say(self, piece: str) -> None:
        if piece:
            self.text += piece
            self._deliver(piece)

    def _finish(self, reason: str | None, error: BaseException | None = None) -> None:
        self.finish_reason, self.error = reason, error
        self._deliver(None)


@dataclass
class _Row:
    """A request in the engine. ids: its prompt, of which the first `start` need not be read, for their keys and values
    are known; length: how many of its tokens are in the cache, -1 when it has ended; last: its newest token."""

    answer: Answer
    ids: list[int]
    images: list[tuple[str, torch.Tensor | None, torch.Tensor | None]]  # hash, features if known, else pixel values
    stream: TextStream
    max_new_tokens: int
    temperature: float
    top_p: float
    uniform: random.Random
    start: int = 0
    length: int = 0
    last: int = 0

    @property
    def need(self) -> int:
        return len(self.ids) + self.max_new_tokens


class Engine:
    """A model, its processor, and one thread that answers for both: CUDA if there is one, else the CPU (in float32,
    which is faster there).

    What a request is answered does not depend on what else is in the batch, but for the rounding of sums whose order
    depends on the batch's size: in float32 two tokens would have to be equally likely to six digits, in bfloat16 to
    two or three. So greedy answers are those of transformers' generate, and sampled ones repeat with their seed.

    quantization: "int8" holds the decoder in 8 bits (on a CPU by this project's own layers: smaller, faster, a little
    rougher), "nf4" in 4 (bitsandbytes). LoRA is folded in, unless bitsandbytes holds the weights.
    compiled: torch.compile the step that writes a token for every row; the first requests wait for it.
    Raises ValueError or OSError if the checkpoint cannot be loaded, ImportError without bitsandbytes."""

    def __init__(
        self,
        checkpoint: str,
        device: str | None = None,
        quantization: str | None = None,
        compiled: bool = False,
        limits: Limits = Limits(),
    ):
        transformers_logging.disable_progress_bar()
        model = _load(checkpoint, torch.device(device or _default_device()), quantization)
        self._start(model, ClipPhiProcessor.from_pretrained(checkpoint), compiled, limits)

    @classmethod
    def of(cls, model: Any, processor: Any, compiled: bool = False, limits: Limits = Limits()) -> "Engine":
        """An engine over a ClipPhiForCausalLM that is there already, in eval mode from now on."""
        engine = cls.__new__(cls)
        engine._start(model, processor, compiled, limits)
        return engine

    def _start(self, model: Any, processor: Any, compiled: bool, limits: Limits) -> None:
        self.model, self.processor, self.limits = model.eval(), processor, limits
        config = model.config.get_text_config()
        if kinds := set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
            raise ValueError(f"the engine serves decoders of full attention, not of {', '.join(sorted(kinds))}")
        self.context: int = getattr(config, "max_position_embeddings", None) or 2048
        window = getattr(config, "sliding_window", None)
        if window is not None and getattr(config, "use_sliding_window", True):
            self.context = min(self.context, window)  # so far a window sees everything, as our masks do
        self.forward = _with_compiled_steps(model) if compiled else model
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.token_bytes = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
        self.cache_bytes = limits.cache_bytes or _default_cache_bytes(model.device)
        self.ends = _end_tokens(model)
        self.preprocess = Preprocessor(processor.image_processor)
        self.images = TensorCache(limits.image_bytes)
        self.counts: Counter[str] = Counter()  # of requests by how they ended, of tokens, steps and images
        self.first_token_seconds: deque[float] = deque(maxlen=1000)
        self.seconds_per_answer = 1.0  # a running mean
        self._cache = RowCache(config.num_hidden_layers, heads, width, model.dtype, model.device)
        self._rows: list[_Row] = []
        self._waiting: deque[_Row] = deque()
        self._changed = threading.Condition()
        self._encoding = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="clip-phi engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a thread that is still inside torch when Python ends takes the process down

    # ------------------------------------------------------------------ asking

    def submit(
        self,
        messages: Sequence[dict[str, Any]],
        images: Sequence[Image.Image] = (),
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        deliver: Callable[[str | None], None] | None = None,
    ) -> Answer:
        """Put a conversation into the queue; it ends with a user's turn.

        messages: as the processor's chat template takes them; images: RGB, one for each {"type": "image"}, in order.
        max_new_tokens: None for that of the limits, or what the context has room for. temperature 0 is greedy; else one
        token is drawn from the likeliest ones that together have the probability top_p. stop: texts that end the
        answer, and are not in it. deliver: called with every piece, and None at the end, in the engine's thread;
        without it, iterate.

        Raises ValueError if the template refuses the messages, nothing is in them, a text contains a special token such
        as <image>, images and their places differ in number, or prompt and answer do not fit; Busy if the queue is
        full; Closed."""
        answer = Answer(deliver)
        self.refuse_if_busy()
        ids = self._encode(messages, len(images))
        if not ids:
            raise ValueError("the conversation is empty: there is nothing to answer")
        if max_new_tokens is None:
            max_new_tokens = max(1, min(self.limits.max_new_tokens, self.context - len(ids)))
        refuse_too_long(self.model, len(ids), max_new_tokens)
        if len(ids) + max_new_tokens > self.context:
            raise ValueError(f"{len(ids)} and {max_new_tokens} tokens do not fit a sliding window of {self.context}")
        if (len(ids) + max_new_tokens) * self.token_bytes > self.cache_bytes:
            raise ValueError(
                f"{len(ids)} tokens of prompt and {max_new_tokens} of answer need more than the {self.cache_bytes:,} "
                "bytes that the engine has for keys and values"
            )
        answer.num_prompt_tokens = len(ids)
        row = _Row(
            answer,
            ids,
            [self._prepare(image) for image in images],
            TextStream(self.processor.tokenizer, stop),
            max_new_tokens,
            temperature,
            top_p,
            random.Random(seed),
        )
        with self._changed:
            self.refuse_if_busy()
            self._waiting.append(row)
            self._changed.notify()
        return answer

    def stream(
        self, text: str | None, image: Image.Image | None, max_new_tokens: int = 128, transcript: str | None = None
    ) -> Iterator[str]:
        """The greedy answer, piece by piece as it comes. text: the instruction; None to ask for a bare caption.
        transcript: what is said before the instruction; for a spoken question, text is SPOKEN_INSTRUCTION.

        Raises ValueError if prompt and answer do not fit the decoder's context."""
        yield from self.submit(*as_prompt(text, image, transcript), max_new_tokens=max_new_tokens)

    def caption(self, image: Image.Image, max_new_tokens: int = 64) -> Iterator[str]:
        """The caption, asked for in the way this checkpoint was trained to give one."""
        return self.stream(self.model.config.caption_instruction, image, max_new_tokens)

    def completed(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages, with what this checkpoint was trained to be told where a user's turn has no text: how to ask
        for a caption, if there are only images, and that the question is spoken, if there is a transcript."""
        completed = []
        for message in messages:
            content = message["content"]
            if message["role"] == "user" and not isinstance(content, str):
                kinds = {item["type"] for item in content}
                text = SPOKEN_INSTRUCTION if "transcript" in kinds else self.model.config.caption_instruction
                if content and "text" not in kinds and text is not None:
                    message = {**message, "content": [*content, {"type": "text", "text": text}]}
            completed.append(message)
        return completed

    def close(self) -> None:
        """End the thread. Answers that are not complete raise Closed."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        atexit.unregister(self.close)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    @property
    def num_running(self) -> int:
        return len(self._rows)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    def refuse_if_busy(self) -> None:
        """Raises Busy if the queue is full, and Closed."""
        if self._closed:
            raise Closed("the engine is closed")
        if (waiting := len(self._waiting)) >= self.limits.max_waiting:
            rounds = waiting / self.limits.max_batch
            raise Busy(waiting, max(1, round(rounds * self.seconds_per_answer)))

    def _encode(self, messages: Sequence[dict[str, Any]], num_images: int) -> list[int]:
        tokenizer, token = self.processor.tokenizer, self.processor.image_token
        special = (token, tokenizer.eos_token, tokenizer.pad_token)
        for message in messages:
            content = message["content"]
            items = [{"type": "text", "text": content}] if isinstance(content, str) else content
            texts = [item.get("text", "") for item in items]
            if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
                raise ValueError("a text contains half a character, a surrogate without its other half")
            for text, each in itertools.product(texts, special):
                if each in text:
                    raise ValueError(f"a text contains {each}, which the model knows as a token of its own")
        with self._encoding:  # a tokenizer is not made for several threads at once
            try:
                text = self.processor.apply_chat_template(list(messages), add_generation_prompt=True)
            except TemplateError as error:
                raise ValueError(f"the chat template refuses the conversation: {error}") from error
            if (places := text.count(token)) != num_images:
                raise ValueError(f"{num_images} images, but {places} places for them in the conversation")
            return tokenizer(text.replace(token, token * self.processor.num_image_tokens))["input_ids"]

    def _prepare(self, image: Image.Image) -> tuple[str, torch.Tensor | None, torch.Tensor | None]:
        key = pixel_hash(image)
        features = self.images.get(key)
        if features is not None:
            return key, features, None
        return key, None, self.preprocess.of_image(image)

    # ------------------------------------------------------------------ answering, in the engine's thread

    @torch.inference_mode()
    def _run(self) -> None:
        while not self._closed:
            try:
                self._drop_cancelled()
                if joining := self._next_to_join():
                    self._prefill(joining)
                elif self._rows:
                    self._step()
            except BaseException as error:  # of the whole batch, out of memory for one: the next one may go well
                logger.exception("a step failed, and with it %s requests", len(self._rows))
                for row in self._rows:
                    self._end(row, None, error)
                self._rows.clear()
                self._cache.release()
        for row in [*self._rows, *self._waiting]:
            self._end(row, None, Closed("the engine was closed before the answer was complete"))
        self._rows.clear()
        self._waiting.clear()

    def _next_to_join(self) -> list[_Row]:
        """Those waiting that the next step takes in; waits for one if nothing is running. In the order they came."""
        with self._changed:
            while not self._waiting and not self._rows and not self._closed:
                self._changed.wait()
            joining: list[_Row] = []
            if self._rows and len(self._waiting) < len(self._rows) / 4:
                waited = time.perf_counter() - self._waiting[0].answer._submitted if self._waiting else 0.0
                if waited < self.limits.gather_seconds:
                    return joining
            longest = max((row.need for row in self._rows), default=0)
            tokens = 0
            while self._waiting and not self._closed:
                row = self._waiting[0]
                if row.answer._cancelled:
                    self._end(self._waiting.popleft(), "cancelled")
                    continue
                num_rows = len(self._rows) + len(joining) + 1
                longest, tokens = max(longest, row.need), max(tokens, len(row.ids))
                full = num_rows > self.limits.max_batch or num_rows * longest * self.token_bytes > self.cache_bytes
                if full or (joining and (len(joining) + 1) * tokens > self.limits.prefill_tokens):
                    break
                joining.append(self._waiting.popleft())
            return joining

    def _prefill(self, joining: list[_Row]) -> None:
        """Read the prompts of new rows, all at once; each alone if that fails, so that one does not fail the others."""
        try:
            logits = self._read_prompts(joining)
        except Exception as error:
            if len(joining) == 1:
                logger.exception("a request failed")
                self._end(joining[0], None, error)
                return
            for row in joining:
                self._prefill([row])
            return
        self._rows += joining
        self._take_tokens(joining, logits)

    def _read_prompts(self, joining: list[_Row]) -> torch.Tensor:
        """Logits (rows, vocabulary) behind the prompts, whose keys and values are in the cache then."""
        features = self._features(joining)
        first, image_token = len(self._rows), self.processor.image_token_id
        prefixes = [self._known_prefix(row) for row in joining]
        for row, prefix in zip(joining, prefixes, strict=True):  # one token at least is read: it gives the logits
            row.start = 0 if prefix is None else min(prefix.shape[2], len(row.ids) - 1)
        width = max(len(row.ids) - row.start for row in joining)
        need = max(max(row.start + width, row.need) for row in joining)
        self._cache.reserve(first + len(joining), max([need, *(row.need for row in self._rows)]))
        ids = torch.zeros(len(joining), width, dtype=torch.long)
        for number, (row, prefix) in enumerate(zip(joining, prefixes, strict=True)):
            ids[number, : len(row.ids) - row.start] = torch.tensor(row.ids[row.start :])
            if prefix is not None:
                self._cache.write(first + number, prefix)
        embeds = self.model.get_input_embeddings()(ids.to(self.model.device))
        for number, of_row in enumerate(features):
            places = (ids[number] == image_token).nonzero().flatten().to(self.model.device)
            if len(places):  # the last features: the first may be in the prefix
                embeds[number, places] = torch.cat(of_row)[-len(places) :].to(embeds.dtype)
        positions = torch.tensor([[row.start] for row in joining]) + torch.arange(width)
        lasts = torch.tensor([[len(row.ids) - row.start - 1] for row in joining])
        logits = self._forward(first, positions, max(len(row.ids) for row in joining), lasts, inputs_embeds=embeds)
        for number, row in enumerate(joining):
            row.length = len(row.ids)
            key = self._prefix_key(row)
            if key is not None and prefixes[number] is None and row.images[0][1] is not None:
                # the image was asked about before: the next question about it need not read it again
                self.images.put(key, self._cache.read(first + number, len(key[1])))
        self.counts["prompt_tokens"] += sum(len(row.ids) for row in joining)
        return logits

    def _features(self, joining: list[_Row]) -> list[list[torch.Tensor]]:
        """Of each row, (patches, text hidden) for each of its images; those that are new go through the tower."""
        found = {key: features for row in joining for key, features, _ in row.images if features is not None}
        new = {key: pixels for row in joining for key, _, pixels in row.images if key not in found}
        for key in list(new):
            if (features := self.images.get(key)) is not None:  # of a request that came just before
                found[key] = features
                del new[key]
        self.counts["images"] += sum(len(row.images) for row in joining)
        self.counts["images_encoded"] += len(new)
        if new:
            pixels = torch.stack([each for each in new.values() if each is not None]).to(self.model.device)
            outputs = self.model.get_image_features(pixels, return_dict=True).pooler_output
            for key, features in zip(new, outputs, strict=True):
                found[key] = features.clone()  # not a view that keeps the whole batch
                self.images.put(key, found[key])
        return [[found[key] for key, _, _ in row.images] for row in joining]

    def _prefix_key(self, row: _Row) -> tuple[str, tuple[int, ...]] | None:
        """Hash of the first image and the tokens up to its end."""
        if not row.images:
            return None
        start = row.ids.index(self.processor.image_token_id)
        return row.images[0][0], tuple(row.ids[: start + self.processor.num_image_tokens])

    def _known_prefix(self, row: _Row) -> torch.Tensor | None:
        key = self._prefix_key(row)
        return None if key is None else self.images.get(key)

    def _step(self) -> None:
        """One more token for every row."""
        positions = torch.tensor([[row.length] for row in self._rows])
        ids = torch.tensor([[row.last] for row in self._rows], device=self.model.device)
        logits = self._forward(0, positions, int(positions.max()) + 1, 1, input_ids=ids)
        for row in self._rows:
            row.length += 1
        self._take_tokens(self._rows, logits)

    def _forward(
        self, first: int, positions: torch.Tensor, length: int, keep: int | torch.Tensor, **inputs: torch.Tensor
    ) -> torch.Tensor:
        """Float32 logits (rows, vocabulary) at one position of each row from the first on."""
        positions = positions.to(self.model.device)
        mask = self._cache.at(first, positions, length)
        keep = keep.to(self.model.device) if isinstance(keep, torch.Tensor) else keep
        outputs = self.forward(
            **inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        self.counts["steps"] += 1
        return outputs.logits[:, 0].float()

    def _take_tokens(self, rows: list[_Row], logits: torch.Tensor) -> None:
        for row, token in zip(list(rows), _choose(logits, rows), strict=True):
            try:
                self._take_token(row, token)
            except Exception as error:  # what reads the answer, or its text: no other row has to do with it
                self._end(row, None, error)
        self._close_ranks()

    def _take_token(self, row: _Row, token: int | None) -> None:
        if token is None:
            self._end(row, None, ValueError("the model's logits are not finite"))
            return
        row.last = token
        first = row.answer.num_tokens == 0
        row.answer._count_token()
        self.counts["tokens"] += 1
        if first:
            self.first_token_seconds.append(row.answer.first_token_seconds or 0.0)
        if token not in self.ends:
            row.answer._say(row.stream.add(token))
        if token in self.ends or row.stream.stopped or row.answer.num_tokens == row.max_new_tokens:
            row.answer._say(row.stream.end())
            self._end(row, "stop" if token in self.ends or row.stream.stopped else "length")

    def _drop_cancelled(self) -> None:
        for row in self._rows:
            if row.answer._cancelled:
                self._end(row, "cancelled")
        self._close_ranks()

    def _close_ranks(self) -> None:
        """Move the last rows into the places of those that have ended."""
        for place in reversed(range(len(self._rows))):
            if self._rows[place].length < 0:
                last = self._rows.pop()
                if place < len(self._rows):
                    self._cache.move(len(self._rows), place, last.length)
                    self._rows[place] = last

    def _end(self, row: _Row, reason: str | None, error: BaseException | None = None) -> None:
        row.length = -1
        self.counts[reason or "failed"] += 1
        seconds = time.perf_counter() - row.answer._submitted
        self.seconds_per_answer += 0.1 * (seconds - self.seconds_per_answer)
        try:
            row.answer._finish(reason, error)
        except Exception:  # whoever asked is gone
            logger.debug("an answer could not be delivered", exc_info=True)


def as_prompt(
    text: str | None, image: Image.Image | None, transcript: str | None = None
) -> tuple[list[dict[str, Any]], list[Image.Image]]:
    """One user's turn about an image, or none, and the images of it; text: None to ask for a bare caption."""
    content: list[dict[str, Any]] = [{"type": "image"}] if image is not None else []
    for kind, words in (("transcript", transcript), ("text", text)):
        if words is not None:
            content.append({"type": kind, "text": words})
    return [{"role": "user", "content": content}], [image] if image is not None else []


def _choose(logits: torch.Tensor, rows: Sequence[_Row]) -> list[int | None]:
    """A token for each row of float (rows, vocabulary); None where the logits are not finite."""
    best = logits.max(dim=-1)
    tokens: list[int | None] = best.indices.tolist()
    finite = best.values.isfinite().tolist()
    sampled = [number for number, row in enumerate(rows) if row.temperature > 0 and finite[number]]
    if sampled:
        options = {"dtype": torch.float32, "device": logits.device}
        temperatures = torch.tensor([rows[number].temperature for number in sampled], **options).unsqueeze(1)
        top_p = torch.tensor([rows[number].top_p for number in sampled], **options).unsqueeze(1)
        # a float of each request's own, so that its draws do not depend on the other rows
        uniform = torch.tensor([rows[number].uniform.random() for number in sampled], **options).unsqueeze(1)
        likely, order = (logits[sampled] / temperatures).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        below = likely.cumsum(dim=-1) - likely
        likely = torch.where(below < top_p, likely, 0)  # the nucleus, arXiv 1904.09751; the first is always in it
        summed = likely.cumsum(dim=-1)
        drawn = torch.searchsorted(summed, uniform * summed[:, -1:], right=True)
        drawn = drawn.clamp(max=(likely > 0).sum(dim=-1, keepdim=True) - 1)
        for number, token in zip(sampled, order.gather(1, drawn).flatten().tolist(), strict=True):
            tokens[number] = token
    return [token if good else None for token, good in zip(tokens, finite, strict=True)]


def _load(checkpoint: str, device: torch.device, quantization: str | None) -> Any:
    if quantization not in (None, *QUANTIZATIONS):
        raise ValueError(f"unknown quantization {quantization!r}: it is one of {', '.join(QUANTIZATIONS)}")
    dtype: Any = torch.float32 if device.type == "cpu" else "auto"
    if quantization is None or (quantization == "int8" and device.type == "cpu"):
        model = ClipPhiForCausalLM.from_pretrained(checkpoint, dtype=dtype).to(device)
        fold_lora(model)
        if quantization is not None:
            quantize_decoder(model)
        return model
    config = quantization_config(quantization, torch.float32 if device.type == "cpu" else torch.bfloat16)
    return ClipPhiForCausalLM.from_pretrained(
        checkpoint, dtype=dtype, quantization_config=config, device_map={"": str(device)}
    )


def _with_compiled_steps(model: Any) -> Callable[..., Any]:
    """Steps have one shape but for the number of rows and the longest one; prompts have too many to compile for."""
    step = torch.compile(model, dynamic=True)
    return lambda **inputs: (step if "input_ids" in inputs else model)(**inputs)


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _default_cache_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 2 * GB


def _end_tokens(model: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    ends = model.config.get_text_config().eos_token_id if ends is None else ends
    return {ends} if isinstance(ends, int) else set(ends or ())
