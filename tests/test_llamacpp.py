"""llama.cpp's own server, on a CPU, gives the answers of the demo's model: make test-llamacpp."""

import json
import os
import subprocess
import sys
from statistics import median

import pytest
import torch
from helpers import ROOT, demo_questions
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from clip_phi.cli import main
from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

pytestmark = pytest.mark.llamacpp
DEMO = ROOT / "outputs/demo"
PRE_TOKENIZERS = json.loads((ROOT / "clip_phi/export/pre_tokenizers.json").read_text(encoding="utf-8"))
NEAR = 0.02  # of two tokens' logits


def generate(model, processor, requests):
    """Greedy answers, the log-probabilities of their two likeliest first tokens, and the tokens before a near tie."""
    answers = []
    for request in requests:
        content = [*({"type": "image"} for _ in request["images"]), {"type": "text", "text": request["text"]}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}])
        inputs = processor(images=[Image.open(path) for path in request["images"]], text=prompt, return_tensors="pt")
        options = {"max_new_tokens": 40, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        done = model.generate(**inputs, **options)
        best = done.logits[0][0].log_softmax(-1).topk(2)
        ids = done.sequences[0, inputs["input_ids"].shape[1] :]
        gaps = torch.cat(done.logits).topk(2).values.diff().flatten()
        # llama.cpp's list of tokens lacks those that are a part of a character
        whole = torch.tensor(["\ufffd" not in processor.tokenizer.decode([number]) for number in ids.tolist()])
        clear = ((gaps < -NEAR) & whole).cumprod(0).sum()
        first = dict(zip(map(str, best.indices.tolist()), best.values.tolist(), strict=True)) if whole[0] else {}
        answers.append((processor.decode(ids, skip_special_tokens=True), first, ids[:clear].tolist()))
    return answers


def compare(model, dtype, requests, answers, folder, title, capsys):
    """The number of llama.cpp's answers that are ours, the differences of first log-probabilities, and the number of
    tokens before a near tie, which are all equal where the weights are not rounded."""
    assert main(["export", str(model), str(folder / "gguf"), "--to", "gguf", "--dtype", dtype]) == 0
    (folder / "requests.json").write_text(json.dumps(requests))
    command = [sys.executable, ROOT / "tests/llamacpp_driver.py", folder / "gguf"]
    command += [folder / "requests.json", folder / "answers.json"]
    done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((folder / "answers.json").read_text())
    differences, equal, tokens = [], 0, 0
    for (text, first, clear), theirs in zip(answers, found, strict=True):
        differences += [
            abs(first[token] - theirs["logprobs"][token]) for token in first.keys() & theirs["logprobs"].keys()
        ]
        equal += text == theirs["text"]
        tokens += len(clear)
        assert dtype.startswith("q") or theirs["ids"][: len(clear)] == clear, text
    with capsys.disabled():
        print(f"\nllama.cpp, {title}: {equal} of {len(found)} greedy answers equal, {tokens} tokens before near ties, ")
        print(f"first tokens' log-probabilities within {max(differences):.4f}, median {median(differences):.4f}")
    return equal, differences, tokens


@pytest.fixture(scope="module")
def requests(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("images"), []
    for paths, question in demo_questions(94, 6):
        lossless = [str(folder / f"{path.stem}.png") for path in paths]  # JPEG decoders differ
        for path, image in zip(lossless, paths, strict=True):
            Image.open(image).convert("RGB").save(path)
        made.append({"text": question, "images": lossless})
    return made


@pytest.fixture(scope="module")
def expected(requests):
    model = ClipPhiForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)
    return requests, generate(model, ClipPhiProcessor.from_pretrained(DEMO / "model"), requests)


# The fewest equal answers, and the largest difference of log-probabilities.
BOUNDS = {"float16": (100, 0.02), "float32": (100, 0.02), "q8_0": (97, 0.3), "q4_0": (85, 1.5)}


@pytest.mark.parametrize("dtype", BOUNDS)
def test_llamacpp_gives_the_same_100_answers(dtype, expected, tmp_path, capsys):
    requests, answers = expected
    equal, differences, _ = compare(DEMO / "model", dtype, requests, answers, tmp_path, f"the demo, {dtype}", capsys)
    assert len({text for text, *_ in answers}) > 10 and len(differences) > 150
    assert equal >= BOUNDS[dtype][0] and len(answers) == 100
    assert max(differences) < BOUNDS[dtype][1]


def test_the_benchmark_sends_the_same_requests_to_both_servers_and_gets_the_same_answers(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/serving.py", "--model", DEMO / "model", "--beside", "llamacpp"]
    command += ["--requests", 12, "--concurrent", 4, "--repeats", 2, "--seconds", 1, "--json", tmp_path / "out.json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    for kind in ("captions", "questions", "questions_without_image"):
        assert found[f"{kind}_compared"] == found[f"{kind}_identical"] == 24, found
        assert found[f"{kind}_tokens_ours"] == found[f"{kind}_tokens_theirs"], found
        assert min(found[f"{kind}_ratios"]) <= found[f"{kind}_ratio"] <= max(found[f"{kind}_ratios"])
    assert found["captions_tokens_ours"] > 3 * found["questions_tokens_ours"] == 3 * 48  # a word and the end


def save_tokenizer(name, has_bos, folder):
    """A tokenizer with this pre-tokenizer, trained on a text that stays as it is, and with BOS as Llama 3's adds it."""
    kind = PRE_TOKENIZERS[name]
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind["ignore_merges"]))
    parts = []
    for part in kind["parts"]:
        if part["type"] == "Split":
            parts.append(pre_tokenizers.Split(Regex(part["pattern"]["Regex"]), "isolated"))
        elif part["type"] == "Digits":
            parts.append(pre_tokenizers.Digits(individual_digits=True))
        else:
            parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=part["use_regex"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts) if len(parts) > 1 else parts[0]
    tokenizer.normalizer = normalizers.NFC() if kind["normalizer"] else None
    tokenizer.decoder = decoders.ByteLevel()
    special = {"special_tokens": ["<|end|>", "<|begin|>"], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    texts = [(ROOT / "LICENSE").read_text(encoding="utf-8")]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=900, show_progress=False, **special))
    if has_bos:
        options = {"single": "<|begin|> $A", "special_tokens": [("<|begin|>", 1)]}
        tokenizer.post_processor = processors.TemplateProcessing(**options)
    options = {"eos_token": "<|end|>", "bos_token": "<|begin|>" if has_bos else None}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)
    fast.save_pretrained(folder)
    return len(fast)


