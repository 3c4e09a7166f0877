"""Captions against references: BLEU, ROUGE-L and CIDEr, as coco-caption computes them, without its Java.

Every number equals that of the reference implementation (arXiv 1504.00325, the package pycocoevalcap), edge cases
included: brackets stay as words such as -lrb-, while quotes and full stops are removed. Its CIDEr, and that of nearly
every paper, is CIDEr-D, with clipped counts and a length penalty; so both names are given for the one number. The form
without these two (arXiv 1411.5726, equations 1 to 3; its authors' code) is CIDEr-unclipped.

Imports nothing of the project: the file is part of the metric on the Hub.
"""

import math
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

MAX_ORDER = 4  # of n-grams
SIGMA = 6.0  # of CIDEr-D's length penalty, in words
BETA = 1.2  # how much more recall weighs in ROUGE-L

# The Penn Treebank's rules as in Stanford's PTBTokenizer 3.4.1, as far as captions need them. Matched in this order.
_TOKEN = re.compile(
    r"""
    https?://[^\s"<>|(){}]+ | [\w.+-]+@[^\W_]+(?:[.-][^\W_]+)*          # addresses
    | <[a-z]\w*> | [:;]-?[()] | ['’]\d\ds?(?![^\W_"]) | '(?:n'|(?:em|til|n|cause|tis|twas)\b) | ol'
    | \b(?:[^\W\d_]\.)+(?:[^\W\d_](?![^\W_])|(?![^\W_]))               # u.s., p.m, and "a." at the end of a sentence
    | \b(?:mr|mrs|ms|dr|prof|st|ave|blvd|rd|mt|ft|jr|sr|co|corp|inc|ltd|vs|etc|gen|sen|rep|gov|lt|col|capt|sgt)\.
      (?![^\s.!?])
    | \bno\.(?=\s*\d)
    | (?-i:[A-Z]+&[A-Z]+)\b                                             # AT&T, but not at&t
    | [+-]?(?<![^\W_])\d+(?:[.,:/]\d+)+ | (?<!\d)\.\d+ | [+-](?<![^\W_][+-])\d+\b     # 10:30, 1,000, 1/2, .5, -5
    | [^\W_]+(?:(?:[-/_][^\W_]+|(?<=[^\W\d_])[.'’](?=[^\W\d_])[^\W_]+))*  # two-story, a/b, 1st, isn't, o'clock
    | ['’](?:s|m|d|re|ve|ll)\b | [@\#][^\W\d]\w*
    | [?!]+ | _+ | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)
_CONTRACTION = re.compile(r"(.*[^\W_])?(n['’]t|['’](?:s|m|d|re|ve|ll))", re.IGNORECASE)
_WHOLE = re.compile(r"(?:[cdlo]['’][^\W\d_]{2,}|ma['’]am)", re.IGNORECASE)  # c'mon, d'you, l'eau, o'clock
_PIECES = re.compile(r"['’]n['’]|['’]n\b|[^'’]+|['’]")
_SPLIT = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "gimme": "gim me"}
_SPLIT |= {"lemme": "lem me", "'tis": "'t is", "'twas": "'t was"}
_RENAMED = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "€": "$", "£": "#"}
_RENAMED |= {"½": "1/2", "¼": "1/4", "¾": "3/4", ":)": ":-rrb-", ":(": ":-lrb-", ";)": ";-rrb-", ";(": ";-lrb-"}
_RENAMED |= {":-)": ":--rrb-", ":-(": ":--lrb-", ";-)": ";--rrb-", ";-(": ";--lrb-"}
# The punctuation that coco-caption removes, and other characters that its tokenizer turns into it.
_DROPPED = {*"'`\".?!,:;-“”‘’–—…", "..."}

_Vector = tuple[list[dict[tuple[str, ...], float]], list[float], int]  # TF-IDF weights by order, their norms, a length


def tokenise(caption: str) -> list[str]:
    """The words of a caption in lower case, by the Penn Treebank's rules, without punctuation."""
    words: list[str] = []
    for found in _TOKEN.findall(caption):
        if found in _DROPPED:
            continue
        word = found.lower()
        if word in _SPLIT:
            words += _SPLIT[word].split()
        elif "'" in word or "’" in word:
            words += [piece for piece in _split_at_apostrophes(word) if piece not in _DROPPED]
        else:
            words.append(_RENAMED.get(word, word))
    return words


def _split_at_apostrophes(word: str) -> list[str]:
    word = word.replace("’", "'") if len(word) > 2 else word
    if match := _CONTRACTION.fullmatch(word):
        stem, ending = match.groups()
        return [*(_split_at_apostrophes(stem) if stem else []), ending]
    if word.startswith("y'"):
        return ["y'", word[2:]]
    if _WHOLE.fullmatch(word) or "'" not in word[1:] or word in ("'n'", "ol'"):
        return [word]
    return _PIECES.findall(word)


class CaptionScores(NamedTuple):
    corpus: dict[str, float]  # the metrics by name
    each: dict[str, np.ndarray]  # of those that are means over the images: float64 (images,)


class CaptionScorer:
    """Scores captions of one set of images, whose references are tokenised once.

    references: one caption or more for each image. CIDEr weighs words by how rare they are in these references, so its
    scores depend on the whole set, and are 0 for a set of one image.
    Raises ValueError if there are no images, or one has no reference."""

    def __init__(self, references: Sequence[Sequence[str]]):
        if not references or not all(references):
            raise ValueError("each image needs at least one reference caption")
        self.references = [[_Words.of(caption) for caption in captions] for captions in references]
        seen = (set().union(*(words.counts for words in captions)) for captions in self.references)
        frequency = Counter(chain.from_iterable(seen))
        self._unseen = math.log(len(references))  # the weight of an n-gram that no reference has
        self._weight = {ngram: self._unseen - math.log(count) for ngram, count in frequency.items()}
        self._vectors = [[self._vector(words) for words in captions] for captions in self.references]

    def __call__(self, captions: Sequence[str]) -> CaptionScores:
        """captions: one for each image. Raises ValueError for another number of them."""
        if len(captions) != len(self.references):
            raise ValueError(f"{len(captions):,} captions for {len(self.references):,} images")
        candidates = [_Words.of(caption) for caption in captions]
        both = np.array([self._cider(words, vectors) for words, vectors in zip(candidates, self._vectors, strict=True)])
        each = {
            "ROUGE-L": np.array([rouge_l(c, r) for c, r in zip(candidates, self.references, strict=True)]),
            "CIDEr": both[:, 1],
            "CIDEr-D": both[:, 1],
            "CIDEr-unclipped": both[:, 0],
        }
        corpus = {f"BLEU-{order}": score for order, score in enumerate(bleu(candidates, self.references), start=1)}
        return CaptionScores(corpus | {name: float(scores.mean()) for name, scores in each.items()}, each)

    def _vector(self, words: "_Words") -> _Vector:
        weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(MAX_ORDER)]
        for ngram, count in words.counts.items():
            weights[len(ngram) - 1][ngram] = count * self._weight.get(ngram, self._unseen)
        norms = [math.sqrt(sum(value * value for value in part.values())) for part in weights]
        # As in the reference, a caption's length is its number of word pairs.
        return weights, norms, max(0, len(words.words) - 1)

    def _cider(self, words: "_Words", references: Sequence[_Vector]) -> tuple[float, float]:
        """CIDEr-unclipped and CIDEr-D of one image."""
        weights, own_norms, length = self._vector(words)
        plain = clipped = 0.0
        for other_weights, other_norms, other_length in references:
            penalty = math.exp(-((length - other_length) ** 2) / (2 * SIGMA**2))
            for mine, theirs, *norms in zip(weights, other_weights, own_norms, other_norms, strict=True):
                if (norm := math.prod(norms)) == 0:
                    continue
                shared = mine.keys() & theirs.keys()
                plain += sum(mine[ngram] * theirs[ngram] for ngram in shared) / norm
                clipped += sum(min(mine[ngram], theirs[ngram]) * theirs[ngram] for ngram in shared) / norm * penalty
        scale = 10 / MAX_ORDER / len(references)
        return plain * scale, clipped * scale


