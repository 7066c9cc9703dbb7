"""The tokenizer of a data set: chosen or trained here, and the quickest way to encode with it.

A document is text and nothing else: one that spells a special token gets the ids of its characters, never the special
one. After each document comes the tokenizer's end-of-sequence token, which no text can contain.

tiktoken encodes several times as fast as ``tokenizers``, and gives the same ids where both run the same merges. Whether
they do is not assumed: a trained byte-level BPE is handed to tiktoken only if its merges are exactly those that its
vocabulary implies (:func:`modeling.tiktoken_encodings.merges_of` has the argument), and if texts of many kinds come out
equal.

Workers read what they need from a folder of its own and import neither torch nor transformers: that would take each of
them three seconds and some hundred megabytes.
"""

import base64
import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from training.shards import token_dtype

UNLIMITED = int(1e30)  # model_max_length as transformers writes it where no model is known yet


def make_tokenizer(name: str | None, vocab_size: int, sample: Iterable[str], out: Path, encoder: Path) -> None:
    """Writes the tokenizer's folder and the one that :class:`Encoder` reads, atomically, unless they are there.

    Args:
        name: a tiktoken encoding, or a folder; None trains byte-level BPE of ``vocab_size`` tokens on the sample.

    Raises:
        ValueError: no such tokenizer, one that is not a fast one, or one without an end-of-sequence token.
    """
    if out.is_dir() and encoder.is_dir():
        return
    from modeling.tiktoken_encodings import from_encoding, load_encoding
    from modeling.tokenizers import END_OF_TEXT, train_bpe

    quick = None
    if name is None:
        tokenizer = train_bpe(sample, vocab_size, UNLIMITED)
        tokenizer.eos_token = END_OF_TEXT  # documents, not turns of a conversation
    elif Path(name).is_dir():
        if not (Path(name) / "tokenizer.json").is_file():
            raise ValueError(f"--tokenizer {name}: it has no tokenizer.json, which reading shards needs")
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast.from_pretrained(name)  # of any class: the file says all that it does
    else:
        quick = load_encoding(name)
        tokenizer = from_encoding(quick, UNLIMITED)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"--tokenizer {name}: it has no end-of-sequence token (eos_token) to put after documents")
    partial, partial_encoder = out.with_suffix(".partial"), encoder.with_suffix(".partial")
    for folder in (partial, partial_encoder, out, encoder):
        shutil.rmtree(folder, ignore_errors=True)
    tokenizer.save_pretrained(partial)
    partial_encoder.mkdir()
    shutil.copy(partial / "tokenizer.json", partial_encoder)
    quick = quick or as_tiktoken(plain_text_tokenizer(partial_encoder / "tokenizer.json"))
    facts = {"eos": tokenizer.eos_token_id, "vocab_size": len(tokenizer), "pattern": quick and quick._pat_str}
    (partial_encoder / "facts.json").write_text(json.dumps(facts))
    if quick is not None:
        lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in quick._mergeable_ranks.items())
        (partial_encoder / "ranks").write_text("".join(lines))
    partial_encoder.rename(encoder)
    partial.rename(out)


