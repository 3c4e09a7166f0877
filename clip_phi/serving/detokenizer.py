"""Streaming detokenizer: whole characters, up to a stop string, without surrounding spaces."""

import re
from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers.convert_slow_tokenizer import bytes_to_unicode

# Characters of a byte-level BPE vocabulary to the bytes that they stand for
BYTES = {character: byte for byte, character in bytes_to_unicode().items()}


class TextStream:
    """The text of one completion, token by token.

    All pieces together are tokenizer.decode(tokens, skip_special_tokens=True).strip(), cut before the first stop
    string. Text is held back while it may be trailing spaces, part of a character, or the start of a stop string."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.tokens: list[int] = []
        self.text = ""  # of all pieces so far
        self.stopped = False  # a stop string has ended the text
        self._stream = DecodeStream(skip_special_tokens=True)
        self._decoded = self._held = ""

    def add(self, token: int) -> str:
        """The text that this token completes; often empty."""
        self.tokens.append(token)
        return self._take(self._stream.step(self.tokenizer.backend_tokenizer, token) or "")

    def end(self) -> str:
        """The last piece: held-back text, with an unfinished character as U+FFFD."""
        if self.stopped:
            return ""
        whole = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        piece = self._take(whole.removeprefix(self._decoded) if whole.startswith(self._decoded) else "")
        if self.stopped:
            return piece
        rest, self._held = self._held.rstrip(), ""
        return piece + self._release(rest)

    def _take(self, decoded: str) -> str:
        self._decoded += decoded
        text = self._held + decoded
        cuts = [place for place in map(text.find, self.stop) if place >= 0]
        self.stopped = bool(cuts)
        keep = min(cuts, default=len(text))
        for stop in () if cuts else self.stop:
            begun = (size for size in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:size]))
            keep = min(keep, len(text) - next(begun, 0))
        keep = len(text[:keep].rstrip())
        self._held = text[keep:]
        return self._release(text[:keep])

    def _release(self, piece: str) -> str:
        piece = piece if self.text else piece.lstrip()
        self.text += piece
        return piece


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """The bytes that a token stands for in a text: those of a special token are its name's."""
    name = tokenizer.convert_ids_to_tokens(token)
    if name is None:  # a spare row of the vocabulary
        return b""
    if name in tokenizer.get_added_vocab():
        return name.encode()
    if "ByteLevel" in str(tokenizer.backend_tokenizer.decoder):
        return bytes(map(BYTES.__getitem__, name))
    if (byte := re.fullmatch(r"<0x([0-9A-F]{2})>", name)) is not None:
        return bytes.fromhex(byte[1])
    return name.replace("▁", " ").encode()
