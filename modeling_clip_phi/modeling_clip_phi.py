"""Clip-Phi: a CLIP-like vision tower, a projector and a decoder that takes the projected patches as token embeddings.

The method is LLaVA's (arXiv 2304.08485). Shapes: "patches" is the number of features that one image gives."""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, torch_compilable_check

from .backbones import ClipPhiPreTrainedModel, make_projector, select_patches
from .configuration_clip_phi import IGNORE_INDEX, ClipPhiConfig


class ClipPhiModel(ClipPhiPreTrainedModel):
    """Vision tower, projector and decoder, without the language modelling head."""

    def __init__(self, config: ClipPhiConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.projector = make_projector(config, self.get_input_embeddings())
        self.post_init()

    def train(self, mode: bool = True) -> "ClipPhiModel":
        """torch's; but a frozen tower stays in eval mode, with its batch norms and drop paths."""
        super().train(mode)
        self.vision_tower.train(mode and any(weight.requires_grad for weight in self.vision_tower.parameters()))
        return self

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> Any:
        """The tower's output; its pooler_output lists a projected (patches, text hidden) tensor for each image.

        pixel_values: float (images, 3, height, width), as the image processor gives them."""
        wanted = kwargs.pop("output_hidden_states", self.config.output_hidden_states)
        outputs, features = self._run_tower(pixel_values, **kwargs)
        outputs.pooler_output = list(self._project(features))
        outputs.hidden_states = outputs.hidden_states if wanted else None
        return outputs

    @torch.no_grad()
    def get_vision_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The projector's input, float (images, patches, vision hidden); forward takes it as vision_features."""
        return self._run_tower(pixel_values)[1]

    def _run_tower(self, pixel_values: torch.Tensor, **kwargs: Any) -> tuple[Any, torch.Tensor]:
        kwargs |= {"output_hidden_states": True, "return_dict": True}
        outputs = self.vision_tower(pixel_values.to(self.vision_tower.dtype), **kwargs)
        return outputs, select_patches(outputs, self.config, *pixel_values.shape[2:])

    def _project(self, features: torch.Tensor) -> torch.Tensor:
        return self.projector(features.to(next(self.projector.parameters()).dtype))  # which may be fp32 in training

    def get_placeholder_mask(self, input_ids: Any, inputs_embeds: torch.Tensor, image_features: torch.Tensor) -> Any:
        """Where image_features, float (images * patches, text hidden), go: bool (batch, sequence, 1).

        Without input_ids, the embedding of the image token is looked for. Raises ValueError if the numbers differ."""
        mask = input_ids == self.config.image_token_id
        if input_ids is None:
            if self.config.image_token_id >= self.config.get_text_config().vocab_size:
                raise ValueError("<image> has no row of the embedding to be found by: give input_ids")
            image_token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(image_token)).all(-1)
        num_tokens, num_features = mask.sum(), image_features.shape[0]
        message = "{} <image> tokens but {} image features: was the prompt truncated, or the image left out?"
        torch_compilable_check(num_tokens == num_features, lambda: message.format(num_tokens, num_features))
        return mask.unsqueeze(-1).to(image_features.device)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Any:
        """Run the decoder on text and projected images; returns the decoder's output.

        Args:
            input_ids: int (batch, sequence), or inputs_embeds: float (batch, sequence, text hidden).
            pixel_values: float (images, 3, height, width), in the order of their places in the batch; or
                vision_features: float (images, patches, vision hidden), from get_vision_features; or in kwargs
                mm_encoder_outputs: {"image": the result of get_image_features}.
            attention_mask: int or bool (batch, sequence); or bool (batch, 1, queries, keys), True where one attends.
            kwargs: of the decoder: position_ids, its cache, and the pack_layout of several samples in one sequence.

        Raises ValueError for a wrong number of image tokens, or a mask that the decoder's attention cannot use."""
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            rows, ids = self.config.get_text_config().vocab_size, torch.as_tensor(input_ids)
            # <image> and padding, the last two ids, need no row: one is replaced, the other masked.
            has_none = (ids >= rows) & (ids < max(rows, self.config.image_token_id) + 2)
            inputs_embeds = self.get_input_embeddings()(ids.masked_fill(has_none, 0))
        encoded = kwargs.pop("mm_encoder_outputs", None)
        if pixel_values is not None:
            encoded = {"image": self.get_image_features(pixel_values, return_dict=True)}
        if has_images := bool(encoded) or vision_features is not None:
            patches = encoded["image"].pooler_output if encoded else self._project(vision_features)
            image_features = torch.cat(list(patches)).to(inputs_embeds.device, inputs_embeds.dtype)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)
            rows = (mask.flatten().cumsum(0) - 1).clamp(0)  # masked_scatter's backward makes the host wait for the GPU
            inputs_embeds = torch.where(mask, image_features[rows].view_as(inputs_embeds), inputs_embeds)
        elif input_ids is not None and "pack_layout" not in kwargs and kwargs.get("past_key_values") is None:
            self.get_placeholder_mask(ids, inputs_embeds, inputs_embeds[0, :0])
        if not has_images and self.training and torch.is_grad_enabled():  # DDP needs a gradient of every trained weight
            nothing = self._project(inputs_embeds.new_zeros(1, next(self.projector.parameters()).shape[1])).sum() * 0
            inputs_embeds = inputs_embeds + nothing.to(inputs_embeds.device, inputs_embeds.dtype)
        attention = self.language_model.config._attn_implementation
        if "pack_layout" in kwargs:
            if not attention.endswith("_packed"):
                raise ValueError(f"{attention!r} attention takes no packs: set_attn_implementation('clip_phi_packed')")
            attention_mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=inputs_embeds.device)  # or it makes one
        elif getattr(attention_mask, "ndim", 0) == 4 and attention_mask.dtype == torch.bool:  # of a cache: a dict
            if attention not in ("sdpa", "eager"):
                raise ValueError(f"attention {attention!r} takes no mask of four dimensions: use 'sdpa' or 'eager'")
            if attention == "eager":  # adds the mask to the scores
                attention_mask = inputs_embeds.new_full((), torch.finfo(inputs_embeds.dtype).min) * ~attention_mask
        return self.language_model(attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)


