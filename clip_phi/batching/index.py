"""The tokenised index of a source: read and tokenised once, then mapped from disk by every process that trains.

It is an Arrow file, whose pages workers share. Where its bytes have changed on disk, it is made anew."""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..data.files import checked_line, file_stamp, no_collector, read_checked_lines
from ..data.report import Report
from ..data.sample import File, Images, Sample, Turn, images_of
from ..data.source import DataSource
from .encode import Encoded, encode_samples, prefix_ids
from .packing import SharedPrefixSample, build_shared_prefix

FORMAT = 8  # of the files; raised too when a reader or the encoding comes to give something else
NAMES = " + "  # between the names of several images
CHUNK = 1000  # samples that are tokenised together
HINT_SAMPLES, SHORT_ANSWER = 500, 3  # samples that independent_turns_hint() reads; words
IMAGE = {"path": pa.string(), "member": pa.string(), "bytes": pa.large_binary()}
# conversations: json. captions: those that begin with an answer. ids, labels: without BOS and image. lengths: tokens.
PARTS = {"images": pa.list_(pa.struct(IMAGE)), "origins": pa.list_(pa.string()), "conversations": pa.string()}
SCHEMA = pa.schema(PARTS | {"captions": pa.int32()} | dict.fromkeys(("ids", "labels", "lengths"), pa.list_(pa.int32())))


