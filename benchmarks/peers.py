"""Whole training programs compared: TRL's SFTTrainer on Hugging Face's Llava, and train_accelerate.py.

    pip install -e '.[trl]'
    python benchmarks/peers.py [--quick] [--json FILE] [--device cuda]

Both train the same random weights on the same files: a CLIP tower, a phi decoder with phi-2's vocabulary, LLaVA-1.5's
projector. Both decode the same JPEGs and get the same token ids, and the loss of one fixed batch is compared first.
Then the programs run in turn (A B A B), each in a process of its own with one thread, and every pair gives a ratio.

The time is the CPU time of all processes of a program (with --device cuda: wall time). The ratios are those of the
steady state: samples per second from the first step to the last. Start-up (imports, loading, tokenised index) and the
end (held-out loss, saving) are printed, but a long run hardly pays for them.

SFTTrainer runs at its best here. The head is at supervised positions only, as TRL does on GPUs; on a CPU TRL scores
every position, so this script switches that on. Stage 2 is run in random order, and grouped by length.

    --quick              what is stated in docs/speed.md: hidden 384, 8 layers; under 15 minutes on an idle machine
    --hidden, --layers   shape of the decoder
    --images, --rounds   images of each stage, and runs of each program
    --tiny               a check that everything runs; its ratios mean nothing
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY, END = 51_200, 50_256  # of phi-2, which leaves 50,295 and 50,296 to <image> and <pad>
WORDS = 50_000
IMAGE_SIZE, PATCH_SIZE = 224, 32
ROWS = 8  # of a batch of SFTTrainer: the default of TrainingArguments
LORA_R, LORA_DROPOUT = 8, 0.05

# Tokens of COCO's 25,014 validation captions of 2017 with phi-2's tokenizer, without the end token: {length: captions}.
CAPTION_LENGTHS = {
    **{7: 68, 8: 816, 9: 3099, 10: 4360, 11: 4749, 12: 4033, 13: 2885, 14: 1843, 15: 1132, 16: 717, 17: 434, 18: 270},
    **{19: 183, 20: 105, 21: 89, 22: 53, 23: 40, 24: 26, 25: 29, 26: 26, 27: 17, 28: 10, 29: 1, 30: 5, 31: 4, 32: 3},
    **{33: 3, 34: 2, 35: 2, 36: 1, 39: 2, 41: 1, 43: 1, 46: 2, 52: 1, 53: 1, 57: 1},
}
CAPTIONS_PER_IMAGE = 5


class Kind(NamedTuple):
    """One kind of LLaVA-Instruct-150K's records.

    records: how many. turns: fewest and most questions. question, answer: mean tokens of one. spread: standard
    deviation of the answer's logarithm."""

    records: int
    turns: tuple[int, int]
    question: int
    answer: int
    spread: float


# The numbers of records are LLaVA's (arXiv 2304.08485). The mean lengths are from the sizes of its three files (126,
# 20.5 and 79.6 MB, docs/Data.md of its repository) without their json, at COCO's 4.4 characters a token. The number of
# turns and the spread are assumed.
LLAVA_KINDS = (
    Kind(56_681, (3, 7), 11, 58, 0.5),  # conversations
    Kind(23_240, (1, 1), 11, 136, 0.25),  # detailed descriptions
    Kind(77_791, (1, 1), 19, 161, 0.25),  # complex reasoning
)
LLAVA_IMAGES = 81_479


class Shape(NamedTuple):
    hidden: int
    layers: int
    tower_hidden: int
    tower_layers: int


class Figures(NamedTuple):
    """What a program took. Seconds are CPU seconds of all its processes, or with a GPU wall seconds."""

    start: float
    steady: float
    end: float
    samples: int
    tokens: int  # of the decoder, with padding
    padding: float  # share of them


# ------------------------------------------------------------------ data and weights


def words(chance: np.random.Generator, count: int) -> str:
    return " ".join(f"w{number}" for number in chance.integers(0, WORDS, count))


def write_image(path: Path, chance: np.random.Generator) -> None:
    """A JPEG as large as COCO's: 640 x 480, about 150 kB."""
    from PIL import Image

    coarse = Image.fromarray(chance.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize((640, 480))
    noise = chance.integers(-12, 13, (480, 640, 3))
    Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)).save(path, quality=90)


