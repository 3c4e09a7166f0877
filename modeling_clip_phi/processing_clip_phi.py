"""The one owner of Clip-Phi's prompt format and of the <image> token."""

from itertools import pairwise
from typing import Any

from jinja2 import TemplateError
from tokenizers import AddedToken
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
from transformers.processing_utils import MultiModalData, ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

IMAGE_TOKEN = "<image>"
PAD_TOKEN = "<pad>"
IGNORE_INDEX = -100

# Leading images, the transcript of speech, then phi-2's own instruction format (microsoft/phi-2, model card). Answers
# stand in generation blocks, from which the labels are made. An image with no text asks for its caption.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message['content'] is string -%}
        {%- set items = [{'type': 'text', 'text': message['content']}] -%}
    {%- else -%}
        {%- set items = message['content'] -%}
    {%- endif -%}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}
        {{- ' ' + items | map(attribute='text') | join('') | trim + eos_token -}}
        {%- endgeneration -%}
    {%- elif message['role'] == 'system' -%}
        {{- items | map(attribute='text') | join('') | trim -}}{{- '\\n' if items -}}
    {%- elif message['role'] == 'user' -%}
        {%- set state = namespace(text=false) -%}
        {%- for item in items -%}
            {%- if item['type'] == 'text' -%}{%- set state.text = true -%}
            {%- elif item['type'] == 'image' and not state.text -%}{{- '<image>' -}}
            {%- endif -%}
        {%- endfor -%}
        {%- for item in items if item['type'] == 'transcript' -%}{{- 'Speech: ' + item['text'] | trim + '\\n' -}}
        {%- endfor -%}
        {%- set state.text = false -%}
        {%- for item in items -%}
            {%- if item['type'] == 'text' -%}
                {{- 'Instruct: ' if not state.text -}}{{- item['text'] | trim -}}{%- set state.text = true -%}
            {%- elif item['type'] == 'image' and state.text -%}{{- '<image>' -}}
            {%- elif item['type'] not in ('image', 'transcript') -%}
                {{- raise_exception("content of type '" + item['type'] + "' is not text, image or transcript") -}}
            {%- endif -%}
        {%- endfor -%}
        {{- '\\nOutput:' if state.text -}}
    {%- else -%}
        {{- raise_exception("role '" + message['role'] + "' is not system, user or assistant") -}}
    {%- endif -%}
{%- endfor -%}
"""


class ClipPhiProcessor(ProcessorMixin):
    """Image processor, tokenizer and chat template of Clip-Phi.

    num_image_tokens: how many features one image gives (49 for TinyCLIP at 224 pixels and patch 32), and so how many
        <image> tokens stand for it.
    The tokenizer must hold <image> and a padding token that is not its end token: see from_backbones.
    Raises ValueError if it does not."""

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        num_image_tokens: int = 49,
        image_token: str = IMAGE_TOKEN,
        **kwargs: Any,
    ):
        if image_token not in tokenizer.get_vocab():
            raise ValueError(f"the tokenizer has no {image_token} token: make the processor with from_backbones")
        if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
            raise ValueError("the tokenizer needs a padding token of its own, or the end token is never learnt")
        self.num_image_tokens = num_image_tokens
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        tokenizer.padding_side = "left"  # for batched generation; training pads by itself
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE, **kwargs)

    @classmethod
    def from_backbones(
        cls,
        vision: str,
        text: str,
        *,
        vision_revision: str | None = None,
        text_revision: str | None = None,
        vision_feature_select_strategy: str = "default",
        **hub: Any,
    ) -> "ClipPhiProcessor":
        """The processor of a tower and a decoder; the arguments are those of ClipPhiForCausalLM.from_backbones.

        <image> and <pad> take the decoder's first spare vocabulary rows (50295 and 50296 of phi-2's 51200), so its
        embedding keeps its size. Raises ValueError if there are too few."""
        at_vision = {"revision": vision_revision or "main", **hub}
        at_text = {"revision": text_revision or "main", **hub}
        tokenizer = AutoTokenizer.from_pretrained(text, **at_text)
        if IMAGE_TOKEN not in tokenizer.get_vocab():
            tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
        if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
            tokenizer.add_special_tokens({"pad_token": AddedToken(PAD_TOKEN, special=True, normalized=False)})
        rows = AutoConfig.from_pretrained(text, **at_text).get_text_config(decoder=True).vocab_size
        if len(tokenizer) > rows:
            raise ValueError(
                f"{text} has {rows} vocabulary rows but {len(tokenizer)} are needed with {IMAGE_TOKEN} and "
                f"{PAD_TOKEN}: resize its embedding with resize_token_embeddings, save it and give that folder"
            )
        vision_config = AutoConfig.from_pretrained(vision, **at_vision)
        vision_config = getattr(vision_config, "vision_config", vision_config)
        # The PIL backend gives the same pixels everywhere, whether torchvision is installed or not.
        image_processor = AutoImageProcessor.from_pretrained(vision, backend="pil", **at_vision)
        return cls(
            image_processor,
            tokenizer,
            num_image_tokens=count_image_features(vision_config, vision_feature_select_strategy),
        )

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        return self.image_token * self.num_image_tokens

    def _get_num_multimodal_tokens(self, image_sizes: list | None = None, **kwargs: Any) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        return MultiModalData(
            num_image_tokens=[self.num_image_tokens] * len(image_sizes), num_image_patches=[1] * len(image_sizes)
        )

    def encode(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
        """Token ids of a conversation, and its labels: the ids of the answers and their end tokens, -100 elsewhere.

        messages: [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ...}]}, ...]; images are
        counted, not opened. The template is rendered once; question and answer pieces are tokenised apart, so that an
        answer is learnt after exactly the tokens that generation will see before it.
        Raises ValueError if a text contains <image> or another special token, or the template refuses the roles."""
        return self.encode_batch([messages])[0]

    def encode_batch(self, conversations: list[list[dict[str, Any]]]) -> list[tuple[list[int], list[int]]]:
        """encode() of many conversations, several times faster than one by one."""
        try:
            texts, spans = render_jinja_template(
                conversations=conversations,
                chat_template=self.chat_template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses a conversation: {error}") from error
        pieces = []  # of each conversation: (text, is it an answer)
        for messages, text, answers in zip(conversations, texts, spans, strict=True):
            self._check_special_tokens(messages, text)
            cuts = [0, *(cut for span in answers for cut in span), len(text)]
            found = [(text[start:stop], place % 2 == 1) for place, (start, stop) in enumerate(pairwise(cuts))]
            pieces.append([piece for piece in found if piece[0]])
        # Prompts repeat, and the tokenizer is fastest with many texts at once.
        unique = list({text: None for found in pieces for text, _ in found})
        expanded = [text.replace(self.image_token, self.image_token * self.num_image_tokens) for text in unique]
        ids = dict(zip(unique, self.tokenizer(expanded, add_special_tokens=False)["input_ids"], strict=True))
        encoded = []
        for found in pieces:
            input_ids = [token for text, _ in found for token in ids[text]]
            labels = [token if answer else IGNORE_INDEX for text, answer in found for token in ids[text]]
            encoded.append((input_ids, labels))
        return encoded

    def _check_special_tokens(self, messages: list[dict[str, Any]], text: str) -> None:
        contents = [message["content"] for message in messages if isinstance(message["content"], list)]
        images = sum(item["type"] == "image" for content in contents for item in content)
        answers = sum(message["role"] == "assistant" for message in messages)
        wanted = {self.image_token: images, self.tokenizer.eos_token: answers, self.tokenizer.pad_token: 0}
        for token, count in wanted.items():
            if (found := text.count(token)) != count:
                raise ValueError(f"{found} {token} in the rendered text, not {count}: a text contains the token itself")


def count_image_features(vision_config: Any, select_strategy: str = "default") -> int:
    """How many features the tower gives for one image: its own forward, on the meta device, is the judge."""
    import torch
    from transformers import AutoModel

    with torch.device("meta"):
        tower = AutoModel.from_config(vision_config)
        pixels = torch.empty(1, 3, vision_config.image_size, vision_config.image_size)
        features = tower(pixels, output_hidden_states=True, return_dict=True).hidden_states[0].shape[1]
    return features - 1 if select_strategy == "default" else features


ClipPhiProcessor.register_for_auto_class()

__all__ = ["ClipPhiProcessor"]
