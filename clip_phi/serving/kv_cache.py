"""What the engine keeps between steps: keys and values of the running requests, and what images gave."""

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

ROUND = 64  # tokens; storage grows by this, so that it does not grow at every request


class RowCache(Cache):
    """Keys and values of a batch in which each row, a request, has a length of its own.

    Rows are written where `at` says and read up to the longest of them; what lies behind a row's end is never seen, by
    the mask. So a row joins by being written, and leaves by another being moved over it: nothing is padded, and
    nothing else is copied. The tensors of a layer are (rows, tokens, heads, head width)."""

    def __init__(self, num_layers: int, num_heads: int, width: int, dtype: torch.dtype, device: torch.device):
        self.shape = (num_heads, width)
        self.options: dict[str, Any] = {"dtype": dtype, "device": device}
        self.first, self.length = 0, 0
        self.rows: torch.Tensor | None = None  # int (rows, 1)
        self.positions: torch.Tensor | None = None  # int (rows, tokens)
        self.num_rows, self.capacity = 0, 0
        super().__init__(layers=[_RowLayer(self) for _ in range(num_layers)])

    def reserve(self, num_rows: int, num_tokens: int) -> None:
        """Make room for so many rows of so many tokens; what is there stays."""
        if num_rows > self.num_rows or num_tokens > self.capacity:
            self.num_rows = max(self.num_rows, num_rows)
            self.capacity = max(self.capacity, -(-num_tokens // ROUND) * ROUND)
            for layer in self.layers:
                layer.keys, layer.values = self._grown(layer.keys), self._grown(layer.values)

    def _grown(self, old: torch.Tensor | None) -> torch.Tensor:
        # zeros, not what lies in memory: a NaN that the mask hides still makes the attention's sum NaN
        new = torch.zeros(self.num_rows, self.capacity, *self.shape, **self.options)
        if old is not None:
            new[: old.shape[0], : old.shape[1]] = old
        return new

    def release(self) -> None:
        """Give the memory back. No row may be in use."""
        self.num_rows = self.capacity = 0
        for layer in self.layers:
            layer.keys = layer.values = None

    def at(self, first: int, positions: torch.Tensor, length: int) -> torch.Tensor:
        """The next forward writes rows first, first + 1, ... at positions, int (rows, tokens), and reads `length`
        tokens of them. Returns its mask, bool (rows, 1, tokens, length)."""
        self.first, self.positions, self.length = first, positions, length
        self.rows = torch.arange(first, first + len(positions), device=positions.device).unsqueeze(1)
        return (torch.arange(length, device=positions.device) <= positions.unsqueeze(-1)).unsqueeze(1)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a row over another row."""
        for layer in self.layers:
            layer.keys[target, :length] = layer.keys[source, :length]
            layer.values[target, :length] = layer.values[source, :length]

    def read(self, row: int, length: int) -> torch.Tensor:
        """A copy of a row's first tokens: (layers, 2, tokens, heads, head width)."""
        return torch.stack(
            [torch.stack((layer.keys[row, :length], layer.values[row, :length])) for layer in self.layers]
        )

    def write(self, row: int, prefix: torch.Tensor) -> None:
        """What `read` gave, as a row's first tokens."""
        for layer, (keys, values) in zip(self.layers, prefix, strict=True):
            layer.keys[row, : len(keys)] = keys
            layer.values[row, : len(values)] = values


class _RowLayer(CacheLayerMixin):
    def __init__(self, cache: RowCache):
        super().__init__()
        self.cache = cache
        self.keys: Any = None  # (rows, tokens, heads, head width), and so are the values
        self.values: Any = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """key_states, value_states: (rows, heads, tokens, head width), and so is what is returned."""
        keys, values, cache = key_states.transpose(1, 2), value_states.transpose(1, 2), self.cache
        self.keys[cache.rows, cache.positions] = keys
        self.values[cache.rows, cache.positions] = values
        rows = slice(cache.first, cache.first + keys.shape[0])  # len() would fix it for torch.compile
        return self.keys[rows, : cache.length].transpose(1, 2), self.values[rows, : cache.length].transpose(1, 2)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None: ...

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.length, 0

    def get_seq_length(self) -> int:
        return self.cache.length

    def get_max_length(self) -> int:
        return -1


class TensorCache:
    """Tensors by key, the least recently used ones dropped when they hold more than max_bytes."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._tensors: OrderedDict[Hashable, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> torch.Tensor | None:
        with self._lock:
            found = self._tensors.get(key)
            if found is not None:
                self._tensors.move_to_end(key)
            return found

    def put(self, key: Hashable, tensor: torch.Tensor) -> None:
        with self._lock:
            if key in self._tensors or tensor.nbytes > self.max_bytes:
                return
            self._tensors[key] = tensor
            self.num_bytes += tensor.nbytes
            while self.num_bytes > self.max_bytes:
                self.num_bytes -= self._tensors.popitem(last=False)[1].nbytes

    def __len__(self) -> int:
        return len(self._tensors)