def plain_text_tokenizer(file: Path) -> Any:
    """A ``tokenizers.Tokenizer`` to which special tokens in a text are text, and no text is too long or too short."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a worker
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def check_name(name: str | None) -> str:
    """What identifies a choice of tokenizer.

    Raises:
        ValueError: neither an encoding of tiktoken's nor a folder with a ``tokenizer.json``.
    """
    if name is None:
        return "trained"
    file = Path(name) / "tokenizer.json"
    if file.is_file():
        return f"sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}"
    import tiktoken

    if name not in tiktoken.list_encoding_names():
        raise ValueError(
            f"--tokenizer {name}: neither a folder with a tokenizer.json nor an encoding of tiktoken's "
            f"({', '.join(sorted(tiktoken.list_encoding_names()))})"
        )
    return name


class Encoder:
    """Encodes documents as the tokenizer does that :func:`make_tokenizer` wrote.

    Attributes:
        vocab_size: tokens of the vocabulary.
        eos: the token after each document.
        dtype: of ids, uint16 or uint32.
        with_tiktoken: whether tiktoken does the work.
    """

    def __init__(self, folder: Path) -> None:
        facts = json.loads((folder / "facts.json").read_text())
        self.vocab_size, self.eos = int(facts["vocab_size"]), int(facts["eos"])
        self.dtype = token_dtype(self.vocab_size)
        self.with_tiktoken = facts["pattern"] is not None
        self._tiktoken, self._tokenizer = None, None
        if self.with_tiktoken:
            import tiktoken

            lines = (folder / "ranks").read_bytes().split()
            ranks = {base64.b64decode(token): int(rank) for token, rank in zip(lines[::2], lines[1::2], strict=True)}
            self._tiktoken = tiktoken.Encoding(
                "prepared", pat_str=facts["pattern"], mergeable_ranks=ranks, special_tokens={}
            )
        else:
            self._tokenizer = plain_text_tokenizer(folder / "tokenizer.json")

    def encode(self, texts: list[str]) -> Iterator[np.ndarray]:
        """The ids of each text, without the token after it.

        Raises:
            ValueError: an id that the vocabulary does not have.
        """
        if self._tiktoken is not None:
            encoded: Iterable[Any] = (self._tiktoken.encode_to_numpy(text, disallowed_special=()) for text in texts)
        else:
            assert self._tokenizer is not None
            encoded = (
                np.array(encoding.ids, np.int64)
                for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            )
        for ids in encoded:
            if len(ids) and int(ids.max()) >= self.vocab_size:
                raise ValueError(f"token id {int(ids.max())} does not fit a vocabulary of {self.vocab_size}")
            yield ids.astype(self.dtype)


def as_tiktoken(tokenizer: Any) -> Any | None:
    """The same encoder as a ``tiktoken.Encoding``; None where it cannot be shown to be the same.

    Args:
        tokenizer: a ``tokenizers.Tokenizer``.
    """
    import tiktoken

    from modeling.tiktoken_encodings import byte_alphabet, merges_of

    state = json.loads(tokenizer.to_str())
    model = state["model"]
    steps = (state["pre_tokenizer"] or {}).get("pretokenizers", [])
    plain = (
        model["type"] == "BPE"
        and not any(model.get(field) for field in ("dropout", "unk_token", "byte_fallback", "ignore_merges"))
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and state["normalizer"] is None
        and [step["type"] for step in steps] == ["Split", "ByteLevel"]
        and not (steps[1]["add_prefix_space"] or steps[1]["use_regex"])
        and steps[0]["behavior"] == "Isolated"
        and not steps[0]["invert"]
        and "Regex" in steps[0]["pattern"]
    )
    if not plain:
        return None
    byte_of = {letter: byte for byte, letter in enumerate(byte_alphabet())}
    special = {token["content"]: token["id"] for token in state["added_tokens"]}
    ranks = {
        bytes(byte_of[letter] for letter in token): rank
        for token, rank in model["vocab"].items()
        if token not in special and all(letter in byte_of for letter in token)
    }
    if len(ranks) + sum(token in model["vocab"] for token in special) != len(model["vocab"]):
        return None
    merges, unreachable = merges_of(ranks)
    alphabet = byte_alphabet()
    spelled = [["".join(alphabet[byte] for byte in part) for part in pair] for pair in merges]
    if unreachable or spelled != [list(pair) for pair in model["merges"]]:
        return None
    try:
        encoding = tiktoken.Encoding(
            "trained", pat_str=steps[0]["pattern"]["Regex"], mergeable_ranks=ranks, special_tokens={}
        )
    except ValueError:  # a pattern that the other library does not read
        return None
    return encoding if _agree(tokenizer, encoding) else None


def _agree(tokenizer: Any, encoding: Any) -> bool:
    """Whether texts of many kinds get the same ids: all of the first planes' letters, and mixtures."""
    chosen = random.Random(0)
    letters = [chr(code) for code in range(0x3000) if not 0xD800 <= code < 0xE000]
    parts = [*letters, *(" ", "  ", "\n", "\r\n", "\t", "'s", "12", "Word", "...", "漢字", "🙂", "\ufeff", "٣") * 400]
    texts = ["".join(letters)] + ["".join(chosen.choices(parts, k=12)) for _ in range(1000)]
    return all(
        one.ids == encoding.encode_ordinary(text)
        for one, text in zip(tokenizer.encode_batch_fast(texts, add_special_tokens=False), texts, strict=True)
    )
