"""The tokenizer of an imported model: its own, the encoding that its files name, or the one its publisher used."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling.importing.layout import Layout
from modeling.importing.source import read_json

NONE = "none"


@dataclass(frozen=True)
class Chosen:
    """A Hugging Face fast tokenizer or None, and where it is from or why there is none, in words."""

    tokenizer: Any
    origin: str
    warning: str | None = None


def choose(wanted: str | None, folder: Path, layout: Layout, vocab_size: int, max_length: int) -> Chosen:
    """The tokenizer for a model.

    Args:
        wanted: an encoding of tiktoken, a tokenizer.json or a folder with one, ``"none"``, or None for the model's own.
        folder: where the model's files are.

    Raises:
        ValueError: the one asked for cannot be read or fetched, or has tokens that the model lacks.
    """
    if wanted == NONE:
        return Chosen(None, "none, as asked")
    if wanted is not None:
        path = Path(wanted)
        tokenizer = _read(path) if path.exists() else _encoding(wanted, "--tokenizer", max_length)
        if (tokens := _tokens(tokenizer)) > vocab_size:
            raise ValueError(
                f"the tokenizer {wanted} has {tokens} tokens, the model's vocabulary {vocab_size}: it was trained with "
                "another one. Name that one, or import without: --tokenizer none"
            )
        return Chosen(_bounded(tokenizer, max_length), wanted)
    unread = None
    if (folder / "tokenizer.json").exists():
        tokenizer, origin = _read(folder), "tokenizer.json of the source"
    else:
        encoding, origin = named(folder)
        file = folder / origin
        if encoding is None and (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            unread = (
                "vocab.json and merges.txt are a tokenizer in a form that is not read: make a tokenizer.json of them "
                "(transformers' AutoTokenizer, load and save), and give it with --tokenizer"
            )
        if encoding is None:
            encoding, origin = layout.tokenizers.get(vocab_size), f"what published models of {vocab_size} tokens use"
        if encoding is None:
            return Chosen(
                None,
                f"none: nothing tells which tokenizer a vocabulary of {vocab_size} belongs to",
                unread or "no tokenizer: requests can only be made of token ids; give one with --tokenizer",
            )
        try:
            tokenizer, origin = _encoding(encoding, str(file), max_length), f"{encoding} ({origin})"
        except ValueError as e:
            raise ValueError(f"{str(e).rstrip('.')}. To import without a tokenizer: --tokenizer none") from None
    if (tokens := _tokens(tokenizer)) > vocab_size:
        warning = (
            f"{origin} has {tokens} tokens, the model's vocabulary {vocab_size}: it is left out; give the right one "
            "with --tokenizer"
        )
        return Chosen(None, "none: the one found does not fit", warning)
    return Chosen(_bounded(tokenizer, max_length), origin, unread)


def named(folder: Path) -> tuple[str | None, str]:
    """The encoding that a published model's files name, and the file."""
    for name, keys in (
        ("tokenizer_config.json", ("tiktoken_model", "encoding")),
        ("tokenizer_manifest.json", ("encoding",)),
    ):
        path = folder / name
        if path.exists():
            content = read_json(path)
            for key in keys:
                if isinstance(content.get(key), str):
                    return content[key], name
    return None, ""


def _read(path: Path) -> Any:
    """A tokenizer.json, or that of a folder with its chat template.

    Without a template, prompts are text and nothing else: what looks like a special token is text. With one they stay
    special tokens, for the template writes them.
    """
    from transformers import PreTrainedTokenizerFast

    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path} has no tokenizer.json")
    try:
        if path.is_dir():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
        else:
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file))
    except Exception as e:  # the library raises plain exceptions
        raise ValueError(
            f"{file} is no tokenizer of Hugging Face's tokenizers ({' '.join(str(e).split())[:200]}); give another "
            "with --tokenizer"
        ) from None
    if not tokenizer.chat_template:
        tokenizer.split_special_tokens = True
        tokenizer.init_kwargs["split_special_tokens"] = True  # what is saved
    return tokenizer


def _encoding(name: str, where: str, max_length: int) -> Any:
    import tiktoken

    if name not in tiktoken.list_encoding_names() and where != "--tokenizer":
        raise ValueError(
            f"{where} names the encoding {name[:80]!r}, which tiktoken does not have "
            f"({', '.join(tiktoken.list_encoding_names())}); give one of these with --tokenizer"
        )
    if name not in tiktoken.list_encoding_names():
        raise ValueError(
            f"--tokenizer {name} is neither a file or folder nor an encoding of tiktoken "
            f"({', '.join(tiktoken.list_encoding_names())}), nor 'none'"
        )
    from modeling.tiktoken_encodings import from_encoding

    return from_encoding(name, max_length)


def _tokens(tokenizer: Any) -> int:
    """One more than the largest id."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def _bounded(tokenizer: Any, max_length: int) -> Any:
    tokenizer.model_max_length = max_length
    return tokenizer
