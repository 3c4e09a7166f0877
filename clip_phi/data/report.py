"""What is wrong with the data: each record that is skipped or repaired is counted by kind, with the first examples."""

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

NUM_EXAMPLES = 3  # of each kind, in the order of the files


def plain(text: str) -> str:
    """The text, with all but line ends, tabs and what is visible escaped: data must not control a terminal."""
    return re.sub(r"[^\n\t -~]", lambda found: found[0] if found[0].isprintable() else ascii(found[0])[1:-1], text)


def plain_json(value: Any, indent: int | None = None) -> str:
    """Json with readable letters of all scripts, in which characters that plain() escapes are escaped as well."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return re.sub(r"[^\n -~]", lambda found: found[0] if found[0].isprintable() else json.dumps(found[0])[1:-1], text)


class RecordError(ValueError):
    """What is wrong with one record. kind: a few words, under which it is counted; detail: what exactly."""

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind, self.detail = kind, detail


class Skip(NamedTuple):
    """Records that are left out. A sample without its image loses all its conversations. records 0: one is repaired."""

    kind: str
    origin: str
    detail: str
    records: int = 1


@dataclass
class Report:
    """A record is one caption or one conversation.

    records: all that were read. So records - num_skipped are trained on; nothing else is ever left out.
    skipped, repaired: how many, by kind. A repaired one is used, but cut to length, or with its image put first.
    filtered: turns that the source's own options leave out; they are no records. examples: the first of each kind."""

    records: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    filtered: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set, repr=False)

    @property
    def num_skipped(self) -> int:
        return sum(self.skipped.values())

    def skip(self, skip: Skip) -> None:
        """Count records that are left out, or one that is repaired."""
        self._count(self.skipped if skip.records else self.repaired, *skip)

    def filter(self, kind: str, origin: str, count: int) -> None:
        self._count(self.filtered, kind, origin, "", count)

    def _count(self, counts: Counter[str], kind: str, origin: str, detail: str, number: int) -> None:
        counts[kind] += number or 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < NUM_EXAMPLES:
            text = f"{origin}: {detail}" if detail else origin
            # An unpaired surrogate, in the id or a key of a record, can neither be printed nor written.
            examples.append(text.encode("utf-8", "backslashreplace").decode("utf-8"))

    def repair(self, kind: str, origin: str, detail: str = "") -> None:
        self.skip(Skip(kind, origin, detail, records=0))

    def reject(self, kind: str, origin: str, detail: str = "", records: int = 1) -> None:
        """Count records that a reader cannot use."""
        self.records += records
        self.skip(Skip(kind, origin, detail, records))

    def skip_once(self, skips: list[Skip]) -> None:
        """Count what turns out to be bad in training, in the first epoch only."""
        for skip in skips:
            if skip.origin not in self.seen:
                self.seen.add(skip.origin)
                self.skip(skip)

    def add(self, other: "Report") -> None:
        """Add the report of another source."""
        for name in ("records", "skipped", "repaired", "filtered"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for kind, examples in other.examples.items():
            self.examples[kind] = [*self.examples.get(kind, []), *examples][:NUM_EXAMPLES]

    def refuse_bad(self, max_bad_fraction: float) -> None:
        """Raises ValueError, with the whole table, if more than this share of the records is skipped."""
        if self.num_skipped > max_bad_fraction * self.records:
            share = self.num_skipped / max(self.records, 1)
            bad = f"{self.num_skipped:,} of {self.records:,} records are bad ({share:.2%})"
            allowed = f"more than --max_bad_fraction {max_bad_fraction:g} allows"
            way_out = "Repair them, or allow more with --max_bad_fraction."
            raise ValueError(f"{bad}, {allowed}:\n{self.table()}\n{way_out}")

    def table(self) -> str:
        """A line for each kind with its first example, the most frequent kind first."""
        lines = []
        for what, counts in (("skipped", self.skipped), ("repaired", self.repaired), ("left out", self.filtered)):
            for kind, count in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])):
                lines.append(f"  {what} {count:,}: {kind} (e.g. {self.examples[kind][0]})".replace("\n", "⏎"))
        return plain("\n".join(lines))

    def as_dict(self) -> dict[str, Any]:
        """For json. Equal data give an equal dict."""
        names = ("skipped", "repaired", *(["filtered"] if self.filtered else []), "examples")
        return {"records": self.records} | {name: dict(sorted(getattr(self, name).items())) for name in names}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Report":
        counts: dict[str, Any] = {name: Counter(values.get(name, {})) for name in ("skipped", "repaired", "filtered")}
        return cls(values["records"], examples=dict(values["examples"]), **counts)
