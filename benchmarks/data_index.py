"""Time and memory to read COCO's captions at their true size.

    python benchmarks/data_index.py [--json FILE] [--images N]

The script writes an artificial captions_train2017.json into a temporary folder. It has all fields of the official
file, 118,287 images and 591,753 captions. The image files are empty, since the reader only checks that they exist.
Each figure is measured in a process of its own, on one thread:

    seconds             from the annotations on disk to the last Sample; without imports
    index_seconds       load_index() with an empty cache: read, tokenise and write; without imports
    peak_mb             peak resident memory of the process of index_seconds, with imports and tokenizer
    read_peak_mb        peak resident memory of the process of seconds, with imports
    imports_mb          resident memory of both before the reader is called
    warm_seconds        load_index() in another process, from the cache; without imports
    checksum_seconds    of these, for the checksum of the whole file
    batches_seconds     with a mapped index, until a run has its first pack of 8,192 tokens: the counts that are
                        printed, fingerprint, 500 images held out, lengths, order and packs of an epoch
    plan_seconds        of these, for the packs
    samples_per_second  Index.shared_prefix_sample() at random places of the mapped index
    worker_mb           private memory (Private_Clean + Private_Dirty) that a forked worker adds while it builds
                        5,000 random samples; pages of the mapped index do not count
    index_mb            the index on disk; annotations_mb: the annotations on disk
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

TRUE_IMAGES, TRUE_CAPTIONS, TRUE_MAX_ID = 118_287, 591_753, 581_929
VOCABULARY = 20_000  # different words in the captions
WORDS = 10.5  # in a caption, on average
MAX_LENGTH = 2048
NUM_WORKER_SAMPLES = 5000
BACKBONES = Path(__file__).resolve().parent.parent / "examples/demo_backbones"


def make_words(chance: np.random.Generator) -> list[str]:
    """Make pronounceable words, the most frequent (and shortest) first."""
    onsets, vowels = list("bcdfghjklmnprstvwz") + ["st", "tr", "ch", "pl"], ["a", "e", "i", "o", "u", "ea", "oo"]
    syllables = [onset + vowel for onset in onsets for vowel in vowels]
    words: dict[str, None] = {}
    while len(words) < VOCABULARY:
        for first, *others, length, end in chance.integers(0, 1000, (VOCABULARY, 6)).tolist():
            count = length % (2 if len(words) < 300 else 4)
            parts = [syllables[place % len(syllables)] for place in (first, *others[:count])]
            words["".join(parts) + ("", "n", "r", "t", "s")[end % 5]] = None
    return list(words)[:VOCABULARY]


def write_coco(folder: Path, num_images: int) -> list[str]:
    """Write annotations/captions_train2017.json and train2017/ into folder. Returns the captions."""
    chance = np.random.default_rng(0)
    words = make_words(chance)
    num_captions = round(num_images * TRUE_CAPTIONS / TRUE_IMAGES)
    lengths = 8 + chance.poisson(WORDS - 8, num_captions)
    shares = 1 / (np.arange(len(words)) + 2.7)  # Zipf and Mandelbrot
    picked = iter(chance.choice(len(words), int(lengths.sum()), p=shares / shares.sum()).tolist())
    captions = [f"A {' '.join(words[next(picked)] for _ in range(length - 1))}." for length in lengths.tolist()]

    image_ids = chance.permutation(TRUE_MAX_ID + 1)[:num_images].tolist()
    owners = [image_ids[place % num_images] for place in chance.permutation(num_captions).tolist()]
    names = [f"{image_id:012d}.jpg" for image_id in image_ids]
    content = {
        "info": {"description": "COCO 2017 Dataset", "url": "http://cocodataset.org", "version": "1.0", "year": 2017},
        "licenses": [{"url": "http://creativecommons.org/licenses/by/2.0/", "id": 4, "name": "Attribution License"}],
        "images": [
            {
                "license": 4,
                "file_name": name,
                "coco_url": f"http://images.cocodataset.org/train2017/{name}",
                "height": 480,
                "width": 640,
                "date_captured": "2013-11-14 11:18:45",
                "flickr_url": f"http://farm9.staticflickr.com/8186/{8_000_000_000 + image_id}_5d4f2c0b1a_z.jpg",
                "id": image_id,
            }
            for name, image_id in zip(names, image_ids, strict=True)
        ],
        "annotations": [
            {"image_id": owner, "id": number + 37, "caption": caption}
            for number, (owner, caption) in enumerate(zip(owners, captions, strict=True))
        ],
    }
    (folder / "annotations").mkdir()
    with open(folder / "annotations/captions_train2017.json", "w", encoding="utf-8") as file:
        file.write(json.dumps(content))
    (folder / "train2017").mkdir()
    for name in names:
        (folder / "train2017" / name).touch()
    return captions


def save_processor(folder: Path, captions: list[str]) -> None:
    """Save a processor with a byte-level BPE of 10,000 entries, trained on the captions, with whole words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoImageProcessor, PreTrainedTokenizerFast

    from modeling_clip_phi import ClipPhiProcessor

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<image>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator((f" {caption}" for caption in captions[:60_000]), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<pad>")
    image_processor = AutoImageProcessor.from_pretrained(str(BACKBONES / "vision"), backend="pil")
    ClipPhiProcessor(image_processor, fast, num_image_tokens=49).save_pretrained(folder)


def peak_mb() -> float:
    """Read the peak resident memory of this process; ru_maxrss would include the parent process's."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def memory_mb(*names: str) -> float:
    """Sum these lines of the kernel's memory summary of this process."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.split(":")[0] in names) / 1024


def measure_read(folder: Path) -> dict[str, float]:
    from clip_phi.data.coco import read_coco_captions  # noqa: F401  # imported here, so that it is not timed
    from clip_phi.data.files import MediaFolder, no_collector
    from clip_phi.data.report import Report
    from clip_phi.data.source import parse_source

    source, report = parse_source(_source(folder)), Report()
    samples = conversations = 0
    started = time.perf_counter()
    with no_collector():  # as the index is made
        for sample in source.read(MediaFolder(source.images), report):
            samples += 1
            conversations += len(sample.conversations)
    seconds = time.perf_counter() - started
    assert conversations == report.records and not report.skipped, report.table()
    return {"images": samples, "captions": conversations, "seconds": seconds, "read_peak_mb": peak_mb()}


def measure_index(folder: Path) -> dict[str, float]:
    load, before = _loader(folder)
    started = time.perf_counter()
    index = load()
    seconds = time.perf_counter() - started
    files = list((folder / "cache").rglob("index.arrow"))
    assert len(files) == 1 and index.num_tokens().sum() > 49 * len(index)
    return {
        "index_seconds": seconds,
        "peak_mb": peak_mb(),
        "imports_mb": before,
        "index_mb": files[0].stat().st_size / 2**20,
    }


def measure_warm(folder: Path) -> dict[str, float]:
    from clip_phi.batching.index import _checksum
    from clip_phi.training import data  # noqa: F401  # imported here, so that it is not timed

    load, _ = _loader(folder)
    started = time.perf_counter()
    index = load()
    warm_seconds = time.perf_counter() - started
    started = time.perf_counter()
    _checksum(index.path)
    checksum_seconds = time.perf_counter() - started
    batches_seconds, plan_seconds = first_pack_seconds(index)
    places = np.random.default_rng(1).integers(0, len(index), 20_000).tolist()
    started = time.perf_counter()
    for place in places:
        index.shared_prefix_sample(place)
    samples_per_second = len(places) / (time.perf_counter() - started)
    return {
        "warm_seconds": warm_seconds,
        "checksum_seconds": checksum_seconds,
        "batches_seconds": batches_seconds,
        "plan_seconds": plan_seconds,
        "samples_per_second": samples_per_second,
        "worker_mb": memory_added_by_a_worker(index),
    }


def first_pack_seconds(index: Any) -> tuple[float, float]:
    """The same calls as read_data()'s, without reading images."""
    from clip_phi.batching.index import independent_turns_hint
    from clip_phi.batching.sampler import Mixture, PackedBatches
    from clip_phi.training.data import hold_out

    started = time.perf_counter()
    index.count(), independent_turns_hint(index)
    (train,), _ = hold_out([index], min(500, len(index) // 10))
    train.fingerprint()
    batches = PackedBatches(Mixture([len(train)], None, 0), train.packed_lengths(), 8192)
    before_plan = time.perf_counter()
    assert batches.count(1) > 0 and batches.fill > 0 and batches.batch(0)
    ended = time.perf_counter()
    return ended - started, ended - before_plan


def memory_added_by_a_worker(index: Any) -> float:
    for column in index.table.columns:  # a page of the file that only one process has read counts as private
        for chunk in column.chunks:
            for buffer in chunk.buffers():
                if buffer is not None:
                    np.frombuffer(buffer, np.uint8).max(initial=0)
    places = np.random.default_rng(2).integers(0, len(index), NUM_WORKER_SAMPLES).tolist()
    reader, writer = os.pipe()
    if os.fork() == 0:  # like a worker of torch's DataLoader
        before = memory_mb("Private_Clean", "Private_Dirty")
        for place in places:
            index.shared_prefix_sample(place)
        os.write(writer, f"{memory_mb('Private_Clean', 'Private_Dirty') - before}".encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as file:
        added = float(file.read())
    os.wait()
    return added


MEASURES: dict[str, Callable[[Path], dict[str, float]]] = {
    "read": measure_read,
    "index": measure_index,
    "warm": measure_warm,
}


def _source(folder: Path) -> str:
    return f"coco:{folder}/annotations/captions_train2017.json,images={folder}/train2017"


def _loader(folder: Path) -> tuple[Callable[[], Any], float]:
    """Prepare a call of load_index(). Returns it, and the resident memory before it in MB."""
    from clip_phi.batching.index import load_index
    from clip_phi.data.coco import read_coco_captions  # noqa: F401
    from clip_phi.data.source import parse_source
    from modeling_clip_phi import ClipPhiProcessor

    processor = ClipPhiProcessor.from_pretrained(folder / "processor")
    source = parse_source(_source(folder))
    return lambda: load_index(source, processor, MAX_LENGTH), memory_mb("Rss")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--images", type=int, default=TRUE_IMAGES, help="number of images (default: %(default)s)")
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)  # internal: a measure of --folder
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not 1 <= options.images <= TRUE_MAX_ID:
        parser.error(f"--images must be between 1 and {TRUE_MAX_ID}, not {options.images}")
    if options.measure:
        print(json.dumps(MEASURES[options.measure](options.folder)))
        return

    result: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="clip-phi-bench-") as name:
        folder = Path(name)
        save_processor(folder / "processor", write_coco(folder, options.images))
        annotations = folder / "annotations/captions_train2017.json"
        result["annotations_mb"] = annotations.stat().st_size / 2**20
        alone = {"HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        alone |= {"RAYON_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        for measure in MEASURES:
            command = [sys.executable, __file__, "--measure", measure, "--folder", name]
            done = subprocess.run(command, env=os.environ | alone, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise SystemExit(f"measuring '{measure}' failed; see the error above")
            result |= json.loads(done.stdout.splitlines()[-1])
    for figure, value in result.items():
        print(f"{figure:20} {value:10,.4g}" if value < 1000 else f"{figure:20} {value:10,.0f}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