class _Words(NamedTuple):
    """A tokenised caption and how often it has each n-gram."""

    words: list[str]
    counts: Counter[tuple[str, ...]]

    @classmethod
    def of(cls, caption: str) -> "_Words":
        words = tokenise(caption)
        tails = [words[start:] for start in range(MAX_ORDER)]
        ngrams = (zip(*tails[:order], strict=False) for order in range(1, MAX_ORDER + 1))
        return cls(words, Counter(chain.from_iterable(ngrams)))


def bleu(candidates: Sequence[_Words], references: Sequence[Sequence[_Words]]) -> list[float]:
    """BLEU-1 to BLEU-4 of all captions together, against the reference of the closest length (arXiv 1504.00325)."""
    correct, guessed = np.zeros(MAX_ORDER), np.zeros(MAX_ORDER)
    length = closest = 0
    for own, others in zip(candidates, references, strict=True):
        length += len(own.words)
        closest += min((abs(len(other.words) - len(own.words)), len(other.words)) for other in others)[1]
        guessed += [max(0, len(own.words) - order) for order in range(MAX_ORDER)]
        for ngram, count in own.counts.items():
            correct[len(ngram) - 1] += min(count, max(other.counts.get(ngram, 0) for other in others))
    precisions = (correct + 1e-15) / (guessed + 1e-9)  # the reference's own guards against 0
    ratio = (length + 1e-15) / (closest + 1e-9)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    return [float(score) * brevity for score in np.cumprod(precisions) ** (1 / np.arange(1, MAX_ORDER + 1))]


def rouge_l(candidate: _Words, references: Sequence[_Words]) -> float:
    """The F score of the longest common subsequence, with more weight on recall (ROUGE-L, Lin 2004, as in arXiv
    1504.00325). Precision and recall are the best of any reference."""
    own = candidate.words or [""]  # an empty caption is one empty word there
    common = [(_longest_common(own, other.words or [""]), len(other.words) or 1) for other in references]
    precision = max(length for length, _ in common) / len(own)
    recall = max(length / size for length, size in common)
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence; a row of its table is the bits of one integer (Hyyro 2004)."""
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    everything = row = (1 << len(first)) - 1
    for word in second:
        matched = row & places.get(word, 0)
        row = ((row + matched) | (row - matched)) & everything
    return len(first) - row.bit_count()


def meteor(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """METEOR of all captions together, by the reference's own Java program in the package pycocoevalcap.

    Raises ImportError if the package is not installed, OSError if there is no Java."""
    try:
        from pycocoevalcap.meteor.meteor import Meteor
    except ImportError as error:
        raise ImportError("METEOR needs pycocoevalcap: pip install 'clip-phi[metrics]'") from error
    if shutil.which("java") is None:
        raise OSError("METEOR needs Java, for example: apt-get install default-jre-headless")
    texts = {key: [" ".join(tokenise(caption))] for key, caption in enumerate(captions)}
    truth = {key: [" ".join(tokenise(caption)) for caption in each] for key, each in enumerate(references)}
    program = Meteor()
    try:
        return float(program.compute_score(truth, texts)[0])
    finally:
        program.meteor_p.kill()
