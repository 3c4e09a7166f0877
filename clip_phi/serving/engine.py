"""Continuous batching: requests join and leave the running batch between two steps.

transformers' own continuous batching takes token ids alone (5.23), no images. This is the iteration-level scheduling of
Orca (OSDI 2022) over a cache in which every sequence has its own length.
"""

import atexit
import logging
import math
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers.utils import logging as transformers_logging

from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

from ..batching.attention import context_length, refuse_other_attention
from ..batching.images import MAX_PIXELS, Preprocessor, load_image, pixel_hash, read_header
from ..data.sample import SPOKEN_INSTRUCTION, user_message
from ..environment import find_device, quantization_config
from ..evaluation.confidence import ABSTENTION, load_scaling, logit, scale
from ..evaluation.generate import answer_logprobs, end_tokens, refuse_too_long
from ..hub.retry import load_with_retries
from .detokenizer import TextStream
from .grammar import Grammar, Grammars
from .int8 import fold_lora, quantize_decoder
from .kv_cache import BatchCache, TensorCache, cache_shapes

logger = logging.getLogger(__name__)
QUANTIZATIONS = ("nf4", "int8")
GB = 2**30
Messages = Sequence[dict[str, Any]]  # of the processor's chat template
Callback = Callable[[str | None], None]  # gets each piece of a text, and None at its end
GREEDY = 1e-5  # a temperature below this is greedy: what it would divide by is no number in float32
MAX_CHARACTERS = 16  # of a conversation, for each token of the context: longer texts cannot fit, and are not tokenised
DECODING_BYTES = 16  # for each pixel of an image: what PIL needs at most, for 16-bit gray and for transparency
# These decoders hold Python's lock until they end, and so hold up every other request: 0.1 s for so many pixels.
MAX_LOCKED_PIXELS = {"AVIF": 1_500_000, "WEBP": 16_000_000}


class QueueFullError(RuntimeError):
    """The queue is full. retry_after: seconds until a retry may succeed."""

    def __init__(self, waiting: int, retry_after: int):
        super().__init__(f"{waiting} requests are in the queue already: try again in {retry_after} s")
        self.retry_after = retry_after


class EngineClosedError(RuntimeError):
    """The engine is closed, or was closed before the completion ended."""


@dataclass(frozen=True)
class Limits:
    max_batch: int = 32  # requests in one batch
    max_waiting: int = 256  # requests in the queue
    # Bytes of the batch's keys and values, with every sequence as long as the longest; a request stays in the queue
    # until it fits. None: half of the GPU memory that is free at the start, 2 GB on a CPU.
    cache_bytes: int | None = None
    image_bytes: int = GB // 4  # cached image features, and keys and values of prompts' leading images
    prefill_tokens: int = 2048  # prompt tokens that join in one step, while running requests pause
    # Longest time that a request is held back so that others join with it: several prompts take little more time than
    # one. It applies while fewer requests are queued than a quarter of those running.
    gather_seconds: float = 0.02
    max_new_tokens: int = 256  # where a request names none and the context has room
    decoding_bytes: int = GB // 2  # memory of the images that are being decoded; each further image waits
    waiting_bytes: int = GB // 2  # pixel values of the requests in the queue


class PreparedImage(NamedTuple):
    """What the engine needs of an image: its hash, and cached features or else pixel values (3, height, width)."""

    key: str
    features: torch.Tensor | None
    pixel_values: torch.Tensor | None


