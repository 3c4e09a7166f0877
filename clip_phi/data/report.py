"""What was wrong with the data: every record that is skipped or mended is counted by kind, with its first examples."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

NUM_EXAMPLES = 3  # of each kind, in the order of the files


class RecordError(ValueError):
    """What is wrong with one record. kind: a few words, under which it is counted; detail: what exactly."""

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind
        self.detail = detail


class Skip(NamedTuple):
    """Records that were left out: a sample's image takes all its branches along. records 0: one that was mended."""

    kind: str
    origin: str
    detail: str
    records: int = 1


@dataclass
class Report:
    """A record is one caption or one conversation: what becomes a branch. records counts all that were met, so what
    is trained on is records - num_skipped. Nothing else is ever left out.

    mended: records that are used, but not as they stand in the file (cut to length, image moved to the front)."""

    records: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set, repr=False)

    @property
    def num_skipped(self) -> int:
        return sum(self.skipped.values())

    def skip(self, skip: Skip) -> None:
        self.skipped[skip.kind] += skip.records
        self._example(skip.kind, skip.origin, skip.detail)

    def skip_once(self, skips: list[Skip]) -> None:
        """Count what turned out bad in training: every epoch meets it again, which must not count again."""
        for skip in skips:
            if skip.origin not in self.seen:
                self.seen.add(skip.origin)
                if skip.records:
                    self.skip(skip)
                else:
                    self.repair(skip.kind, skip.origin, skip.detail)

    def repair(self, kind: str, origin: str, detail: str = "") -> None:
        self.repaired[kind] += 1
        self._example(kind, origin, detail)

    def _example(self, kind: str, origin: str, detail: str) -> None:
        examples = self.examples.setdefault(kind, [])
        if len(examples) < NUM_EXAMPLES:
            text = f"{origin}: {detail}" if detail else origin
            # Half a surrogate pair, in the id or a key of a record, could neither be printed nor written.
            examples.append(text.encode("utf-8", "backslashreplace").decode("utf-8"))

    def add(self, other: "Report") -> None:
        """The report of another source, behind this one."""
        self.records += other.records
        self.skipped += other.skipped
        self.repaired += other.repaired
        for kind, examples in other.examples.items():
            mine = self.examples.setdefault(kind, [])
            mine += examples[: NUM_EXAMPLES - len(mine)]

    def refuse_bad(self, max_bad_fraction: float) -> None:
        """Raises ValueError, with all that was found, if more than this share of the records was skipped."""
        if self.num_skipped > max_bad_fraction * self.records:
            share = self.num_skipped / max(self.records, 1)
            raise ValueError(
                f"{self.num_skipped:,} of {self.records:,} records are bad ({share:.2%}), more than --max_bad_fraction "
                f"{max_bad_fraction:g} allows:\n{self.table()}\nMend them, or allow more with --max_bad_fraction."
            )

    def table(self) -> str:
        """A line a kind, most frequent first, each with its first example."""
        kinds = [("skipped", *entry) for entry in sorted(self.skipped.items(), key=_by_count)]
        kinds += [("repaired", *entry) for entry in sorted(self.repaired.items(), key=_by_count)]
        return "\n".join(f"  {what} {count:,}: {kind} (e.g. {self.examples[kind][0]})" for what, kind, count in kinds)

    def as_dict(self) -> dict[str, Any]:
        """For json. Equal data give an equal dict."""
        return {
            "records": self.records,
            "skipped": dict(sorted(self.skipped.items())),
            "repaired": dict(sorted(self.repaired.items())),
            "examples": dict(sorted(self.examples.items())),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Report":
        return cls(
            values["records"], Counter(values["skipped"]), Counter(values["repaired"]), examples=dict(values["examples"])
        )


def _by_count(entry: tuple[str, int]) -> tuple[int, str]:
    return -entry[1], entry[0]
