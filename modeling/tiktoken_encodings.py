"""tiktoken encodings as Hugging Face fast tokenizers: the same ids for every text, read by vLLM without tiktoken.

Prompts are text and nothing else: one that holds ``<|endoftext|>`` gets the ids of those thirteen characters, as
:meth:`tiktoken.Encoding.encode_ordinary` gives them, never the special token. This is ``split_special_tokens`` in
``tokenizer_config.json``, which holds wherever the tokenizer is loaded from its files. Whoever renders conversations
with special tokens passes ``split_special_tokens=False`` for that call.

Sources: tiktoken 0.14 (``_educational.py`` states the algorithm); Sennrich et al. 2016; GPT-2's byte alphabet.
"""

import hashlib
import os
import random
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeling.tokenizers import END_OF_TEXT

if TYPE_CHECKING:
    import tiktoken

SAME_AS = {"gpt2": "r50k_base"}  # published twice, under other file names: one cached file serves both
_CACHE_VARIABLES = ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR")
_environment = threading.Lock()


def from_encoding(encoding: "str | tiktoken.Encoding", max_length: int) -> Any:
    """Makes a ``PreTrainedTokenizerFast`` that gives ``encoding.encode_ordinary(text)`` for every text.

    Its length is ``encoding.n_vocab``; ids that the encoding leaves out become special tokens that no text contains.
    The end-of-sequence token is ``<|endoftext|>`` where the encoding has it. Nothing is put before or after a text, and
    there is no padding token. A lone surrogate, which is no text in UTF-8, raises ``TypeError``; tiktoken replaces it
    with U+FFFD.

    Args:
        encoding: a name that tiktoken knows, such as ``p50k_base``, or any ``tiktoken.Encoding``.
        max_length: the model's longest sequence in tokens, recorded as ``model_max_length``.

    Raises:
        ValueError: the name is unknown, its ranks are neither cached nor to be had, or the encoding cannot be expressed
            as a fast tokenizer (bytes without a token, a special token that is an ordinary one as well, a pattern that
            the ``tokenizers`` library reads differently).
    """
    if isinstance(encoding, str):
        encoding = load_encoding(encoding)

    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    specials = _special_tokens(encoding)
    tokenizer = _ordinary_tokenizer(encoding, specials)
    _compare(tokenizer, encoding)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in specials.values()])
    named = [name for name in specials.values() if name in encoding.special_tokens_set and name != END_OF_TEXT]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT if END_OF_TEXT in encoding.special_tokens_set else None,
        extra_special_tokens=named,
        split_special_tokens=True,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def load_encoding(name: str) -> "tiktoken.Encoding":
    """Gives tiktoken's encoding of this name, from the cache or else from the network (once).

    The cache is the directory that ``TIKTOKEN_CACHE_DIR`` or ``DATA_GYM_CACHE_DIR`` names, as for tiktoken itself, or
    else ``medassist/tiktoken`` in the user's cache directory, because tiktoken's own choice does not outlast a reboot.

    Raises:
        ValueError: tiktoken knows no such encoding; or its ranks are in no cache and cannot be fetched, or not kept.
    """
    import tiktoken

    known = tiktoken.list_encoding_names()
    if name not in known:
        raise ValueError(f"tiktoken has no encoding named {name!r}; it has {', '.join(sorted(known))}")
    published = SAME_AS.get(name, name)
    with _lasting_cache() as cache:
        before: set[str] = set()
        try:
            if cache and os.path.isdir(cache):
                before.update(os.listdir(cache))
            encoding = tiktoken.get_encoding(published)
        except (OSError, ValueError) as error:
            raise ValueError(_no_ranks(name, cache, before, error)) from error
    if published == name:
        return encoding
    return tiktoken.Encoding(
        name,
        pat_str=encoding._pat_str,
        mergeable_ranks=encoding._mergeable_ranks,
        special_tokens=encoding._special_tokens,
    )


