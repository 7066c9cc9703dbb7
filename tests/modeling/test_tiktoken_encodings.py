"""tiktoken encodings as fast tokenizers: the same ids as tiktoken for every text, wherever the files are loaded."""

import functools
import gzip
import json
import os
import pickle
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import example, given
from hypothesis import strategies as st

from modeling.tiktoken_encodings import from_encoding, load_encoding, portable_pattern
from modeling.tokenizers import train_bpe

ROOT = Path(__file__).parents[2]
MEDQUAD = ROOT.parent / "shared" / "data" / "medquad.jsonl.gz"
BYTES = {bytes([byte]): byte for byte in range(256)}

# The patterns of GPT-2, cl100k_base and o200k_base in their features: contractions, possessive repeats, look-ahead.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
THREE_DIGITS = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s"
)
CASES = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'ll)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'ll)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@functools.cache
def _learned_ranks() -> dict[bytes, int]:
    """A few hundred tokens learned from English, with gaps between some of the ids."""
    text = "What helps with a cold? Rest and drink plenty of water.   You'll see a doctor: 38.5 or 39,\n\n  at most."
    model = json.loads(train_bpe([text] * 9, 420, 64).backend_tokenizer.to_str())["model"]
    letters = _letters()
    return {
        bytes(letters.index(letter) for letter in token): rank + 3 * (rank // 50)
        for token, rank in model["vocab"].items()
        if rank > 3
    }


def _letters() -> str:
    kept = [chr(byte) if chr(byte).isprintable() and byte != 32 else "" for byte in range(256)]
    moved = iter(range(256, 512))
    return "".join(letter or chr(next(moved)) for letter in kept)


def _custom(name: str) -> tiktoken.Encoding:
    learned = _learned_ranks()
    if name == "special ids in gaps and at the end":
        specials = {"<|endoftext|>": 50, "<|fim|>": 52, "<| two words |>": 900, "<|début|>": 901}
        return tiktoken.Encoding(name, pat_str=GPT2, mergeable_ranks=learned, special_tokens=specials)
    if name == "special tokens that the pattern leaves whole":
        specials = {"<|endoftext|>": 0, "help": 1, "</s>": 600}
        return tiktoken.Encoding(name, pat_str=r"\S+|\s+", mergeable_ranks=learned, special_tokens=specials)
    if name == "tokens that no merge makes":
        whole = {"qqzzq": 700, "<|endof": 701, "text|>": 702, "\u00e9\u00e9": 703, "      ": 704}
        ranks = learned | {token.encode(): rank for token, rank in whole.items()}
        specials = {"<|endoftext|>": 50, "<|endofqqzzq": 52, "é|é": 705}
        return tiktoken.Encoding(name, pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens=specials)
    if name == "tokens that split in several ways, in no order":
        tokens = [b"ab", b"ba", b"aa", b"aaa", b"aaaa", b"abab", b"aba", b"bab", b"baa", b"aab", b"abaab", b"  ", b" a"]
        ids = list(range(256 + len(tokens)))
        random.Random(3).shuffle(ids)
        ranks = dict(zip([*BYTES, *tokens], ids, strict=True))
        return tiktoken.Encoding(name, pat_str=r"(?s:.+)", mergeable_ranks=ranks, special_tokens={"abba": 300})
    if name == "digits by threes":
        ranks = learned | {b"38": 950, b"385": 951, b"85": 952}
        return tiktoken.Encoding(name, pat_str=THREE_DIGITS, mergeable_ranks=ranks, special_tokens={})
    if name == "letters by case":
        specials = {"<|endoftext|>": 1999, "<|endofprompt|>": 2018, "<|same id|>": 2018}
        return tiktoken.Encoding(name, pat_str=CASES, mergeable_ranks=learned, special_tokens=specials)
    assert name == "text that the pattern leaves out"
    return tiktoken.Encoding(name, pat_str=r"^\w{2,4}+|\w+$|\W", mergeable_ranks=learned, special_tokens={})


LOSSLESS = (
    "special ids in gaps and at the end",
    "special tokens that the pattern leaves whole",
    "tokens that no merge makes",
    "tokens that split in several ways, in no order",
    "digits by threes",
    "letters by case",
)
CUSTOM = (*LOSSLESS, "text that the pattern leaves out")
PUBLISHED = ("p50k_base", "gpt2")


@functools.cache
def _pair(name: str) -> tuple[tiktoken.Encoding, Any]:
    encoding = load_encoding(name) if name in PUBLISHED else _custom(name)
    return encoding, from_encoding(encoding, max_length=1_000_000)


PIECES = st.one_of(
    st.text(max_size=12),
    st.text(alphabet=" \n\t\r\u00a0\u2003\u3000\x0b\x85", max_size=40),
    st.text(alphabet="ab <|>", max_size=40),
    st.text(alphabet="0123456789.,-\u00b2\u0663\u2167", max_size=12),
    st.text(alphabet="\x00\x01\x1b\x7f\u200b\u200c\u200d\ufeff\ufffe\U000e0001", max_size=6),
    st.sampled_from(
        [
            *("<|endoftext|>", "<|endoftext", "<|fim|>", "<| two words |>", "<|début|>", "</s>", "help", "abba", "é|é"),
            *(
                "qqzzq",
                "<|endofqqzzq",
                "<unused 53>",
                "I'm",
                "they'LL",
                "can't",
                "we've",
                "\u017f",
                "'\u017f",
                "isn\u2019t",
            ),
            *("👩🏽\u200d⚕️", "👨\u200d👩\u200d👧", "🇫🇷", "e\u0301", "頭痛 薬", "صداع", "सिर", "38.5 °C"),
            *("isn\u2019t", " 140/90 mmHg", "\n\n  -"),
        ]
    ),
)
TEXTS = st.lists(PIECES, max_size=6).map("".join)


def _assert_same(name: str, text: str) -> None:
    encoding, tokenizer = _pair(name)
    ids = encoding.encode_ordinary(text)
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == encoding.decode(ids)


@pytest.mark.parametrize("name", CUSTOM)
@given(text=TEXTS)
@example(text="<|endoftext|>")
@example(text="<|endoftext|> help <|endoftext|>\n</s>")
@example(text="aaaaaaabaabbaaabab" * 60)
@example(text=" " * 700 + "x" + "\n" * 200)
def test_ids_are_those_of_tiktoken(name: str, text: str) -> None:
    _assert_same(name, text)


@pytest.mark.usefixtures("tiktoken_ranks")
@pytest.mark.parametrize("name", PUBLISHED)
@given(text=TEXTS)
@example(text="<|endoftext|>")
@example(text="".join(" " * count + "x" for count in range(60)))
def test_ids_are_those_of_tiktoken_in_the_published_encodings(name: str, text: str) -> None:
    _assert_same(name, text)


@pytest.mark.parametrize("name", LOSSLESS)
@given(text=TEXTS)
def test_every_text_is_restored_exactly(name: str, text: str) -> None:
    tokenizer = _pair(name)[1]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("name", ["digits by threes", "letters by case", "text that the pattern leaves out"])
def test_every_character_is_classed_as_tiktoken_classes_it(name: str) -> None:
    encoding, tokenizer = _pair(name)
    # Where characters were assigned in recent years, and a sample of all the rest.
    codes = [*range(0x3000), *range(0xA000, 0xD800), *range(0x10000, 0x20000), *range(0xE000, 0x110000, 37)]
    for start in range(0, len(codes), 64):
        for around in ("a", "1", " ", "'", "\n"):
            text = "".join(f"{around}{chr(code)}s{around}" for code in codes[start : start + 64])
            assert tokenizer.backend_tokenizer.encode(text).ids == encoding.encode_ordinary(text), ascii(text)


@pytest.mark.usefixtures("tiktoken_ranks")
@pytest.mark.skipif(not MEDQUAD.exists(), reason=f"{MEDQUAD} is not there")
@pytest.mark.parametrize("name", PUBLISHED)
def test_medical_text_has_the_ids_of_tiktoken(name: str) -> None:
    with gzip.open(MEDQUAD, "rt", encoding="utf-8") as file:
        rows = [json.loads(row) for row, _ in zip(file, range(300), strict=False)]
    encoding, tokenizer = _pair(name)
    texts = [f"{row['question']}\n{row['answer']}" for row in rows]
    assert tokenizer(texts)["input_ids"] == encoding.encode_ordinary_batch(texts)


@pytest.mark.usefixtures("tiktoken_ranks")
@pytest.mark.parametrize(("name", "size"), [("p50k_base", 50281), ("gpt2", 50257)])
def test_published_encodings_have_their_sizes_and_end_of_text_in_its_place(name: str, size: int) -> None:
    encoding, tokenizer = _pair(name)
    assert encoding.name == name
    assert len(tokenizer) == tokenizer.vocab_size == encoding.n_vocab == size
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 50256)
    assert tokenizer.bos_token is None
    assert tokenizer.pad_token is None
    if name == "p50k_base":
        runs = [tokenizer.decode([token]) for token in range(50257, 50281)]
        assert runs == [" " * count for count in range(2, 26)]


