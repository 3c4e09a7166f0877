"""Clip-Phi: a CLIP-like vision tower, a projector and a decoder that reads the projected patches as if they were words.

The method is LLaVA's (arXiv 2304.08485): patch features of a frozen tower, one trained projection, a language model.
Shapes are written (batch, sequence, hidden); "patches" is the number of features that one image gives.
"""

import copy
import hashlib
import inspect
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    modeling_utils,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, torch_compilable_check
from transformers.utils.hub import cached_file

from .configuration_clip_phi import IGNORE_INDEX, ClipPhiConfig

# transformers 5.24 calls the cache "cache" where releases before call it "past_key_values".
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
ADAPTER_FOLDER = "adapter"
WAITS = (1, 2, 4)  # seconds between tries to reach the Hub
# The base of all errors of the HTTP library, whichever one huggingface_hub uses (httpx, later httpx2).
HTTPError = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
# What from_pretrained takes to find files, as opposed to what it takes to place them.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
# What transformers' own classes and pipelines pass along, and what changes nothing for a delta.
PASSIVE_OPTIONS = {
    *("trust_remote_code", "code_revision", "adapter_kwargs", "use_safetensors", "weights_only", "low_cpu_mem_usage"),
    *("_from_auto", "_from_pipeline", "_commit_hash"),
}

# The one block that `clip-phi push` replaces by its own; see clip_phi/hub/card.py.
BRIEF_CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
{base}tags:
- clip-phi
- custom_code
- vision-language
- llava
---