def write_data(folder: Path, images: int) -> None:
    """Write train2017 and val2017 in COCO's layout, and llava_instruct_{train,val}.json about the same images."""
    chance = np.random.default_rng(0)
    lengths, counts = np.array(list(CAPTION_LENGTHS)), np.array(list(CAPTION_LENGTHS.values()))
    (folder / "annotations").mkdir(parents=True)
    for split, first, number in (("train", 1, images), ("val", 900_001, 4)):
        (folder / f"{split}2017").mkdir()
        names = {image: f"{image:012d}.jpg" for image in range(first, first + number)}
        captions: list[dict[str, Any]] = []
        records: list[dict[str, Any]] = []
        for image, name in names.items():
            write_image(folder / f"{split}2017" / name, chance)
            for length in chance.choice(lengths, CAPTIONS_PER_IMAGE, p=counts / counts.sum()):
                captions.append({"id": len(captions), "image_id": image, "caption": words(chance, length)})
            records += [{"id": name[:-4], "image": name, "conversations": each} for each in _conversations(chance)]
        about = [{"id": image, "file_name": name, "height": 480, "width": 640} for image, name in names.items()]
        content = {"images": about, "annotations": captions}
        (folder / "annotations" / f"captions_{split}2017.json").write_text(json.dumps(content))
        (folder / f"llava_instruct_{split}.json").write_text(json.dumps(records))


def _conversations(chance: np.random.Generator) -> list[list[dict[str, str]]]:
    """Those about one image: each kind as often as it is about an image of LLaVA-Instruct, but at least one."""
    shares = [kind.records / LLAVA_IMAGES for kind in LLAVA_KINDS]
    kinds = [kind for kind, share in zip(LLAVA_KINDS, shares, strict=True) if chance.random() < share]
    found: list[list[dict[str, str]]] = []
    for kind in kinds or [LLAVA_KINDS[2]]:
        found.append([])
        for _ in range(chance.integers(kind.turns[0], kind.turns[1] + 1)):
            answer = kind.answer * np.exp(chance.normal(-(kind.spread**2) / 2, kind.spread))
            found[-1].append({"from": "human", "value": words(chance, kind.question)})
            found[-1].append({"from": "gpt", "value": words(chance, max(2, round(answer)))})
        found[-1][0]["value"] = "<image>\n" + found[-1][0]["value"]
    return found


