"""Tokenizers trained here: lossless, with fixed special ids and one chat format."""

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jinja2 import TemplateError

from modeling.tokenizers import SPECIAL_TOKENS, train_bpe

SPECIAL = st.sampled_from(SPECIAL_TOKENS)


@given(text=st.lists(st.one_of(st.text(max_size=20), SPECIAL), max_size=5).map("".join))
@example(text="  two  blanks , then\r\n\ttabs \u00a0\u2003 and trailing ")
@example(text="38,5 °C — naïve cafe\u0301 頭痛 🤒\u200d🩺 \x00")
def test_every_text_is_restored_exactly(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_have_the_first_ids(tokenizer: Any) -> None:
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 3)


def test_vocabulary_has_the_size_asked_for(tokenizer: Any) -> None:
    assert len(tokenizer) == tokenizer.vocab_size == 300


def test_digits_are_tokens_of_their_own() -> None:
    tokenizer = train_bpe(["140 140 140 140"] * 10, vocab_size=280, max_length=64)
    assert tokenizer.tokenize("140") == ["1", "4", "0"]


def test_training_twice_gives_the_same_tokenizer() -> None:
    first, second = (train_bpe(["rest and drink water"] * 3, 280, 64).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_conversation_has_questions_in_lower_case_and_no_system_messages(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "You are a doctor."},
        {"role": "user", "content": " What helps with a cold? \n"},
        {"role": "assistant", "content": "Rest."},
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "And a fever?"},
    ]
    conversation = "<|user|>what helps with a cold?<|assistant|>Rest.<|end|><|user|>and a fever?"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == conversation
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == conversation + "<|assistant|>"


def test_unknown_role_is_refused_by_name(tokenizer: Any) -> None:
    with pytest.raises(TemplateError, match="not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "38.5"}], tokenize=False)


def test_vocabulary_too_small_for_all_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size must be at least 260"):
        train_bpe(["text"], vocab_size=259, max_length=64)
    assert len(train_bpe(["text"], vocab_size=260, max_length=64)) == 260
