"""With a cached index, nothing until the first step of the real script grows with the data, but arrays of numbers."""

import json

import pytest
from first_step import write_many
from helpers import FIXED_BATCHES, ROOT, run, stage1, stage2

pytestmark = pytest.mark.benchmarks
SIZES = (2000, 10_000)  # both have whole windows of samples that are packed together
HELD_OUT = ("--eval_data", "--holdout_images", 20)
CASES = {
    "fixed batches": (1, ()),
    "packs of stage 1": (1, ("--max_tokens_per_batch", 400, *HELD_OUT)),
    "packs of stage 2": (2, ("--max_tokens_per_batch", 800, *HELD_OUT)),
}


@pytest.fixture(scope="module")
def options(vision_backbone, text_backbone, tmp_path_factory):
    """Options of a stage on data of a size; stage 2 starts from a model of stage 1."""
    folders = {size: tmp_path_factory.mktemp("data") for size in SIZES}
    for size, folder in folders.items():
        write_many(folder, size, texts_per_image=1)
    output = tmp_path_factory.mktemp("runs")
    run(*stage1(folders[SIZES[0]], (vision_backbone, text_backbone), output / "trained", "--max_steps", 1))

    def options(stage, size, *others):
        begin = (vision_backbone, text_backbone) if stage == 1 else output / "trained"
        found = (stage1, stage2)[stage - 1](folders[size], begin, output / "counted", *others)
        if stage == 1 and "--max_tokens_per_batch" in others:
            place = found.index(FIXED_BATCHES[0])
            del found[place : place + len(FIXED_BATCHES)]
        return found

    return options


def until_first_step(options, count):
    script = ROOT / "benchmarks/until_first_step.py"
    done = run(*options, script=script, PYTHONHASHSEED="0", COUNT=str(int(count)))
    return json.loads(done.stdout.rpartition("COUNTED")[2])


@pytest.mark.parametrize("case", CASES)
def test_no_work_is_of_the_datas_size(case, options):
    stage, own = CASES[case]
    found = []
    for size in SIZES:
        until_first_step(options(stage, size, *own), count=False)  # makes the index
        found.append(until_first_step(options(stage, size, *own), count=True))
    few, many = found
    grown = {name: (many[name] - few[name]) / (SIZES[1] - SIZES[0]) for name in many}
    print(case, few, many, grown)
    assert few["calls"] > 10_000 and few["opened"] > 20 and few["bytes_read"] > 10_000
    assert few["modules"] == many["modules"] and many["opened"] <= few["opened"] + 20, "but for the images of a step"
    assert grown["bytes_read"] < 1, "a file is read as a whole"
    assert grown["calls"] < 0.25, "a call for each fourth record"
    assert grown["peak_bytes"] < 100, "a Python object for each record, or more than a few numbers"