class TokenLogprob(NamedTuple):
    """A generated token, its log-probability in nats before temperature and constraints, and the likeliest tokens."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


class Completion:
    """The text of one request. Iterating gives its pieces as they are generated, and raises the request's error.

    text: all pieces so far.
    finish_reason: "stop" (end token or stop string), "length" or "cancelled"; None until then.
    num_prompt_tokens: tokens of the prompt, images included.
    num_tokens: generated tokens, the end token included.
    logprobs: of each generated token but the end token, if they were asked for. logprob: of all, the end token too.
    first_token_seconds: time from submission to the first token.
    tokens_per_second: rate after the first token."""

    def __init__(self, num_prompt_tokens: int, callback: Callback | None):
        self._pieces: SimpleQueue[str | None] = SimpleQueue()
        self._callback = callback or self._pieces.put
        self._cancelled = False
        self._submitted = time.perf_counter()
        self._first = self._last = 0.0
        self.finish_reason: str | None = None
        self.error: BaseException | None = None
        self.text = ""
        self.num_prompt_tokens, self.num_tokens = num_prompt_tokens, 0
        self.logprobs: list[TokenLogprob] = []
        self.logprob = 0.0

    @property
    def first_token_seconds(self) -> float | None:
        return self._first - self._submitted if self._first else None

    @property
    def tokens_per_second(self) -> float | None:
        return (self.num_tokens - 1) / (self._last - self._first) if self.num_tokens > 1 else None

    def cancel(self) -> None:
        """Stop generating: the request leaves the batch after the current step."""
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
        """Block until the text is complete."""
        return "".join(self)

    def _add(self, piece: str) -> None:
        if piece:
            self.text += piece
            self._callback(piece)


@dataclass
class _Request:
    completion: Completion
    ids: list[int]  # the prompt
    images: list[PreparedImage]
    stream: TextStream
    max_new_tokens: int
    temperature: float
    top_p: float
    uniform: random.Random
    top_logprobs: int | None  # None: no log-probabilities
    grammar: Grammar | None
    start: int = 0  # tokens at the start of the prompt whose keys and values are cached
    length: int = 0  # tokens in the cache; -1 when the request has ended
    last: int = 0  # newest token

    @property
    def max_length(self) -> int:
        return len(self.ids) + self.max_new_tokens


class Engine(AbstractContextManager["Engine"]):
    """Continuous batching of one model and its processor, in a thread of its own.

    A completion does not depend on the rest of the batch, up to rounding: in float32 two tokens would have to be
    equally likely to six digits, in bfloat16 to two or three. Greedy completions are those of transformers' generate;
    sampled ones repeat with their seed. Raises ValueError for a decoder that training refuses too.

    model: a ClipPhiForCausalLM, in eval mode from now on.
    compiled: torch.compile the step that generates a token for every request; the first requests are slow."""

    def __init__(self, model: Any, processor: Any, compiled: bool = False, limits: Limits = Limits()):
        self.model, self.processor, self.limits = model.eval(), processor, limits
        self.scaling: dict[str, float] | None = None  # of likelihoods to confidences
        refuse_other_attention(model)
        config = model.config.get_text_config()
        self.context: int = context_length(model.config) or 2048
        kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
        slides = "sliding_attention" in kinds and getattr(config, "use_sliding_window", True)
        self.window: int | None = getattr(config, "sliding_window", None) if slides else None
        self.mixes_windows = len(kinds) > 1  # such a decoder takes a mask of each kind
        step = torch.compile(model, dynamic=True) if compiled else model  # prompts have too many shapes for it
        self.forward = lambda **inputs: (step if "input_ids" in inputs else model)(**inputs)
        self.ends = end_tokens(model, processor)
        self.preprocess = Preprocessor(processor.image_processor)
        self.images = TensorCache(limits.image_bytes)
        self.grammars = Grammars(processor.tokenizer, config.vocab_size, self.ends)
        self.counts: Counter[str] = Counter()  # requests by finish reason, tokens, steps and images
        self.first_token_seconds: deque[float] = deque(maxlen=1000)
        self.seconds_per_request = 1.0  # a running mean
        is_cuda = model.device.type == "cuda"
        self.cache_bytes = limits.cache_bytes or (torch.cuda.mem_get_info(model.device)[0] // 2 if is_cuda else 2 * GB)
        self._cache = BatchCache(cache_shapes(model), model.dtype, model.device, self.cache_bytes)
        self._running: list[_Request] = []
        self._waiting: deque[list[_Request]] = deque()  # the completions of one prompt together
        self._free_bytes = limits.decoding_bytes
        Image.core.set_block_size(2**28)  # a large image in one piece, which the C library gives back when it is freed
        self._freed = threading.Condition()
        self._changed = threading.Condition()
        self._encoding = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="clip-phi engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a thread still inside torch when Python exits crashes the process

    @classmethod
    def from_pretrained(
        cls, path: str, device: str | None = None, quantization: str | None = None, compiled: bool = False,
        limits: Limits = Limits(),
    ) -> "Engine":  # fmt: skip
        """Load a model and its processor.

        Raises ValueError or OSError if the model cannot be loaded, ImportError without bitsandbytes.

        Args:
            path: folder or Hub id. LoRA is merged into the weights, unless bitsandbytes holds them.
            device: None for CUDA if there is one, else the CPU (in float32, which is faster there).
            quantization: "int8" for 8-bit decoder weights (on a CPU by this project's own layers: smaller, faster,
                slightly less exact), "nf4" for 4-bit ones (bitsandbytes)."""
        if quantization not in (None, *QUANTIZATIONS):
            raise ValueError(f"unknown quantization {quantization!r}: it is one of {', '.join(QUANTIZATIONS)}")
        transformers_logging.disable_progress_bar()
        place = find_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        is_cpu = place.type == "cpu"
        options: dict[str, Any] = {"dtype": torch.float32 if is_cpu else "auto"}
        if has_bitsandbytes := quantization == "nf4" or (quantization == "int8" and not is_cpu):
            config = quantization_config(quantization, torch.float32 if is_cpu else torch.bfloat16)
            options |= {"quantization_config": config, "device_map": {"": str(place)}}
        model = load_with_retries(ClipPhiForCausalLM.from_pretrained, path, **options)
        if not has_bitsandbytes:
            (fold_lora if quantization is None else quantize_decoder)(model.to(place))
        engine = cls(model, load_with_retries(ClipPhiProcessor.from_pretrained, path), compiled, limits)
        engine.scaling = load_scaling(path, model)
        return engine

    def submit(
        self, messages: Messages, images: Sequence[Image.Image | PreparedImage] = (), *,
        callback: Callback | None = None, **options: Any,
    ) -> Completion:  # fmt: skip
        """One completion of a conversation; arguments and errors are those of submit_many, and

        callback: called in the engine's thread with each piece, and with None at the end. Without it, iterate."""
        return self.submit_many(messages, images, [callback], **options)[0]

    def submit_many(
        self, messages: Messages, images: Sequence[Image.Image | PreparedImage], callbacks: Sequence[Callback | None],
        *, max_new_tokens: int | None = None, temperature: float = 0.0, top_p: float = 1.0, seed: int | None = None,
        stop: Sequence[str] = (), top_logprobs: int | None = None, grammar: Grammar | None = None, cut: bool = False,
    ) -> list[Completion]:  # fmt: skip
        """Put a conversation that ends with a user's turn into the queue; its prompt is processed once.

        Raises ValueError if the template refuses the messages, they are empty or too long, a text contains a special
        token such as <image>, the number of images is wrong, prompt and completion do not fit, or an option has no
        meaning; QueueFullError; EngineClosedError.

        Args:
            images: RGB, or of read_image: one for each {"type": "image"}, in order.
            callbacks: as of submit, one for each completion.
            max_new_tokens: None for Limits.max_new_tokens, or what the context has room for.
            temperature: 0 is greedy, and so is less than 1e-5; else one token is sampled.
            top_p: probability of the likeliest tokens together, from which one is sampled.
            seed: of the first completion; the next one has the next seed.
            stop: strings that end the completion and are left out of it.
            top_logprobs: number of the likeliest tokens in each of Completion.logprobs; None for no logprobs.
            grammar: what the completion follows, of self.grammars.compile. With logprobs the end token comes after it.
            cut: lower max_new_tokens to what the context has room for, instead of an error."""
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be a number of at least 0, not {temperature}")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        self.check_queue()
        ids = self._encode(messages, len(images))
        if not ids:
            raise ValueError("the conversation is empty: write a question or attach an image")
        room = self.cache_bytes // (len(callbacks) * self._cache.token_bytes) - len(ids)  # for each completion
        if max_new_tokens is None or cut:
            most = self.limits.max_new_tokens if max_new_tokens is None else max_new_tokens
            max_new_tokens = max(1, min(most, room, self.context - len(ids)))
        refuse_too_long(self.model, len(ids), max_new_tokens)
        if len(callbacks) > self.limits.max_batch:
            raise ValueError(f"{len(callbacks)} completions at once: the engine has room for {self.limits.max_batch}")
        if max_new_tokens > room:
            available = f"the {self.cache_bytes:,} bytes that the engine has for keys and values"
            raise ValueError(f"{len(ids)} prompt tokens and {max_new_tokens} new tokens need more than {available}")
        prepared = [self._prepare(image) if isinstance(image, Image.Image) else image for image in images]
        group = []
        for number, callback in enumerate(callbacks):
            stream = TextStream(self.processor.tokenizer, stop)
            sampling = temperature, top_p, random.Random(None if seed is None else seed + number), top_logprobs
            rules = grammar and grammar.copy(max_new_tokens)
            completion = Completion(len(ids), callback)
            group.append(_Request(completion, ids, prepared, stream, max_new_tokens, *sampling, rules))
        with self._changed:
            self.check_queue()
            queued = sum(_num_bytes(each[0].images) for each in self._waiting)
            if queued and queued + _num_bytes(prepared) > self.limits.waiting_bytes:
                raise QueueFullError(len(self._waiting), self._retry_after())
            self._waiting.append(group)
            self._changed.notify()
        return [request.completion for request in group]

    def read_image(self, source: str | Path | bytes, max_pixels: int = MAX_PIXELS) -> PreparedImage:
        """Decode an image and keep what the model needs of it.

        Blocks while other threads decode as much as Limits.decoding_bytes allow. Raises RecordError as load_image, and
        ValueError for more than max_pixels, or for a format that is slow to decode and has more than MAX_LOCKED_PIXELS.

        Args:
            source: a file, or the content of one."""
        format, num_pixels = read_header(source)
        limit = min(max_pixels, MAX_LOCKED_PIXELS.get(format, max_pixels))
        if num_pixels > limit:
            kind = "an image" if limit == max_pixels else f"an image in the format {format}"
            raise ValueError(f"{kind} of {num_pixels:,} pixels: at most {limit:,} here")
        num_bytes = min(num_pixels * DECODING_BYTES, self.limits.decoding_bytes)
        with self._freed:
            self._freed.wait_for(lambda: self._free_bytes >= num_bytes)
            self._free_bytes -= num_bytes
        try:
            return self._prepare(load_image(source))
        finally:
            with self._freed:
                self._free_bytes += num_bytes
                self._freed.notify_all()

    def _prepare(self, image: Image.Image) -> PreparedImage:
        features = self.images.get(key := pixel_hash(image))
        return PreparedImage(key, features, self.preprocess.of_image(image) if features is None else None)

    def stream(
        self, text: str | None, image: Image.Image | None, max_new_tokens: int = 128, transcript: str | None = None,
        grammar: Grammar | None = None,
    ) -> Iterator[str]:  # fmt: skip
        """The pieces of the greedy completion; arguments as of as_prompt, errors as of submit."""
        yield from self.submit(*as_prompt(text, image, transcript), max_new_tokens=max_new_tokens, grammar=grammar)

    def caption(self, image: Image.Image, max_new_tokens: int = 64) -> Iterator[str]:
        """The caption, with the instruction that the model was trained on."""
        return self.stream(self.model.config.caption_instruction, image, max_new_tokens)

    def confidence(
        self, completion: Completion, messages: Messages, abstain_below: float | None = None
    ) -> dict[str, Any]:
        """How sure a whole completion is that was submitted with top_logprobs; for json, see evaluation/confidence.py.

        gain is None without an image and for an answer that is cut (also by a stop string), confidence where the model
        has no scaling. If the confidence, or else the likelihood, is below `abstain_below`, the completion has
        abstained: its text becomes ABSTENTION."""
        likelihood, gain = math.exp(completion.logprob), None
        contents: list[Any] = [message["content"] for message in messages]
        texts = [each if isinstance(each, str) else [i for i in each if i["type"] != "image"] for each in contents]
        said = self.processor.decode([each.token for each in completion.logprobs], skip_special_tokens=True).strip()
        # The blind likelihood is that of the whole text with its end token, which logprobs leave out.
        if texts != contents and completion.num_tokens > len(completion.logprobs) and said == completion.text:
            blind = [{**message, "content": text} for message, text in zip(messages, texts, strict=True)]
            with self._encoding:
                (logprob,) = answer_logprobs(self.model, self.processor, [(blind, None)], [completion.text])
            gain = likelihood - math.exp(logprob)
        confidence = None if self.scaling is None else float(scale(logit(likelihood), **self.scaling))
        abstained = (likelihood if confidence is None else confidence) < (abstain_below or 0)
        completion.text = ABSTENTION if abstained else completion.text
        return {"likelihood": likelihood, "gain": gain, "confidence": confidence, "abstained": abstained}

    def add_default_instructions(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages; a user's turn without text gets the instruction that the model was trained on.

        That is SPOKEN_INSTRUCTION where the turn has a transcript, else the instruction for a caption."""
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
        """End the thread. Unfinished completions raise EngineClosedError."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        atexit.unregister(self.close)

    def __exit__(self, *error: Any) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def check_queue(self) -> None:
        """Raises QueueFullError or EngineClosedError if the queue takes no request."""
        if self._closed:
            raise EngineClosedError("the engine is closed")
        if len(self._waiting) >= self.limits.max_waiting:
            raise QueueFullError(len(self._waiting), self._retry_after())

    def _retry_after(self) -> int:
        return max(1, round(len(self._waiting) / self.limits.max_batch * self.seconds_per_request))

    def _encode(self, messages: Sequence[dict[str, Any]], num_images: int) -> list[int]:
        if (size := sum(map(_num_characters, messages))) > (most := MAX_CHARACTERS * self.context):
            raise ValueError(f"{size:,} characters of text: at most {most:,} here ({self.context} tokens of context)")
        with self._encoding:  # a tokenizer is not made for several threads at once
            ids, _ = self.processor.encode(messages, add_generation_prompt=True)
        if (places := ids.count(self.processor.image_token_id) // self.processor.num_image_tokens) != num_images:
            raise ValueError(f"{num_images} images, but {places} places for them in the conversation")
        return ids

    # ------------------------------------------------------------------ generating, in the engine's thread

    @torch.inference_mode()
    def _run(self) -> None:
        while not self._closed:
            try:
                self._end_cancelled(self._running)
                self._remove_ended()
                if joining := self._next_to_join():
                    self._prefill(joining)
                elif self._running:
                    self._step()
            except BaseException as error:  # of the whole batch, for example out of memory: the next one may succeed
                logger.exception("a step failed, and its %s requests with it", len(self._running))
                self._fail(self._running, error)
                self._cache.release()
        for requests in (self._running, *self._waiting):  # none is added once the engine is closed
            self._fail(requests, EngineClosedError("the engine is closed"))
        self._waiting.clear()

    def _next_to_join(self) -> list[list[_Request]]:
        """Queued requests for the next step, oldest first; blocks until there is one if nothing runs."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._running or self._closed)
            joining: list[list[_Request]] = []
            if self._running and len(self._waiting) < len(self._running) / 4:
                queued = time.perf_counter() - self._waiting[0][0].completion._submitted if self._waiting else 0.0
                if queued < self.limits.gather_seconds:
                    return joining
            longest = max((request.max_length for request in self._running), default=0)
            size, tokens = len(self._running), 0
            while self._waiting and not self._closed:
                self._end_cancelled(self._waiting[0])
                group = self._waiting[0] = [request for request in self._waiting[0] if request.length >= 0]
                if not group:
                    self._waiting.popleft()
                    continue
                size += len(group)
                longest, tokens = max(longest, group[0].max_length), max(tokens, len(group[0].ids))
                full = size > self.limits.max_batch or size * longest * self._cache.token_bytes > self.cache_bytes
                if full or (joining and (len(joining) + 1) * tokens > self.limits.prefill_tokens):
                    break
                joining.append(self._waiting.popleft())
            return joining

    def _prefill(self, groups: list[list[_Request]]) -> None:
        """Process the prompts of new requests in one forward pass; if it fails, each in its own."""
        joining = [group[0] for group in groups]
        places = [*range(len(groups)), *(number for number, group in enumerate(groups) for _ in group[1:])]
        joining += [request for group in groups for request in group[1:]]
        try:
            logits = self._read_prompts(joining[: len(groups)], joining)
            for number in range(len(groups), len(joining)):
                joining[number].length = joining[places[number]].length
                source, target = len(self._running) + places[number], len(self._running) + number
                self._cache.move(source, target, joining[number].length)
        except Exception as error:
            if len(groups) == 1:
                logger.exception("a request failed")
                self._fail(joining, error)
            else:
                for group in groups:
                    self._prefill([group])
        else:
            for request in joining:
                request.images = []  # their pixel values are not needed again
            self._running += joining
            self._take_tokens(joining, logits if len(joining) == len(groups) else logits[places])

    def _read_prompts(self, joining: list[_Request], sharing: list[_Request]) -> torch.Tensor:
        """Logits (requests, vocabulary) after the prompts; their keys and values are in the cache afterwards.

        sharing: these requests and those that share their prompts, for which the cache has room afterwards."""
        features = self._features(joining)
        first, image_token = len(self._running), self.processor.image_token_id
        keys = [self._prefix_key(request) for request in joining]
        prefixes = [None if key is None else self.images.get(key) for key in keys]
        for request, prefix in zip(joining, prefixes, strict=True):  # at least one token is left: it gives the logits
            request.start = 0 if prefix is None else min(len(prefix), len(request.ids) - 1)
        rests = [torch.tensor(request.ids[request.start :]) for request in joining]
        ids = torch.nn.utils.rnn.pad_sequence(rests, batch_first=True)
        lengths = [request.max_length for request in (*self._running, *sharing)]
        self._cache.reserve(len(lengths), max([*lengths, *(request.start + ids.shape[1] for request in joining)]))
        for number, prefix in enumerate(prefixes):
            if prefix is not None:
                self._cache.write(first + number, prefix)
        embeds = self.model.get_input_embeddings()(ids.masked_fill(ids == image_token, 0).to(self.model.device))
        for number, of_request in enumerate(features):
            places = (ids[number] == image_token).nonzero().flatten().to(self.model.device)
            if len(places):  # the last features: the first may be in the prefix
                embeds[number, places] = torch.cat(of_request)[-len(places) :].to(embeds.dtype)
        positions = torch.tensor([[request.start] for request in joining]) + torch.arange(ids.shape[1])
        lasts = torch.tensor([[len(rest) - 1] for rest in rests])
        length = max(len(request.ids) for request in joining)
        logits = self._forward(first, positions, length, lasts.to(self.model.device), inputs_embeds=embeds)
        for number, (request, key) in enumerate(zip(joining, keys, strict=True)):
            request.length = len(request.ids)
            if key is not None and prefixes[number] is None and request.images[0].features is not None:
                # the second question about this image: a third one need not compute its keys and values again
                self.images.put(key, self._cache.read(first + number, len(key[1])))
        self.counts["prompt_tokens"] += sum(len(request.ids) for request in joining)
        return logits

    def _features(self, joining: list[_Request]) -> list[list[torch.Tensor]]:
        """Features (patches, text hidden) of each image of each request; new images go through the vision tower."""
        images = [image for request in joining for image in request.images]
        # An image may have come into the cache since it was read: by a request just before.
        found: dict[str, Any] = {key: self.images.get(key) if known is None else known for key, known, _ in images}
        new = {key: pixels for key, _, pixels in images if found[key] is None and pixels is not None}
        self.counts.update(images=len(images), images_encoded=len(new))
        if new:
            pixel_values = torch.stack(list(new.values())).to(self.model.device)
            outputs = self.model.get_image_features(pixel_values, return_dict=True).pooler_output
            for key, features in zip(new, outputs, strict=True):
                found[key] = features.clone()  # a view would keep the whole batch
                self.images.put(key, found[key])
        return [[found[key] for key, _, _ in request.images] for request in joining]

    def _prefix_key(self, request: _Request) -> tuple[str, tuple[int, ...]] | None:
        """Hash of the first image, and the tokens up to its end."""
        if not request.images:
            return None
        end = request.ids.index(self.processor.image_token_id) + self.processor.num_image_tokens
        return request.images[0].key, tuple(request.ids[:end])

    def _step(self) -> None:
        """One more token for every running request."""
        positions = torch.tensor([[request.length] for request in self._running])
        ids = torch.tensor([[request.last] for request in self._running], device=self.model.device)
        logits = self._forward(0, positions, int(positions.max()) + 1, 1, input_ids=ids)
        for request in self._running:
            request.length += 1
        self._take_tokens(self._running, logits)

    def _forward(
        self, first: int, positions: torch.Tensor, length: int, logits_to_keep: int | torch.Tensor, **inputs: Any
    ) -> torch.Tensor:
        """Float32 logits (requests, vocabulary) at one position of each request from the first on."""
        positions = positions.to(self.model.device)
        mask: Any = self._cache.at(first, positions, length)
        if self.window is not None and self.window < length:
            places = torch.arange(length, device=positions.device)
            near = mask & (positions.unsqueeze(-1) - places < self.window).unsqueeze(1)
            mask = {"full_attention": mask, "sliding_attention": near} if self.mixes_windows else near
        inputs |= {"attention_mask": mask, "position_ids": positions, "logits_to_keep": logits_to_keep}
        outputs = self.forward(**inputs, past_key_values=self._cache, use_cache=True)
        self.counts["steps"] += 1
        return outputs.logits[:, 0].float()

    def _take_tokens(self, requests: list[_Request], logits: torch.Tensor) -> None:
        wanted = [number for number, request in enumerate(requests) if request.top_logprobs is not None]
        logprobs = dict(zip(wanted, logits[wanted].log_softmax(dim=-1), strict=True)) if wanted else {}
        if any(request.grammar is not None for request in requests):
            allowed = np.ones(logits.shape, bool)
            for number, request in enumerate(requests):
                if request.grammar is not None:
                    with self._failing_alone(request):
                        bits = np.frombuffer(request.grammar.allowed(), np.uint8)
                        allowed[number] = np.unpackbits(bits, count=logits.shape[1], bitorder="little")
            logits = logits.masked_fill(~torch.from_numpy(allowed).to(logits.device), -torch.inf)
        tokens: list[int | None] = [None] * len(requests)
        try:
            tokens = _choose(logits, requests)
        except Exception:  # of one of them
            for number, request in enumerate(requests):
                with self._failing_alone(request):
                    tokens[number] = _choose(logits[number : number + 1], [request])[0]
        for number, (request, token) in enumerate(zip(requests, tokens, strict=True)):
            if request.length >= 0:
                with self._failing_alone(request):  # its callback or its text may raise too
                    self._take_token(request, token, logprobs.get(number))
        self._remove_ended()

    @contextmanager
    def _failing_alone(self, request: _Request) -> Iterator[None]:
        """An error ends this request, and no other one."""
        try:
            yield
        except Exception as error:
            self._end(request, None, error)

    def _take_token(self, request: _Request, token: int | None, logprobs: torch.Tensor | None) -> None:
        if token is None:
            raise ValueError("the model's logits are not finite")
        completion, stream, grammar = request.completion, request.stream, request.grammar
        if grammar is not None and token not in self.ends:
            token = grammar.take(token, request.max_new_tokens - completion.num_tokens)
        request.last = token
        completion.num_tokens += 1
        self.counts["tokens"] += 1
        completion.logprob += 0.0 if logprobs is None else float(logprobs[token])
        completion._last = time.perf_counter()
        if completion.num_tokens == 1:
            completion._first = completion._last
            self.first_token_seconds.append(completion._first - completion._submitted)
        if token not in self.ends:
            if logprobs is not None:
                top = logprobs.topk(min(request.top_logprobs or 0, len(logprobs)))
                pairs = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
                completion.logprobs.append(TokenLogprob(token, float(logprobs[token]), pairs))
            completion._add(stream.add(token))
        stopped = token in self.ends or stream.stopped or (logprobs is None and grammar and grammar.is_stopped())
        if stopped or completion.num_tokens == request.max_new_tokens:
            completion._add(stream.end())
            stopped = stopped or stream.stopped or (grammar is not None and grammar.is_complete())
            self._end(request, "stop" if stopped else "length")

    def _remove_ended(self) -> None:
        """Move the last requests into the places of those that have ended."""
        for place in reversed(range(len(self._running))):
            if self._running[place].length < 0:
                last = self._running.pop()
                if place < len(self._running):
                    self._cache.move(len(self._running), place, last.length)
                    self._running[place] = last

    def _end_cancelled(self, requests: list[_Request]) -> None:
        for request in requests:
            if request.completion._cancelled:
                self._end(request, "cancelled")

    def _fail(self, requests: list[_Request], error: BaseException) -> None:
        for request in requests:
            self._end(request, None, error)
        requests.clear()

    def _end(self, request: _Request, reason: str | None, error: BaseException | None = None) -> None:
        request.length = -1
        request.completion.finish_reason, request.completion.error = reason, error
        self.counts[reason or "failed"] += 1
        seconds = time.perf_counter() - request.completion._submitted
        self.seconds_per_request += 0.1 * (seconds - self.seconds_per_request)
        try:
            request.completion._callback(None)
        except Exception:  # the client is gone
            logger.debug("a completion could not be delivered", exc_info=True)


def as_prompt(text: str | None, image: Image.Image | None, transcript: str | None = None) -> tuple[list, list]:
    """Messages and images of one user's turn.

    Args:
        text: the instruction; None to ask for a bare caption.
        transcript: recognized speech before the instruction; for a spoken question, text is SPOKEN_INSTRUCTION."""
    images = [] if image is None else [image]
    return [user_message(text, len(images), transcript)], images


def _choose(logits: torch.Tensor, requests: Sequence[_Request]) -> list[int | None]:
    """A token for each request, from float logits (requests, vocabulary); None where they are not finite."""
    best = logits.max(dim=-1)
    tokens: list[int | None] = best.indices.tolist()
    finite = best.values.isfinite().tolist()
    sampled = [number for number, request in enumerate(requests) if request.temperature >= GREEDY and finite[number]]
    if sampled:
        # each request has its own generator: its samples do not depend on the other requests
        chosen = [requests[number] for number in sampled]
        options = [(request.temperature, request.top_p, request.uniform.random()) for request in chosen]
        temperatures, top_p, uniform = torch.tensor(options, dtype=torch.float32, device=logits.device).T.unsqueeze(-1)
        scores = (logits[sampled] - best.values[sampled].unsqueeze(-1)) / temperatures  # of at most 0: no overflow
        likely, order = scores.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        below = likely.cumsum(dim=-1) - likely
        below[:, 0] = -1  # the likeliest is always in the nucleus, arXiv 1904.09751
        likely = torch.where(below < top_p, likely, 0)
        summed = likely.cumsum(dim=-1)
        drawn = torch.searchsorted(summed, uniform * summed[:, -1:], right=True)
        drawn = drawn.clamp(max=(likely > 0).sum(dim=-1, keepdim=True) - 1)
        for number, token in zip(sampled, order.gather(1, drawn).flatten().tolist(), strict=True):
            tokens[number] = token
    return [token if good else None for token, good in zip(tokens, finite, strict=True)]


def _num_characters(message: dict[str, Any]) -> int:
    content = message["content"]
    return len(content) if isinstance(content, str) else sum(len(item.get("text") or "") for item in content)


def _num_bytes(images: Sequence[PreparedImage]) -> int:
    return sum(image.pixel_values.nbytes for image in images if image.pixel_values is not None)