SIZES = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.06}
SIZES |= {"eos_token_id": 0, "bos_token_id": 1, "pad_token_id": None}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
# A decoder's classes, its tokenizer's kind, and its other fields; rows are those of the embedding beside the tokens.
OTHER_DECODERS = {
    "Llama 3": (LlamaConfig, LlamaForCausalLM, "llama-bpe", 2, {"rope_parameters": LLAMA3}),
    "SmolLM2": (LlamaConfig, LlamaForCausalLM, "smollm", 0, {"tie_word_embeddings": True}),
    "Qwen2": (Qwen2Config, Qwen2ForCausalLM, "qwen2", 20, {"tie_word_embeddings": True}),
    "Qwen3": (Qwen3Config, Qwen3ForCausalLM, "qwen2", 20, {"head_dim": 48}),
}
# Texts that pre-tokenizers cut differently.
ODD = ["It's 12345 o'clock,\n\n  and  I'll   go: 3.14159!", "na\u00efve \uff0b \u6771\u4eac caf\u00e9's 'tis WE'LL"]
ODD.append("\ttabs\r\n\r\nnew lines   \n end")


def save_random(backbone, folder):
    """With norms and biases that are not at their beginnings."""
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2 * (parameter.dim() == 1))
    backbone.save_pretrained(folder)


