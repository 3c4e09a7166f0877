"""The time to read an image: this project's two methods, Hugging Face's image processor, and the feature cache.

    python benchmarks/images.py [--images 24] [--repeats 5] [--json FILE]

The images are JPEGs of 640 x 480 pixels, quality 90, with smooth noise and texture. They are decoded and resized to
the tower's 224 x 224. The figures are the least time of several alternating runs on one core. The pixels are compared
as 8-bit levels before anything is timed.
"""

import argparse
import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from clip_phi.batching.feature_cache import FeatureCache
from clip_phi.batching.images import Preprocessor, load_image

SHAPE = (49, 640)  # TinyCLIP's


def draw_photo(number: int) -> bytes:
    """Make a JPEG with a photo's frequencies: noise at every scale, each half as strong as the next larger one."""
    chance = np.random.default_rng(number)
    photo = np.zeros((480, 640, 3))
    for scale in (2, 4, 8, 16, 32, 64, 128):
        noise = chance.normal(size=(480 // scale + 2, 640 // scale + 2, 3))
        levels = Image.fromarray(((noise * 40) + 128).clip(0, 255).astype(np.uint8))
        photo += (np.asarray(levels.resize((640, 480), Image.Resampling.BICUBIC), dtype=np.float64) - 128) * scale / 60
    buffer = io.BytesIO()
    Image.fromarray((photo + 128).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def levels(pixels: torch.Tensor, processor: CLIPImageProcessorPil) -> torch.Tensor:
    """Convert normalised pixel values to integer levels, 0 to 255."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    return ((pixels * std + mean) * 255).round().int()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=24, help="images per round (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=4000, help="images in the feature cache (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)

    processor = CLIPImageProcessorPil()
    photos = [draw_photo(number) for number in range(options.images)]
    exact, fast = Preprocessor(processor, "exact"), Preprocessor(processor, "fast")
    ways: dict[str, Callable[[bytes], torch.Tensor]] = {
        "hugging_face": lambda data: processor(load_image(data), return_tensors="pt")["pixel_values"][0],
        "exact": exact,
        "fast": fast,
    }
    differences = []
    for photo in photos:
        expected = ways["hugging_face"](photo)
        if not torch.equal(exact(photo), expected):
            raise SystemExit("the exact method differs from Hugging Face's image processor")
        differences.append((levels(fast(photo), processor) - levels(expected, processor)).abs())
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, way in ways.items():
            began = time.process_time()
            for photo in photos:
                way(photo)
            seconds[name].append(time.process_time() - began)
    per_second = {name: options.images / min(each) for name, each in seconds.items()}
    different = torch.stack(differences)
    result = {
        "exact_ratio": per_second["exact"] / per_second["hugging_face"],
        "fast_ratio": per_second["fast"] / per_second["hugging_face"],
        "max_level_diff": int(different.max()),
        "differing_share": float((different > 0).float().mean()),
        "cache_reads_per_s": cache_reads_per_second(options.rows, options.repeats),
        **{f"images_per_s_{name}": value for name, value in per_second.items()},
    }
    for name, value in result.items():
        print(f"{name:28} {value:.4g}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def cache_reads_per_second(num_rows: int, repeats: int) -> float:
    """Measure reads of one image's features in random order, from a cache in the page cache of the system."""
    with tempfile.TemporaryDirectory() as folder:
        cache = FeatureCache(folder, "0" * 40, SHAPE)
        keys = [number.to_bytes(16, "little") for number in np.random.default_rng(0).permutation(num_rows).tolist()]
        for start in range(0, num_rows, 256):
            cache.put(keys[start : start + 256], torch.randn(len(keys[start : start + 256]), *SHAPE))
        cache.refresh()
        order = [keys[place] for place in np.random.default_rng(1).permutation(num_rows)]
        best = float("inf")
        for _ in range(repeats):
            began = time.perf_counter()
            for start in range(0, num_rows - 63, 64):
                for key in order[start : start + 64]:
                    cache.get(key)
            best = min(best, time.perf_counter() - began)
    return num_rows // 64 * 64 / best


if __name__ == "__main__":
    main()