def test_gpt2_and_r50k_base_are_one_encoding(tiktoken_ranks: None) -> None:
    gpt2, r50k = load_encoding("gpt2"), load_encoding("r50k_base")
    assert (gpt2._mergeable_ranks, gpt2._pat_str, gpt2._special_tokens, gpt2.n_vocab) == (
        r50k._mergeable_ranks,
        r50k._pat_str,
        r50k._special_tokens,
        r50k.n_vocab,
    )


def test_special_tokens_have_their_ids_and_every_other_id_is_filled() -> None:
    encoding, tokenizer = _pair("special ids in gaps and at the end")
    for name, token in encoding._special_tokens.items():
        assert tokenizer.convert_tokens_to_ids(name) == token
    assert tokenizer.eos_token_id == 50
    assert sorted(tokenizer.all_special_ids) == [50, 52, 900, 901]
    assert len(tokenizer) == encoding.n_vocab == 902
    assert sorted(tokenizer.get_vocab().values()) == list(range(902))
    known = set(encoding._mergeable_ranks.values()) | set(encoding._special_tokens.values())
    for token in range(902):
        if token in known:
            assert tokenizer.decode([token]) == encoding.decode([token])
        else:
            assert tokenizer.decode([token], skip_special_tokens=True) == ""


def test_special_tokens_are_left_out_of_text_on_request() -> None:
    encoding, tokenizer = _pair("special ids in gaps and at the end")
    ids = [*encoding.encode_ordinary("a <|fim|> cold"), 50, 900, 901]
    assert tokenizer.decode(ids) == "a <|fim|> cold<|endoftext|><| two words |><|début|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a <|fim|> cold"