class ClipPhiForCausalLM(ClipPhiPreTrainedModel, GenerationMixin):
    """Clip-Phi with its language modelling head: what is trained, generated with and shipped."""

    max_logits = 2**26  # of a loss at once: 1310 tokens of phi-2, 256 MB in float32
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: ClipPhiConfig):
        super().__init__(config)
        self.model = ClipPhiModel(config)
        # phi-2's head has a bias, most decoders' heads have none: ask the decoder's own class.
        with torch.device("meta"):
            whole: Any = AutoModelForCausalLM.from_config(config.text_config)
        head, parts, text = whole.get_output_embeddings(), list(whole.children()), whole.config
        after = [getattr(text, name, 1) for name in ("final_logit_softcapping", "logit_scale", "logits_scaling")]
        if head not in parts or len(parts) > 2 or any(each not in (None, 1) for each in after):
            raise ValueError(f"{text.model_type!r} decoders are not supported: more than a head makes their logits")
        self.lm_head = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None)
        embeddings = next(name for name, part in self.named_modules() if part is self.get_input_embeddings())
        self._tied_weights_keys = {"lm_head.weight": f"{embeddings}.weight"}
        self.post_init()

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> Any:
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,  # named, so that generate makes it
        **kwargs: Unpack[TransformersKwargs],
    ) -> Any:
        """ClipPhiModel.forward with its inputs, then head and loss; returns a CausalLMOutputWithPast.

        Args:
            labels: int (batch, sequence), aligned with input_ids; -100 where nothing is learnt.
            logits_to_keep: 0 for all positions, n for the last n, or int (positions,) or (batch, positions): these.
            skip_logits: leave logits None, as in training with labels: the head runs at supervised positions only.
            kwargs: also shift_labels: int (batch, positions), instead of labels: the token after each kept position;
                and num_items_in_batch: divides the summed loss, instead of the number of supervised tokens."""
        shift_labels = kwargs.pop("shift_labels", None)  # if named, Trainer would take it for a column of labels
        inputs = {"mm_encoder_outputs": mm_encoder_outputs, "position_ids": position_ids}
        outputs = self.model(input_ids, pixel_values, attention_mask, inputs_embeds, **inputs, **kwargs)
        hidden_states = select_positions(outputs.last_hidden_state, logits_to_keep)
        loss = None
        if labels is not None and shift_labels is None:
            shifted = nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]
            shift_labels = select_positions(shifted.unsqueeze(-1), logits_to_keep).squeeze(-1)
        skip_logits = self.training and shift_labels is not None if skip_logits is None else skip_logits
        if shift_labels is not None:
            states, targets = hidden_states.flatten(0, 1), shift_labels.to(hidden_states.device).flatten()
            learnt = (targets != IGNORE_INDEX) & (targets != self.config.image_token_id)
            kept: Any = slice(None) if labels is None else learnt  # a mask makes the host wait
            loss = self._loss(states[kept], targets[kept], **kwargs)
        logits = None if skip_logits else self.lm_head(hidden_states)
        if logits is not None and (rowless := self.config.image_token_id + 2 - logits.shape[-1]) > 0:
            # generate's logits processors look up each id of a prompt; none of these is ever generated
            logits = nn.functional.pad(logits, (0, rowless), value=torch.finfo(logits.dtype).min)
        fields = {name: outputs[name] for name in outputs if name in CausalLMOutputWithPast.__dataclass_fields__}
        return CausalLMOutputWithPast(**fields | {"loss": loss, "logits": logits})

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        """As transformers', but each sequence of a prompt gets all images of the prompt, in their order."""
        outputs = kwargs.pop("mm_encoder_outputs", None) or {}
        if not outputs and not kwargs.keys() & {"pixel_values", "vision_features", "inputs_embeds", "past_key_values"}:
            self.model.get_placeholder_mask(input_ids, None, self.lm_head.weight[:0])
        if expand_size > 1 and outputs:
            ids, features = input_ids if input_ids.numel() else None, outputs["image"].pooler_output
            places = self.model.get_placeholder_mask(ids, kwargs.get("inputs_embeds"), torch.cat(features))
            images = torch.arange(len(features)).split((places.sum((1, 2)) // len(features[0])).tolist())
            repeated = [features[image] for each in images for image in each.tolist() * expand_size]
            outputs = {"image": type(outputs["image"])(pooler_output=repeated)}
        ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return ids, kwargs | {"mm_encoder_outputs": outputs}

    def _loss(self, hidden_states: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Cross-entropy of (supervised, text hidden) with int (supervised,), in chunks of max_logits."""
        head, size = self.lm_head, max(1, self.max_logits // self.lm_head.out_features)
        count = (labels != IGNORE_INDEX).sum() if (given := kwargs.get("num_items_in_batch")) is None else given
        own_loss = "_loss_function" in vars(self) or "ignore_index" in kwargs
        hooked = head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head)  # sharded or offloaded
        frozen = type(head) is nn.Linear and not any(each.requires_grad for each in head.parameters())
        if torch.is_grad_enabled() and hidden_states.requires_grad and frozen and not (own_loss or hooked):
            return self._frozen_head_loss(hidden_states, labels, size) / count
        kwargs |= {"vocab_size": head.out_features, "labels": None, "num_items_in_batch": count}
        if len(labels) <= size:
            return self._chunk_loss(hidden_states, labels, kwargs)
        chunks = zip(hidden_states.split(size), labels.split(size), strict=True)  # each is computed again backward
        return sum(checkpoint(self._chunk_loss, *chunk, kwargs, use_reentrant=False) for chunk in chunks)

    def _chunk_loss(self, hidden_states: torch.Tensor, labels: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        return self.loss_function(logits=self.lm_head(hidden_states), shift_labels=labels, **options)

    def _frozen_head_loss(self, hidden_states: torch.Tensor, labels: torch.Tensor, size: int) -> torch.Tensor:
        """The summed cross-entropy, computed with its gradient: no logits are kept, and none are computed twice."""
        weight, loss, gradients = self.lm_head.weight, labels.new_zeros((), dtype=torch.float32), []
        for states, targets in zip(hidden_states.detach().split(size), labels[:, None].split(size), strict=True):
            valid, logits = targets != IGNORE_INDEX, self.lm_head(states).float()
            highest, right = logits.amax(1, keepdim=True), logits.gather(1, targets * valid)
            sums = logits.sub_(highest).exp_().sum(1, keepdim=True)
            loss += ((highest + sums.log() - right) * valid).sum()
            means = torch.matmul(logits.to(weight.dtype), weight) / sums
            gradients.append((means - weight[(targets * valid).squeeze(1)]) * valid)
            del logits  # before the next are made
        carrier = (hidden_states * torch.cat(gradients)).sum()  # has this gradient
        return loss + (carrier - carrier.detach())


def select_positions(states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The positions of states (batch, sequence, width) that logits_to_keep names; see ClipPhiForCausalLM.forward."""
    if isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.dim() == 2:
        return torch.take_along_dim(states, logits_to_keep.unsqueeze(-1), dim=1)
    return states[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]


ClipPhiPreTrainedModel.whole_class = ClipPhiForCausalLM
ClipPhiConfig.register_for_auto_class()
ClipPhiForCausalLM.register_for_auto_class("AutoModelForCausalLM")
