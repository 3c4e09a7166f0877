"""Clip-Phi's model, configuration and processor: the files that are shipped to the Hub with every checkpoint."""

import transformers

from .configuration_clip_phi import AUTO_CLASSES, ClipPhiConfig
from .modeling_clip_phi import ClipPhiForCausalLM, ClipPhiModel
from .processing_clip_phi import ClipPhiProcessor

__version__ = "0.1.0"

transformers.AutoConfig.register(ClipPhiConfig.model_type, ClipPhiConfig)
for name in AUTO_CLASSES:
    getattr(transformers, name).register(ClipPhiConfig, ClipPhiForCausalLM)
transformers.AutoProcessor.register(ClipPhiConfig, ClipPhiProcessor)

__all__ = ["ClipPhiConfig", "ClipPhiForCausalLM", "ClipPhiModel", "ClipPhiProcessor"]
