"""Small tokenizers of the kinds that decoders have: byte-level BPE and SentencePiece's, with BOS or without."""

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPACE = "\u2581"  # SentencePiece's


def bpe(text_of_training, special, **parts):
    """A trained BPE tokenizer of these parts (pre_tokenizer, normalizer, decoder)."""
    tokenizer = Tokenizer(
        models.BPE(unk_token="<unk>" if "<unk>" in special else None, byte_fallback="<unk>" in special)
    )
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    alphabet = pre_tokenizers.ByteLevel.alphabet() if "<unk>" not in special else []
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(text_of_training, trainer)
    return tokenizer


WORDS = ["Instruct: a red circle\nOutput: yes", "Speech: hello", "Be brief. a red circle hi b c d"]


def add_bos(tokenizer, bos):
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )


def llama_3(bos="<s>", end="</s>"):
    """Byte-level BPE, words split by Llama 3's pattern, with BOS."""
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = bpe(
        WORDS,
        [*dict.fromkeys((bos, end)), "<pad>", "<image>"],
        pre_tokenizer=pre_tokenizers.Sequence([split, byte_level]),
        decoder=decoders.ByteLevel(),
    )
    add_bos(tokenizer, bos)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=end, pad_token="<pad>")


def sentencepiece(metaspace=None):
    """SentencePiece's kind, with BOS. metaspace: its prepend_scheme; None for the normalizer of Llama 2."""
    tokenizer = bpe(
        WORDS,
        ["<unk>", "<s>", "</s>", "<pad>", "<image>"],
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme=metaspace or "always"),
        decoder=decoders.Metaspace(),
    )
    if metaspace is None:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
    add_bos(tokenizer, "<s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def unigram():
    """SentencePiece's other kind, with its usual NFKC: characters that look like those of </s> become its id."""
    pieces = [(token, 0.0) for token in ("<unk>", "<s>", "</s>", "<pad>")] + [(SPACE, -3.0), (f"{SPACE}yes", -4.0)]
    letters = sorted({letter for words in WORDS for letter in words} - {" "})
    tokenizer = Tokenizer(models.Unigram(pieces + [(letter, -6.0) for letter in letters], unk_id=0))
    tokenizer.normalizer, tokenizer.decoder = normalizers.NFKC(), decoders.Metaspace()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["<image>"])
    add_bos(tokenizer, "<s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


TOKENIZERS = {
    "phi-2": None,  # the processor's own: byte-level BPE, its BOS is not added
    "llama-3": llama_3,
    "opt": lambda: llama_3("</s>", "</s>"),  # BOS is the end token
    "llama-2": sentencepiece,
    "metaspace always": lambda: sentencepiece("always"),
    "metaspace first": lambda: sentencepiece("first"),
    "unigram": unigram,
}
