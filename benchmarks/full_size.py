"""Both training stages at true size on a CPU, with 2.84 B parameters in float32: measured memory and planned memory.

    python benchmarks/full_size.py [--json FILE] [--folder DIR]     16 GB of memory, 6 GB of disk, a quarter of an hour
    python benchmarks/full_size.py --layers 2                       phi-2's width, two of its layers: 3 GB, a minute
    python benchmarks/full_size.py --count [--json FILE]            MB a token on a GPU, without one: a minute

The script writes two folders in the Hub's format, with random weights: wkcn/TinyCLIP-ViT-61M-32-Text-29M-LAION400M (a
complete CLIP) and microsoft/phi-2 (fp16 shards with an index, 50,295 tokens). It writes them tensor by tensor, which
takes little memory. Then it draws a small data set in the formats of COCO and LLaVA-Instruct. It runs
train_accelerate.py for stage 1, and for stage 2 with the result, each in a process of its own. It compares the peak
memory (without the mapped weights) with the count of clip_phi.tools.plan for the same packs.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
)

from clip_phi.batching.packing import SharedPrefixSample
from clip_phi.data.synthetic import write_dataset
from clip_phi.training.arguments import Stage1Arguments, Stage2Arguments, TrainingArguments, parse_arguments
from clip_phi.training.guards import NonFiniteGuard
from clip_phi.training.memory import CARDS, Formula

ROOT = Path(__file__).resolve().parent.parent
END_TOKEN, END, ENTRIES = "<|endoftext|>", 50256, 50295
SHARD_BYTES = 5 * 10**9
VISION = {
    "hidden_size": 640,
    "intermediate_size": 2560,
    "num_hidden_layers": 12,
    "num_attention_heads": 10,
    "image_size": 224,
    "patch_size": 32,
}
VISION_TEXT = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 9, "num_attention_heads": 8}
SPLITS = ("train", "val")
LITTLE = "--logging_steps 1 --dataloader_num_workers 0 --max_eval_images 1 --num_sample_texts 1 --max_new_tokens 2"
DTYPES = {torch.float16: "F16", torch.float32: "F32"}


# ------------------------------------------------------------------ checkpoints in the format of the Hub


def write_backbones(folder: Path, layers: int, texts: Iterable[str]) -> tuple[Path, Path]:
    """Write random weights in the formats and shapes of TinyCLIP and phi-2 into folder/vision and folder/text.

    Args:
        folder: where to write.
        layers: layers of the decoder; phi-2 has 32.
        texts: the training texts of the tokenizer.
    """
    vision, text = folder / "vision", folder / "text"
    clip = CLIPConfig(text_config=VISION_TEXT, vision_config=VISION, projection_dim=512)
    with torch.device("meta"):
        whole_clip = CLIPModel(clip)
    write_checkpoint(vision, whole_clip, torch.float32, SHARD_BYTES)
    CLIPImageProcessorPil().save_pretrained(vision)
    phi = PhiConfig(
        vocab_size=51200,
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=layers,
        num_attention_heads=32,
        partial_rotary_factor=0.4,
        max_position_embeddings=2048,
        resid_pdrop=0.1,
        hidden_act="gelu_new",
        bos_token_id=END,
        eos_token_id=END,
    )
    with torch.device("meta"):
        decoder = PhiForCausalLM(phi)
    write_checkpoint(text, decoder, torch.float16, SHARD_BYTES)
    write_tokenizer(text, texts)
    return vision, text


def write_checkpoint(folder: Path, model: Any, dtype: torch.dtype, shard_bytes: int) -> None:
    """Write config.json and random weights with the model's names and shapes, in shards of at most shard_bytes."""
    folder.mkdir(parents=True)
    config = model.config
    config.architectures, config.dtype = [type(model).__name__], dtype
    config.save_pretrained(folder)
    shards: list[dict[str, torch.Size]] = [{}]
    room = shard_bytes
    for name, tensor in model.state_dict().items():
        size = tensor.numel() * dtype.itemsize
        if size > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor.shape
        room -= size
    chance = torch.Generator().manual_seed(0)

    def make(name: str, shape: torch.Size) -> torch.Tensor:
        if name.endswith("norm.weight") or name.endswith(("norm1.weight", "norm2.weight")):
            return torch.ones(shape, dtype=dtype)
        return torch.empty(shape).normal_(std=0.02, generator=chance).to(dtype)

    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", shards[0], dtype, make)
        return
    places: dict[str, str] = {}
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / file, shapes, dtype, make)
        places |= dict.fromkeys(shapes, file)
    total = sum(shape.numel() for shapes in shards for shape in shapes.values()) * dtype.itemsize
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def write_safetensors(
    path: Path, shapes: dict[str, torch.Size], dtype: torch.dtype, make: Callable[[str, torch.Size], torch.Tensor]
) -> None:
    """Write a safetensors file tensor by tensor; the library's own writer needs all of them at once."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            file.write(make(name, shape).numpy().data)


def write_tokenizer(folder: Path, texts: Iterable[str]) -> None:
    """Write a byte-level BPE with phi-2's ids: 50,256 tokens, the end token, 38 runs of blanks.

    Most tokens are fillers that occur in no text; the others are trained on texts.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet))
    whole = json.loads(tokenizer.to_str())
    vocabulary = whole["model"]["vocab"]
    vocabulary |= {f"filler{number}": number for number in range(len(vocabulary), END)}
    tokenizer = Tokenizer.from_str(json.dumps(whole))
    tokenizer.add_special_tokens([AddedToken(END_TOKEN, special=True)])
    blanks = [" " * size for size in range(31, 1, -1)] + ["\t" * size for size in range(9, 1, -1)]
    tokenizer.add_tokens([AddedToken(run, normalized=False) for run in blanks])
    assert tokenizer.token_to_id(END_TOKEN) == END and tokenizer.get_vocab_size() == ENTRIES
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_TOKEN, bos_token=END_TOKEN)
    fast.model_max_length = 2048
    fast.save_pretrained(folder)


