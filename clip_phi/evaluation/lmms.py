"""Clip-Phi as a model of lmms-eval, for its tasks: lmms-eval --model clip_phi.

lmms-eval finds it by the entry point in setup.cfg; --model_args pretrained=FOLDER,batch_size=8,device=cpu. Greedy or
beam search. Tasks that need more (sampling, likelihoods, several images, several rounds) are refused by name.
"""

from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from ..data.sample import user_message
from .generate import Prompt, generate_answers
from .run import load

MANIFEST = ModelManifest("clip_phi", simple_class_path="clip_phi.evaluation.lmms.ClipPhi")


class ClipPhi(lmms):
    """pretrained: folder or Hub id. The image is before the text, so <image> is removed from a task's context."""

    def __init__(self, pretrained: str, batch_size: int | str = 8, device: str | None = None):
        super().__init__()
        import torch
        from accelerate import Accelerator

        self.accelerator = accelerator = Accelerator(cpu=device == "cpu")
        self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        self.batch_size = int(batch_size)
        self.device = torch.device(device) if device and self._world_size == 1 else accelerator.device
        self.model, self.processor, _ = load(pretrained, self.device)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The answers, in the order of the requests, each cut at the first of its task's "until" texts."""
        found: dict[int, str] = {}
        groups: dict[tuple[int, int], list[int]] = {}
        for number, request in enumerate(requests):
            options = request.args[1]
            if options.get("do_sample"):
                raise ValueError(f"task {request.args[4]} samples answers, and clip_phi has greedy and beam search")
            how = (int(options.get("max_new_tokens", 64)), int(options.get("num_beams") or 1))
            groups.setdefault(how, []).append(number)
        for (max_new_tokens, num_beams), numbers in groups.items():
            for start in range(0, len(numbers), self.batch_size):
                batch = numbers[start : start + self.batch_size]
                prompts = [self._prompt(requests[number].args) for number in batch]
                answers = generate_answers(self.model, self.processor, prompts, max_new_tokens, num_beams)
                for number, answer in zip(batch, answers, strict=True):
                    found[number] = _until(answer.text, requests[number].args[1].get("until"))
        return [found[number] for number in range(len(requests))]

    def _prompt(self, arguments: tuple[Any, ...]) -> Prompt:
        context, _, to_visual, document, task, split = arguments
        images = to_visual(self.task_dict[task][split][document])
        if len(images) > 1:
            raise ValueError(f"task {task}: {len(images)} images in one question; Clip-Phi takes one")
        message = user_message(context.replace("<image>", "").strip(), len(images))
        return [message], images[0].convert("RGB") if images else None

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("clip_phi answers tasks of output_type generate_until only")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError("clip_phi answers tasks of one round only")


def _until(text: str, ends: Any) -> str:
    for end in filter(None, [ends] if isinstance(ends, str) else ends or []):
        text = text.split(end)[0]
    return text.strip()
