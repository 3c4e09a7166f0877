"""Two frozen backbones to one Clip-Phi model, and back: pinned revisions, delta and merged checkpoints, adapters.

A delta checkpoint holds trained weights only (the projector, a PEFT adapter) and names its two backbones."""

import copy
import hashlib
import importlib
import json
import logging
import re
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils.hub import cached_file

from .configuration_clip_phi import IMAGE_TOKEN, ClipPhiConfig, add_special_tokens, read_config

PEFT_PREFIX = "base_model.model."  # of each name in PEFT's files
PEFT_PARTS = re.compile(r"\.base_layer(?=\.)|\.modules_to_save\.\w+(?=\.)")  # what it adds to the names of weights
HUB_OPTIONS = ["cache_dir", "force_download", "local_files_only", "proxies", "token"]
PLACEMENT = ["dtype", "device_map", "max_memory", "offload_folder", "quantization_config", "attn_implementation"]
# Arguments that transformers' own classes and pipelines pass along, and that change nothing for a delta.
PASSIVE = ["trust_remote_code", "code_revision", "adapter_kwargs", "use_safetensors", "weights_only", "_from_auto"]
PASSIVE += ["low_cpu_mem_usage", "_from_pipeline", "_commit_hash"]
SEVERAL_DEVICES = ["auto", "balanced", "balanced_low_0", "sequential"]
CHANGED = torch.tensor(torch.nan)  # equal to nothing


