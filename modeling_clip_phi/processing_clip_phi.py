"""The one owner of Clip-Phi's prompt format, of the <image> token, and of text to token ids."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.processing_utils import MultiModalData, ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from .backbones import measure_tower, sort_options
from .configuration_clip_phi import IGNORE_INDEX, IMAGE_TOKEN, ClipPhiConfig, add_special_tokens, read_config

Messages = Sequence[dict[str, Any]]


class ClipPhiProcessor(ProcessorMixin):
    """Image processor, tokenizer and chat template: training, evaluation and serving get their token ids here.

    Args:
        image_processor, tokenizer: of tower and decoder; the latter with <image>, and padding that is no end token.
        chat_template: a Jinja template, answers in generation blocks that end with the end token.
        num_image_tokens: features of one image, and so <image> tokens for it: 49 for TinyCLIP (224 pixels, patch 32).

    Raises ValueError if the tokenizer lacks one of the two tokens, or adds tokens behind a text."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, num_image_tokens=49, **kwargs: Any):
        self.image_token = kwargs.pop("image_token", IMAGE_TOKEN)
        if self.image_token not in tokenizer.get_vocab():
            raise ValueError(f"the tokenizer has no {self.image_token} token: make the processor with from_backbones")
        if tokenizer.pad_token in (None, tokenizer.eos_token, tokenizer.unk_token):
            raise ValueError("the tokenizer needs a padding token of its own, or other tokens are taken for padding")
        self.num_image_tokens, self.image_token_id = num_image_tokens, tokenizer.convert_tokens_to_ids(self.image_token)
        tokenizer.padding_side = "left"  # for batched generation; training pads by itself
        *self.bos_ids, last = tokenizer(self.image_token)["input_ids"]
        if last != self.image_token_id:
            raise ValueError(f"the tokenizer adds {tokenizer.decode([last])} behind a text: switch this off")
        self.bos = "".join(tokenizer.convert_ids_to_tokens(self.bos_ids))
        # Each checkpoint has the template too. Labels are made from its generation blocks, which hold the answers.
        chat_template = chat_template or self.bos + Path(__file__).with_name("chat_template.jinja").read_text()
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)

    @classmethod
    def from_backbones(cls, vision, text, *, vision_revision=None, text_revision=None, **options) -> "ClipPhiProcessor":
        """The processor of a tower and a decoder; arguments and errors are ClipPhiForCausalLM.from_backbones'."""
        hub, _, _, fields = sort_options(options)
        tokenizer = AutoTokenizer.from_pretrained(text, revision=text_revision or "main", **hub)
        if (count := tokenizer.vocab_size) > (rows := read_config("text", text, text_revision, hub).vocab_size):
            raise ValueError(f"the tokenizer of {text} has {count} tokens, and its embedding {rows} rows")
        # The PIL backend gives the same pixels everywhere, whether torchvision is installed or not.
        processor = AutoImageProcessor.from_pretrained(vision, backend="pil", revision=vision_revision or "main", **hub)
        images = (torch.zeros((3, *size), dtype=torch.uint8) for size in ((90, 120), (120, 90)))
        shape, other = (tuple(processor(each, return_tensors="pt")["pixel_values"].shape) for each in images)
        if shape != other or len(shape) != 4:
            raise ValueError(f"{vision}: the image processor gives pixels {shape} and {other}, not of one fixed size")
        config = ClipPhiConfig(vision_config=read_config("vision", vision, vision_revision, hub), **fields)
        return cls(processor, add_special_tokens(tokenizer), num_image_tokens=measure_tower(config, *shape[2:])[0])

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        """ProcessorMixin's, but for a text that begins with BOS: it gets no second one."""
        first = text if isinstance(text, str) else text[0] if text else ""
        kwargs |= {"add_special_tokens": False} if self.bos and first.startswith(self.bos) else {}
        return super().__call__(images=images, text=text, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        return self.image_token * self.num_image_tokens

    def _get_num_multimodal_tokens(self, image_sizes: list | None = None, **kwargs: Any) -> MultiModalData:
        ones = None if image_sizes is None else [1] * len(image_sizes)
        return MultiModalData(ones and [self.num_image_tokens] * len(ones), num_image_patches=ones)

    def encode(self, messages: Messages, **options: Any) -> tuple[list[int], list[int]]:
        return self.encode_batch([messages], **options)[0]

    def encode_batch(
        self, conversations: Sequence[Messages], add_generation_prompt: bool = False, expand_images: bool = True
    ) -> list[tuple[list[int], list[int]]]:
        """Token ids and labels of each conversation: the ids of answers and their end tokens, -100 elsewhere.

        conversations: each [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ...}]}, ...].
        expand_images: whether an image is num_image_tokens <image> tokens, or a single one.
        Raises ValueError if a text has a special token or half a character, if the template refuses the messages, or if
        the tokenizer joins the end of a prompt with its answer."""
        try:
            options = {"add_generation_prompt": add_generation_prompt, "return_assistant_tokens_mask": True}
            options |= {"chat_template": self.chat_template, **self.tokenizer.special_tokens_map}
            texts, spans = render_jinja_template([list(messages) for messages in conversations], **options)
        except TemplateError as error:
            raise ValueError(f"the chat template refuses a conversation: {error}") from error
        end = self.tokenizer.eos_token
        prompts: list[list[str]] = []  # before each answer, from the previous end token on
        for text, answers in zip(texts, spans, strict=True):
            if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
                raise ValueError("a text contains half a character, a surrogate without its other half")
            if not all(text[:stop].endswith(end) for _, stop in answers):
                raise ValueError(f"the chat template must end each generation block with {end}")
            starts = [0, *(stop - len(end) for _, stop in answers)]
            prompts.append([text[start:stop] for start, (stop, _) in zip(starts, answers, strict=False)])
        # Prompts repeat, and the tokenizer is fastest with many texts at once.
        unique = list(dict.fromkeys([*texts, *(prompt for each in prompts for prompt in each)]))
        ids_of = dict(zip(unique, self.tokenizer(unique, add_special_tokens=False)["input_ids"], strict=True))
        encoded = []
        for messages, text, before in zip(conversations, texts, prompts, strict=True):
            ids = [*([] if self.bos and text.startswith(self.bos) else self.bos_ids), *ids_of[text]]
            # By ids: a normalizer may turn other characters, such as full-width ones, into a special token.
            items = (item for message in messages for item in message["content"] if isinstance(item, dict))
            wanted = Counter({self.tokenizer.pad_token_id: 0, **Counter(self.bos_ids)})
            wanted[self.image_token_id] = sum(item["type"] == "image" for item in items)
            wanted[self.tokenizer.eos_token_id] += sum(message["role"] == "assistant" for message in messages)
            for each, count in wanted.items():
                if (found := ids.count(each)) != count:
                    token = self.tokenizer.convert_ids_to_tokens(each)
                    raise ValueError(f"a text contains {token}: {found} {token} in the rendered text, not {count}")
            labels, start = [IGNORE_INDEX] * len(ids), len(ids) - len(ids_of[text])
            for prompt in before:
                first = start + len(ids_of[prompt])
                if ids[start:first] != ids_of[prompt]:
                    raise ValueError(f"the tokenizer joins the end of a prompt with its answer: {prompt[-20:]!r}")
                start = ids.index(self.tokenizer.eos_token_id, first)
                labels[first : start + 1] = ids[first : start + 1]
            if expand_images:
                counts = [self.num_image_tokens if token == self.image_token_id else 1 for token in ids]
                places = [place for place, count in enumerate(counts) for _ in range(count)]
                ids, labels = [ids[place] for place in places], [labels[place] for place in places]
            encoded.append((ids, labels))
        return encoded


ClipPhiProcessor.register_for_auto_class()