@contextmanager
def _lasting_cache() -> Iterator[str | None]:
    """Has tiktoken use a directory of ours unless another is set; gives the one in use (None: none that lasts)."""
    with _environment:
        chosen = next((os.environ[variable] for variable in _CACHE_VARIABLES if variable in os.environ), None)
        if chosen is not None:
            yield chosen or None  # tiktoken takes an empty value for "no cache"
            return
        try:
            ours = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medassist" / "tiktoken"
            ours.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):  # no home, or none to write to: fetched again next time
            yield None
            return
        os.environ[_CACHE_VARIABLES[0]] = str(ours)
        try:
            yield str(ours)
        finally:
            del os.environ[_CACHE_VARIABLES[0]]


def _no_ranks(name: str, cache: str | None, before: set[str], error: Exception) -> str:
    """Says why there are no ranks and what to do. ``before`` are the names that the cache held at first."""
    network = hasattr(error, "request")  # as the exceptions of the requests library, which are OSErrors too
    if isinstance(error, OSError) and not network:
        return (
            f"the ranks of {name} cannot be read from or kept in {error.filename or cache}: {error.strerror or error}; "
            "set TIKTOKEN_CACHE_DIR to a directory that you may write to"
        )
    url = getattr(getattr(error, "request", None), "url", None)
    file = hashlib.sha1(url.encode()).hexdigest() if url else None  # tiktoken's name for it
    if file in before:
        where = f"the copy in {cache} is damaged"
    else:
        where = f"they are not in {cache}" if cache else "no cache holds them"
    reason = type(error).__name__ if network else "what arrived is something else"
    return (
        f"the ranks of {name} could not be fetched ({reason}) and {where}; copy the file {file or 'of the ranks'} from "
        "the cache of a machine that has a network, and set TIKTOKEN_CACHE_DIR to the directory that it is in, or give "
        "a tokenizer's files with --tokenizer PATH"
    )


def _special_tokens(encoding: "tiktoken.Encoding") -> dict[int, str]:
    """Gives every id that no text is encoded to -> its token's name, in the order of the ids."""
    taken = set(encoding._mergeable_ranks.values())
    names: dict[int, str] = {}
    for name, token in encoding._special_tokens.items():
        if token in taken:
            raise ValueError(f"the special token {name!r} of {encoding.name} has an ordinary token's id; renumber it")
        names.setdefault(token, name)  # o200k_harmony has two names for an id
    for token in set(range(encoding.n_vocab)) - taken - names.keys():
        names[token] = f"<unused {token}>"
    return dict(sorted(names.items()))


def _ordinary_tokenizer(encoding: "tiktoken.Encoding", specials: Mapping[int, str]) -> Any:
    """Builds the ``tokenizers.Tokenizer``, without special tokens but with their ids in the vocabulary.

    They have to be there from the start: ids that are added to a finished vocabulary come after all others.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    ranks = encoding._mergeable_ranks
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(
            f"the encoding {encoding.name} has no token for the byte {missing[0]:#04x} ({len(missing)} are missing), "
            "without which it cannot encode every text; give it all 256 single bytes"
        )
    alphabet = byte_alphabet()
    merges, unreachable = merges_of(ranks)
    vocabulary = {_spell(token, alphabet): rank for token, rank in ranks.items()}
    for token, name in specials.items():
        if name in vocabulary:
            raise ValueError(f"the special token {name!r} of {encoding.name} is spelled as an ordinary one; rename it")
        vocabulary[name] = token
    assert len(vocabulary) == encoding.n_vocab
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[(_spell(left, alphabet), _spell(right, alphabet)) for left, right in merges],
            ignore_merges=unreachable,
        )
    )
    try:
        pattern = Regex(portable_pattern(encoding._pat_str))
    except Exception as error:  # the library's own error is a bare Exception
        raise ValueError(f"the pattern of the encoding {encoding.name} cannot be carried over: {error}") from error
    steps = [
        # Text that the pattern does not match is dropped, as tiktoken drops it.
        pre_tokenizers.Split(pattern, "removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    cuts = _cuts(encoding, specials, alphabet) if unreachable else []
    if cuts:
        steps.append(pre_tokenizers.Split(Regex("|".join(cuts)), "isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    # The decoder takes letters for bytes wherever it can. A special token of such letters is spelled in bytes first.
    respelled = [
        decoders.Replace(Regex(rf"\A{_quote(name)}\z"), _spell(name.encode(), alphabet))
        for name in specials.values()
        if not name.isascii() and all(letter in alphabet for letter in name)
    ]
    tokenizer.decoder = decoders.Sequence([*respelled, decoders.ByteLevel()]) if respelled else decoders.ByteLevel()
    return tokenizer


def byte_alphabet() -> str:
    """Gives the letters by which ``ByteLevel`` writes the bytes 0 to 255: printable ones as they are, others moved."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    moved = iter(letter for letter in letters if ord(letter) > 255)
    return "".join(chr(byte) if chr(byte) in letters else next(moved) for byte in range(256))