<!-- clip-phi:brief: what stands between these marks is written anew by each push -->
A vision-language model made with Clip-Phi: a vision tower, a projector and a decoder, by the method of LLaVA
([arXiv 2304.08485](https://arxiv.org/abs/2304.08485)). Its prompt format is its processor's chat template.

```python
from transformers import pipeline

chat = pipeline("image-text-to-text", model="{repo_id}", trust_remote_code=True)
```

How it was trained and how good it is was not written down here.
<!-- clip-phi:end -->
"""


@dataclass
class ClipPhiModelOutputWithPast(BaseModelOutputWithPast):
    """image_hidden_states: float (images * patches, text hidden), the projected features, or None."""

    image_hidden_states: torch.Tensor | None = None


@dataclass
class ClipPhiCausalLMOutputWithPast(CausalLMOutputWithPast):
    """loss: scalar, or None without labels. logits: float (batch, kept positions, vocabulary), None if skipped."""

    image_hidden_states: torch.Tensor | None = None


def make_projector(config: ClipPhiConfig) -> nn.Module:
    """The map from the tower's feature width to the decoder's embedding width.

    "linear" is one layer (LLaVA, arXiv 2304.08485); "mlp" is two with GELU between (LLaVA-1.5, arXiv 2310.03744)."""
    vision: Any = config.vision_config
    width, text_width = vision.hidden_size, config.get_text_config().hidden_size
    linear = nn.Linear(width, text_width, bias=config.projector_bias)
    if config.projector_type == "linear":
        return linear
    return nn.Sequential(linear, nn.GELU(), nn.Linear(text_width, text_width, bias=config.projector_bias))


class ClipPhiPreTrainedModel(PreTrainedModel):
    config_class = ClipPhiConfig
    config: ClipPhiConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):  # type: ignore[override]
        """Load a merged or a delta checkpoint from a folder or the Hub, with transformers' own arguments.

        A delta checkpoint names its two backbones: they are loaded from where they come from, at the pinned
        revisions, and the trained weights are put over them.

        Raises ValueError if the checkpoint is of another architecture or if weights are missing: no part of the model
        is ever left at its random initialisation. (An explicit `state_dict` is the caller's own business.) Raises
        OSError if the weights are a pickle and not safetensors, and if the Hub is not reached in several tries."""
        path = pretrained_model_name_or_path
        return _patiently(path, lambda: cls._from_pretrained(path, *model_args, **kwargs))

    @classmethod
    def _from_pretrained(cls, path, *model_args, config=None, **kwargs):
        kwargs.setdefault("use_safetensors", True)  # a pickle can run any code while it is opened
        if path is None or kwargs.get("state_dict") is not None:
            return super().from_pretrained(path, *model_args, config=config, **kwargs)
        peeked = config
        if not isinstance(config, PreTrainedConfig):
            hub = {name: kwargs[name] for name in (*HUB_OPTIONS, "revision", "subfolder") if name in kwargs}
            found, _ = PreTrainedConfig.get_config_dict(config or path, **hub)
            if found.get("model_type") != ClipPhiConfig.model_type:
                raise ValueError(
                    f"{path} holds a {found.get('model_type')!r} model, not a {ClipPhiConfig.model_type!r} one"
                )
            peeked = ClipPhiConfig.from_pretrained(config or path, **hub)
        if peeked.delta:
            model = ClipPhiForCausalLM._from_delta(path, peeked, **kwargs)
            return model if issubclass(cls, ClipPhiForCausalLM) else model.model
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["quantization_config"] = _spare_small_parts(kwargs.get("quantization_config"))
        model, info = super().from_pretrained(path, *model_args, config=config, output_loading_info=True, **kwargs)
        _refuse_missing(path, info["missing_keys"])
        return (model, info) if wants_info else model


class ClipPhiModel(ClipPhiPreTrainedModel):
    """Vision tower, projector and decoder, without the language modelling head."""

    def __init__(self, config: ClipPhiConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.projector = make_projector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        """Project patch features into the decoder's embedding space.

        pixel_values: float (images, 3, height, width), normalised as the tower's image processor does it.
        Returns the tower's output; its pooler_output is a list of one (patches, text hidden) tensor per image.
        Raises ValueError (from the tower) if height or width is not its image_size."""
        wanted = kwargs.pop("output_hidden_states", None)
        kwargs.pop("return_dict", None)
        outputs = self.vision_tower(
            pixel_values.to(self.vision_tower.dtype), output_hidden_states=True, return_dict=True, **kwargs
        )
        features = self._select(outputs.hidden_states)
        if not (self.config.output_hidden_states if wanted is None else wanted):
            outputs.hidden_states = None
        outputs.pooler_output = list(self._project(features))
        return outputs

    @torch.no_grad()
    def get_vision_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """What the projector reads: the frozen tower's (images, patches, vision hidden), to be kept for later.

        pixel_values: float (images, 3, height, width); the result is taken by forward as vision_features."""
        pixel_values = pixel_values.to(self.vision_tower.dtype)
        return self._select(self.vision_tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states)

    def _select(self, hidden_states: tuple[torch.Tensor, ...]) -> torch.Tensor:
        features = hidden_states[self.config.vision_feature_layer]
        return features[:, 1:] if self.config.vision_feature_select_strategy == "default" else features

    def _project(self, features: torch.Tensor) -> torch.Tensor:
        # The projector may be held in fp32 for training while the frozen parts are in bf16.
        return self.projector(features.to(next(self.projector.parameters()).dtype))

    def get_placeholder_mask(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, image_features: torch.Tensor
    ) -> torch.Tensor:
        """Where the image features go: bool (batch, sequence, 1).

        image_features: float (images * patches, text hidden). Without input_ids the places are found by comparing
        inputs_embeds with the embedding of the image token.
        Raises ValueError if the number of places and of features differ; it names both."""
        if input_ids is None:
            image_token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(image_token)).all(-1)
        else:
            mask = input_ids == self.config.image_token_id
        num_tokens, num_features = mask.sum(), image_features.shape[0]
        torch_compilable_check(
            num_tokens == num_features,
            lambda: (
                f"{num_tokens} <image> tokens but {num_features} image features: was the prompt truncated, "
                "or the image left out?"
            ),
        )
        return mask.unsqueeze(-1).to(inputs_embeds.device)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | ClipPhiModelOutputWithPast:
        """input_ids: int (batch, sequence), or inputs_embeds: float (batch, sequence, text hidden).
        pixel_values: float (images, 3, height, width), in the order in which the images stand in the batch; or
        vision_features: float (images, patches, vision hidden), what get_vision_features makes of them.
        attention_mask: int or bool (batch, sequence), or bool (batch, 1, sequence, sequence): True where row may see
        column, as a tree of branches needs it.

        Other keyword arguments go to the decoder: its cache (past_key_values, from transformers 5.24 on called cache),
        and segments, of a row of several trees, to its attention.

        Raises ValueError for both or neither of input_ids and inputs_embeds, for a wrong number of image tokens, and
        for segments if the decoder's attention does not know them."""
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        image_features = None
        if vision_features is not None:
            image_features = self._project(vision_features).flatten(0, 1)
        elif pixel_values is not None:
            image_features = torch.cat(self.get_image_features(pixel_values, return_dict=True).pooler_output)
        if image_features is not None:
            image_features = image_features.to(inputs_embeds.device, inputs_embeds.dtype)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)
            inputs_embeds = inputs_embeds.masked_scatter(mask, image_features)
        elif self.training and torch.is_grad_enabled():
            # DDP waits for a gradient of every trained weight, in a batch without images too.
            weight = next(self.projector.parameters())
            nothing = self.projector(weight.new_zeros(1, weight.shape[1])).sum() * 0
            inputs_embeds = inputs_embeds + nothing.to(inputs_embeds.device, inputs_embeds.dtype)
        if "pack_layout" in kwargs:
            attention = self.language_model.config._attn_implementation
            if not attention.endswith("_packed"):
                raise ValueError(
                    f"{attention!r} attention knows no segments: set_attn_implementation('clip_phi_packed')"
                )
            # Any mask of four dimensions keeps the decoder from making one of its own, of tokens x tokens.
            attention_mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=inputs_embeds.device)
        # generate with a static cache gives a dict of ready masks to decoders that have several kinds of layers
        elif (
            isinstance(attention_mask, torch.Tensor)
            and attention_mask.dtype == torch.bool
            and attention_mask.dim() == 4
        ):
            attention_mask = self._additive_if_eager(attention_mask, inputs_embeds.dtype)
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return ClipPhiModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
        )

    def _additive_if_eager(self, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        # transformers passes a 4D mask through untouched, and eager attention adds it to the scores.
        implementation = self.language_model.config._attn_implementation
        if implementation == "eager":
            return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
        if implementation != "sdpa":
            raise ValueError(f"attention {implementation!r} takes no mask of four dimensions: use 'sdpa' or 'eager'")
        return mask


class ClipPhiForCausalLM(ClipPhiPreTrainedModel, GenerationMixin):
    """Clip-Phi with its language modelling head: what is trained, generated with and shipped.

    max_logits: the most logits that a loss makes at once; 2**26 are 1310 tokens of phi-2, 256 MB in float32."""

    max_logits = 2**26
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: ClipPhiConfig):
        super().__init__(config)
        self.model = ClipPhiModel(config)
        # phi-2's head has a bias, most decoders' heads have none: ask the decoder's own class.
        with torch.device("meta"):
            head = AutoModelForCausalLM.from_config(config.text_config).get_output_embeddings()
        self.lm_head = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None)
        decoder = self.model.language_model
        embeddings = next(name for name, part in decoder.named_modules() if part is decoder.get_input_embeddings())
        self._tied_weights_keys = {"lm_head.weight": f"model.language_model.{embeddings}.weight"}
        _refuse_scaled_logits(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        """See ClipPhiModel.get_image_features."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def get_vision_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """See ClipPhiModel.get_vision_features."""
        return self.model.get_vision_features(pixel_values)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        shift_labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | ClipPhiCausalLMOutputWithPast:
        """Inputs as in ClipPhiModel.forward, and:

        labels: int (batch, sequence), aligned with input_ids; -100 where nothing is asked.
        shift_labels: int (batch, kept positions), instead of labels: the token that follows each kept position.
        logits_to_keep: 0 for all positions, n for the last n, int (kept,) or (batch, kept) for these positions, which
        may repeat (the last token of a tree's prefix is followed by the first of every branch).
        skip_logits: leave logits None. By default while training with labels: the head then runs at supervised
        positions only, and no (sequence, vocabulary) tensor ever exists.
        num_items_in_batch: divide the summed loss by this instead of by the number of supervised tokens."""
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        hidden_states = _keep(outputs.last_hidden_state, logits_to_keep)
        loss = logits = None
        if labels is not None and shift_labels is None:
            shifted = nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]
            shift_labels = _keep(shifted.unsqueeze(-1), logits_to_keep).squeeze(-1)
        if skip_logits is None:
            skip_logits = self.training and shift_labels is not None
        if shift_labels is not None:
            shift_labels = shift_labels.to(hidden_states.device)
            supervised = shift_labels != IGNORE_INDEX
            loss = self._loss(hidden_states[supervised], shift_labels[supervised], **kwargs)
        if not skip_logits:
            logits = self.lm_head(hidden_states)
        return ClipPhiCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def _loss(
        self,
        hidden_states: torch.Tensor,
        targets: torch.Tensor,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Cross-entropy of (supervised, text hidden) with int (supervised,), in chunks of at most max_logits logits.

        Where there are several, each is made again for the backward pass instead of being kept for it."""
        head = self.lm_head

        def of_chunk(hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return self.loss_function(
                logits=head(hidden_states),
                labels=None,
                shift_labels=targets,
                vocab_size=head.out_features,
                num_items_in_batch=num_items_in_batch,
                **kwargs,
            )

        size = max(1, self.max_logits // head.out_features)
        if len(targets) <= size:
            return of_chunk(hidden_states, targets)
        if num_items_in_batch is None:
            num_items_in_batch = len(targets)
        chunks = zip(hidden_states.split(size), targets.split(size), strict=True)
        return sum(checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks)

    # ------------------------------------------------------------------ from two backbones

    @classmethod
    def from_backbones(
        cls,
        vision: str,
        text: str,
        *,
        vision_revision: str | None = None,
        text_revision: str | None = None,
        image_token_id: int | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        quantization_config: Any = None,
        attn_implementation: str | dict[str, str] | None = None,
        max_memory: dict | None = None,
        offload_folder: str | None = None,
        **options: Any,
    ) -> "ClipPhiForCausalLM":
        """Put a pretrained tower and a pretrained decoder together, frozen, with a new projector between them.

        vision, text: Hub ids or folders in transformers' format. A full CLIP-like checkpoint may bring its text half,
        which is left out. vision_revision, text_revision: branch, tag or commit; pinned to the commit it is now.
        image_token_id: by default the decoder's first spare row after its tokenizer (or its own "<image>").
        dtype: of all parts; by default float32. quantization_config: for the decoder alone.
        attn_implementation: one for both parts or {"vision_config": ..., "text_config": ...}.
        options: fields of ClipPhiConfig, and from_pretrained's cache_dir, token, local_files_only, force_download.

        Raises ValueError if a checkpoint lacks weights, or the vocabulary has no row left for <image>."""
        hub = {name: options.pop(name) for name in HUB_OPTIONS if name in options}
        (vision, vision_revision), (text, text_revision) = _patiently(
            f"{vision} and {text}", lambda: (_pin(vision, vision_revision, hub), _pin(text, text_revision, hub))
        )
        vision_config = AutoConfig.from_pretrained(vision, revision=vision_revision or "main", **hub)
        text_config = AutoConfig.from_pretrained(text, revision=text_revision or "main", **hub)
        vocabulary = _vocabulary(text, text_revision, hub, needed=image_token_id is None)
        if image_token_id is None:
            image_token_id = vocabulary.get("<image>", len(vocabulary))
        config = ClipPhiConfig(
            vision_config=getattr(vision_config, "vision_config", vision_config),
            text_config=text_config.get_text_config(decoder=True),
            image_token_id=image_token_id,
            vision_backbone=vision,
            vision_backbone_revision=vision_revision,
            text_backbone=text,
            text_backbone_revision=text_revision,
            text_tokenizer_sha256=_hash(vocabulary) if vocabulary else None,
            delta=True,
            **options,
        )
        placement = (device_map, max_memory, offload_folder)
        return _patiently(
            f"{vision} and {text}",
            lambda: cls._compose(config, hub, dtype, *placement, quantization_config, attn_implementation),
        )

    @classmethod
    def _compose(
        cls, config, hub, dtype, device_map, max_memory, offload_folder, quantization_config, attn_implementation
    ) -> "ClipPhiForCausalLM":
        if config.image_token_id >= config.text_config.vocab_size:
            raise ValueError(
                f"{config.text_backbone} has {config.text_config.vocab_size} vocabulary rows and none of them is left "
                f"for <image> (id {config.image_token_id}): resize its embedding with resize_token_embeddings, "
                "save it and give that folder"
            )
        dtype = _as_dtype(dtype, config)
        # One device is loaded onto directly; several are filled after the parts have been put together.
        spread = isinstance(device_map, str) and device_map in ("auto", "balanced", "balanced_low_0", "sequential")
        spread = spread or (isinstance(device_map, dict) and set(device_map) != {""})
        if spread and quantization_config is not None:
            device_map, spread = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}, False
        placed = {"dtype": dtype, "device_map": None if spread else device_map}
        attention = attn_implementation if isinstance(attn_implementation, dict) else {}
        common = None if attention else attn_implementation
        with _quiet_about_text_half():
            vision_tower = _load_part(
                AutoModel,
                config.vision_backbone,
                config=config.vision_config,
                revision=config.vision_backbone_revision or "main",
                attn_implementation=attention.get("vision_config", common),
                **placed,
                **hub,
            )
        decoder = _load_part(
            AutoModelForCausalLM,
            config.text_backbone,
            config=config.text_config,
            revision=config.text_backbone_revision or "main",
            attn_implementation=attention.get("text_config", common),
            quantization_config=quantization_config,
            **placed,
            **hub,
        )
        config.dtype = dtype
        with torch.device("meta"):
            model = cls(config)
        vision_tower.config.name_or_path = decoder.config.name_or_path = ""  # the backbones' own fields say it
        model.model.vision_tower = vision_tower
        model.model.language_model = decoder.base_model
        model.lm_head = decoder.get_output_embeddings()
        # The parts were loaded with configs of their own: from here on there is one owner.
        model.config.vision_config, model.config.text_config = vision_tower.config, decoder.config
        model.model.projector = make_projector(config).to(dtype=dtype, device=model.lm_head.weight.device)
        model.model.projector.apply(model._init_weights)
        if quantization_config is not None:
            del decoder.config.quantization_config  # the caller's choice of today, not a property of the checkpoint
        for name in ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
            if name in vars(decoder):
                setattr(model, name, getattr(decoder, name))
        model.generation_config = GenerationConfig.from_model_config(config.text_config)
        if model.generation_config.pad_token_id is None:
            model.generation_config.pad_token_id = min(config.image_token_id + 1, config.text_config.vocab_size - 1)
        model.freeze_backbones()
        model.eval()
        return _spread(model, device_map, max_memory, offload_folder) if spread else model

    def freeze_backbones(self) -> None:
        """Freeze the tower, the decoder and its head: no gradients and no dropout; the projector stays trainable.

        phi-2's config has resid_pdrop 0.1: model.train() would switch it on inside the frozen decoder, and .eval()
        would switch gradient checkpointing off. So the probabilities themselves are set to 0."""
        for part in (self.model.vision_tower, self.model.language_model, self.lm_head):
            part.requires_grad_(False)
            for module in part.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
                for name in ("attention_dropout", "dropout"):
                    if isinstance(getattr(module, name, None), float):
                        setattr(module, name, 0.0)

    # ------------------------------------------------------------------ checkpoints

    @classmethod
    def _from_delta(cls, path, config, **kwargs) -> Any:
        hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        place = {"revision": kwargs.pop("revision", None) or "main", "subfolder": kwargs.pop("subfolder", None) or ""}
        wants_info = kwargs.pop("output_loading_info", False)
        options = {
            name: kwargs.pop(name, None)
            for name in (
                *("dtype", "device_map", "max_memory", "offload_folder"),
                *("quantization_config", "attn_implementation"),
            )
        }
        options["dtype"] = options["dtype"] or kwargs.pop("torch_dtype", None)
        given = {name: kwargs.pop(name) for name in list(kwargs) if name in config.to_dict()}
        for part in ("vision", "text"):
            if f"{part}_backbone" in given:  # the pinned commit is one of the other repository
                given.setdefault(f"{part}_backbone_revision", None)
        for name, value in given.items():
            setattr(config, name, value)
        if unknown := sorted(kwargs.keys() - PASSIVE_OPTIONS):
            raise TypeError(f"from_pretrained of a delta checkpoint takes no {', '.join(unknown)}")
        _check_backbones(path, config, hub, other_text="text_backbone" in given)
        model = cls._compose(config, hub, **options)
        model.config.name_or_path = str(path)
        trained = load_file(cached_file(path, "model.safetensors", **place, **hub))
        own = {f"model.projector.{name}": value for name, value in model.model.projector.state_dict().items()}
        _refuse_missing(path, own.keys() - trained.keys())
        for name, value in own.items():
            value.copy_(trained[name])
        if config.adapter is not None:
            try:
                import peft  # noqa: F401
            except ImportError as error:
                raise ImportError(f"{path} holds a LoRA adapter: pip install peft") from error
            # load_adapter's own subfolder is not looked into for the weights by transformers 5.18
            names = (f"{config.adapter}/{name}" for name in ("adapter_config.json", "adapter_model.safetensors"))
            files = [cached_file(path, name, **place, **hub) for name in names]
            model.load_adapter(str(Path(files[0]).parent))
        generation_file = cached_file(
            path, "generation_config.json", _raise_exceptions_for_missing_entries=False, **place, **hub
        )
        if generation_file is not None:
            model.generation_config = GenerationConfig.from_pretrained(path, **place, **hub)
        info = {"missing_keys": set(), "unexpected_keys": set(trained) - set(own), "mismatched_keys": set()}
        model.eval()
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory, *args, merged: bool | None = None, **kwargs):  # type: ignore[override]
        """Save as transformers does, in one of two forms.

        merged=False, the default of a model made from backbones: a delta, which holds the projector, the LoRA adapter
        (in the subfolder "adapter", PEFT's format) and the names and commits of the backbones.
        merged=True: everything in one set, LoRA folded in; no other repository is needed to load it.

        Raises ValueError if a delta would lose trained weights, or a quantised decoder would have to be merged."""
        merged = not self.config.delta if merged is None else merged
        adapted = bool(getattr(self, "_hf_peft_config_loaded", False))
        state = kwargs.pop("state_dict", None)
        # load_adapter leaves its own renaming of weights behind, which would be undone in what is saved here
        plain = {"_hf_peft_config_loaded": False} | ({"_weight_conversions": None} if adapted else {})
        if merged:
            if getattr(self, "hf_quantizer", None) is not None:
                raise ValueError(
                    "a merged checkpoint is not made of quantised weights: save the delta, load it without "
                    "quantization_config, and save that with merged=True"
                )
            state = state or self.state_dict()
            if adapted:
                state = self._folded(state)
            # a folder of this machine says nothing elsewhere, and is not needed any more
            parts = [part for part in ("vision", "text") if getattr(self.config, f"{part}_backbone_revision") is None]
            local = dict.fromkeys(f"{part}_backbone" for part in parts)
            with _temporarily(self.config, delta=False, adapter=None, **local), _temporarily(self, **plain):
                return super().save_pretrained(save_directory, *args, state_dict=state, **kwargs)
        if not self.config.delta:
            raise ValueError("this model was not made from backbones: save it with merged=True")
        lost = [
            name
            for name, parameter in self.named_parameters()
            if parameter.requires_grad and not name.startswith("model.projector.") and "lora_" not in name
        ]
        if lost:
            raise ValueError(
                f"a delta checkpoint would lose {len(lost)} trainable backbone weights ({lost[0]}, ...): "
                "save with merged=True"
            )
        # Not state_dict(): it changes what bitsandbytes' 4-bit layers answer on a CPU (0.50.2, measured)
        state = state or {name: parameter.detach() for name, parameter in self.named_parameters()}
        if adapted:
            self._save_adapter(save_directory, state)
        trained = {name: value for name, value in state.items() if name.startswith("model.projector.")}
        adapter = ADAPTER_FOLDER if adapted else None
        with _temporarily(self.config, delta=True, adapter=adapter), _temporarily(self, hf_quantizer=None, **plain):
            return super().save_pretrained(save_directory, *args, state_dict=trained, **kwargs)

    def push_to_hub(self, repo_id: str, *, merged: bool | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Push as transformers does, with its arguments; merged as in save_pretrained.

        A repository that has no card gets a short one of this model; `clip-phi push` writes the whole one.
        Raises ValueError for a delta whose backbones are folders of this machine: nobody else could load it."""
        merged = not self.config.delta if merged is None else merged
        parts = ("vision", "text")
        local = [part for part in parts if getattr(self.config, f"{part}_backbone_revision") is None]
        if not merged and local and self.config.delta:
            raise ValueError(
                f"the {local[0]} backbone is a folder of this machine, {getattr(self.config, f'{local[0]}_backbone')}, "
                "and nobody else could load a delta of it: push_to_hub(..., merged=True)"
            )
        with _temporarily(self.config, delta=not merged and self.config.delta):
            return super().push_to_hub(repo_id, **kwargs)

    def _upload_modified_files(self, working_dir, repo_id, *args, **kwargs):
        # What transformers puts into a repository without a card says nothing, and looks like a card.
        card = Path(working_dir) / "README.md"
        if not card.is_file() or "has been automatically generated" in card.read_text(encoding="utf-8"):
            backbones = [self.config.vision_backbone, self.config.text_backbone]
            names = [name for name in backbones if name is not None and not Path(name).is_absolute()]
            base = "".join(f"- {name}\n" for name in names)
            head = BRIEF_CARD.format(repo_id=repo_id, base=f"base_model:\n{base}" if base else "")
            card.write_text(head, encoding="utf-8")
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    def _save_adapter(self, save_directory, state: dict[str, torch.Tensor]) -> None:
        folder = Path(save_directory) / ADAPTER_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        name = self.active_adapters()[0]
        weights = self.get_adapter_state_dict(name, state_dict=state)
        weights = {f"base_model.model.{key}": value.contiguous().cpu() for key, value in weights.items()}
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        adapter_config = self.peft_config[name]
        adapter_config.base_model_name_or_path = self.config.text_backbone
        adapter_config.save_pretrained(folder)

    def _folded(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The state dict with W + scaling * B @ A in place of each adapted W; computed in float32."""
        folded = {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}
        adapter = self.active_adapters()[0]
        for name, module in self.named_modules():
            if adapter in getattr(module, "lora_A", {}):
                # Not get_delta_weight: the module's own weights may be sharded, those of the state are whole
                factor_a, factor_b = (state[f"{name}.lora_{part}.{adapter}.weight"].float() for part in "AB")
                delta = (factor_b @ factor_a) * module.scaling[adapter]
                delta = delta.T if module.fan_in_fan_out else delta
                weight = folded[f"{name}.weight"]
                folded[f"{name}.weight"] = (weight.float() + delta.to(weight.device)).to(weight.dtype)
        return folded


def _patiently(what: Any, load: Callable[[], Any]) -> Any:
    """load(), again after growing waits if the connection breaks or the Hub fails; files that have come are cached.

    huggingface_hub goes on with a download that breaks off, and does not try again one that is answered with 5xx."""
    for wait in (*WAITS, None):
        try:
            return load()
        except (OSError, HTTPError) as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, HTTPError):
                cause = cause.__cause__ or cause.__context__
            status = getattr(getattr(cause, "response", None), "status_code", 500)
            # without any network there is nothing to wait for
            if cause is None or status < 500 or type(cause).__name__ == "ConnectError":
                raise
            if wait is None:
                reason = str(cause).strip().split("\n")[0]
                raise OSError(
                    f"{what} cannot be loaded: the Hub was not reached ({reason}). Try again later."
                ) from error
            time.sleep(wait)


def _keep(states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The kept positions of states (batch, sequence, width); see ClipPhiForCausalLM.forward."""
    if isinstance(logits_to_keep, torch.Tensor):
        if logits_to_keep.dim() == 2:
            return torch.take_along_dim(states, logits_to_keep.unsqueeze(-1), dim=1)
        return states[:, logits_to_keep]
    return states[:, -logits_to_keep:] if logits_to_keep else states


def _refuse_missing(path: Any, missing: Any) -> None:
    if missing:
        names = sorted(missing)
        raise ValueError(f"{path} lacks {len(names)} of the weights its config asks for: {', '.join(names[:3])}, ...")


def _refuse_scaled_logits(text_config: PreTrainedConfig) -> None:
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(text_config, name, None) not in (None, 1, 1.0):
            raise ValueError(f"decoders that change their logits after the head ({name}) are not supported")


def _load_part(auto_class: Any, path: str, **kwargs: Any) -> Any:
    with _read_tensor_by_tensor():
        part, info = auto_class.from_pretrained(path, output_loading_info=True, **kwargs)
    _refuse_missing(path, info["missing_keys"])
    return part


def _pin(path: str, revision: str | None, hub: dict[str, Any]) -> tuple[str, str | None]:
    """A folder as (absolute path, None); a Hub repository as (id, the commit that `revision` stands for now)."""
    if Path(path).is_dir():
        return str(Path(path).resolve()), None
    config_file = cached_file(path, "config.json", revision=revision or "main", **hub)
    return str(path), Path(str(config_file)).parent.name  # .../snapshots/<commit>/config.json


def _vocabulary(text: str, revision: str | None, hub: dict[str, Any], needed: bool = True) -> dict[str, int]:
    """Of the decoder's own tokenizer; {} if it has none and it is not needed."""
    try:
        return AutoTokenizer.from_pretrained(text, revision=revision or "main", **hub).get_vocab()
    except (OSError, ValueError):
        if needed:
            raise
        return {}


def _hash(vocabulary: dict[str, int]) -> str:
    return hashlib.sha256(json.dumps(vocabulary, sort_keys=True).encode()).hexdigest()


def _check_backbones(path: Any, config: ClipPhiConfig, hub: dict[str, Any], other_text: bool) -> None:
    """That the two backbones of the delta checkpoint at `path` can be reached and are still what they were."""
    vision = (config.vision_backbone, config.vision_backbone_revision, config.vision_config)
    text = (config.text_backbone, config.text_backbone_revision, config.text_config)
    for backbone, revision, expected in (vision, text):
        try:
            found = AutoConfig.from_pretrained(backbone, revision=revision or "main", **hub)
        except (OSError, ValueError) as error:
            where = f"on the Hub at {revision}" if revision else "as a folder"
            reason = str(error).split("\n")[0]
            raise OSError(
                f"{path} is completed from {backbone}, which was not found {where} ({reason}): put it back there, or "
                "use the checkpoint that save_pretrained(..., merged=True) makes"
            ) from error
        is_tower = expected is config.vision_config
        found = getattr(found, "vision_config", found) if is_tower else found.get_text_config(decoder=True)
        for name in ("hidden_size",) if is_tower else ("hidden_size", "vocab_size"):
            if getattr(found, name) != getattr(expected, name):
                raise ValueError(
                    f"{path} was trained on {backbone} with {name} {getattr(expected, name)}, which now has "
                    f"{name} {getattr(found, name)}"
                )
    # A commit does not change, but a folder may, and so may the backbone that the caller wants.
    backbone, revision, _ = text
    may_differ = config.text_tokenizer_sha256 is not None and (revision is None or other_text)
    if may_differ and _hash(_vocabulary(str(backbone), revision, hub)) != config.text_tokenizer_sha256:
        raise ValueError(f"{path} was trained with another tokenizer than that of {backbone}: its tokens differ")


def _as_dtype(dtype: torch.dtype | str | None, config: ClipPhiConfig) -> torch.dtype:
    if dtype is None or dtype == "auto":
        dtype = config.dtype or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _spare_small_parts(quantization_config: Any) -> Any:
    """Leave the tower, the projector and the head out of a bitsandbytes quantisation that names no exceptions."""
    if getattr(quantization_config, "llm_int8_skip_modules", ...) is None:
        quantization_config = copy.copy(quantization_config)
        # transformers compares these with the beginning of a module's name, which differs for the headless class
        parts = ("vision_tower", "projector")
        quantization_config.llm_int8_skip_modules = ["lm_head", *parts, *(f"model.{part}" for part in parts)]
    return quantization_config


def _spread(
    model: ClipPhiForCausalLM, device_map: Any, max_memory: dict | None, offload_folder: str | None
) -> ClipPhiForCausalLM:
    try:
        from accelerate import dispatch_model, infer_auto_device_map
        from accelerate.utils import get_balanced_memory
    except ImportError as error:
        raise ImportError("device_map needs accelerate: pip install accelerate") from error
    if isinstance(device_map, str):
        whole = list(model._no_split_modules or [])
        if device_map != "sequential":
            max_memory = get_balanced_memory(
                model, max_memory, no_split_module_classes=whole, low_zero=device_map == "balanced_low_0"
            )
        device_map = infer_auto_device_map(model, max_memory=max_memory, no_split_module_classes=whole)
    return dispatch_model(
        model, device_map=device_map, offload_dir=offload_folder, skip_keys=model._skip_keys_device_placement
    )


@contextmanager
def _quiet_about_text_half() -> Iterator[None]:
    """Leave out transformers' report, a line a weight, if all it says is that a CLIP's text half is not used."""

    def is_news(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        rows = [line for line in message.splitlines() if " | " in line][1:]  # the first is the table's head
        half = ("text_model.", "text_projection", "visual_projection", "logit_")
        return "LOAD REPORT" not in message or not all(row.startswith(half) and "UNEXPECTED" in row for row in rows)

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_news)
    try:
        yield
    finally:
        logger.removeFilter(is_news)


@contextmanager
def _read_tensor_by_tensor() -> Iterator[None]:
    """Have transformers read checkpoint files instead of mapping them, where safetensors can (0.8).

    A mapped file's pages stay in memory until all of it is loaded: 5 GB of phi-2's fp16 beside its 11 in float32."""

    def opened(*args: Any, **kwargs: Any) -> Any:
        return safe_open(*args, **kwargs | {"backend": "pread"})

    can_read = "backend" in inspect.signature(safe_open).parameters
    with _temporarily(modeling_utils, safe_open=opened if can_read else safe_open):
        yield


@contextmanager
def _temporarily(target: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(target, name) for name in values if hasattr(target, name)}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name in values:
            if name in before:
                setattr(target, name, before[name])
            else:
                delattr(target, name)


ClipPhiConfig.register_for_auto_class()
ClipPhiForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["ClipPhiForCausalLM", "ClipPhiModel", "ClipPhiPreTrainedModel"]
