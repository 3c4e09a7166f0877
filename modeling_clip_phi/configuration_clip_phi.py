"""Configuration of Clip-Phi: what the weights are."""

import copy
import difflib
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import AddedToken, AutoConfig, PreTrainedConfig

IMAGE_TOKEN = "<image>"
IGNORE_INDEX = -100  # the label of a token that is not learnt; also torch's default of ignore_index

# Where wkcn/TinyCLIP-ViT-61M-32-Text-29M-LAION400M (its vision half) and microsoft/phi-2 differ from the defaults.
TINYCLIP = {"model_type": "clip_vision_model", "hidden_size": 640, "intermediate_size": 2560, "num_attention_heads": 10}
PHI_2: dict[str, Any] = {"model_type": "phi", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32}
PHI_2 |= {"partial_rotary_factor": 0.4, "resid_pdrop": 0.1, "bos_token_id": 50256, "eos_token_id": 50256}

# AutoModel gives the class that has `generate`; pipeline("image-text-to-text") uses AutoModelForImageTextToText.
AUTO_CLASSES = ["AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"]


@strict
class ClipPhiConfig(PreTrainedConfig):
    """Configuration of a vision tower, a projector and a decoder; by default TinyCLIP, one linear layer, phi-2.

    Raises ValueError for a value outside those below, or a keyword that looks like a misspelt field."""

    model_type = "clip_phi"
    sub_configs: ClassVar = {"vision_config": AutoConfig, "text_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar = ["past_key_values", "cache"]

    vision_config: dict | PreTrainedConfig | None = None  # of a transformers vision encoder
    text_config: dict | PreTrainedConfig | None = None  # of a transformers decoder
    image_token_id: int = 50295  # stands for one image feature in input_ids; the embedding needs no row for it
    projector_type: Literal["linear", "mlp", "norm_mlp"] = "linear"  # see make_projector
    projector_bias: bool = True
    # The tower's hidden state for the projector; -1 is the last, which CLIP trains for CLS. LLaVA (2304.08485): -2.
    vision_feature_layer: int = -2
    vision_feature_select_strategy: Literal["default", "full"] = "default"  # patches alone; or CLS and registers too
    vision_backbone: str | None = None  # Hub id or folder of the frozen weights; None in a model without backbones
    vision_backbone_revision: str | None = None  # the commit that it is pinned to; None for a folder
    text_backbone: str | None = None
    text_backbone_revision: str | None = None
    text_tokenizer_sha256: str | None = None  # of its tokenizer's vocabulary; another decoder must have the same
    delta: bool = False  # a checkpoint of trained weights only: the others are loaded from the two backbones
    adapter: str | None = None  # subfolder of a delta checkpoint with a PEFT adapter
    caption_instruction: str | None = None  # asks for a caption; None after stage 1, where an image alone does
    tie_word_embeddings: bool = False  # set from text_config

    def __post_init__(self, **kwargs: Any) -> None:
        for key in kwargs.keys() - self.__dataclass_fields__.keys():
            if match := difflib.get_close_matches(key, self.__dataclass_fields__, n=1, cutoff=0.85):
                raise ValueError(f"ClipPhiConfig has no field {key!r}: did you mean {match[0]!r}?")
        for name, default in (("vision_config", TINYCLIP), ("text_config", PHI_2)):
            if not isinstance(value := getattr(self, name), PreTrainedConfig):
                value = default if value is None else {"model_type": default["model_type"]} | value
                setattr(self, name, AutoConfig.for_model(**value))
        # gelu_new is the same function with eight passes over the activations instead of one: four times the time.
        for name in ("hidden_act", "activation_function"):
            if getattr(self.text_config, name, None) == "gelu_new":
                self.text_config = copy.copy(self.text_config)
                setattr(self.text_config, name, "gelu_pytorch_tanh")
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        kwargs.setdefault("auto_map", dict.fromkeys(AUTO_CLASSES, "modeling_clip_phi.ClipPhiForCausalLM"))
        super().__post_init__(**kwargs)
        layers = getattr(self.vision_config, "num_hidden_layers", None)
        if layers is not None and not -layers - 1 <= self.vision_feature_layer <= layers:
            states = f"{layers + 1} hidden states (-{layers + 1} to {layers}) of the tower"
            raise ValueError(f"vision_feature_layer {self.vision_feature_layer} is not one of the {states}")


def read_config(part: str, path: str, revision: str | None, hub: dict[str, Any]) -> Any:
    """The config of a backbone, "vision" or "text", also where it is one part of a larger model's config."""
    config = AutoConfig.from_pretrained(path, revision=revision or "main", **hub)
    return getattr(config, "vision_config", config) if part == "vision" else config.get_text_config(decoder=True)


def add_special_tokens(tokenizer: Any) -> Any:
    """Add <image>, and <pad> if padding has no token of its own. Without spare rows their ids are behind the last."""
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    if tokenizer.pad_token in (None, tokenizer.eos_token, tokenizer.unk_token):
        tokenizer.add_special_tokens({"pad_token": AddedToken("<pad>", special=True, normalized=False)})
    return tokenizer
