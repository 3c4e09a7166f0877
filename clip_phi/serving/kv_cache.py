"""Caches of the engine: keys and values of the running requests, and image features."""

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

ROUND = 64  # tokens; storage grows in such steps, so that it does not grow at every request
Shape = tuple[int, int, int]  # heads, width of a key, width of a value


@torch.no_grad()
def cache_shapes(model: Any) -> list[Shape]:
    """What one token puts into the cache of each layer of a model's decoder, found by running it.

    Raises ValueError if a layer keeps anything but keys and values."""
    outputs = model.model.language_model(torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=True)
    layers = next(value.layers for value in outputs.values() if isinstance(value, Cache))
    if not all(isinstance(getattr(layer, "keys", None), torch.Tensor) for layer in layers):
        kind = model.config.get_text_config().model_type
        raise ValueError(f"{kind!r} decoders are not supported: some layers do not cache keys and values")
    return [(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in layers]


class BatchCache(Cache):
    """Keys and values of a batch of sequences, each with its own length.

    `at` sets where the next forward pass writes, and how many tokens it reads; the mask hides what lies behind the end
    of a sequence. A sequence joins by being written and leaves by another being moved over it: no padding, no other
    copies. Storage shrinks to what is needed now before it exceeds max_bytes. shapes: of each layer."""

    def __init__(self, shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device, max_bytes: int):
        self.max_bytes = max_bytes
        self.token_bytes = sum(heads * (key + value) for heads, key, value in shapes) * dtype.itemsize
        self.options: dict[str, Any] = {"dtype": dtype, "device": device}
        self.first, self.length = 0, 0
        self.sequences: torch.Tensor | None = None  # int (sequences, 1)
        self.positions: torch.Tensor | None = None  # int (sequences, tokens)
        self.num_sequences, self.capacity = 0, 0
        super().__init__(layers=[_BatchLayer(self, shape) for shape in shapes])

    def reserve(self, num_sequences: int, num_tokens: int) -> None:
        """Make room for so many sequences of so many tokens; the content within these numbers stays."""
        if num_sequences > self.num_sequences or num_tokens > self.capacity:
            capacity = -(-num_tokens // ROUND) * ROUND
            largest = max(num_sequences, self.num_sequences), max(capacity, self.capacity)
            fits = largest[0] * largest[1] * self.token_bytes <= self.max_bytes
            self.num_sequences, self.capacity = largest if fits else (num_sequences, capacity)
            for layer in self.layers:
                # zeros, not uninitialized memory: a NaN that the mask hides still makes the attention's sum NaN
                for part, width in enumerate(layer.widths):
                    new = torch.zeros(self.num_sequences, self.capacity, layer.heads, width, **self.options)
                    if (old := layer.states[part]) is not None:
                        old = old[: self.num_sequences, : self.capacity]
                        new[: old.shape[0], : old.shape[1]] = old
                    layer.states[part] = new

    def release(self) -> None:
        """Free the memory. No sequence may be in use."""
        self.num_sequences = self.capacity = 0
        for layer in self.layers:
            layer.states = [None, None]

    def at(self, first: int, positions: torch.Tensor, length: int) -> torch.Tensor:
        """Set what the next forward pass writes and reads. Returns its mask, bool (sequences, 1, tokens, length).

        Args:
            first: number of its first sequence.
            positions: int (sequences, tokens), where it writes.
            length: tokens of each sequence that it reads."""
        self.first, self.positions, self.length = first, positions, length
        self.sequences = torch.arange(first, first + len(positions), device=positions.device).unsqueeze(1)
        return (torch.arange(length, device=positions.device) <= positions.unsqueeze(-1)).unsqueeze(1)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a sequence over another one."""
        for states in self._states():
            states[target, :length] = states[source, :length]

    def read(self, sequence: int, length: int) -> torch.Tensor:
        """A copy of a sequence's first tokens: (tokens, numbers of all layers)."""
        return torch.cat([states[sequence, :length].flatten(1) for states in self._states()], dim=1)

    def write(self, sequence: int, prefix: torch.Tensor) -> None:
        """Write the result of `read` as a sequence's first tokens."""
        parts = prefix.split([states.shape[2] * states.shape[3] for states in self._states()], dim=1)
        for states, part in zip(self._states(), parts, strict=True):
            states[sequence, : len(prefix)] = part.unflatten(1, states.shape[2:])

    def _states(self) -> list[torch.Tensor]:
        return [states for layer in self.layers for states in layer.states]


class _BatchLayer(CacheLayerMixin):
    def __init__(self, cache: BatchCache, shape: Shape):
        super().__init__()
        self.cache = cache
        self.heads, *self.widths = shape
        self.states: list[Any] = [None, None]  # keys and values: (sequences, tokens, heads, width)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Write and read keys and values, (sequences, heads, tokens, width)."""
        cache, (keys, values) = self.cache, self.states
        keys[cache.sequences, cache.positions] = key_states.transpose(1, 2)
        values[cache.sequences, cache.positions] = value_states.transpose(1, 2)
        batch = slice(cache.first, cache.first + key_states.shape[0])  # len() would fix it for torch.compile
        return keys[batch, : cache.length].transpose(1, 2), values[batch, : cache.length].transpose(1, 2)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None: ...

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.length, 0

    def get_seq_length(self) -> int:
        return self.cache.length

    def get_max_length(self) -> int:
        return -1


class TensorCache:
    """Least-recently-used cache of tensors, at most max_bytes."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._tensors: OrderedDict[Hashable, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> torch.Tensor | None:
        with self._lock:
            if key in self._tensors:
                self._tensors.move_to_end(key)
            return self._tensors.get(key)

    def put(self, key: Hashable, tensor: torch.Tensor) -> None:
        with self._lock:
            if key in self._tensors or tensor.nbytes > self.max_bytes:
                return
            self._tensors[key] = tensor
            self.num_bytes += tensor.nbytes
            while self.num_bytes > self.max_bytes:
                self.num_bytes -= self._tensors.popitem(last=False)[1].nbytes
