"""Fixtures that several test packages share."""

from typing import Any

import pytest
from hypothesis import settings

# The same examples in every run, and no deadline: a busy machine is no failure.
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=50, database=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level BPE tokenizer of 300 tokens with our chat template."""
    from modeling.tokenizers import train_bpe

    texts = ("What helps with a cold?", "Rest and drink plenty of water.", "When should a fever be seen by a doctor?")
    return train_bpe(texts, vocab_size=300, max_length=512)
