"""Data sets come whole from a server that does its worst, and nothing half-written gets a final name."""

import hashlib
import io
import json
import re
import threading
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from clip_phi.cli import main
from clip_phi.data.catalog import DATASETS, RemoteDataset, RemoteFile, how_to_download
from clip_phi.data.files import checked_line, read_checked_lines
from clip_phi.data.report import Report
from clip_phi.data.source import missing_files, parse_source
from clip_phi.hub import retry
from clip_phi.tools import download as downloading
from clip_phi.training.arguments import STAGES

PIECE = 1000


class Server:
    """Files by path. faults: for each path, what happens to its next requests for content, one after another."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list] = {}
        self.ranges = True
        self.asked: list[tuple[str, int, int]] = []  # path, first byte and end of each request for content
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments):
                pass

            def do_GET(self):
                server.answer(self)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def answer(self, handler) -> None:
        data = self.files.get(handler.path)
        if data is None:
            return self.refuse(handler, 404)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
        start, end = (int(wanted[1]), int(wanted[2]) + 1) if wanted and self.ranges else (0, len(data))
        probe = (start, end) == (0, 1) or (wanted is not None and not self.ranges)
        fault = self.faults[handler.path].pop(0) if not probe and self.faults.get(handler.path) else None
        if not probe:
            self.asked.append((handler.path, start, end))
        if isinstance(fault, int):
            return self.refuse(handler, fault)
        if fault == "all":
            wanted, start, end = None, 0, len(data)
        shift = 1 if fault == "shifted" else 0
        handler.send_response(206 if wanted and self.ranges else 200)
        if wanted and self.ranges:
            handler.send_header("Content-Range", f"bytes {start + shift}-{end - 1 + shift}/{len(data)}")
        handler.send_header("Content-Length", str(end - start))
        handler.end_headers()
        part = data[start:end]
        if fault == "cut":
            handler.wfile.write(part[: len(part) // 2])
            handler.close_connection = True
        else:
            handler.wfile.write(part if fault != "flipped" else bytes([part[0] ^ 1]) + part[1:])

    def refuse(self, handler, code: int) -> None:
        handler.send_response(code)
        handler.send_header("Retry-After", "0")
        handler.send_header("Content-Length", "0")
        handler.end_headers()


def zipped(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return content.getvalue()


def photo(number: int) -> bytes:
    content = io.BytesIO()
    Image.effect_noise((40, 30), 60).save(content, "JPEG")
    return content.getvalue() + bytes([number])


@pytest.fixture
def server(monkeypatch):
    """With a small COCO: two images and their captions in two archives; a json file is the third."""
    server = Server()
    captions = {
        "images": [{"id": number, "file_name": f"{number:012d}.jpg"} for number in (1, 2)],
        "annotations": [{"id": number, "image_id": number, "caption": f"image {number}"} for number in (1, 2)],
    }
    captions = json.dumps(captions).encode()
    server.files = {
        "/annotations.zip": zipped({f"annotations/captions_{split}.json": captions for split in ("a", "val2017")}),
        "/zips/val2017.zip": zipped({f"val2017/{number:012d}.jpg": photo(number) for number in (1, 2)}),
        "/notes.json": b"[" + b"1," * 2000 + b"1]",
    }
    members = {"/annotations.zip": ("annotations/captions_val2017.json",), "/zips/val2017.zip": ("val2017/",)}
    files = tuple(
        RemoteFile(
            *(f"http://official.example{path}", f"coco/{path.rpartition('/')[2]}", len(data)),
            *(hashlib.sha256(data).hexdigest(), members.get(path, ())),
        )
        for path, data in server.files.items()
    )
    data = ("coco:{0}/coco/annotations/captions_val2017.json,images={0}/coco/val2017",)
    monkeypatch.setitem(DATASETS, "coco-val", RemoteDataset("a small one", data, files))
    monkeypatch.setattr(downloading, "PIECE", PIECE)
    monkeypatch.setattr(retry, "WAITS", (0.0, 0.0, 0.0))
    yield server
    server.http.shutdown()
    server.http.server_close()


def run(server, folder, *options) -> int:
    return main(["download", "coco-val", "--output_dir", str(folder), "--mirror", server.url, *map(str, options)])


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


WHOLE = {
    *("coco/annotations/captions_val2017.json", "coco/notes.json"),
    *("coco/val2017/000000000001.jpg", "coco/val2017/000000000002.jpg"),
}


def assert_whole(server, folder: Path) -> None:
    """All is under its final name, nothing else is there, and the data can be read as the command says."""
    assert files_in(folder) == WHOLE
    assert (folder / "coco/notes.json").read_bytes() == server.files["/notes.json"]
    archive = zipfile.ZipFile(io.BytesIO(server.files["/zips/val2017.zip"]))
    for name in archive.namelist():
        assert (folder / "coco" / name).read_bytes() == archive.read(name)
    source = parse_source(DATASETS["coco-val"].data[0].format(folder))
    assert missing_files([source]) is None
    assert len(list(source.read(source.media(), Report()))) == 2


def test_a_data_set_comes_into_the_layout_that_training_reads(server, tmp_path, capsys):
    assert run(server, tmp_path / "data") == 0
    assert_whole(server, tmp_path / "data")
    captured = capsys.readouterr()
    told = parse_source(captured.out.splitlines()[-1].removeprefix("--data "))
    assert Path(told.path).is_file() and told.kind == "coco"
    pieces = Counter(path for path, _, _ in server.asked)
    assert pieces == {path: -(-len(data) // PIECE) for path, data in server.files.items()}
    server.asked.clear()
    assert run(server, tmp_path / "data", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["state"] for row in found["files"]} == {"there already"} and not server.asked
    assert str(tmp_path / "data/coco/val2017") in {row["path"] for row in found["files"]}


@pytest.mark.parametrize("connections", [1, 5])
@pytest.mark.parametrize(
    "faults",
    [["cut"] * 4, [503, 429, 503], ["shifted", "all", "cut", 500], [429, "cut", 503, "cut", 408]],
    ids=str,
)
def test_cuts_busy_answers_and_wrong_ranges_are_tried_again(server, tmp_path, faults, connections, capsys):
    server.faults = {path: list(faults) for path in server.files}
    assert run(server, tmp_path, "--connections", connections) == 0, capsys.readouterr().err
    assert_whole(server, tmp_path)
    assert not any(server.faults.values())


def test_after_a_cut_only_the_rest_of_a_piece_is_asked_for(server, tmp_path):
    server.faults = {"/notes.json": ["cut"]}
    assert run(server, tmp_path, "--connections", 1) == 0
    assert [each[1:] for each in server.asked if each[0] == "/notes.json"][:2] == [(0, 1000), (500, 1000)]


@pytest.mark.parametrize("faults", [[], ["cut", 503, "cut"]], ids=str)
def test_a_server_without_ranges_sends_each_file_as_a_whole(server, tmp_path, faults):
    server.ranges = False
    server.faults = {"/notes.json": list(faults)}
    assert run(server, tmp_path) == 0
    assert_whole(server, tmp_path)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda server: server.faults.update({"/notes.json": ["flipped"]}), "its SHA-256 is"),
        (lambda server: server.faults.update({"/notes.json": [404]}), "answered 404"),
        (lambda server: server.faults.update({"/notes.json": [503] * 50}), "answered 503 4 times"),
        (lambda server: server.faults.update({"/notes.json": ["all"] * 50}), "were asked for"),
        (lambda server: server.files.update({"/notes.json": b"[1]"}), "has 3 bytes, and not the published 4,003"),
        (lambda server: server.files.pop("/notes.json"), "answered 404"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line_and_a_later_run_goes_on(server, tmp_path, capsys, break_it, message):
    right = dict(server.files)
    break_it(server)
    assert run(server, tmp_path, "--connections", 1) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("clip-phi: error: http://127.0.0.1") and "/notes.json" in last and message in last
    assert "coco/notes.json" not in files_in(tmp_path)
    assert files_in(tmp_path) - {"coco/notes.json.part", "coco/notes.json.part.jsonl"} <= WHOLE
    server.files, server.faults = right, {}
    assert run(server, tmp_path) == 0
    assert_whole(server, tmp_path)


def test_a_stopped_run_goes_on_with_the_pieces_that_it_lacks(server, tmp_path):
    server.faults = {"/notes.json": [None, None, 404]}
    assert run(server, tmp_path, "--connections", 1) == 2
    assert [line[-1] for line in read_checked_lines(tmp_path / "coco/notes.json.part.jsonl")] == [0, 1000]
    server.asked.clear()
    assert run(server, tmp_path) == 0
    assert sorted(server.asked) == [
        ("/notes.json", 2000, 3000),
        ("/notes.json", 3000, 4000),
        ("/notes.json", 4000, 4003),
    ]
    assert_whole(server, tmp_path)


def test_what_another_version_of_the_file_has_left_is_not_used(server, tmp_path):
    server.faults = {"/notes.json": [None, 404]}
    assert run(server, tmp_path, "--connections", 1) == 2
    path = tmp_path / "coco/notes.json.part.jsonl"
    lines = read_checked_lines(path)
    assert [line[-1] for line in lines] == [0]
    path.write_text(checked_line(["0" * 64, *lines[0][1:]]))
    (tmp_path / "coco/notes.json.part").write_bytes(b"other")
    assert run(server, tmp_path) == 0
    assert_whole(server, tmp_path)


def test_images_may_stay_in_their_archive(server, tmp_path, capsys):
    assert run(server, tmp_path, "--keep_zip") == 0
    assert files_in(tmp_path) == {"coco/annotations/captions_val2017.json", "coco/notes.json", "coco/val2017.zip"}
    source = parse_source(DATASETS["coco-val"].data[0].format(tmp_path))
    images = [sample.image for sample in source.read(source.media(), Report())]
    assert [image.member for image in images] == ["val2017/000000000001.jpg", "val2017/000000000002.jpg"]
    server.asked.clear()
    assert run(server, tmp_path, "--keep_zip") == 0 and not server.asked
    assert run(server, tmp_path) == 0 and not server.asked  # now they are unpacked
    assert "unpacked " in capsys.readouterr().out
    assert_whole(server, tmp_path)


def test_a_full_disk_is_noticed_before_anything_is_fetched(server, tmp_path, monkeypatch, capsys):
    usage = downloading.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(downloading.shutil, "disk_usage", lambda path: usage._replace(free=3000))
    assert run(server, tmp_path / "data") == 2
    assert "GB needed, 0.0 GB free; --keep_zip needs about half" in capsys.readouterr().err
    assert not server.asked and not files_in(tmp_path)


@pytest.mark.parametrize("name", ["val2017/../../../escaped.jpg", "val2017/link.jpg"])
def test_an_archive_that_reaches_out_of_its_folder_is_refused(server, tmp_path, monkeypatch, name, capsys):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        info = zipfile.ZipInfo(name)
        info.external_attr = (0o120777 if "link" in name else 0o100644) << 16
        archive.writestr(info, "/etc/hostname")
    server.files["/zips/val2017.zip"] = data = content.getvalue()
    dataset = DATASETS["coco-val"]
    file = dataset.files[1]._replace(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    monkeypatch.setitem(DATASETS, "coco-val", dataset._replace(files=(file,)))
    assert run(server, tmp_path / "a/b/data") == 2
    assert "is no plain file in it" in capsys.readouterr().err
    assert files_in(tmp_path) == {"a/b/data/coco/val2017.zip"}


def test_what_stands_under_a_final_name_is_not_trusted_blindly(server, tmp_path, capsys):
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco/val2017.zip").write_bytes(b"PK half of it")
    assert run(server, tmp_path) == 2
    assert "has 13 bytes, and not the published" in capsys.readouterr().err


def test_two_downloads_do_not_write_one_file(server, tmp_path, capsys):
    import fcntl

    (tmp_path / "coco").mkdir()
    with open(tmp_path / "coco/notes.json.part", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run(server, tmp_path) == 2
    assert "another download is writing it" in capsys.readouterr().err


@pytest.mark.parametrize("mirror", ["mirror.example", "ftp://mirror.example", "https://"])
def test_a_bad_mirror_is_refused(mirror, tmp_path, capsys):
    assert main(["download", "pope", "--mirror", mirror, "--output_dir", str(tmp_path)]) == 2
    assert f"--mirror {mirror}: an address begins with" in capsys.readouterr().err


# The table


def test_the_table_is_whole():
    files = {file for dataset in DATASETS.values() for file in dataset.files}
    assert len({file.path for file in files}) == len({file.url for file in files}) == len(files)
    assert len({file.sha256 for file in files}) == len(files)
    for file in files:
        assert re.fullmatch("[0-9a-f]{64}", file.sha256) and re.match("https?://", file.url)
        assert file.size is None or file.size > 100_000
    targets = {target for file in files for target in file.targets()}
    for dataset in DATASETS.values():
        for text in dataset.data:
            kind, _, rest = text.partition(":{0}/")
            path, *options = rest.split(",")
            assert kind in ("coco", "karpathy", "llava", "vqa") and path in targets
            folders = [option.partition("={0}/")[2] for option in options if "{0}" in option]
            assert all(folder in targets | {"coco"} for folder in folders), text


def test_missing_data_name_the_command_that_downloads_them():
    for stage, name in ((1, "coco"), (2, "llava-instruct")):
        arguments = STAGES[stage](stage)
        sources = [parse_source(text) for text in arguments.data + arguments.eval_data]
        assert f"'clip-phi download {name}' downloads it" in missing_files(sources)
    assert how_to_download(["/mnt/coco/val2017"]) == "'clip-phi download coco-val --output_dir /mnt'"
    assert how_to_download(["data/coco/train2017", "data/pope/coco_pope_random.json"]) == (
        "'clip-phi download llava-instruct' and 'clip-phi download pope'"
    )
    assert how_to_download(["mine.json", "data/mycoco/val2017"]) is None
    with pytest.raises(ValueError, match="'clip-phi download llava-instruct' downloads it"):
        parse_source("data/llava_instruct_150k.json")
    assert DATASETS["coco"].files[2].targets() == ["coco/train2017"]
