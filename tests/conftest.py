"""Tiny backbones in the official formats, and models made from them. Everything runs offline, on one core."""

import atexit
import copy
import os
import shutil
import tempfile

# Before torch is imported: its idle OpenMP threads spin, which makes two busy cores 15 times slower.
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
if "CLIP_PHI_TEST_GPU" not in os.environ:  # which make test-gpu sets
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.update(
    HF_HOME=tempfile.mkdtemp(prefix="hf-home-"),
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_TELEMETRY="1",
)

import pytest
import torch
import transformers
from newest import CANNOT_WORK
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
)

from clip_phi.batching.attention import PACKED_ATTENTION
from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

END_TOKEN = "<|endoftext|>"
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
TEXT = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
    "resid_pdrop": 0.1,
}

atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def save_tokenizer(folder) -> PreTrainedTokenizerFast:
    """A byte-level BPE with an end token, no padding token, and fewer entries than the decoder has rows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[END_TOKEN]
    )
    tokenizer.train_from_iterator(["Instruct: a red circle\nOutput: yes", "a blue square and a star"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_TOKEN, bos_token=END_TOKEN)
    fast.save_pretrained(folder)
    return fast


@pytest.fixture(scope="session")
def vision_backbone(tmp_path_factory) -> str:
    """A full CLIP checkpoint, text half included, with its image processor: 4 features of 16 numbers an image."""
    folder = tmp_path_factory.mktemp("vision")
    torch.manual_seed(0)
    text = VISION | {"vocab_size": 50, "num_hidden_layers": 1}
    del text["image_size"], text["patch_size"]
    CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessorPil(**sizes).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def text_backbone(tmp_path_factory) -> str:
    """A sharded fp16 Phi checkpoint with phi-2's dropout, and its tokenizer."""
    folder = tmp_path_factory.mktemp("text")
    end = save_tokenizer(folder).eos_token_id
    torch.manual_seed(1)
    decoder = PhiForCausalLM(PhiConfig(**TEXT, bos_token_id=end, eos_token_id=end))
    with torch.no_grad():  # phi-2's head has a bias, and a fresh one is zero
        decoder.lm_head.bias.normal_(std=0.02)
    decoder.half().save_pretrained(folder, max_shard_size="40KB")
    return str(folder)


@pytest.fixture(scope="session")
def processor(vision_backbone, text_backbone) -> ClipPhiProcessor:
    return ClipPhiProcessor.from_backbones(vision_backbone, text_backbone)


@pytest.fixture(scope="session")
def model(vision_backbone, text_backbone) -> ClipPhiForCausalLM:
    """Frozen, in eval mode, shared by all tests: one that changes it takes `fresh_model`."""
    torch.manual_seed(2)
    return ClipPhiForCausalLM.from_backbones(vision_backbone, text_backbone)


@pytest.fixture(scope="session")
def checkpoint(model, processor, tmp_path_factory) -> str:
    """A folder with the delta of `model` and its processor, shared by all tests."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def fresh_model(model) -> ClipPhiForCausalLM:
    return copy.deepcopy(model)


@pytest.fixture
def packed_model(fresh_model) -> ClipPhiForCausalLM:
    """With the attention that training uses."""
    fresh_model.set_attn_implementation({"text_config": PACKED_ATTENTION})
    return fresh_model


def pytest_addoption(parser):
    parser.addoption("--newest", action="store_true", help="the newest libraries are installed (make test-newest)")
    parser.addoption(
        "--screenshots", metavar="DIR", help="write screenshots of the chat page there (make test-browser)"
    )


def pytest_collection_modifyitems(config, items):
    """With --newest, what cannot work is expected to fail, and the reason is printed; if it works, that is an error."""
    if config.getoption("--newest"):
        for item in items:
            for name, reason in CANNOT_WORK.items():
                if item.nodeid.split("[")[0].endswith(name):
                    item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