def _spell(token: bytes, alphabet: str) -> str:
    return "".join(alphabet[byte] for byte in token)


def _pieces(token: bytes, ranks: Mapping[bytes, int], at_least: int) -> list[bytes]:
    """Merges a token's bytes as tiktoken does, down to ``at_least`` pieces or until no pair has a rank."""
    pieces = [token[index : index + 1] for index in range(len(token))]
    while len(pieces) > at_least:
        pairs = [ranks.get(pieces[index] + pieces[index + 1]) for index in range(len(pieces) - 1)]
        lowest = min((rank for rank in pairs if rank is not None), default=None)
        if lowest is None:
            break
        index = pairs.index(lowest)
        pieces[index : index + 2] = [pieces[index] + pieces[index + 1]]
    return pieces


def merges_of(ranks: Mapping[bytes, int]) -> tuple[list[tuple[bytes, bytes]], bool]:
    """Gives the merges in the order of ranks, and whether there are tokens that no merge makes.

    tiktoken merges the leftmost of the pairs whose joined bytes rank lowest. A token may split into two others in
    several ways, but only one pair ever becomes it: until the pair is joined, no merge crosses its two ends, so what
    happens between them is what happens to the token's bytes on their own. One merge a token, the last one there, hence
    gives the same pieces, with the same ties to the left. (A merge for every split would not: it would put a rank on
    ways of reaching the token, where tiktoken goes by position.) Tokens not reached this way are found only as whole
    pieces, which ``ignore_merges`` looks up first, like tiktoken.
    """
    merges = []
    unreachable = False
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) > 1:
            pieces = _pieces(token, ranks, at_least=2)
            if len(pieces) == 2:
                merges.append((pieces[0], pieces[1]))
            else:
                unreachable = True
    return merges, unreachable


def _cuts(encoding: "tiktoken.Encoding", specials: Mapping[int, str], alphabet: str) -> list[str]:
    """Gives regular expressions for the cuts that keep the text of a special token from being looked up as a whole.

    With ``ignore_merges``, a piece spelled as a special token would become it. Such a piece is cut in advance into the
    tokens that it consists of, each of which is then found by its own look-up.
    """
    cuts = []
    for name in specials.values():
        if not all(letter in alphabet for letter in name):
            continue  # no bytes are spelled like this
        text = bytes(alphabet.index(letter) for letter in name)
        pieces = [_spell(piece, alphabet) for piece in _pieces(text, encoding._mergeable_ranks, at_least=1)]
        for index in range(1, len(pieces)):
            left, right = _quote("".join(pieces[:index])), _quote("".join(pieces[index:]))
            cuts.append(rf"(?<=\A{left})(?={right}\z)")
    return cuts


def _quote(text: str) -> str:
    return "".join(rf"\x{{{ord(letter):x}}}" for letter in text)


# What \w is to tiktoken's regular expressions (Unicode TR 18, annex C). Oniguruma has other digits and no joiners.
_WORD = r"\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{200c}\x{200d}"
_PATTERN_PARTS = re.compile(
    r"""\\[pP]\{\^?(?:\w+[:=])?\w+\} | \\[pP]\w | \\[xu]\{[0-9a-fA-F]+\} | \\.  # escapes
    | \(\?(?:[<][=!]|[=!>:]|P?<\w+>|[a-zA-Z-]+[:)]) | [()|]                      # groups
    | (?:\{\d*,?\d*\}|[*+?])[+?]?                                                # quantifiers
    | \[\^?\]? | .""",
    re.VERBOSE | re.DOTALL,
)