# ------------------------------------------------------------------ running and measuring


def run_measured(command: Sequence[str], log: Path, environment: dict[str, str]) -> dict[str, float]:
    """Run a command. Returns its seconds, peak memory without the mapped weights, and peak resident memory, in bytes.

    transformers maps the weights only while it loads, and the kernel can take these pages back at any time. So mapped
    files count as much as they do at the peak of anonymous memory, in training: these are the libraries'.

    Raises:
        SystemExit: with the end of its output, if the command fails.
    """
    started, peak = time.perf_counter(), {"VmHWM": 0, "RssAnon": 0, "RssFile": 0}
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment)
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
            now = {name: int(fields[name].split()[0]) * 1024 for name in peak if name in fields}
            resident = max(peak["VmHWM"], now.get("VmHWM", 0))
            if now.get("RssAnon", 0) > peak["RssAnon"]:
                peak = now
            peak["VmHWM"] = resident
            time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{log.read_text()[-3000:]}")
    seconds = time.perf_counter() - started
    return {"peak_bytes": peak["RssAnon"] + peak["RssFile"], "resident_bytes": peak["VmHWM"], "seconds": seconds}


def packs_of(arguments: TrainingArguments, processor: Any) -> list[list[SharedPrefixSample]]:
    """Read the packs that the run trains on, from the same plan of the same data."""
    from accelerate import Accelerator

    from clip_phi.batching.dataset import ImageReader
    from clip_phi.training.data import read_data

    data = read_data(arguments, processor, ImageReader(processor), Accelerator(cpu=True))
    assert data.sampler is not None
    packs = []
    for number in range(arguments.max_steps * arguments.gradient_accumulation_steps):
        items: list[Any] = [data.train[place] for place in data.sampler.batches.batch(number)]  # type: ignore[index]
        packs.append([sample for sample, _ in items])
    return packs


