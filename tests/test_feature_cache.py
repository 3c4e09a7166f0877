"""Cached features are bit-equal to what was put in, whoever is killed, and never another image's or another tower's."""

import errno
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from cached_features import FINGERPRINT, SHAPE, features_of, key_of, put
from fork_server import run_forked
from PIL import Image
from transformers import CLIPImageProcessorPil

from clip_phi.batching import feature_cache as features
from clip_phi.batching.feature_cache import RECORD, FeatureCache, fingerprint_of, image_key
from clip_phi.data.files import read_checked_lines
from clip_phi.data.report import RecordError
from clip_phi.data.sample import File
from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

ROOT = Path(__file__).parent.parent
ROW_BYTES = 2 * 3 * 5


def open_cache(folder, **options) -> FeatureCache:
    return FeatureCache(folder, FINGERPRINT, SHAPE, **options)


def found(cache: FeatureCache, numbers) -> list[int]:
    """Those that the cache has; the features of each are compared, bit by bit."""
    hits = []
    for number in numbers:
        features = cache.get(key_of(number))
        assert (features is not None) == (key_of(number) in cache)
        if features is not None:
            hits.append(number)
            assert torch.equal(features.view(torch.int16), features_of([number], cache.shape)[0].view(torch.int16))
    return hits


# What goes in comes out


def test_features_come_back_bit_equal_in_any_order(tmp_path):
    cache = open_cache(tmp_path)
    put(cache, *range(3))
    put(cache, *range(3, 13))
    numbers = random.Random(0).sample(range(20), 20)
    expected = [number for number in numbers if number < 13]
    for reader in (cache, open_cache(tmp_path), pickle.loads(pickle.dumps(cache))):
        assert len(reader) == 13
        assert found(reader, numbers) == expected
        assert found(reader, []) == []
    assert sorted(path.stat().st_size // ROW_BYTES for path in tmp_path.rglob("*.bin")) == [13]


def test_what_is_there_stays_and_is_not_written_twice(tmp_path):
    cache = open_cache(tmp_path)
    put(cache, 1, 2, 1)
    cache.put([key_of(1), key_of(3)], features_of([9, 3]))
    open_cache(tmp_path).put([key_of(2)], features_of([9]))
    assert len(cache) == 3 and found(cache, range(5)) == [1, 2, 3]
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.bin")) == 3 * ROW_BYTES


def test_other_floats_are_rounded_to_bfloat16(tmp_path):
    cache = open_cache(tmp_path)
    values = torch.randn(2, *SHAPE, requires_grad=True)
    cache.put([key_of(1), key_of(2)], values)
    assert torch.equal(torch.stack([cache.get(key_of(1)), cache.get(key_of(2))]), values.bfloat16())


def test_what_does_not_fit_is_refused(tmp_path):
    cache = open_cache(tmp_path)
    with pytest.raises(ValueError, match=re.escape("features are (1, 3, 4), not (1, 3, 5)")):
        cache.put([key_of(1)], torch.zeros(1, 3, 4))


# Several at once


def test_a_reader_sees_what_others_add_after_refresh(tmp_path):
    reader, one, two = open_cache(tmp_path), open_cache(tmp_path), open_cache(tmp_path)
    put(one, 0, 1, 2)
    put(two, 3, 4)
    assert found(reader, range(10)) == []
    reader.refresh()
    assert found(reader, range(10)) == [0, 1, 2, 3, 4]
    put(one, 5)
    put(two, 1, 6)  # 1 is there twice now
    for cache in (reader, one, two):
        cache.refresh()
        assert found(cache, range(10)) == [0, 1, 2, 3, 4, 5, 6] and len(cache) == 7


def write_some(cache: FeatureCache, writer: int) -> None:
    for number in range(writer, 200, 4):
        put(cache, number, number + 1)


def test_writers_that_are_forked_from_one_another_write_at_once(tmp_path):
    cache = open_cache(tmp_path)
    put(cache, 1000)
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=write_some, args=(cache, writer)) for writer in range(1, 4)]
    for process in writers:
        process.start()
    write_some(cache, 0)
    for process in writers:
        process.join()
        assert process.exitcode == 0
    put(cache, 1001)
    cache.refresh()
    everything = [*range(201), 1000, 1001]
    assert found(cache, everything) == everything == found(open_cache(tmp_path), everything)


