"""Tokenizers trained here, as Hugging Face fast tokenizers, and the chat format of our models.

A conversation is ``<|user|>question<|assistant|>answer<|end|>`` for each turn. The model answers after
``<|assistant|>`` and ends its answer with ``<|end|>``.
"""

from collections.abc import Iterable
from typing import Any

END_OF_TEXT = "<|endoftext|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
END_OF_TURN = "<|end|>"
SPECIAL_TOKENS = (END_OF_TEXT, USER, ASSISTANT, END_OF_TURN)  # ids 0, 1, 2, 3

# Questions are lower-cased, so that a small model need not learn each word twice. System messages are left out: a model
# of this size is trained without any, and follows none.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'user' -%}<|user|>{{ message.content | trim | lower }}
{%- elif message.role == 'assistant' -%}<|assistant|>{{ (message.content or '') | trim }}<|end|>
{%- elif message.role not in ('system', 'developer') -%}
{{ raise_exception("this model takes messages of the roles user, assistant and system, not " ~ message.role) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""


def train_bpe(texts: Iterable[str], vocab_size: int, max_length: int) -> Any:
    """Trains byte-level BPE (Sennrich et al. 2016, on bytes as in GPT-2) and returns a fast tokenizer.

    Byte level means that every text can be encoded and is restored exactly.

    Args:
        texts: the training text, in pieces of any size.
        vocab_size: tokens in all, special ones included; at least 260 (256 bytes and 4 special tokens).
        max_length: the model's longest sequence, recorded as ``model_max_length``.

    Raises:
        ValueError: the vocabulary cannot hold the bytes.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < 256 + len(SPECIAL_TOKENS):
        raise ValueError(f"vocab_size must be at least {256 + len(SPECIAL_TOKENS)}, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    # Digits one by one, so that numbers share tokens; words with their leading blank; punctuation and blanks apart.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d| ?\p{L}+| ?[^\s\p{L}\d]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[USER, ASSISTANT],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