def write_backbones(folder: Path, shape: Shape) -> None:
    """Write random backbones, the project's model of them, and a Llava with the same weights."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        CLIPVisionModel,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PhiConfig,
        PhiForCausalLM,
        PreTrainedTokenizerFast,
    )

    from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=shape.tower_hidden,
        intermediate_size=4 * shape.tower_hidden,
        num_hidden_layers=shape.tower_layers,
        num_attention_heads=max(1, shape.tower_hidden // 64),
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    text = PhiConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        intermediate_size=4 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=max(1, shape.hidden // 64),
        hidden_act="gelu_new",
        bos_token_id=END,
        eos_token_id=END,
    )
    CLIPVisionModel(vision).save_pretrained(folder / "vision")
    CLIPImageProcessorPil().save_pretrained(folder / "vision")
    PhiForCausalLM(text).save_pretrained(folder / "text")  # its head has a bias of 0, and Llava's has none
    # A word with the space before it is one token, so that lengths are exact.
    ids = {f" w{number}": number for number in range(WORDS)} | {"Instruct:": WORDS, "\nOutput:": WORDS + 1}
    spare = [number for number in range(WORDS + 2, END + 39) if number != END]
    ids |= {f"<{number}>": number for number in spare} | {"<|endoftext|>": END}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[ \n]"), "merged_with_next")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    fast.save_pretrained(folder / "text")

    backbones = str(folder / "vision"), str(folder / "text")
    processor = ClipPhiProcessor.from_backbones(*backbones)
    image_token = processor.image_token_id
    ours = ClipPhiForCausalLM.from_backbones(*backbones, image_token_id=image_token, projector_type="mlp")
    ours.save_pretrained(folder / "ours")
    processor.save_pretrained(folder / "ours")
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        vision_feature_layer=ours.config.vision_feature_layer,
        vision_feature_select_strategy="default",
    )
    llava: Any = LlavaForConditionalGeneration(config)
    parts: Any = ours.model
    llava.model.vision_tower.load_state_dict(parts.vision_tower.state_dict())
    llava.model.language_model.load_state_dict(parts.language_model.state_dict())
    llava.lm_head.weight = ours.lm_head.weight
    projector = llava.model.multi_modal_projector
    projector.linear_1, projector.linear_2 = parts.projector[0], parts.projector[2]
    llava.save_pretrained(folder / "llava")
    LlavaProcessor(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=processor.chat_template,
    ).save_pretrained(folder / "llava")


def write_rows(folder: Path) -> None:
    """Write the training data in TRL's format: {"messages", "images", "length"} of each caption or conversation."""
    names = {"human": "user", "gpt": "assistant"}
    captions = json.loads((folder / "data/annotations/captions_train2017.json").read_text())["annotations"]
    records = json.loads((folder / "data/llava_instruct_train.json").read_text())
    rows: dict[str, list[dict[str, Any]]] = {"stage1": [], "stage2": []}
    for each in captions:
        messages = [_message("user", None, True), _message("assistant", each["caption"])]
        rows["stage1"].append({"messages": messages, "image": f"{each['image_id']:012d}.jpg"})
    for record in records:
        messages = []
        for turn in record["conversations"]:
            text = turn["value"].removeprefix("<image>\n")
            messages.append(_message(names[turn["from"]], text, not messages))
        rows["stage2"].append({"messages": messages, "image": record["image"]})
    for stage, found in rows.items():
        for row in found:
            row["images"] = [str(folder / "data/train2017" / row.pop("image"))]
            texts = [part["text"] or "" for message in row["messages"] for part in message["content"]]
            row["length"] = sum(text.count(" ") + 2 for text in texts)
        (folder / f"{stage}.json").write_text(json.dumps(found))


def _message(role: str, text: str | None, has_image: bool = False) -> dict[str, Any]:
    content = [{"type": "image", "text": None}] if has_image else []
    return {"role": role, "content": content + ([{"type": "text", "text": text}] if text else [])}


# ------------------------------------------------------------------ TRL


class Counted:
    """A collator that counts the tokens of its batches, in whatever process makes them."""

    def __init__(self, collator: Callable[[Any], Any]):
        self.collator, self.tokens, self.padding = collator, multiprocessing.Value("q"), multiprocessing.Value("q")

    def __call__(self, rows: Any) -> Any:
        batch = self.collator(rows)
        for count, found in ((self.tokens, batch["attention_mask"] >= 0), (self.padding, batch["attention_mask"] == 0)):
            with count.get_lock():
                count.value += int(found.sum())
        return batch