def test_threads_may_share_a_cache(tmp_path):
    cache = open_cache(tmp_path)
    failures = []

    def work(writer: int) -> None:
        try:
            for number in range(writer, 200, 4):
                put(cache, number)
                assert found(cache, range(writer, number + 1, 4)) == list(range(writer, number + 1, 4))
                if number % 20 == 0:
                    cache.refresh()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert found(cache, range(200)) == list(range(200)) and len(open_cache(tmp_path)) == 200


# Crashes


@pytest.mark.parametrize(("ending", "unit"), [("index", RECORD.size), ("bin", ROW_BYTES)])
def test_a_last_record_cut_at_any_byte_costs_that_image_alone(tmp_path, ending, unit):
    put(open_cache(tmp_path / "whole"), 0, 1, 2)
    for lost in range(unit + 1):
        folder = tmp_path / str(lost)
        shutil.copytree(tmp_path / "whole", folder)
        (path,) = folder.rglob(f"*.{ending}")
        os.truncate(path, 3 * unit - lost)
        cache = open_cache(folder)
        left = [0, 1, 2] if lost == 0 else [0, 1]
        assert found(cache, range(3)) == left and len(cache) == len(left)
        put(cache, 0, 1, 2)
        assert found(cache, range(3)) == [0, 1, 2] == found(open_cache(folder), range(3))


def test_an_index_that_a_power_cut_filled_with_zeros_or_noise_names_nothing(tmp_path):
    put(open_cache(tmp_path), 0, 1)
    (path,) = tmp_path.rglob("*.index")
    good = path.read_bytes()
    for tail in (bytes(480), random.Random(0).randbytes(480), bytes(5) + good):
        path.write_bytes(good + tail)
        cache = open_cache(tmp_path)
        assert found(cache, [0, 1]) == [0, 1] and len(cache) == 2
    for place in range(len(good)):
        changed = bytearray(good)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        assert len(open_cache(tmp_path)) < 2


@pytest.mark.parametrize("ending", ["bin", "index", "json"])
def test_bytes_that_have_changed_on_disk_cost_one_image_which_is_stored_again(tmp_path, ending, capsys):
    """One bit at every third byte, and zeros: nothing is read wrong, and all is there after it is put again."""
    put(open_cache(tmp_path / "whole"), *range(3))
    (path,) = (tmp_path / "whole").rglob(f"*.{ending}")
    good = path.read_bytes()
    changes = [
        good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :] for place in range(0, len(good), 3)
    ]
    for number, changed in enumerate([*changes, bytes(len(good)), b"", good[:-1]]):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", folder)
        (folder / path.relative_to(tmp_path / "whole")).write_bytes(changed)
        stale, cache = open_cache(folder), open_cache(folder)
        left = found(cache, range(3))
        assert len(left) >= (0 if number >= len(changes) else 3 if ending == "json" else 2)
        put(cache, 0, 1, 2)
        for reader in (cache, open_cache(folder), open_cache(folder)):
            assert found(reader, range(3)) == [0, 1, 2]
        stale.refresh()
        assert found(stale, range(3)) == [0, 1, 2]
    assert ("is damaged" in capsys.readouterr().err) == (ending == "bin")


def test_rows_that_vanish_under_a_reader_are_missed(tmp_path):
    cache = open_cache(tmp_path)
    put(cache, 0, 1)
    (path,) = tmp_path.rglob("*.bin")
    os.truncate(path, 2 * ROW_BYTES - 1)
    assert cache.get(key_of(0)) is not None and cache.get(key_of(1)) is None


WRITE_UNTIL_KILLED = """
import os
import random
import signal
import sys
import threading
import time
from cached_features import FINGERPRINT, FeatureCache, put

folder, first = sys.argv[1], int(sys.argv[2]) + int(os.environ["RANK"])
cache = FeatureCache(folder, FINGERPRINT, (49, 64))
killer = threading.Timer(random.Random(first).uniform(0.02, 0.3), os.kill, (os.getpid(), signal.SIGKILL))
for number in range(first * 10**6, 10**9, 7):
    put(cache, *range(number, number + 7))
    if number == first * 10**6:
        killer.start()
    time.sleep(0.002)  # at most 5000 rows until it is killed
"""