def save_decoder(name, folder, **others):
    config, decoder, pre_tokenizer, rows, fields = OTHER_DECODERS[name]
    count = save_tokenizer(pre_tokenizer, name == "Llama 3", folder)
    torch.manual_seed(5)
    save_random(decoder(config(vocab_size=count + rows, **SIZES | fields | others)), folder)


def save_model(vision, text, folder, **fields):
    model = ClipPhiForCausalLM.from_backbones(vision, text, **fields).float().eval()
    with torch.no_grad():
        for parameter in model.model.projector.parameters():
            parameter.normal_(std=0.1)
    processor = ClipPhiProcessor.from_backbones(vision, text)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


@pytest.mark.parametrize("name", OTHER_DECODERS)
def test_llamacpp_gives_the_answers_of_other_decoders(name, requests, tmp_path, capsys):
    """Random weights, so that each answer has its own tokens, up to where two of them are nearly as likely."""
    save_decoder(name, tmp_path / "text")
    vision = str(ROOT / "examples/demo_backbones/vision")
    model, processor = save_model(vision, str(tmp_path / "text"), tmp_path / "model", projector_type="mlp")
    asked = [each | {"text": odd} for each, odd in zip(requests, ODD, strict=False)] + requests[3:17] + requests[-3:]
    answers = generate(model, processor, asked)
    _, differences, tokens = compare(tmp_path / "model", "float32", asked, answers, tmp_path, name, capsys)
    assert len({text for text, *_ in answers}) > 10 and len(differences) > 20
    assert len(asked) == 20 and tokens > 100
    assert max(differences) < 0.02


# Fields of the tower and of the model. 64 pixels are 7 patches of 9 and a rest, as 384 are 27 of 14 (SO400M).
SIGLIP_TOWERS = {
    "SigLIP, last layer but one": ({"patch_size": 16}, {"vision_feature_layer": -2}),
    "SigLIP, last layer": ({"patch_size": 16, "vision_use_head": False}, {"vision_feature_layer": -1}),
    "SigLIP, all of 49 patches": ({"patch_size": 9}, {"vision_feature_select_strategy": "full"}),
    "SigLIP, mlp": ({"patch_size": 9}, {"vision_feature_layer": 2, "projector_type": "mlp"}),
}


@pytest.mark.parametrize("name", SIGLIP_TOWERS)
def test_llamacpp_gives_the_answers_of_siglip_towers(name, tmp_path, capsys):
    """One question about images of random colors, so that answers differ by the images alone."""
    sizes, fields = SIGLIP_TOWERS[name]
    save_decoder("Llama 3", tmp_path / "text", initializer_range=0.12)  # rarer near ties
    shape = {"hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 3, "num_attention_heads": 4}
    save_random(SiglipVisionModel(SiglipVisionConfig(image_size=64, **shape, **sizes)), tmp_path / "vision")
    SiglipImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "vision")
    model, processor = save_model(str(tmp_path / "vision"), str(tmp_path / "text"), tmp_path / "model", **fields)
    asked = []
    for number in range(20):
        colors = Image.fromarray(torch.randint(256, (4, 4, 3), dtype=torch.uint8).numpy())
        side = 64 if number else 150  # the first is larger than the tower's: both programs resize it as Pillow does
        colors.resize((side, side), Image.Resampling.NEAREST).save(tmp_path / f"{number}.png")
        asked.append({"text": "What is it?", "images": [str(tmp_path / f"{number}.png")]})
    asked[-1]["images"] = [asked[1]["images"][0], asked[2]["images"][0]]
    answers = generate(model, processor, asked)
    equal, differences, tokens = compare(tmp_path / "model", "float32", asked, answers, tmp_path, name, capsys)
    assert len({text for text, *_ in answers}) > 10 and len(differences) > 20
    assert equal >= 12 and tokens > 20
    assert max(differences) < 0.02