def test_encoding_without_end_of_text_has_no_end_token() -> None:
    assert _pair("digits by threes")[1].eos_token is None


def test_two_names_of_one_special_id_give_the_first() -> None:
    _, tokenizer = _pair("letters by case")
    assert tokenizer.decode([2018]) == "<|endofprompt|>"
    assert len(tokenizer) == 2019


@pytest.mark.parametrize("name", CUSTOM)
def test_saved_files_give_the_same_in_hugging_face_and_in_vllm(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    vllm_tokenizers = pytest.importorskip("vllm.tokenizers")
    encoding, tokenizer = _pair(name)
    tokenizer.save_pretrained(tmp_path)
    texts = ["<|endoftext|>", "", "help a<|endoftext|>b </s><unused 53>", "it'll  be\n\n 38.5 é|é qqzzq abba abaabab"]
    expected = [encoding.encode_ordinary(text) for text in texts]
    special = sorted(encoding._special_tokens.values())
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), vllm_tokenizers.get_tokenizer(str(tmp_path))):
        assert (len(loaded), loaded.model_max_length) == (encoding.n_vocab, 1_000_000)
        assert (loaded.eos_token_id, loaded.pad_token) == (tokenizer.eos_token_id, None)
        assert loaded.decode(special) == tokenizer.decode(special)
        assert loaded.decode(special, skip_special_tokens=True) == ""
        for copied in (loaded, pickle.loads(pickle.dumps(loaded))):
            # As the server calls it: completions with special tokens added, and without.
            for options in ({}, {"add_special_tokens": True}, {"add_special_tokens": False}):
                assert [copied(text, **options)["input_ids"] for text in texts] == expected
                assert [copied.encode(text, **options) for text in texts] == expected
                assert copied(texts, **options)["input_ids"] == expected


def test_special_tokens_are_recognised_when_a_call_asks_for_it() -> None:
    encoding, tokenizer = _pair("special ids in gaps and at the end")
    text = "a cold<|endoftext|>"
    assert tokenizer(text, split_special_tokens=False)["input_ids"] == encoding.encode(text, allowed_special="all")
    assert tokenizer(text)["input_ids"] == encoding.encode_ordinary(text)


def test_threads_share_a_tokenizer() -> None:
    encoding, tokenizer = _pair("letters by case")
    texts = [f"{number} colds <|endoftext|> and {number} doctors" for number in range(200)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda text: tokenizer(text)["input_ids"], texts)) == encoding.encode_ordinary_batch(texts)