def test_a_writer_killed_at_any_moment_leaves_a_cache_that_is_right(tmp_path):
    """Ten kills. Two processes write at a time, each its own rows; the end of one is at once the end of the other."""
    (tmp_path / "write.py").write_text(WRITE_UNTIL_KILLED)
    cache, written = tmp_path / "cache", 0
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    for start in range(0, 10, 2):
        done = run_forked(tmp_path / "write.py", [cache, start], tmp_path, environment, processes=2)
        assert done.returncode == -signal.SIGKILL, done.stderr
        numbers = [first * 10**6 + number for first in range(start + 2) for number in range(5000)]
        opened = FeatureCache(cache, FINGERPRINT, (49, 64))
        right = found(opened, numbers)
        assert len(right) == len(opened) > written
        written = len(right)


def test_a_full_disk_names_the_option_and_leaves_a_cache_that_is_right(tmp_path, monkeypatch):
    cache = open_cache(tmp_path)
    put(cache, 0, 1)
    write, room = os.write, [0]

    def short_write(file, data):
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = min(room[0], len(data))
        room[0] -= count
        return write(file, bytes(data[:count]))

    one_more = 3 * ROW_BYTES + 3 * RECORD.size
    for left in range(0, one_more, 7):
        room[0] = left
        monkeypatch.setattr(features.os, "write", short_write)
        message = f"--cache_features {tmp_path}: the disk is full. The features of {len(cache)} images"
        numbers = range(10 + left * 3, 13 + left * 3)
        with pytest.raises(OSError, match=re.escape(message)) as caught:
            put(cache, *numbers)
        assert caught.value.errno == errno.ENOSPC
        monkeypatch.undo()
        put(cache, *range(5000 + left, 5002 + left))
        cache.refresh()
        assert found(cache, [0, 1, *numbers])[:2] == [0, 1]
    right = found(open_cache(tmp_path), range(6000))
    assert set(right) >= {0, 1, *range(5000, 5000 + one_more // 7 * 7, 7)}


# Which image


def write_image(path: Path, colour: str = "red") -> File:
    Image.new("RGB", (8, 8), colour).save(path)
    return File(str(path))


def test_a_changed_image_is_a_miss(tmp_path):
    source = write_image(tmp_path / "cat.png")
    key = image_key(source)
    assert len(key) == 16 and image_key(source) == key
    status = os.stat(source.path)
    os.utime(source.path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    touched = image_key(source)
    with open(source.path, "ab") as file:
        file.write(b"more")
    os.utime(source.path, ns=(status.st_atime_ns, status.st_mtime_ns))
    longer = image_key(source)
    other = image_key(write_image(tmp_path / "dog.png"))
    assert len({key, touched, longer, other}) == 4


def test_a_relative_path_is_the_file_that_it_means(tmp_path, monkeypatch):
    source = write_image(tmp_path / "cat.png")
    monkeypatch.chdir(tmp_path)
    assert image_key(File("cat.png")) == image_key(File("./cat.png")) == image_key(source)


def test_members_are_told_apart_and_change_with_their_archive(tmp_path):
    path = str(tmp_path / "images.zip")

    def keys(*colours: str) -> list[bytes]:
        features._open_zip.cache_clear()  # one run
        with zipfile.ZipFile(path, "w") as archive:
            for number, colour in enumerate(colours):
                archive.writestr(f"{number}.png", colour)
        os.utime(path, (1, 1))  # so that the checksums alone tell
        return [image_key(File(path, f"{number}.png")) for number in range(len(colours))]

    red = keys("red", "red")
    assert red[0] != red[1] and keys("red", "red") == red
    changed = keys("red", "tan")
    assert changed[0] == red[0] and changed[1] != red[1]
    os.utime(path, (2, 2))
    assert image_key(File(path, "0.png")) != red[0]
    (tmp_path / "data.arrow").write_bytes(b"never opened")
    arrow = [image_key(File(str(tmp_path / "data.arrow"), member)) for member in ("0/image", "1/image", "0/image/0")]
    assert len(set(arrow)) == 3


def test_bytes_are_told_by_themselves():
    assert image_key(b"one") == image_key(b"one") != image_key(b"two")


def test_missing_images_are_named_as_load_image_names_them(tmp_path):
    for source in (File(str(tmp_path / "none.png")), File(str(tmp_path / "none.zip"), "cat.png")):
        with pytest.raises(RecordError, match=re.escape(f"missing image: {source}: No such file")):
            image_key(source)
    (tmp_path / "bad.zip").write_bytes(b"no archive")
    with pytest.raises(RecordError, match="damaged image"):
        image_key(File(str(tmp_path / "bad.zip"), "cat.png"))


def test_a_warm_run_opens_no_image(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("dog.png", b"never read")
    sources = [write_image(tmp_path / "cat.png"), File(str(tmp_path / "images.zip"), "dog.png")]
    cache = open_cache(tmp_path / "cache")
    cache.put([image_key(source) for source in sources], features_of([0, 1]))
    opened, os_open = [], os.open

    def spy(path, *arguments, **options):
        opened.append(str(path))
        return os_open(path, *arguments, **options)

    def never(*_, **__):
        pytest.fail("opened an image")

    monkeypatch.setattr(os, "open", spy)
    monkeypatch.setattr("builtins.open", lambda path, *rest, **options: os.fdopen(spy(path, os.O_RDONLY), *rest))
    monkeypatch.setattr(zipfile.ZipFile, "open", never)
    monkeypatch.setattr(File, "read", never)
    cache = open_cache(tmp_path / "cache")
    out = torch.stack([cache.get(image_key(source)) for source in sources])
    assert torch.equal(out.view(torch.int16), features_of([0, 1]).view(torch.int16))
    assert {".index", ".bin"} <= {Path(path).suffix for path in opened} <= {".json", ".index", ".bin"}


# Which tower


def test_another_fingerprint_is_another_cache(tmp_path):
    put(open_cache(tmp_path), 0)
    other = FeatureCache(tmp_path, "f" * 32, SHAPE)
    assert found(other, [0]) == [] and found(open_cache(tmp_path), [0]) == [0]
    (about,) = read_checked_lines(tmp_path / FINGERPRINT[:16] / "about.json")
    assert about == {"format": 3, "fingerprint": FINGERPRINT, "shape": [3, 5]}


def test_a_folder_of_other_features_is_refused(tmp_path):
    open_cache(tmp_path)
    with pytest.raises(ValueError, match="--cache_features: .*about.json has"):
        FeatureCache(tmp_path, FINGERPRINT, (3, 6))
    with pytest.raises(ValueError, match="--cache_features: .*about.json has"):
        FeatureCache(tmp_path, FINGERPRINT[:16] + "0" * 16, SHAPE)


def test_all_that_changes_a_feature_changes_the_fingerprint(fresh_model, processor):
    model = fresh_model
    before = fingerprint_of(model, processor)
    assert re.fullmatch("[0-9a-f]{40}", before)
    assert fingerprint_of(model, processor) == fingerprint_of(model.model, processor) == before
    seen = {before, fingerprint_of(model, processor, "fast")}
    for name, value in (("vision_feature_layer", -1), ("vision_feature_select_strategy", "full")):
        kept = getattr(model.config, name)
        assert kept != value
        setattr(model.config, name, value)
        seen.add(fingerprint_of(model, processor))
        setattr(model.config, name, kept)
    config = model.model.vision_tower.config
    config.layer_norm_eps *= 2
    seen.add(fingerprint_of(model, processor))
    config.layer_norm_eps /= 2
    settings = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    other = ClipPhiProcessor(CLIPImageProcessorPil(**settings, image_mean=[0, 0, 0]), processor.tokenizer)
    seen.add(fingerprint_of(model, other))
    weight = next(model.model.vision_tower.parameters())
    with torch.no_grad():
        weight.view(-1)[0] += 1
    seen.add(fingerprint_of(model, processor))
    with torch.no_grad():
        weight.view(-1)[0] -= 1
    seen.add(fingerprint_of(model.bfloat16(), processor))
    assert len(seen) == 8


def test_the_fingerprint_survives_saving_and_what_changes_no_feature(
    tmp_path, fresh_model, vision_backbone, text_backbone
):
    processor = ClipPhiProcessor.from_backbones(vision_backbone, text_backbone)
    before = fingerprint_of(fresh_model, processor)
    with torch.no_grad():
        fresh_model.model.projector.weight += 1
    fresh_model.train()
    fresh_model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert fingerprint_of(fresh_model, processor) == before
    reloaded = ClipPhiForCausalLM.from_pretrained(tmp_path), ClipPhiProcessor.from_pretrained(tmp_path)
    assert fingerprint_of(*reloaded) == before
