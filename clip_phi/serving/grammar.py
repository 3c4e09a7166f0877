"""Answers that follow a JSON schema, a regular expression or a choice: llguidance says which tokens may come next."""

import json
import re
import threading
from functools import lru_cache
from typing import Any

import numpy as np

MAX_CHARACTERS = 65_536  # of a grammar


class GrammarError(ValueError):
    """What llguidance reports, in one line: without the lines of the grammar and its state."""

    def __init__(self, problem: str, matcher: Any):
        reason = re.split(r"\n(?: +\d+ \| |<state>)", matcher.get_error())[0]
        super().__init__(f"{problem}: {' '.join(reason.split())[:200]}")


class Grammars:
    """Compiles grammars for one tokenizer.

    Args:
        num_tokens: the number of logits.
        ends: the tokens that end an answer."""

    def __init__(self, tokenizer: Any, num_tokens: int, ends: set[int]):
        self.tokenizer, self.num_tokens, self.ends = tokenizer, num_tokens, sorted(ends)
        self._converted: Any = None
        self._lock = threading.Lock()
        self._compile_text = lru_cache(maxsize=16)(self._compile_new_text)  # clients send one schema many times

    def compile(self, schema: Any = None, regex: str | None = None, choice: list[str] | None = None) -> "Grammar":
        """The grammar of one of the three. Raises ValueError for what llguidance cannot follow; ImportError.

        An answer may begin with a space, as those that the model is trained on, which is not part of the text.

        Args:
            schema: a JSON schema, as an object or as its json."""
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            raise ImportError("answers in a schema need llguidance: pip install 'clip-phi[schema]'") from error
        if choice is not None:
            texts = choice if isinstance(choice, list) else [None]
            if not texts or not all(isinstance(each, str) and each and each == each.strip() for each in texts):
                raise ValueError("must be a list of texts without spaces around them")
            regex = "|".join(map(re.escape, choice))
        if regex is not None:
            if not isinstance(regex, str):
                raise ValueError("must be a text")
            text = LLMatcher.grammar_from_regex(f" ?(?:{regex})")
        else:
            schema = json.loads(schema) if isinstance(schema, str) else schema
            if not isinstance(schema, dict):
                raise ValueError("must be a JSON schema, which is an object")
            # As json.dumps writes it: with free spaces, a model may write spaces up to its last token
            style = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
            answer = json.dumps({**schema, "x-guidance": style})
            text = LLMatcher.grammar_from_lark(f'start: " "? answer\nanswer: %json {answer}')
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"{len(text):,} characters of grammar: at most {MAX_CHARACTERS:,} here")
        return self._compile_text(text)

    def _compile_new_text(self, text: str) -> "Grammar":
        from llguidance import LLMatcher
        from llguidance.hf import from_tokenizer

        with self._lock:  # takes a second for 50,000 tokens
            if self._converted is None:
                self._converted = from_tokenizer(self.tokenizer, n_vocab=self.num_tokens, eos_token=self.ends)
        matcher = LLMatcher(self._converted, text, log_level=0)
        if matcher.is_error():
            raise GrammarError("cannot be followed", matcher)
        marks = {mark: self._converted.tokenize_str(mark)[0] for mark in '"}],~0123456789'}
        return Grammar(matcher, marks, self.ends[0])


class Grammar:
    """The state of one answer.

    An answer that becomes too long is led to its end, so that it follows the grammar within its limit of tokens: before
    the limit, `take` looks for a short way to the end, and goes this way before it becomes too long."""

    def __init__(self, matcher: Any, marks: dict[str, int], end: int):
        self.matcher, self.marks, self.end = matcher, marks, end
        self.is_stopped = matcher.is_stopped  # whether nothing can follow
        self.is_complete = matcher.is_accepting  # whether the answer may end here
        self.allowed = matcher.compute_bitmask  # bytes: a bit for each token, the lowest first, 1 where it may follow
        self.ending: list[int] = []  # tokens from here to the end of an answer; empty: not known
        self.unchecked = 0  # tokens that may follow before the next look

    def copy(self, max_new_tokens: int) -> "Grammar":
        """The beginning of an answer of at most so many tokens."""
        copy = Grammar(self.matcher.deep_copy(), self.marks, self.end)
        copy.ending = copy._find_ending(max_new_tokens) or []
        # Without a short answer there is nothing to look for
        copy.unchecked = copy._steps_without_look(max_new_tokens) if copy.ending else max_new_tokens
        return copy

    def take(self, token: int, left: int) -> int:
        """Go on with this token, or another one if the answer could not end within `left` tokens, it included.

        Returns the token that was taken. Raises ValueError if it may not follow."""
        before, self.ending = self.ending, []
        self._consume([token])
        self.unchecked -= 1
        if before[:1] == [token]:
            self.ending = before[1:]
        elif self.unchecked < 0 and not self.is_stopped():
            found = self._rest_of(before, left - 1) or self._find_ending(left - 1)
            if found is None and before:
                self.matcher.rollback(1)
                token, *self.ending = before
                self._consume([token])
            elif found is not None:
                self.ending = found
                self.unchecked = self._steps_without_look(left)
        return token

    def _steps_without_look(self, left: int) -> int:
        """So many tokens may follow before the way to the end can become too long: one token adds a part of it."""
        return max(0, left - len(self.ending) - 16) // 2

    def _consume(self, tokens: list[int]) -> None:
        if not self.matcher.consume_tokens(tokens):
            raise GrammarError("the answer cannot follow its grammar", self.matcher)

    def _rest_of(self, ending: list[int], most: int) -> list[int] | None:
        """A way to the end that was known before the last token, if it, or its rest, is one from here too."""
        for start in range(min(3, len(ending))):  # the last token may be the first two of it in one
            rest = ending[start:]
            if len(rest) <= most and self.matcher.validate_tokens([*rest, self.end]) > len(rest):
                return rest
        return None

    def _find_ending(self, most: int) -> list[int] | None:
        """A short, not always the shortest way to the end; None if it has more tokens than `most`."""
        tokens: list[int] = []
        try:
            while not self.is_complete() and len(tokens) <= most:
                following = self.matcher.compute_ff_tokens() or [self._shortest_step(len(tokens))]
                self._consume(following)
                tokens += following
        finally:
            self.matcher.rollback(len(tokens))
        return tokens if len(tokens) <= most else None

    def _shortest_step(self, number: int) -> int:
        def may(mark: str) -> bool:
            return self.matcher.validate_tokens([self.marks[mark]]) == 1

        is_quote = may('"')
        if is_quote and may("~"):  # inside of a text
            return self.marks['"']
        for mark in '}]"' if is_quote else "}],0123456789":
            if may(mark):
                return self.marks[mark]
        allowed = np.unpackbits(np.frombuffer(self.allowed(), np.uint8), bitorder="little").nonzero()[0]
        return int(allowed[number % len(allowed)])  # each in turn: one of them leads to the end