def test_lone_surrogates_are_no_text() -> None:
    with pytest.raises(TypeError):
        _pair("letters by case")[1]("\ud83d")


@pytest.mark.parametrize(
    ("ranks", "pattern", "specials", "message"),
    [
        ({token: rank for token, rank in BYTES.items() if token != b"q"}, r"\w+", {}, "no token for the byte 0x71"),
        (BYTES, r"\w+", {"<s>": 7}, "'<s>' of odd has an ordinary token's id"),
        (BYTES | {b"<s>": 256}, r"\S+", {"<s>": 300}, "'<s>' of odd is spelled as an ordinary one"),
        (BYTES, r"(?x) \w+ ", {}, "has the flags"),
        (BYTES | {b"ab": 256}, r"(?:a(?i)B|.)", {}, "has the flags"),
        # POSIX classes are ASCII to tiktoken and Unicode here: found by trying.
        (BYTES | {"aé".encode(): 256}, r"[[:alpha:]]+", {}, "reads it differently"),
    ],
)
def test_encoding_that_cannot_be_carried_over_is_refused(
    ranks: dict[bytes, int], pattern: str, specials: dict[str, int], message: str
) -> None:
    encoding = tiktoken.Encoding("odd", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
    with pytest.raises(ValueError, match=message):
        from_encoding(encoding, 64)


@pytest.mark.parametrize(
    ("pattern", "portable"),
    [
        (r"\d{1,3}+a", r"(?>\d{1,3})a"),
        (r"x(?:ab|c){2}+", r"x(?>(?:ab|c){2})"),
        (r"[^{1,3}+]{4}+", r"(?>[^{1,3}+]{4})"),
        (r"^a|[$^]|b$|\$", r"\Aa|[$^]|b\z|\$"),
        (r"\pL+\p{Script=Han}\P{sc=Han}", r"\p{L}+\p{Han}\P{Han}"),
        (r"(?s:.)|(?i:s)", r"(?m:.)|(?i:s)"),
    ],
)
def test_patterns_are_rewritten_where_the_libraries_differ(pattern: str, portable: str) -> None:
    assert portable_pattern(pattern) == portable


def _run(name: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Loads the ranks in a process whose network is a closed port."""
    code = f"from modeling.tiktoken_encodings import load_encoding; print(load_encoding({name!r}).n_vocab)"
    kept = {key: value for key, value in os.environ.items() if "CACHE" not in key and "proxy" not in key.lower()}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=kept | {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def _error(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: ")
    return last


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("p50k_base", "ec7223a39ce59f226a68acc30dc1af2788490e15"),
        pytest.param("gpt2", "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4", marks=pytest.mark.slow),
    ],
)
def test_neither_network_nor_cache_says_what_to_do(name: str, file: str, tmp_path: Path) -> None:
    message = _error(_run(name, TIKTOKEN_CACHE_DIR=str(tmp_path)))
    for part in (f"the ranks of {name}", f"not in {tmp_path}", file, "set TIKTOKEN_CACHE_DIR", "--tokenizer PATH"):
        assert part in message
    assert "http" not in message


def test_damaged_cache_file_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "ec7223a39ce59f226a68acc30dc1af2788490e15").write_bytes(b"IQ== 0\n")
    message = _error(_run("p50k_base", TIKTOKEN_CACHE_DIR=str(tmp_path)))
    assert f"the copy in {tmp_path} is damaged" in message


@pytest.mark.slow
def test_ranks_are_kept_in_the_users_cache_directory(tiktoken_ranks: None, tmp_path: Path) -> None:
    source = Path(os.environ.get("TIKTOKEN_CACHE_DIR", "nowhere")) / "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4"
    if not source.exists():
        pytest.skip("the ranks are in no directory that TIKTOKEN_CACHE_DIR names")
    message = _error(_run("gpt2", XDG_CACHE_HOME=str(tmp_path)))
    assert f"not in {tmp_path / 'medassist' / 'tiktoken'}" in message
    (tmp_path / "medassist" / "tiktoken" / source.name).write_bytes(source.read_bytes())
    assert _run("gpt2", XDG_CACHE_HOME=str(tmp_path)).stdout.strip() == "50257"


def test_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no encoding named 'p50k'; it has cl100k_base, gpt2, .*p50k_base"):
        from_encoding("p50k", 64)