@dataclass(eq=False)
class Index:
    """Samples and their token ids, by number. It pickles as the name of its file.

    prefixes: the token ids before the conversations of a sample without and with an image. report: what was skipped and
    repaired when it was made. selected: which entries of the table it has, in this order; None for all."""

    table: pa.Table
    prefixes: tuple[list[int], list[int]]
    report: Report
    path: Path | None = None
    selected: np.ndarray | None = None

    @classmethod
    def concatenate(cls, parts: Sequence["Index"]) -> "Index":
        """In memory, for small parts."""
        tables, report = [], Report()
        for part in parts:
            whole, chosen = part.table, part.selected
            tables.append(whole if chosen is None else whole.take(pa.array(chosen, pa.int64())))
            report.add(part.report)
        return cls(pa.concat_tables(tables), parts[0].prefixes, report)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | ({"table": None} if self.path else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.path:
            self.table = _map(self.path)

    def __len__(self) -> int:
        return self.table.num_rows if self.selected is None else len(self.selected)

    def _cell(self, name: str, number: int) -> Any:
        return self.table[name][number if self.selected is None else int(self.selected[number])]

    def image(self, number: int) -> Images | None:
        cells = (each.values() for each in self._cell("images", number).as_py())
        images = [data if path is None else File(path, member) for path, member, data in cells]
        return tuple(images) if len(images) > 1 else next(iter(images), None)

    def has_image(self, number: int) -> bool:
        return len(self._cell("images", number)) > 0

    def origins(self, number: int) -> list[str]:
        return self._cell("origins", number).as_py()

    def num_conversations(self, number: int) -> int:
        return len(self._cell("lengths", number))

    def sample(self, number: int) -> Sample:
        conversations = json.loads(self._cell("conversations", number).as_py())
        turns = (tuple(_turn(*values) for values in conversation) for conversation in conversations)
        return Sample(self.image(number), tuple(turns), tuple(self.origins(number)))

    def encoded(self, number: int) -> list[Encoded]:
        """The conversations of a sample, without what precedes them."""
        ids, labels, lengths = (self._cell(name, number).as_py() for name in ("ids", "labels", "lengths"))
        ids, labels = iter(ids), iter(labels)
        return [Encoded(list(islice(ids, length)), list(islice(labels, length))) for length in lengths]

    def prefix(self, number: int) -> list[int]:
        """Token ids before each conversation of a sample: BOS, if the decoder has one, and the image's."""
        without, with_image = self.prefixes
        return without + with_image[len(without) :] * len(self._cell("images", number))

    def shared_prefix_sample(self, number: int, conversations: Sequence[int] | None = None) -> SharedPrefixSample:
        """A sample with all its conversations, or with these."""
        encoded = self.encoded(number)
        chosen = encoded if conversations is None else [encoded[conversation] for conversation in conversations]
        return build_shared_prefix(chosen, self.prefix(number), self.origins(number)[0])

    def take(self, numbers: np.ndarray) -> "Index":
        """A view of these samples."""
        selected = numbers if self.selected is None else self.selected[numbers]
        return Index(self.table, self.prefixes, self.report, self.path, selected)

    def fingerprint(self) -> str:
        """Hex digest of the token ids and the order of the samples."""
        digest = hashlib.blake2b(digest_size=16)
        for chunk in self.table["ids"].chunks + self.table["lengths"].chunks:
            digest.update(chunk.flatten().to_numpy().tobytes())
        if self.selected is not None:
            digest.update(np.ascontiguousarray(self.selected).tobytes())
        return digest.hexdigest()

    def image_files(self) -> tuple[np.ndarray, pa.ChunkedArray]:
        """Of each image of the table, selected or not, the number of its sample, and its file; null if it is bytes."""
        images, counts = self.table["images"], pc.list_value_length(self.table["images"]).to_numpy()
        path, member = (pc.struct_field(pc.list_flatten(images), name) for name in ("path", "member"))
        files = pc.coalesce(pc.binary_join_element_wise(path, member, "!"), path)  # as str(File)
        return np.repeat(np.arange(len(counts)), counts), files

    def image_names(self) -> list[str | None]:
        """The image file of each sample, several joined by NAMES; None for text-only samples and images in bytes."""
        files = iter(self.image_files()[1].to_pylist())
        counts = pc.list_value_length(self.table["images"]).to_pylist()
        names = [NAMES.join(filter(None, islice(files, count))) or None for count in counts]
        return np.array(names, object)[self._rows].tolist()

    def num_tokens(self) -> np.ndarray:
        """int64 (samples,): tokens of each sample, its image once and all end tokens included."""
        return self._with_prefix(self._lengths("ids"))

    def packed_lengths(self, num_conversations: int | None = None) -> np.ndarray:
        """int64 (samples,): tokens of each sample that go into the model; the most that so many conversations have."""
        counts, tokens = (read(self.table["lengths"]).to_numpy() for read in (pc.list_value_length, pc.list_flatten))
        owners, starts = (np.repeat(each, counts) for each in (np.arange(len(counts)), np.cumsum(counts) - counts))
        taken = np.arange(len(tokens)) - starts < (num_conversations or len(tokens))  # the longest come first
        sums = np.bincount(owners[taken], tokens[np.lexsort((-tokens, owners))][taken] - 1, len(counts))
        return self._with_prefix(sums.astype(np.int64)[self._rows])

    def count(self) -> tuple[int, int, int]:
        """Samples with an image; captions and (other) conversations of all samples."""
        counts = (self._lengths("images"), self.num_captions(), self._lengths("lengths"))
        images, captions, conversations = (int(each.sum()) for each in counts)
        return images, captions, conversations - captions

    def num_captions(self) -> np.ndarray:
        """int64 (samples,): conversations that begin with an answer."""
        return self.table["captions"].to_numpy()[self._rows].astype(np.int64)

    @property
    def _rows(self) -> Any:
        return slice(None) if self.selected is None else self.selected

    def _lengths(self, name: str) -> np.ndarray:
        """int64 (samples,): of the lists in a column."""
        return pc.list_value_length(self.table[name]).to_numpy()[self._rows].astype(np.int64)

    def _with_prefix(self, lengths: np.ndarray) -> np.ndarray:
        without, with_image = map(len, self.prefixes)
        return lengths + without + (with_image - without) * self._lengths("images")


def count_text(images: int, captions: int, conversations: int) -> str:
    """4,000 images, 20,000 captions, 8,000 conversations; without what there is none of."""
    texts = [f"{captions:,} captions"] * bool(captions)
    texts += [f"{conversations:,} conversations"] * bool(conversations or not captions)
    return ", ".join([f"{images:,} images", *texts])


def independent_turns_hint(index: Index) -> str | None:
    """The advice to separate the turns, if most conversations of several turns have short answers only.

    Later turns read the answers before them, and a model that reads an answer need not look."""
    several, short = 0, 0
    for number in np.unique(np.linspace(0, len(index) - 1, min(len(index), HINT_SAMPLES), dtype=np.int64)):
        for conversation in index.sample(int(number)).conversations if index.has_image(int(number)) else ():
            answers = [turn.text for turn in conversation if turn.role == "assistant"]
            several += len(answers) > 1
            short += len(answers) > 1 and all(len(answer.split()) <= SHORT_ANSWER for answer in answers)
    if several < 2 or 2 * short <= several:
        return None
    share = f"{short / several:.0%} of the conversations with several questions have short answers only"
    return f"hint: {share}; turns=independent trains each question alone, at no cost in image tokens"


def load_index(source: DataSource, processor: Any, max_length: int, num_workers: int = 0) -> Index:
    """The index of a source: mapped from the cache (clip_phi in HF_HOME) if neither its files nor the tokenizer have
    changed, else made, by num_workers processes (0: this one). Raises ValueError or OSError if it cannot be read."""
    from huggingface_hub.constants import HF_HOME

    folder = Path(HF_HOME) / "clip_phi" / f"index-{_fingerprint(source, processor, max_length)}"
    state = source.state()
    if (index := _open(folder, state, processor)) is not None:
        return index
    folder.parent.mkdir(parents=True, exist_ok=True)
    media, transcripts, report = source.media(), source.transcripts(), Report()
    samples = transcripts.fill(source.read(media, report), report)
    with tempfile.TemporaryDirectory(prefix="making-", dir=folder.parent, ignore_cleanup_errors=True) as temporary:
        path = Path(temporary) / "index.arrow"
        with no_collector(), pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
            for batch in _tokenise(samples, processor, max_length, report, num_workers):
                writer.write_batch(batch)
        stamps = media.file_stamps() | transcripts.file_stamps()
        about = {"state": state, "report": report.as_dict(), "file_stamps": stamps, "checksum": _checksum(path)}
        path.with_name("about.json").write_text(checked_line(about), encoding="utf-8")
        made = Index(_map(path), _prefixes(processor), report, folder / "index.arrow")
        if _open(folder, state, processor) is None:  # another process may have been faster
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                os.replace(temporary, folder)
    return made


def _open(folder: Path, state: list[Any], processor: Any) -> Index | None:
    """The index in a folder; None if there is none, or it is of other files, or its bytes have changed."""
    if not folder.exists():
        return None
    path = folder / "index.arrow"
    try:
        about, *_ = read_checked_lines(folder / "about.json") or [None]
        if about is not None and about["state"] != state:
            return None
        # Before Arrow parses anything: wrong offsets would end the process.
        if about is None or about["checksum"] != _checksum(path):
            raise ValueError("its checksum is wrong")
        if any(file_stamp(name) != then for name, then in about["file_stamps"].items()):
            return None
        return Index(_map(path), _prefixes(processor), Report.from_dict(about["report"]), path)
    except (OSError, ValueError) as error:
        print(f"{folder} is damaged ({' '.join(str(error).split())}), and is made anew", file=sys.stderr)
        return None


def _checksum(path: Path) -> int:
    """Two gigabytes a second."""
    with pa.memory_map(str(path)) as file:
        return zlib.crc32(file.read_buffer())


def _map(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _prefixes(processor: Any) -> tuple[list[int], list[int]]:
    return prefix_ids(processor, 0), prefix_ids(processor, 1)


def _fingerprint(source: DataSource, processor: Any, max_length: int) -> str:
    """Of all that decides what the index holds, but for the state of files: a newer index replaces an older one."""
    parts = [FORMAT, source.identity(), max_length, processor.num_image_tokens, processor.image_token_id]
    parts += [processor.chat_template, processor.tokenizer.backend_tokenizer.to_str()]
    parts += sorted(processor.tokenizer.special_tokens_map.items())
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()


def _tokenise(
    samples: Iterable[Sample], processor: Any, max_length: int, report: Report, num_workers: int = 0
) -> Iterator[pa.RecordBatch]:
    """One RecordBatch for each CHUNK samples, in order; the same with any number of workers."""
    stream = iter(samples)
    chunks = iter(lambda: list(islice(stream, CHUNK)), [])
    work = partial(_tokenise_chunk, processor, max_length)
    with ProcessPoolExecutor(num_workers) if num_workers else contextlib.nullcontext() as pool:
        # A few chunks at a time, since all samples of a large source would not fit into memory twice.
        while window := list(islice(chunks, 4 * max(num_workers, 1))):
            for batch, found in pool.map(work, window) if pool else map(work, window):
                report.add(found)
                yield batch


def _tokenise_chunk(processor: Any, max_length: int, chunk: list[Sample]) -> tuple[pa.RecordBatch, Report]:
    report, rows = Report(), []
    for sample, encoded in encode_samples(chunk, processor, max_length, report):
        places = (each if isinstance(each, File) else (None, None, each) for each in images_of(sample.image))
        images = [dict(zip_longest(IMAGE, place)) for place in places]
        conversations = json.dumps(sample.conversations, default=bytes.hex)  # of speech that is bytes
        ids, labels = ([token for each in encoded for token in each[part]] for part in (0, 1))
        lengths = [len(each.ids) for each in encoded]
        captions = sum(turns[0].role == "assistant" for turns in sample.conversations)
        row = (images, sample.origins, conversations, captions, ids, labels, lengths)
        rows.append(dict(zip(SCHEMA.names, row, strict=True)))
    return pa.RecordBatch.from_pylist(rows, SCHEMA), report


def _turn(role: Any, text: str, transcript: str | None, speech: Any, references: list[str]) -> Turn:
    if speech is not None:
        speech = bytes.fromhex(speech) if isinstance(speech, str) else File(*speech)
    return Turn(role, text, transcript, speech, tuple(references))