def make_trainer(folder: Path, stage: int, device: str, grouped: bool = False, images_per_step: int = 16) -> Any:
    """Make an SFTTrainer that trains what stage 1 or 2 trains, for one epoch."""
    import torch
    import trl.trainer.utils
    from datasets import Dataset, Image, Sequence
    from peft import LoraConfig
    from transformers import AutoImageProcessor, AutoProcessor, LlavaForConditionalGeneration

    torch.set_num_threads(1)
    if device == "cpu":
        trl.trainer.utils._use_triton = lambda device: True  # there: whether only supervised positions are scored
    rows = json.loads((folder / f"stage{stage}.json").read_text())
    dataset = Dataset.from_list(rows).cast_column("images", Sequence(Image()))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = LlavaForConditionalGeneration.from_pretrained(folder / "llava", dtype=dtype)
    model.requires_grad_(False)
    lora = None
    if stage == 2:
        lora = LoraConfig(
            r=LORA_R,
            lora_alpha=2 * LORA_R,
            lora_dropout=LORA_DROPOUT,
            target_modules=r".*language_model\.layers.*\.(q_proj|k_proj|v_proj|dense|fc1|fc2)",
            modules_to_save=["multi_modal_projector"],
        )
    else:
        model.model.multi_modal_projector.requires_grad_(True).float()
    arguments = trl.SFTConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=ROWS,
        # Length grouping sorts the rows of 50 steps, or of a fourth of the data. In stage 2 all rows are one step, so
        # that all are sorted together, nearly as well as in a large data set.
        gradient_accumulation_steps=-(-(images_per_step * CAPTIONS_PER_IMAGE if stage == 1 else len(rows)) // ROWS),
        num_train_epochs=1,
        learning_rate=1e-3 if stage == 1 else 2e-4,
        train_sampling_strategy="group_by_length" if grouped else "random",
        remove_unused_columns=False,  # the column of lengths
        assistant_only_loss=True,
        max_length=None,
        optim="adamw_torch_fused",
        gradient_checkpointing=False,
        bf16=device == "cuda",
        use_cpu=device == "cpu",
        dataloader_num_workers=0 if device == "cpu" else 4,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    processor = AutoProcessor.from_pretrained(folder / "llava")
    processor.image_processor = AutoImageProcessor.from_pretrained(folder / "llava", backend="pil")  # as ours
    return trl.SFTTrainer(
        model=model, args=arguments, train_dataset=dataset, processing_class=processor, peft_config=lora
    )


def train_with_trl(folder: Path, stage: int, device: str, grouped: bool, images_per_step: int) -> None:
    """The program that is compared. It appends a json line to trl.jsonl before the first and after each step."""
    from transformers import TrainerCallback

    trainer = make_trainer(folder, stage, device, grouped, images_per_step)
    counted = trainer.data_collator = Counted(trainer.data_collator)

    def write(**values: Any) -> None:
        with open(folder / "trl.jsonl", "a") as file:
            file.write(json.dumps(values) + "\n")

    class Marks(TrainerCallback):
        def on_train_begin(self, arguments: Any, state: Any, control: Any, **kwargs: Any) -> None:
            write(steps=state.max_steps, samples=len(trainer.train_dataset))

        def on_step_end(self, arguments: Any, state: Any, control: Any, **kwargs: Any) -> None:
            write(step=state.global_step, tokens=counted.tokens.value, padding=counted.padding.value)

    trainer.add_callback(Marks())
    trainer.train()
    trainer.save_model(folder / "trl")


# ------------------------------------------------------------------ measuring


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a jsonl file, which may not exist yet."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def measure(command: list[str], folder: Path, device: str, marks: list[Callable[[], bool]]) -> list[float]:
    """Run a program. Returns the seconds until each mark is true, and in all."""
    import psutil

    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "HF_HOME": tempfile.mkdtemp(prefix="hf_home-", dir=folder),  # so that each run makes its index
        "OMP_NUM_THREADS": "1" if device == "cpu" else "8",
        "TOKENIZERS_PARALLELISM": "false",
        "ACCELERATE_USE_CPU": str(device == "cpu").lower(),
        "ACCELERATE_MIXED_PRECISION": "bf16" if device == "cuda" else "no",
    }
    started, before, output = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN), folder / "output.txt"
    with open(output, "w") as file:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=file)
    watched, seconds = psutil.Process(process.pid), []
    for reached in marks:
        while not reached():
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(command)} ended early:\n{output.read_text()[-3000:]}")
            time.sleep(0.01)
        family = [watched, *watched.children(recursive=True)]
        cpu = sum(sum(each.cpu_times()[:4]) for each in family)  # user and system, and those of ended children
        seconds.append(cpu if device == "cpu" else time.perf_counter() - started)
    if process.wait():
        raise SystemExit(f"{' '.join(command)} failed:\n{output.read_text()[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return [*seconds, cpu if device == "cpu" else time.perf_counter() - started]


def run_trl(folder: Path, stage: int, device: str, images_per_step: int, grouped: bool) -> Figures:
    log = folder / "trl.jsonl"
    log.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--trl", str(folder), "--device", device]
    command += ["--stage", str(stage), "--images_per_step", str(images_per_step), *(["--grouped"] if grouped else [])]

    def done() -> bool:
        return len(found := lines(log)) > 1 and len(found) == 1 + found[0]["steps"]

    start, until, total = measure(command, folder, device, [lambda: len(lines(log)) > 0, done])
    first, *_, last = lines(log)
    padding = last["padding"] / last["tokens"]
    return Figures(start, until - start, total - until, first["samples"], last["tokens"], padding)


def run_ours(folder: Path, stage: int, device: str, images_per_step: int, tokens_per_sample: float) -> Figures:
    """tokens_per_sample: of the decoder, without padding."""
    data, output = folder / "data", Path(tempfile.mkdtemp(prefix="output-", dir=folder))
    command = [sys.executable, str(ROOT / "train_accelerate.py"), "--stage", str(stage), "--output_dir", str(output)]
    if stage == 1:
        command += ["--vision_backbone", str(folder / "vision"), "--text_backbone", str(folder / "text")]
        command += ["--projector_type", "mlp", "--per_device_train_batch_size", str(images_per_step)]
    else:
        command += ["--init_from", str(folder / "ours"), "--gradient_accumulation_steps", "1"]
        command += ["--lora_r", str(LORA_R), "--lora_alpha", str(2 * LORA_R), "--lora_dropout", str(LORA_DROPOUT)]
    command += ["--data", sources(data, "train")[stage - 1], "--eval_data", sources(data, "val")[stage - 1]]
    command += ["--optim", "adamw_torch_fused", "--num_sample_texts", "0", "--logging_steps", "1", "--debug"]
    command += ["--dataloader_num_workers", "0" if device == "cpu" else "4"]
    record, metrics = output / "run.json", output / "metrics.jsonl"

    def trained() -> list[dict[str, Any]]:
        return [line for line in lines(metrics) if "loss" in line]

    def done() -> bool:
        return len(trained()) == json.loads(record.read_text())["num_steps"]

    # run.json is written before the first step.
    start, until, total = measure(command, folder, device, [lambda: record.exists() and metrics.exists(), done])
    samples, tokens = (trained()[-1][name] for name in ("samples_seen", "tokens_seen"))
    return Figures(start, until - start, total - until, samples, tokens, 1 - tokens_per_sample * samples / tokens)


def sources(data: Path, split: str) -> tuple[str, str]:
    """The data of stage 1 and 2, as --data names it."""
    names = f"coco:{data}/annotations/captions_{split}2017.json", f"llava:{data}/llava_instruct_{split}.json"
    return f"{names[0]},images={data}/{split}2017", f"{names[1]},images={data}/{split}2017"


def fixed_losses(folder: Path, stage: int, images: int) -> tuple[float, float, float]:
    """The loss of the same images' captions or conversations in our program and in TRL, in float32 on the CPU.

    The third value is our tokens per sample in the whole data."""
    import torch

    from clip_phi.batching.attention import PACKED_ATTENTION
    from clip_phi.batching.dataset import ImageReader
    from clip_phi.batching.index import load_index
    from clip_phi.batching.packing import pack_samples
    from clip_phi.data.sample import images_of
    from clip_phi.data.source import parse_source
    from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

    trainer = make_trainer(folder, stage, "cpu")
    files = [str(folder / f"data/train2017/{image:012d}.jpg") for image in range(1, images + 1)]
    rows = json.loads((folder / f"stage{stage}.json").read_text())
    chosen = [number for number, row in enumerate(rows) if row["images"][0] in files]
    with torch.no_grad():
        batch = trainer.data_collator([trainer.train_dataset[number] for number in chosen])
        theirs = trainer.compute_loss(trainer.model.train(), batch).item()

    processor = ClipPhiProcessor.from_pretrained(folder / "ours")
    index = load_index(parse_source(sources(folder / "data", "train")[stage - 1]), processor, 2048)
    read = ImageReader(processor)
    pixels = torch.stack([read(path).tensor for number in range(images) for path in images_of(index.image(number))])
    samples = [index.shared_prefix_sample(number) for number in range(images)]
    model = ClipPhiForCausalLM.from_pretrained(folder / "ours", dtype=torch.float32)
    model.set_attn_implementation({"text_config": PACKED_ATTENTION})
    pack = pack_samples(samples, pixels, processor.tokenizer.pad_token_id)
    assert pack.num_conversations == len(chosen) and pack.num_supervised == int((batch["labels"] != -100).sum())
    with torch.no_grad():
        ours = model.train()(**pack.inputs, use_cache=False).loss.item()
    return ours, theirs, int(index.packed_lengths().sum()) / len(rows)


# ------------------------------------------------------------------ the benchmark


def print_runs(title: str, runs: dict[str, list[Figures]]) -> None:
    print(f"\n{title}\n{'':14}{'start-up s':>11}{'steps s':>9}{'end s':>7}{'samples/s':>11}{'tokens':>9}{'padding':>9}")
    for name, found in runs.items():
        for run in found:
            speed = run.samples / run.steady
            print(f"{name:14}{run.start:11.1f}{run.steady:9.1f}{run.end:7.1f}{speed:11.2f}", end="")
            print(f"{run.tokens:9}{run.padding:9.1%}")


def compare(folder: Path, stage: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run both programs in turn in stage 1 or 2. Returns the ratios and the figures of all runs."""
    ours, theirs, tokens_per_sample = fixed_losses(folder, stage, min(4, options.images))
    difference = abs(ours / theirs - 1)
    print(f"\nstage {stage}: loss of one fixed batch {ours:.7f} (ours), {theirs:.7f} (TRL)")
    names = ("ours", "TRL", "TRL grouped")[: 1 + stage]
    runs: dict[str, list[Figures]] = {name: [] for name in names}
    where = (folder, stage, options.device, options.images_per_step)
    for _ in range(options.rounds):
        runs["ours"].append(run_ours(*where, tokens_per_sample))
        runs["TRL"].append(run_trl(*where, grouped=False))
        if stage == 2:
            runs["TRL grouped"].append(run_trl(*where, grouped=True))
    clock = "CPU" if options.device == "cpu" else "wall"
    print_runs(f"stage {stage}, {clock} seconds of all processes of a run", runs)
    speeds = {name: [run.samples / run.steady for run in found] for name, found in runs.items()}
    figures = {name: [run._asdict() for run in found] for name, found in runs.items()}
    result: dict[str, Any] = {"loss_rel_diff": difference, f"stage{stage}": figures}
    for name in names[1:]:
        pairs = [mine / other for mine, other in zip(speeds["ours"], speeds[name], strict=True)]
        key = f"stage{stage}_vs_trl{'_grouped' if 'grouped' in name else ''}"
        result |= {key: statistics.median(pairs), f"{key}_pairs": pairs}
        print(f"ours to {name}, pair by pair: {', '.join(f'{pair:.2f}' for pair in pairs)}")
    return result


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="fewer images and runs; under 15 minutes on two idle cores")
    size.add_argument("--tiny", action="store_true", help="the least that runs everything; its ratios mean nothing")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: bfloat16, and wall time")
    parser.add_argument("--hidden", type=int, help="width of the decoder (default: 384)")
    parser.add_argument("--layers", type=int, help="layers of the decoder (default: 8)")
    parser.add_argument("--images", type=int, help="images of the data, a multiple of 16 (default: by size)")
    parser.add_argument("--rounds", type=int, help="runs of each program (default: by size)")
    parser.add_argument("--trl", type=Path, help=argparse.SUPPRESS)  # this process is the program that is compared
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--grouped", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--images_per_step", type=int, default=16, help=argparse.SUPPRESS)
    options = parser.parse_args()
    hidden, layers, options.images, options.rounds = (
        given or (tiny if options.tiny else quick if options.quick else usual)
        for given, tiny, quick, usual in (
            (options.hidden, 64, 384, 384),
            (options.layers, 1, 8, 8),
            (options.images, 16, 32, 128),
            (options.rounds, 1, 2, 3),
        )
    )
    if options.images % options.images_per_step:
        parser.error(f"--images must be a multiple of {options.images_per_step}, not {options.images}")
    options.shape = Shape(hidden, layers, *((64, 1) if options.tiny else (128, 4)))
    return options


def main() -> None:
    options = parse_options()
    if options.trl:
        train_with_trl(options.trl, options.stage, options.device, options.grouped, options.images_per_step)
        return
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_HOME"] = str(folder / "hf_home")
        write_data(folder / "data", options.images)
        write_backbones(folder, options.shape)
        write_rows(folder)
        first, second = (compare(folder, stage, options) for stage in (1, 2))
    losses = max(first.pop("loss_rel_diff"), second.pop("loss_rel_diff"))
    result = first | second | {"loss_rel_diff": losses, "shape": options.shape._asdict(), "device": options.device}
    result["wall_seconds"] = time.perf_counter() - started
    print()
    for key, value in result.items():
        if isinstance(value, float):
            print(f"{key:24} {value:.4g}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
