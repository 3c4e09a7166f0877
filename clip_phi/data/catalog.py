"""The data sets of 'clip-phi download': official addresses, published sizes and checksums, and where files go.

catalog.json is the table, and says where each checksum is published."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class RemoteFile(NamedTuple):
    """One file at its official address.

    path: where it is stored, relative to the folder of all data.
    size: in bytes; None if none is published. sha256: hex digest.
    members: what is unpacked from an archive into its own folder: a file, or a folder that ends in "/"."""

    url: str
    path: str
    size: int | None
    sha256: str
    members: tuple[str, ...] = ()

    def targets(self) -> list[str]:
        """What a reader needs of it, relative to the folder of all data."""
        folder = self.path.rpartition("/")[0]
        return [f"{folder}/{member}".strip("/") for member in self.members] or [self.path]


class RemoteDataset(NamedTuple):
    """about: a noun phrase for --help. data: how to name it in --data, with {0} for the folder of all data."""

    about: str
    data: tuple[str, ...]
    files: tuple[RemoteFile, ...]


_TABLE = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
_FILES = {
    path: RemoteFile(path=path, **about | {"members": tuple(about["members"])})
    for path, about in _TABLE["files"].items()
}
# The smallest first: the one that missing data are explained with.
DATASETS = {
    name: RemoteDataset(each["about"], tuple(each["data"]), tuple(_FILES[path] for path in each["files"]))
    for name, each in _TABLE["datasets"].items()
}


def how_to_download(missing: Sequence[str]) -> str | None:
    """The command that downloads missing files, by the ends of their paths; None if none of them is known."""
    offers = {name: {target for file in each.files for target in file.targets()} for name, each in DATASETS.items()}
    wanted: dict[str, set[str]] = {}  # by the folder of all data
    for path in missing:
        for target in set().union(*offers.values()):
            if f"/{path}".endswith(f"/{target}"):
                wanted.setdefault(path.removesuffix(target).rstrip("/") or ".", set()).add(target)
    commands = []
    for root, targets in wanted.items():
        names = [name for name, offered in offers.items() if targets <= offered][:1]
        names = names or [next(name for name in offers if target in offers[name]) for target in sorted(targets)]
        commands += [f"'clip-phi download {name}{f' --output_dir {root}' * (root != 'data')}'" for name in names]
    return " and ".join(dict.fromkeys(commands)) or None
