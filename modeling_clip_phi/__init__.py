"""Clip-Phi's model, configuration and processor: the files that are shipped to the Hub with every checkpoint."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .configuration_clip_phi import ClipPhiConfig
from .modeling_clip_phi import ClipPhiForCausalLM, ClipPhiModel
from .processing_clip_phi import ClipPhiProcessor

__version__ = "0.1.0"

AutoConfig.register(ClipPhiConfig.model_type, ClipPhiConfig)
for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    auto_class.register(ClipPhiConfig, ClipPhiForCausalLM)
AutoProcessor.register(ClipPhiConfig, ClipPhiProcessor)

__all__ = ["ClipPhiConfig", "ClipPhiForCausalLM", "ClipPhiModel", "ClipPhiProcessor"]
