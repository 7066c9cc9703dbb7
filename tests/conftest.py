"""Fixtures that several test packages share."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# The same examples in every run, and no deadline: a busy machine is no failure.
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=50, database=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keys of whoever runs the tests do not matter to them, nor do tests leave any."""
    os.environ["MEDASSIST_HOME"] = str(tmp_path_factory.mktemp("home"))  # for the commands that tests start, too


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder for sockets: ``tmp_path`` can be too long for one's address."""
    with tempfile.TemporaryDirectory(prefix="ma-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level BPE tokenizer of 300 tokens with our chat template."""
    from modeling.tokenizers import train_bpe

    texts = ("What helps with a cold?", "Rest and drink plenty of water.", "When should a fever be seen by a doctor?")
    return train_bpe(texts, vocab_size=300, max_length=512)


@pytest.fixture(scope="session")
def tiktoken_ranks() -> None:
    """tiktoken's ranks of p50k_base and r50k_base: from its cache, from the data beside the checkout, or fetched."""
    from modeling.tiktoken_encodings import load_encoding

    beside = Path(__file__).parents[2] / "shared" / "data" / "tiktoken_cache"
    if "TIKTOKEN_CACHE_DIR" not in os.environ and beside.is_dir():
        os.environ["TIKTOKEN_CACHE_DIR"] = str(beside)  # for the commands that tests start, too
    try:
        load_encoding("p50k_base")
        load_encoding("gpt2")
    except ValueError as error:
        pytest.skip(str(error))