def stage_options(stage: int, folder: Path, arguments: argparse.Namespace) -> list[str]:
    """Make the options of train_accelerate.py."""
    data = folder / "data"
    if stage == 1:
        sources = [f"coco:{data}/annotations/captions_{split}2017.json,images={data}/{split}2017" for split in SPLITS]
        own = f"--vision_backbone {folder}/vision --text_backbone {folder}/text --output_dir {folder}/stage1"
    else:
        sources = [f"llava:{data}/llava_instruct_{split}.json,images={data}/{split}2017" for split in SPLITS]
        own = f"--init_from {folder}/stage1 --output_dir {folder}/stage2 --gradient_accumulation_steps 1"
    shared = f"--stage {stage} --max_tokens_per_batch {arguments.tokens} --max_steps {arguments.steps} {LITTLE}"
    return [*shared.split(), "--data", sources[0], "--eval_data", sources[1], *own.split()]


def run_stage(stage: int, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and compare the memory with the plan. Raises SystemExit if training fails."""
    from clip_phi.training.model import load_processor
    from modeling_clip_phi import ClipPhiConfig

    options = stage_options(stage, folder, arguments)
    environment = os.environ | {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    environment |= {"OMP_NUM_THREADS": str(arguments.threads), "TOKENIZERS_PARALLELISM": "false"}
    environment["MALLOC_MMAP_THRESHOLD_"] = str(2**20)  # without it glibc keeps freed tensors: 1.4 GB more
    print(f"train_accelerate.py {' '.join(options)}".replace(str(folder), "DIR"), flush=True)
    log = folder / f"stage{stage}.log"
    found: dict[str, Any] = dict(run_measured([sys.executable, "train_accelerate.py", *options], log, environment))
    print(log.read_text().replace(str(folder), "DIR"), flush=True)
    output = folder / f"stage{stage}"
    asked = parse_arguments(options)
    packs = packs_of(asked, load_processor(asked))
    largest = max(packs, key=lambda pack: sum(len(sample.input_ids) for sample in pack))
    config = ClipPhiConfig.from_pretrained(output)
    config.adapter = None
    ids, supervised = (
        [sample.conversation_ids for sample in largest],
        sum(len(sample.shift_labels) for sample in largest),
    )
    bill = Formula(config, asked, CARDS["cpu-16"]).bill(ids, supervised)
    logged = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return found | {
        "plan_bytes": sum(bill.values()),
        "plan_error": sum(bill.values()) / found["peak_bytes"] - 1,
        "bill_bytes": bill,
        "tokens": [sum(len(sample.input_ids) for sample in pack) for pack in packs],
        "losses": [row["loss"] for row in logged if "loss" in row],
        "checkpoint_bytes": sum(file.stat().st_size for file in checkpoint_files(output)),
        "checkpoint_weights": sum(map(count_weights, checkpoint_files(output))),
    }


def checkpoint_files(folder: Path) -> list[Path]:
    """List the files of the model's weights, without training checkpoints."""
    return sorted({*folder.glob("*.safetensors"), *folder.glob("adapter/*.safetensors")})


def count_weights(path: Path) -> int:
    with safe_open(path, framework="pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (it is no dict)


# ------------------------------------------------------------------ counting on meta tensors


def count_activations(layers: int) -> dict[str, float]:
    """MB that a token of a pack keeps for the backward pass in bfloat16 on CUDA, with the attention of each stage."""
    from plan_counting import build_model, count_step

    from clip_phi.training.memory import typical_sample
    from modeling_clip_phi import ClipPhiConfig

    kinds: dict[str, TrainingArguments] = {
        "stage1": Stage1Arguments(stage=1),
        "stage2": Stage2Arguments(stage=2),
        "stage2_dropout0": Stage2Arguments(stage=2, lora_dropout=0.0),
        "nf4": Stage2Arguments(stage=2, quantization="nf4"),
        "int8": Stage2Arguments(stage=2, quantization="int8"),
        "full": Stage2Arguments(stage=2, tune_decoder="full"),
    }
    found = {}
    for name, arguments in kinds.items():
        config: Any = ClipPhiConfig()
        config.text_config.num_hidden_layers = layers
        model = build_model(config, arguments, torch.bfloat16, varlen=arguments.stage == 2)  # see choose_attention
        ids, supervised, _ = typical_sample(arguments, 49)
        few, more = (
            count_step(model, [ids] * images, supervised * images, torch.bfloat16).activations for images in (2, 4)
        )
        found[name] = (more - few) / 2 / len(ids) / 1e6
    return found


class HostSyncs(TorchDispatchMode):
    """Counts the operations for which the host would wait for a CUDA device."""

    waits = {
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.masked_select.default,
        torch.ops.aten.masked_scatter_backward.default,
        torch.ops.aten.equal.default,
        torch.ops.aten.is_nonzero.default,
    }

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = args[1] if func is torch.ops.aten.index.Tensor else ()
        by_mask = any(each is not None and each.dtype == torch.bool for each in masks)
        self.count += by_mask or func in self.waits
        return func(*args, **(kwargs or {}))


def count_host_syncs() -> int:
    """Of a step of train_accelerate.py with one micro-batch, with a tiny model on the CPU."""
    import runpy
    from types import SimpleNamespace

    from accelerate import Accelerator
    from training import Size, caption_work, make_models, our_batches

    from clip_phi.batching.packing import PackedBatch

    train_step = runpy.run_path(str(ROOT / "train_accelerate.py"))["train_step"]
    accelerator = Accelerator(cpu=True)
    models = make_models(Size(64, 1, 1, 32, 1, 1), lora_r=0)
    work = caption_work(2)
    (inputs,) = our_batches(work, sharing=True, packing=True)
    pack = PackedBatch(inputs, work.num_supervised, work.num_samples, ["", ""])
    optimizer = accelerator.prepare(torch.optim.AdamW(models.trained, fused=True))
    run = SimpleNamespace(
        accelerator=accelerator,
        arguments=Stage1Arguments(stage=1),
        model=models.ours,
        plain_model=models.ours,
        optimizer=optimizer,
        scheduler=SimpleNamespace(step=lambda: None),
        guard=NonFiniteGuard(ROOT, "stop", print),
        logger=None,
    )
    counts = torch.tensor([work.num_samples, work.num_supervised, inputs["input_ids"].numel(), 0, 0, 0])
    train_step(run, 1, [pack], counts)
    as_list, lists = torch.Tensor.tolist, []

    def counted(tensor: torch.Tensor) -> Any:
        lists.append(tensor)
        return as_list(tensor)

    try:
        torch.Tensor.tolist = counted  # type: ignore[method-assign]
        with HostSyncs() as syncs:
            train_step(run, 2, [pack], counts)
    finally:
        torch.Tensor.tolist = as_list  # type: ignore[method-assign]
    return syncs.count + len(lists)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--layers", type=int, default=32, help="layers of the decoder; phi-2 has 32 (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=2, help="steps of each stage (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="--max_tokens_per_batch (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="folder for all files (default: a temporary folder)")
    parser.add_argument("--count", action="store_true", help="count activations and host syncs on a GPU, without one")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    if options.count:
        counted = {"mb_per_token": count_activations(options.layers), "host_syncs_per_step": count_host_syncs()}
        print(json.dumps(counted, indent=2))
        if options.json:
            options.json.write_text(json.dumps(counted, indent=2) + "\n", encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        started = time.perf_counter()
        write_dataset(folder / "data", num_train=8, num_val=2)
        captions = json.loads((folder / "data" / "annotations" / "captions_train2017.json").read_text())
        write_backbones(folder, options.layers, [row["caption"] for row in captions["annotations"]])
        print(f"wrote the backbones in {time.perf_counter() - started:.0f} s")
        result: dict[str, Any] = {f"stage{stage}": run_stage(stage, folder, options) for stage in (1, 2)}
    result["writer_peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for name, found in result.items():
        print(name, json.dumps(found, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