class ClipPhiPreTrainedModel(PreTrainedModel):
    """Loading and saving; modeling_clip_phi.py has the forward passes."""

    config: ClipPhiConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = _supports_sdpa = _supports_flex_attn = _supports_attention_backend = True
    supports_gradient_checkpointing = _can_compile_fullgraph = True
    whole_class: Any = None  # ClipPhiForCausalLM
    loaded_backbones: dict[str, torch.Tensor | None] | None = None  # see sample_backbones

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """Load a merged or a delta checkpoint, with transformers' arguments; for a delta also fields of ClipPhiConfig.

        A `state_dict` is not checked. Raises ValueError for another architecture and for weights that are unknown, of
        another shape, or missing (output_loading_info reports these); OSError for an absent file, and for a pickle."""
        path = pretrained_model_name_or_path
        kwargs.setdefault("use_safetensors", True)  # a pickle can run any code while it is opened
        if path is None or kwargs.get("state_dict") is not None:
            return super().from_pretrained(path, *model_args, config=config, **kwargs)
        known = copy.deepcopy(config)  # which loading changes
        if not isinstance(config, PreTrainedConfig):
            fields, _ = PreTrainedConfig.get_config_dict(config or path, **kwargs)
            if (kind := fields.get("model_type")) != ClipPhiConfig.model_type:
                raise ValueError(f"{path} holds a {kind!r} model, not a {ClipPhiConfig.model_type!r} one")
            known = ClipPhiConfig.from_dict(fields)
        wants_info = kwargs.pop("output_loading_info", False)
        info: dict[str, Any] = {f"{kind}_keys": set() for kind in ("missing", "unexpected", "mismatched")}
        if known.delta:
            model = load_delta(cls.whole_class, path, known, kwargs, info["missing_keys"])
            model = model if issubclass(cls, cls.whole_class) else model.model
        else:
            quantization: Any = copy.copy(kwargs.get("quantization_config"))
            if getattr(quantization, "llm_int8_skip_modules", ...) is None:  # bitsandbytes, for the decoder alone
                quantization.llm_int8_skip_modules = ["lm_head", "(model.)?vision_tower", "(model.)?projector"]
            kwargs |= {"quantization_config": quantization, "output_loading_info": True}
            model, info = super().from_pretrained(path, *model_args, config=config, **kwargs)
            model.base_model.vision_tower.requires_grad_(False)  # until the caller asks for it
        refuse_missing(path, set() if wants_info else info["missing_keys"])
        return (model, info) if wants_info else model

    @classmethod
    def from_backbones(cls, vision, text, *, vision_revision=None, text_revision=None, **options):
        """A pretrained tower and a pretrained decoder (Hub id or folder), frozen, with a new projector between them.

        Args:
            vision_revision, text_revision: branch, tag or commit; the config keeps the commit.
            options: HUB_OPTIONS; PLACEMENT (quantization_config is for the decoder alone, attn_implementation may be
                {"vision_config": ..., "text_config": ...}, dtype is float32 by default); fields of ClipPhiConfig
                (image_token_id is by default the tokenizer's "<image>", or the first id after its last token).

        Raises ValueError if a checkpoint lacks weights or is not supported; TypeError for an unknown option."""
        hub, placement, _, fields = sort_options(options)
        fields |= pin_backbone("vision", vision, vision_revision, hub) | pin_backbone("text", text, text_revision, hub)
        tokenizer, fields["text_tokenizer_sha256"] = load_tokenizer(text, fields["text_backbone_revision"], hub)
        fields.setdefault("image_token_id", add_special_tokens(tokenizer).convert_tokens_to_ids(IMAGE_TOKEN))
        return load_backbones(cls, ClipPhiConfig(delta=True, **fields), hub, placement, tokenizer).dispatch(placement)

    def freeze_backbones(self) -> None:
        """Freeze tower, decoder and head: no gradients, and no dropout in train mode either (phi-2's is 0.1)."""
        for part in (self.model.vision_tower, self.model.language_model, self.lm_head):
            part.requires_grad_(False)
            for module in part.modules():
                for name in ("p", "attention_dropout", "dropout"):  # p: of nn.Dropout
                    if isinstance(getattr(module, name, None), float):
                        setattr(module, name, 0.0)

    def add_adapter(self, adapter_config: Any, adapter_name: str | None = None) -> None:
        """Add a PEFT adapter. Raises ValueError if there is one. transformers' own refuses peft 0.21 from 5.24 on."""
        if getattr(self, "peft_config", None):
            raise ValueError("the model has an adapter: save it with merged=True, and load that to add another one")
        importlib.import_module("peft").inject_adapter_in_model(adapter_config, self, adapter_name or "default")
        self._hf_peft_config_loaded = True

    def save_pretrained(self, save_directory, *args, merged: bool | None = None, **kwargs):
        """Save as transformers does, in one of two forms.

        merged: False, the default of a model made from backbones: the projector, the LoRA adapter (in the subfolder
            "adapter", PEFT's format) and the names and commits of the backbones. True: all weights, LoRA folded in.
        Raises ValueError if a delta would lose weights that are trainable or have changed since loading, or a part of
        its adapter; or if quantised weights, or an adapter other than plain LoRA, would have to be merged."""
        # Trainer passes state_dict and no merged. It resumes from model.safetensors alone: the adapter is there, too.
        by_trainer, state_dict = merged is None and "state_dict" in kwargs, kwargs.pop("state_dict", None)
        adapted = bool(getattr(self, "peft_config", None))  # transformers would save an adapter alone
        own: dict[str, Any] = {"_hf_peft_config_loaded": False} | ({"_weight_conversions": None} if adapted else {})
        fields: dict[str, Any] = {"delta": False, "adapter": None}
        if not self.config.delta if merged is None else merged:
            if getattr(self, "hf_quantizer", None) is not None:
                raise ValueError("quantised weights cannot be merged: save the delta, and load it without quantisation")
            state = fold_adapter(self, state_dict or self.state_dict())
            fields |= dict.fromkeys(f"{part}_backbone" for part in self.local_parts())  # not needed any more
        else:
            if not self.config.delta or self.loaded_backbones is None:
                raise ValueError("this model was not made from backbones: save it with merged=True")
            old, new = self.loaded_backbones, sample_backbones(self)
            if lost := [name for name in new | old if not is_same(old.get(name, CHANGED), new.get(name, CHANGED))]:
                count = f"{len(lost)} trainable or changed backbone weights ({lost[0]}, ...)"
                raise ValueError(f"a delta checkpoint would lose {count}: save with merged=True")
            # Not state_dict(): it changes what bitsandbytes' 4-bit layers answer on a CPU (0.50.2, measured)
            state = state_dict or {name: parameter.detach() for name, parameter in self.named_parameters()}
            if adapted:
                weights, folder = self.adapter_weights(state), Path(save_directory) / "adapter"
                refuse_missing("state_dict", self.adapter_weights().keys() - weights.keys())
                if any(weight.is_meta for weight in weights.values()):
                    raise ValueError("the adapter is offloaded: load the model without device_map to save it")
                adapter_config = copy.copy(next(iter(self.peft_config.values())))
                adapter_config.base_model_name_or_path = self.config.text_backbone
                adapter_config.modules_to_save = None  # the projector is in model.safetensors
                adapter_config.save_pretrained(folder)
                tensors = {PEFT_PREFIX + name: weights[name].contiguous().cpu() for name in weights if "lora_" in name}
                save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
            kept = {PEFT_PARTS.sub("", name): name for name in state if "original_module" not in name}
            names = [name for name in kept if (by_trainer if "lora_" in name else name.startswith("model.projector."))]
            state = {name: state[kept[name]] for name in names}
            fields = {"delta": True, "adapter": "adapter" if adapted else None}
            own["hf_quantizer"], kwargs["max_shard_size"] = None, "1TB"  # from_pretrained reads one file
        with patch.multiple(self.config, create=True, **fields), patch.multiple(self, create=True, **own):
            return super().save_pretrained(save_directory, *args, state_dict=state, **kwargs)

    def load_state_dict(self, state_dict, *args, **kwargs):
        """As torch's. Raises ValueError if an adapter's weights are absent, which Trainer would not notice."""
        if getattr(self, "peft_config", None) and not any("lora_" in name for name in state_dict):
            raise ValueError("the model has an adapter, these weights have none: load them with from_pretrained")
        own = {PEFT_PARTS.sub("", name): name for name, _ in self.named_parameters()}
        return super().load_state_dict({own.get(name, name): state_dict[name] for name in state_dict}, *args, **kwargs)

    def push_to_hub(self, repo_id: str, *, merged: bool | None = None, **kwargs: Any) -> Any:
        """Push without a model card; merged as in save_pretrained. Raises ValueError for a delta of local folders."""
        delta = self.config.delta and not merged
        for part in self.local_parts() if delta else []:
            raise ValueError(f"the {part} backbone is a local folder: push a whole model, with merged=True")
        with patch.object(self.config, "delta", delta):
            return super().push_to_hub(repo_id, **kwargs)

    def local_parts(self) -> list[str]:
        return [part for part in ("vision", "text") if getattr(self.config, f"{part}_backbone_revision") is None]

    def adapter_weights(self, state: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """The adapter's weights, the model's own or those in a state dict, under PEFT's names."""
        peft, (name,) = importlib.import_module("peft"), self.peft_config
        options = {"state_dict": state or dict(self.named_parameters()), "save_embedding_layers": False}
        return peft.get_peft_model_state_dict(self, adapter_name=name, **options)

    def dispatch(self, placement: dict[str, Any]) -> Any:
        """Place a model that is loaded completely: copying into a weight that was moved to the disk has no effect."""
        if not placement["dispatch"]:
            return self
        accelerate, memory = importlib.import_module("accelerate"), placement.get("max_memory")
        if isinstance(device_map := placement["device_map"], str):  # each device is filled before the next one
            device_map = accelerate.infer_auto_device_map(self, memory, self._no_split_modules, clean_result=False)
        if folder := placement.get("offload_folder"):
            Path(folder).mkdir(parents=True, exist_ok=True)  # accelerate would use what another model left in it:
            self.offloaded = self.base_model.offloaded = tempfile.TemporaryDirectory(dir=folder)  # so one of its own
        options = {"offload_dir": folder and self.offloaded.name, "skip_keys": self._skip_keys_device_placement}
        return accelerate.dispatch_model(self, device_map, **options)


def load_backbones(model_class: Any, config: Any, hub: dict, placement: dict, tokenizer: Any = None) -> Any:
    """A model of config's two backbones, frozen, with a new projector; dispatch() must follow."""
    dtype = config.dtype or torch.float32 if (given := placement.get("dtype")) in (None, "auto") else given
    config.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    quantization, attention = placement.get("quantization_config"), placement.get("attn_implementation")
    device_map: Any = placement.get("device_map")
    several = set(device_map) != {""} if isinstance(device_map, dict) else device_map in SEVERAL_DEVICES
    placement["dispatch"] = several and quantization is None  # bitsandbytes' layers stay where they were made
    if several:
        device_map = {"": "cpu" if quantization is None else torch.accelerator.current_accelerator(True) or "cpu"}
    loaded = []
    for part, auto_class in (("vision", AutoModel), ("text", AutoModelForCausalLM)):
        path, revision = getattr(config, f"{part}_backbone"), getattr(config, f"{part}_backbone_revision")
        options = {"config": getattr(config, f"{part}_config"), "revision": revision or "main", "dtype": config.dtype}
        options["attn_implementation"] = attention.get(f"{part}_config") if isinstance(attention, dict) else attention
        options |= {"device_map": device_map, "quantization_config": quantization if part == "text" else None}
        # transformers would report each weight of a CLIP's unused text half.
        with patch.object(logging.getLogger("transformers.modeling_utils"), "disabled", part == "vision"):
            model, info = auto_class.from_pretrained(path, output_loading_info=True, **options, **hub)
        refuse_missing(path, info["missing_keys"])
        unused = [name for name in info["unexpected_keys"] if not name.startswith(("text_", "visual_proj", "logit_"))]
        if unused and part == "vision":
            logging.getLogger(__name__).warning("%s: weights that are not used: %s", path, sorted(unused))
        loaded.append(model)
    vision_tower, decoder = loaded
    with torch.device("meta"):
        model = model_class(config)
    vision_tower.config.name_or_path = decoder.config.name_or_path = ""  # the config's own fields name them
    model.model.vision_tower, model.model.language_model = vision_tower, decoder.base_model
    model.lm_head = decoder.get_output_embeddings()
    # Each part was loaded with a config of its own: model and parts must share one.
    model.config.vision_config, model.config.text_config = vision_tower.config, decoder.config
    projector = model.model.projector = make_projector(config, decoder.get_input_embeddings())
    projector.to(dtype=config.dtype, device=model.lm_head.weight.device).apply(model._init_weights)
    if quantization is not None:
        del decoder.config.quantization_config  # chosen at each load, and no property of the checkpoint
    names = ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")
    vars(model).update({name: vars(decoder)[name] for name in names if name in vars(decoder)})
    generation = model.generation_config = GenerationConfig.from_model_config(config.text_config)
    # Training learns the tokenizer's end token, which the decoder's config may not name.
    found = [getattr(tokenizer, "eos_token_id", None), generation.eos_token_id, decoder.generation_config.eos_token_id]
    ends = {end: None for some in found for end in (some if isinstance(some, list) else [some]) if end is not None}
    generation.eos_token_id = list(ends) if len(ends) > 1 else next(iter(ends), None)
    generation.pad_token_id = getattr(tokenizer, "pad_token_id", generation.pad_token_id)
    model.freeze_backbones()
    model.loaded_backbones = sample_backbones(model)
    return model.eval()


def make_projector(config: Any, embedding: nn.Module) -> nn.Module:
    """Tower width to embedding width: "linear" (LLaVA, arXiv 2304.08485), "mlp" (LLaVA-1.5, arXiv 2310.03744), or
    "norm_mlp", whose wide middle can hold LLaVA's residual block."""
    width, size = getattr(config.vision_config, "hidden_size", None), getattr(config.vision_config, "image_size", 224)
    if width is None or hasattr(config.vision_config, "depths"):  # each of several stages has another width
        width = measure_tower(config, *([size] * 2 if isinstance(size, int) else size))[1]
    text_width, bias = embedding.weight.shape[1], config.projector_bias
    linear, norm = nn.Linear(width, text_width, bias), config.projector_type == "norm_mlp"
    if config.projector_type == "linear":
        return linear
    first = [nn.LayerNorm(text_width), nn.Linear(text_width, 3 * text_width)] if norm else []
    last = nn.Linear(text_width * (3 if norm else 1), text_width, bias or norm)
    return nn.Sequential(linear, *first, nn.GELU(), last)


def measure_tower(config: Any, *size: int) -> torch.Size:
    """Number and width of the features of an image (height, width), by the tower's forward pass, on no device."""
    try:
        with torch.device("meta"):
            tower, pixels = AutoModel.from_config(copy.deepcopy(config.vision_config)).eval(), torch.empty(1, 3, *size)
            return select_patches(tower(pixels, output_hidden_states=True, return_dict=True), config, *size).shape[1:]
    except Exception as error:  # of the tower's own code
        what = f"{config.vision_config.model_type!r} towers are not supported with {size} pixels"
        raise ValueError(f"{what}: {' '.join(str(error).split())[:200]}") from error


def select_patches(outputs: Any, config: Any, height: int, width: int) -> torch.Tensor:
    """Features (images, patches, width) of a tower's hidden state, a map or a sequence, for pixels of this size.

    Of a sequence, "default" leaves out what is before the patches: CLS, registers, or nothing."""
    states, vision = outputs.hidden_states[config.vision_feature_layer], config.vision_config
    if states.dim() == 4:  # channels last, or first
        last = states.shape[1] == states.shape[2] != states.shape[3]
        return (states if last else states.movedim(1, -1)).flatten(1, 2)
    if config.vision_feature_select_strategy == "full":
        return states
    rows, columns = [vision.patch_size] * 2 if isinstance(vision.patch_size, int) else vision.patch_size
    patches, count = height // rows * (width // columns), states.shape[1]
    if (count < patches and patches % count) or hasattr(vision, "num_detection_tokens"):  # some masked; YOLOS
        raise ValueError(f"its {count} features are not those of {patches} patches after CLS and registers")
    return states[:, max(0, count - patches) :]  # all, where patches are merged (Swin)


def pin_backbone(part: str, path: Any, revision: str | None, hub: dict) -> dict[str, Any]:
    """Fields of ClipPhiConfig: the id of a repository and the commit of a `revision`, or a folder; and its config."""
    folder = Path(str(cached_file(path, "config.json", revision=revision or "main", **hub))).parent
    path, commit = (str(folder.resolve()), None) if Path(path).is_dir() else (path, folder.name)  # snapshots/<commit>
    config = read_config(part, path, commit, hub)
    return {f"{part}_backbone": path, f"{part}_backbone_revision": commit, f"{part}_config": config}


def load_tokenizer(path: Any, revision: str | None, hub: dict) -> tuple[Any, str]:
    """A tokenizer, and the hash of its vocabulary."""
    tokenizer = AutoTokenizer.from_pretrained(path, revision=revision or "main", **hub)
    return tokenizer, hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()


def sort_options(options: dict[str, Any]) -> list[dict[str, Any]]:
    """`options` as HUB_OPTIONS, PLACEMENT, PASSIVE and fields of ClipPhiConfig. Raises TypeError for others."""
    options["dtype"] = options.pop("dtype", None) or options.pop("torch_dtype", None)
    kinds = (HUB_OPTIONS, PLACEMENT, PASSIVE, ClipPhiConfig.__dataclass_fields__)
    found = [{name: options.pop(name) for name in names if name in options} for names in kinds]
    if options:
        raise TypeError(f"a model of two backbones takes no {', '.join(options)}")
    return found


def load_delta(model_class: Any, path: Any, config: ClipPhiConfig, options: dict, missing: set[str]) -> Any:
    own = {"revision": options.pop("revision", None) or "main", "subfolder": options.pop("subfolder", None) or ""}
    hub, placement, _, fields = sort_options(options)
    own |= hub
    for name in {"vision_backbone", "text_backbone"} & fields.keys():
        fields.setdefault(f"{name}_revision", None)  # the checkpoint's commit is one of the other repository
    config.update(fields)
    check_backbones(path, config, hub, other_text="text_backbone" in fields)
    model = load_backbones(model_class, config, hub, placement)
    model.config.name_or_path = str(path)
    projector = {f"model.projector.{name}": weight for name, weight in model.model.projector.named_parameters()}
    found = load_file(cached_file(path, "model.safetensors", **own))
    missing |= copy_weights(path, {name: found[name] for name in found if "lora_" not in name}, projector)
    if (folder := config.adapter) is not None:
        if Path(folder).is_absolute() or ".." in Path(folder).parts:
            raise ValueError(f"the adapter {folder} of {path} is not in its folder")
        try:  # transformers refuses remote code if a package is absent that an import statement outside a try names
            from peft import PeftConfig
        except ImportError as error:
            raise ImportError(f"{path} holds a LoRA adapter: pip install peft") from error
        adapter_file = Path(str(cached_file(path, f"{folder}/adapter_config.json", **own)))
        adapter_config = PeftConfig.from_pretrained(str(adapter_file.parent))
        adapter_config.inference_mode = True  # frozen
        model.add_adapter(adapter_config)
        found = load_file(cached_file(path, f"{folder}/adapter_model.safetensors", **own))
        found = {name.removeprefix(PEFT_PREFIX): weight for name, weight in found.items()}
        missing |= copy_weights(f"{path}/{folder}", found, model.adapter_weights())
    if cached_file(path, "generation_config.json", _raise_exceptions_for_missing_entries=False, **own):
        model.generation_config = GenerationConfig.from_pretrained(path, **own)
    return model.eval().dispatch(placement)


def check_backbones(path: Any, config: ClipPhiConfig, hub: dict, other_text: bool) -> None:
    """Raise OSError if a backbone of the delta is not found, ValueError if it differs; other_text: the caller's own."""
    for part in ("vision", "text"):
        backbone, revision = getattr(config, f"{part}_backbone"), getattr(config, f"{part}_backbone_revision")
        try:
            found = pin_backbone(part, backbone, revision, hub)
        except (OSError, ValueError) as error:
            where, reason = f"on the Hub at {revision}" if revision else "as a folder", str(error).split("\n")[0]
            problem = f"{path} needs {backbone}, which was not found {where} ({reason})"
            raise OSError(f"{problem}: put it back there, or use a checkpoint saved with merged=True") from error
        known, now_there = getattr(config, f"{part}_config"), found.pop(f"{part}_config")
        for size in ("hidden_size", "vocab_size"):
            if (before := getattr(known, size, None)) != (now := getattr(now_there, size, None)):
                raise ValueError(f"{path} was trained on {backbone} with {size} {before}, which now has {size} {now}")
        config.update(found)
    # A commit does not change, but a folder may, and so may the backbone that the caller gives.
    sha256, may_differ = config.text_tokenizer_sha256, revision is None or other_text
    if sha256 is not None and may_differ and load_tokenizer(backbone, config.text_backbone_revision, hub)[1] != sha256:
        raise ValueError(f"{path} was trained with another tokenizer than that of {backbone}: its tokens differ")


def refuse_missing(path: Any, missing: set[str]) -> None:
    if names := sorted(missing):
        raise ValueError(f"{path} lacks {len(names)} of the weights its config asks for: {', '.join(names[:3])}, ...")


def copy_weights(path: Any, found: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> set[str]:
    """Copy weights into the model's own; returns what is missing. Raises ValueError for other names or shapes."""
    if unknown := sorted(found.keys() - own.keys()):
        raise ValueError(f"{path} holds {len(unknown)} weights that the model has no place for: {unknown[0]}, ...")
    for name, weight in ((name, own[name]) for name in own if name in found):
        if found[name].shape != weight.shape:
            raise ValueError(f"{path}: {name} has shape {tuple(found[name].shape)}, not {tuple(weight.shape)}")
        weight.data.copy_(found[name])
    return own.keys() - found.keys()


def sample_backbones(model: nn.Module) -> dict[str, torch.Tensor | None]:
    """One number of each row of each backbone weight; NaN if it is trained; None if sharded, offloaded or quantised."""
    samples: dict[str, torch.Tensor | None] = {}
    for name, weight in model.named_parameters():
        if not name.startswith("model.projector.") and "lora_" not in name:
            sample = CHANGED if weight.requires_grad else None
            if sample is None and weight.is_floating_point() and not (weight.is_meta or hasattr(weight, "device_mesh")):
                rows = weight.detach().reshape(len(weight) if weight.dim() else 1, -1)
                sample = rows[:, rows.shape[1] // 2].to("cpu", copy=True)
            samples[PEFT_PARTS.sub("", name)] = sample
    return samples


def is_same(old: torch.Tensor | None, new: torch.Tensor | None) -> bool:
    """Whether two samples of a weight are equal; a cast to another floating-point type is not a change."""
    if old is None or new is None:
        return new is None
    return any(torch.equal(old.to(dtype).to(new.dtype), new) for dtype in (old.dtype, torch.bfloat16, torch.float16))


@torch.no_grad()
def fold_adapter(model: nn.Module, state: dict[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    """A state dict with LoRA folded in: W + scaling * B @ A in float32 (arXiv 2106.09685, section 4.1).

    The model stays as it is. Raises ValueError for other adapters, and layers that are quantised or offloaded."""
    kept = (key for key in state if ".lora_" not in key and ".original_module." not in key)
    folded = {PEFT_PARTS.sub("", key): state[key] for key in kept}
    adapted = {path: part for path, part in model.named_modules(prefix=prefix) if hasattr(part, "get_base_layer")}
    for path, layer in adapted.items():
        (name,), weight = layer.active_adapters, folded[f"{path}.weight"]
        plain = name in getattr(layer, "lora_A", ()) and not (layer.lora_variant.get(name) or layer.lora_bias.get(name))
        if not (plain and weight.dim() == 2 and weight.is_floating_point() and not weight.is_meta):
            raise ValueError(f"the adapter of {path} cannot be folded in: it must be plain LoRA on a linear layer")
        if name not in layer.merged_adapters:
            factors = (state[f"{path}.lora_{part}.{name}.weight"].float() for part in "BA")
            delta = torch.mm(*factors).to(weight.device) * layer.scaling[name]
            folded[f"{path}.weight"] = (weight.float() + (delta.T if layer.fan_in_fan_out else delta)).to(weight.dtype)
    return folded