def portable_pattern(pattern: str) -> str:
    r"""Writes a pattern of tiktoken's (Rust, fancy-regex) so that ``tokenizers`` (Oniguruma) reads the same.

    Handled are: ``{1,3}+``, possessive there, a repeated repeat here; ``^`` and ``$``, ends of the text there, of every
    line here; ``\w`` and ``\W``; ``\pL``, ``\p{Script=Han}``, ``\u{...}``; the flag ``s``.

    Raises:
        ValueError: the pattern has flags other than ``i`` and ``s``, or sets them halfway.
    """
    out: list[str] = []
    groups: list[int] = []  # where in `out` the open groups start
    depth = 0  # of character classes
    atom = 0  # where in `out` the last thing that a quantifier can follow starts
    for match in _PATTERN_PARTS.finditer(pattern):
        part = match.group()
        if part[0] == "\\":
            part = _portable_escape(part, within_class=depth > 0)
            atom = atom if depth else len(out)
        elif part[0] == "[":
            atom = atom if depth else len(out)
            depth += 1
        elif depth:
            # Within a class everything else stands for itself, whatever the expression above took it for.
            depth -= part == "]"
        elif part[0] == "(":
            groups.append(len(out))
            flags = re.fullmatch(r"\(\?([a-zA-Z-]+)([:)])", part)
            if flags:
                if set(flags[1]) - set("is-") or (flags[2] == ")" and match.start() > 0):
                    raise ValueError(f"it has the flags {part}, of which only i and s, in groups, are understood")
                part = part.replace("s", "m")
                if flags[2] == ")":
                    groups.pop()
        elif part == ")":
            atom = groups.pop() if groups else len(out)
        elif part[0] in "*+?" or re.match(r"\{[\d,]+\}", part):
            if part[0] == "{" and part.endswith("+"):
                out[atom:] = ["(?>" + "".join(out[atom:]) + part[:-1] + ")"]
                continue
        else:
            part = {"^": r"\A", "$": r"\z"}.get(part, part)
            atom = len(out)
        out.append(part)
    return "".join(out)


def _portable_escape(escape: str, within_class: bool) -> str:
    if escape in (r"\w", r"\W"):
        negated = escape == r"\W"
        return _WORD if within_class and not negated else f"[{'^' if negated else ''}{_WORD}]"
    if escape.startswith(r"\u{"):
        return r"\x" + escape[2:]
    named = re.fullmatch(r"\\([pP])\{?(\^?)(?:\w+[:=])?(\w+)\}?", escape)
    return rf"\{named[1]}{{{named[2]}{named[3]}}}" if named else escape


def _compare(tokenizer: Any, encoding: "tiktoken.Encoding") -> None:
    """Refuses an encoding whose pattern the two libraries read differently, found by trying texts of many kinds."""
    chosen = random.Random(0)
    parts = [
        *(chr(code) for code in range(0x250)),
        *"ſΣςюЖאبक्षไ漢字한あ\u0301\u200b\u200c\u200d\u2028\u3000\ufeff\ufffd٣Ⅷ½²🙂🩺\U0001f468\U0010ffff",
        *(" ", "  ", "\n", "\r\n", "\t", "'s", "'LL", "'re", "1234", "word", "Word", "WORD", "...", "/\n") * 20,
        *encoding.special_tokens_set,
    ]
    texts = ["".join(chosen.choices(parts, k=chosen.randint(1, 12))) for _ in range(3000)]
    for text in texts:
        if tokenizer.encode(text).ids != encoding.encode_ordinary(text):
            raise ValueError(
                f"the pattern of the encoding {encoding.name} cannot be carried over: the tokenizers library reads it "
                f"differently, first seen with the text {text!r}; write it without what differs between regex libraries"
            )
