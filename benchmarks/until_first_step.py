"""Runs train_accelerate.py until its first optimizer step and prints the work until then, as a line of json.

python benchmarks/until_first_step.py train_accelerate.py --stage 1 ...

calls         calls of functions, Python's and C's, after the imports that BARE_IMPORTS of first_step.py names
modules       imported modules
opened        files opened after the imports
bytes_read    bytes that all system calls read after the imports; pages of mapped files are not among them
peak_bytes    peak of what Python and NumPy allocate while the data are read and batches are planned
read_seconds  wall time of the same; without counting (COUNT=0), where the figures above are absent
"""

import json
import os
import runpy
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from types import FrameType
from typing import Any

import peft  # noqa: F401
import torch.distributed.fsdp  # noqa: F401
import torch.distributed.tensor  # noqa: F401
import transformers
from accelerate.optimizer import AcceleratedOptimizer

COUNT = os.environ.get("COUNT", "1") == "1"
FIRST_USED = ("CLIPImageProcessorPil", "CLIPVisionModel", "PhiForCausalLM", "PreTrainedTokenizerFast", "get_scheduler")


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def main() -> None:
    from clip_phi.training import data

    for name in FIRST_USED:
        getattr(transformers, name)
    found: dict[str, Any] = {"calls": 0, "opened": 0}
    before, read_data = bytes_read(), data.read_data

    def timed_read_data(*arguments: Any) -> Any:
        if COUNT:
            tracemalloc.start()
        began = time.perf_counter()
        read = read_data(*arguments)
        found["read_seconds"] = time.perf_counter() - began
        if COUNT:
            found["peak_bytes"] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        return read

    def count(frame: FrameType, event: str, argument: Any) -> None:
        found["calls"] += event in ("call", "c_call")

    def count_opened(event: str, arguments: Any) -> None:
        found["opened"] += event == "open"

    def leave(*arguments: Any) -> None:
        sys.setprofile(None)
        if COUNT:
            found["modules"], found["bytes_read"] = len(sys.modules), bytes_read() - before
        print("COUNTED", json.dumps(found if COUNT else {"read_seconds": found["read_seconds"]}), flush=True)
        os._exit(0)

    data.read_data = timed_read_data  # type: ignore[assignment]
    AcceleratedOptimizer.step = leave
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    if COUNT:
        sys.addaudithook(count_opened)
        threading.setprofile(count)
        sys.setprofile(count)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
