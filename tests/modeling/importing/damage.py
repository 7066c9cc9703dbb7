"""Inputs that an import must refuse, made from a small intact model by seeded loops.

Each case is a function that puts its files into an empty folder and says how to import them.
"""

import io
import json
import os
import pickle
import random
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from tests.modeling.importing import published
from tests.modeling.importing.published import Sizes, State

SIZES = Sizes(vocab=11, d=8, heads=4, kv=2, ff=6, layers=2, ctx=8)
MEDASSIST = published.medassist(SIZES, buffers=False, head=None)
GPT = published.gpt(SIZES)
NATIVE = published.native(SIZES)


@dataclass(frozen=True)
class Input:
    source: Path
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """``message``: regular expression that the error must match, besides being one paragraph."""

    name: str
    build: Callable[[Path, Path], Input]  # folder, marker file that a hostile input would create
    message: str = field(default="")


def cases() -> list[Case]:
    result = [case for kind in KINDS for case in kind(random.Random(kind.__name__))]
    assert len({case.name for case in result}) == len(result)
    return result


def _folder(state: State, config: Any = NATIVE, file: str = "model.safetensors") -> Callable[[Path, Path], Input]:
    return lambda folder, marker: Input(published.write_folder(folder, state, config, file))


def _bytes(content: bytes, file: str, config: Any = NATIVE) -> Callable[[Path, Path], Input]:
    def build(folder: Path, marker: Path) -> Input:
        published.write_json(folder / "config.json", config)
        (folder / file).write_bytes(content)
        return Input(folder)

    return build


def _saved(content: Any, *, old: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not old)
    return buffer.getvalue()


def _intact() -> dict[str, bytes]:
    return {
        "model.safetensors": save(MEDASSIST),
        "pytorch_model.bin": _saved(MEDASSIST),
        "step.pt": _saved({"step": 3, "model_state_dict": published.prefixed(MEDASSIST), "config": NATIVE}),
        "old.pth": _saved(MEDASSIST, old=True),
    }


def truncated(rng: random.Random) -> Iterator[Case]:
    for file, content in _intact().items():
        cuts = {0, 1, 7, 8, 9, 64, len(content) // 2, len(content) - 1, len(content) - 30}
        cuts |= {rng.randrange(len(content)) for _ in range(5)}
        for cut in sorted(cuts):
            yield Case(f"truncated-{file}-{cut}", _bytes(content[:cut], file))
    text = json.dumps(NATIVE).encode()
    for cut in sorted(rng.sample(range(len(text)), 8)):
        yield Case(f"truncated-config-{cut}", _config_bytes(text[:cut]), r"config\.json")


def _config_bytes(text: bytes) -> Callable[[Path, Path], Input]:
    def build(folder: Path, marker: Path) -> Input:
        published.write_folder(folder, MEDASSIST, None)
        (folder / "config.json").write_bytes(text)
        return Input(folder)

    return build


def flipped(rng: random.Random) -> Iterator[Case]:
    content = _intact()["model.safetensors"]
    header = 8 + int.from_bytes(content[:8], "little")
    for at in sorted({*range(0, 8), *rng.sample(range(8, header), 16)}):
        damaged = bytearray(content)
        damaged[at] ^= 1 << rng.randrange(7)
        yield Case(f"flipped-safetensors-{at}", _bytes(bytes(damaged), "model.safetensors"))
    for file, marks in (
        ("pytorch_model.bin", (b"PK\x05\x06", b"PK\x01\x02", b"data.pkl")),
        ("old.pth", (b"\x80\x02\x8a",)),
    ):
        for mark in marks:
            content = bytearray(_intact()[file])
            at = content.rfind(mark)
            content[at + (2 if file == "old.pth" else 0)] ^= 0x55
            yield Case(f"flipped-{file}-{mark!r}", _bytes(bytes(content), file))


def _changed_shapes(tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    yield "row-more", torch.cat([tensor, tensor[:1]])
    yield "row-less", tensor[:-1].clone()
    yield "dimension-more", tensor[None].clone()
    if tensor.ndim == 2:
        yield "column-more", torch.cat([tensor, tensor[:, :1]], 1)
        yield "flat", tensor.flatten().clone()
        if tensor.shape[0] != tensor.shape[1]:
            yield "transposed", tensor.T.contiguous()


def shapes(rng: random.Random) -> Iterator[Case]:
    for state, config, names in (
        (MEDASSIST, NATIVE, ["embed.weight", "final_rms.weight", "blocks.1.rms1.weight", "blocks.0.attn.q_proj.weight",
                             "blocks.1.attn.k_proj.weight", "blocks.0.mlp.w1.weight", "blocks.1.mlp.w2.weight"]),
        (GPT, published.gpt_config(SIZES), ["tok_emb.weight", "pos_emb.weight", "trf_blocks.1.att.W_key.weight",
                                            "trf_blocks.0.ff.layers.0.bias", "out_head.weight", "final_norm.shift"]),
    ):  # fmt: skip
        for name in names:
            for kind, tensor in _changed_shapes(state[name]):
                # The file's name of the tensor, and two shapes, are in the message.
                yield Case(
                    f"shape-{name}-{kind}", _folder(state | {name: tensor}, config), r"\.\w+ .*\(.*\(|says|contra"
                )


def keys(rng: random.Random) -> Iterator[Case]:
    for name in ("embed.weight", "final_rms.weight", *(n for n in MEDASSIST if n.startswith("blocks.1."))):
        rest = {n: t for n, t in MEDASSIST.items() if n != name}
        yield Case(f"missing-{name}", _folder(rest), "missing")
        yield Case(f"renamed-{name}", _folder(rest | {f"{name}_old": MEDASSIST[name]}), "missing.*unexpected")
    for name in [n for n in GPT if n.startswith("trf_blocks.0.") and "mask" not in n]:
        rest = {n: t for n, t in GPT.items() if n != name}
        yield Case(f"missing-{name}", _folder(rest, published.gpt_config(SIZES)), "missing")
    extra = {
        "blocks.0.attn.q_proj.bias": torch.zeros(8),
        "blocks.2.rms1.weight": torch.ones(8),
        "value_head": torch.ones(1),
    }
    for name, tensor in extra.items():
        yield Case(f"extra-{name}", _folder(MEDASSIST | {name: tensor}))
    twice = MEDASSIST | {"_orig_mod.embed.weight": MEDASSIST["embed.weight"]}
    yield Case("keys-with-and-without-prefix", _folder(twice), "twice")
    other = MEDASSIST | {"lm_head.weight": MEDASSIST["embed.weight"] + 0.01}
    yield Case("head-differs", _folder(other), "lm_head.weight and embed.weight differ")
    yield Case("head-of-another-shape", _folder(MEDASSIST | {"lm_head.weight": torch.ones(12, 8)}), r"\(12, 8\)")
    gator = MEDASSIST | {"unembed.weight": MEDASSIST["embed.weight"]}
    yield Case("head-of-another-architecture", _folder(gator, published.hugging(SIZES)), "do not belong together")
    yield Case("other-model", _folder({"transformer.wte.weight": torch.ones(4, 4)}), "of no architecture")
    llama = {"model.embed_tokens.weight": torch.ones(4, 4), "model.layers.0.self_attn.q_proj.weight": torch.ones(4, 4)}
    yield Case("llama", _folder(llama, {"model_type": "llama"}), "of no architecture")
    block = {"attn.qkv.weight": torch.ones(12, 4), "norm.weight": torch.ones(4)}
    yield Case("tinymorfer-block", _folder(block, None), "cannot be a language model")
    for number, name in enumerate((5, ("a", "b"), None)):
        yield Case(f"name-{number}", _bytes(_saved(MEDASSIST | {name: torch.ones(2)}), "a.bin"), "must be strings")


def values(rng: random.Random) -> Iterator[Case]:
    for number, value in enumerate((3, 2.5, None, "text", [1, 2], {"a": torch.ones(2)}, True, b"bytes")):
        yield Case(f"value-{number}", _bytes(_saved(MEDASSIST | {"extra": value}), "a.bin"), "'extra' is an? ")
        inside = {"model_state_dict": MEDASSIST | {"extra": value}, "config": NATIVE}
        yield Case(f"value-inside-{number}", _bytes(_saved(inside), "a.pt"), "'extra' is an? ")
    for number, content in enumerate(([MEDASSIST], torch.ones(3), 7, "text", {}, {"model_state_dict": {}}, None)):
        yield Case(f"content-{number}", _bytes(_saved(content), "a.pt"))


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def hostile(rng: random.Random) -> Iterator[Case]:
    import builtins
    import importlib
    import runpy
    import shutil
    import subprocess

    def attacks(marker: Path) -> dict[str, Any]:
        text = f"open({str(marker)!r}, 'w')"
        return {
            "system": Call(os.system, f"touch {marker}"),
            "popen": Call(subprocess.Popen, ["touch", str(marker)]),
            "eval": Call(eval, text),
            "exec": Call(exec, text),
            "open": Call(builtins.open, str(marker), "w"),
            "import": Call(importlib.import_module, "antigravity"),
            "copy": Call(shutil.copy, "/etc/hostname", str(marker)),
            "mkdir": Call(os.mkdir, str(marker)),
            "getattr": Call(getattr, "text", "upper"),
            "runpy": Call(runpy.run_path, str(marker)),
            "load": Call(torch.load, str(marker)),
            "hub": Call(torch.hub.load, str(marker), "x"),
        }

    def build(name: str, place: str, old: bool) -> Callable[[Path, Path], Input]:
        def write(folder: Path, marker: Path) -> Input:
            attack = attacks(marker)[name]
            content = {
                "tensor": {**MEDASSIST, "embed.weight": attack},
                "config": {"model_state_dict": MEDASSIST, "config": attack},
                "beside": {"model_state_dict": MEDASSIST, "config": NATIVE, "extra": [attack]},
                "whole": attack,
            }[place]
            return _bytes(_saved(content, old=old), "a.pt")(folder, marker)

        return write

    for number, name in enumerate(attacks(Path("x"))):
        for place in ("tensor", "config", "beside", "whole"):
            old = (number + len(place)) % 2 == 0
            yield Case(
                f"hostile-{name}-{place}-{'old' if old else 'new'}", build(name, place, old), "refused|no file of"
            )
    for name in ("system", "eval", "mkdir"):
        for protocol in (0, 2, 4):

            def plain(folder: Path, marker: Path, name: str = name, protocol: int = protocol) -> Input:
                return _bytes(pickle.dumps({"embed.weight": attacks(marker)[name]}, protocol), "a.bin")(folder, marker)

            yield Case(f"hostile-plain-{name}-{protocol}", plain)
    for old in (False, True):
        module = _saved(torch.nn.Sequential(torch.nn.Linear(2, 2)), old=old)
        yield Case(f"whole-module-{old}", _bytes(module, "GPT2_v1.pt"), r"torch\.nn\.modules.*state_dict")
    script = io.BytesIO()
    with zipfile.ZipFile(script, "w") as archive:
        for name in ("m/data.pkl", "m/constants.pkl", "m/code/__torch__.py", "m/version"):
            archive.writestr(name, b"\x80\x02}q\x00.")
    yield Case("script", _bytes(script.getvalue(), "a.pt"))


def archives(rng: random.Random) -> Iterator[Case]:
    intact = _saved(MEDASSIST)

    def repacked(compression: int, change: Callable[[str, bytes], Iterator[tuple[str, bytes]]]) -> bytes:
        target = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(intact)) as source, zipfile.ZipFile(target, "w", compression) as archive:
            for entry in source.infolist():
                for name, content in change(entry.filename, source.read(entry)):
                    archive.writestr(name, content)
        return target.getvalue()

    for compression in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        bomb = repacked(compression, lambda name, content: iter([(name, content + bytes(10**6))]))
        yield Case(f"bomb-{compression}", _bytes(bomb, "a.pt"), "compressed")
    for record in ("data.pkl", "data/0", "data/5"):
        rest = repacked(zipfile.ZIP_STORED, lambda n, c, r=record: iter([] if n.endswith("/" + r) else [(n, c)]))
        yield Case(f"archive-without-{record}", _bytes(rest, "a.pt"))
    second = repacked(
        zipfile.ZIP_STORED,
        lambda n, c: iter([(n, c), ("other/" + n.rpartition("/")[2], c)][: 2 if n.endswith(".pkl") else 1]),
    )
    yield Case("archive-with-two-structures", _bytes(second, "a.pt"), "data.pkl")
    plain = io.BytesIO()
    with zipfile.ZipFile(plain, "w") as archive:
        archive.writestr("readme.txt", "hello")
    yield Case("archive-of-something", _bytes(plain.getvalue(), "a.pt"), "not one of torch.save")
    short = repacked(zipfile.ZIP_STORED, lambda n, c: iter([(n, c[:4] if "/data/" in n else c)]))
    yield Case("archive-with-short-tensors", _bytes(short[:], "a.pt"))


def files(rng: random.Random) -> Iterator[Case]:
    yield Case("nothing", lambda folder, marker: Input(folder / "missing.pt"), "does not exist")
    yield Case("no-repository", lambda folder, marker: Input(Path("no such model")), "does not exist")
    yield Case("empty-folder", lambda folder, marker: Input(folder), "no weights")
    yield Case("empty-file", _bytes(b"", "model.safetensors"), "empty")
    yield Case(
        "pointer", _bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "model.safetensors"), "git lfs"
    )
    yield Case("page", _bytes(b"<!DOCTYPE html><html></html>", "pytorch_model.bin"), "web page")
    yield Case("noise", _bytes(rng.randbytes(5000), "a.bin"))
    yield Case("text", _bytes(b"hello\n" * 50, "a.bin"))
    yield Case("several", _several, "name the one you mean: a.pt, b.pt")
    yield Case("adapter", _bytes(save(MEDASSIST), "adapter_model.safetensors"), "LoRA adapter")
    yield Case("optimizer-alone", _bytes(_saved(MEDASSIST), "optimizer.pt"), "no weights")
    yield Case("part-alone", _bytes(save(MEDASSIST), "model-00001-of-00002.safetensors"), "index")

    def directory(name: str) -> Callable[[Path, Path], Input]:
        def build(folder: Path, marker: Path) -> Input:
            published.write_folder(folder, MEDASSIST, None)
            (folder / name).mkdir()
            return Input(folder)

        return build

    yield Case("config-is-a-directory", directory("config.json"), "is no file")

    def pipe(folder: Path, marker: Path) -> Input:
        os.mkfifo(folder / "model.safetensors")
        return Input(folder)

    yield Case("pipe", pipe, "is no file")
    for kind in ("safetensors", "bin"):
        stem = {"safetensors": "model", "bin": "pytorch_model"}[kind]

        def shards(change: Callable[[Path], object], kind: str = kind) -> Callable[[Path, Path], Input]:
            def build(folder: Path, marker: Path) -> Input:
                published.write_shards(folder, MEDASSIST, NATIVE, kind)
                change(folder)
                return Input(folder)

            return build

        part, index = f"{stem}-00002-of-00003.{kind}", f"{stem}.{kind}.index.json"
        other = f"{stem}-00001-of-00003.{kind}"
        yield Case(f"{kind}-part-missing", shards(lambda f, p=part: (f / p).unlink()), "missing")
        yield Case(f"{kind}-part-empty", shards(lambda f, p=part: (f / p).write_bytes(b"")), "empty")
        yield Case(
            f"{kind}-part-twice",
            shards(lambda f, p=part, o=other: (f / p).write_bytes((f / o).read_bytes())),
            "two files",
        )
        for number, content in enumerate((
            [], {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 3}},
            {"weight_map": {"a": "../../x.bin"}},
            {"weight_map": {"a": "/etc/hostname"}}, {"weight_map": {"final_rms.weight": part}},
        )):  # fmt: skip
            yield Case(f"{kind}-index-{number}", shards(lambda f, i=index, c=content: published.write_json(f / i, c)))


def _several(folder: Path, marker: Path) -> Input:
    for name in ("a.pt", "b.pt"):
        published.write_folder(folder, MEDASSIST, NATIVE, name)
    return Input(folder)


def elements(rng: random.Random) -> Iterator[Case]:
    for number, (name, value) in enumerate(
        (name, value) for name in ("embed.weight", "blocks.1.mlp.w1.weight", "final_rms.weight")
        for value in (float("nan"), float("inf"), float("-inf"))
    ):  # fmt: skip
        tensor = MEDASSIST[name].clone()
        tensor.view(-1)[rng.randrange(tensor.numel())] = value
        yield Case(f"element-{number}", _folder(MEDASSIST | {name: tensor}), f"{name} .*no finite")
    large = MEDASSIST["embed.weight"].double() * 1e60
    yield Case("beyond-float32", _folder(MEDASSIST | {"embed.weight": large}), "embed.weight .*no finite")
    huge = {n: torch.full_like(t, 1e30) for n, t in GPT.items()}
    yield Case("overflowing", _folder(huge, published.gpt_config(SIZES)), "no finite numbers")
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn):
        tensor = torch.zeros(8, 6, dtype=dtype)
        yield Case(f"dtype-{dtype}", _folder(MEDASSIST | {"blocks.0.mlp.w2.weight": tensor}), r"blocks.0.mlp.w2.weight")
    weight = MEDASSIST["blocks.0.mlp.w2.weight"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of these are on their way out of torch
        quantised, compressed = torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8), weight.to_sparse_csr()
    unusual = {
        "complex": torch.zeros(8, 6, dtype=torch.complex64),
        "quantised": quantised,
        "sparse": weight.to_sparse(),
        "compressed": compressed,
        "meta": torch.empty(8, 6, device="meta"),
        "expanded": torch.zeros(1, 1).expand(8, 6),
        "overlapping": torch.ones(100).as_strided((8, 6), (5, 1)),
    }
    for name, tensor in unusual.items():
        content = _saved(MEDASSIST | {"blocks.0.mlp.w2.weight": tensor})
        yield Case(f"tensor-{name}", _bytes(content, "a.pt"), r"blocks.0.mlp.w2.weight|damaged or no file")


def configurations(rng: random.Random) -> Iterator[Case]:
    wrong: dict[str, tuple[Any, ...]] = {
        "vocab_size": (0, -1, "11", True, 10, 12, 10**9, 10**40, [11], 11.0, {}),
        "d_model": (0, 7, 9, 16, "8", 10**12, float("nan")),
        "n_heads": (0, 3, 5, 8, 16, True, "4", 10**9),
        "gqa_groups": (0, 1, 3, 4, "2", True, -2),
        "d_ff": (0, 5, 12, 7, 10**10, float("inf")),
        "blocks": (0, 1, 3, 10**9, -2, "2"),
        "max_len": (0, -8, "8", 2.5, True),
        "eps": (-1, 0, "small", float("nan"), 7, True),
        "dropout_p": (-0.5, 1.5, "none", float("inf")),
    }
    for name, settings in wrong.items():
        for number, value in enumerate(settings):
            config = NATIVE | {name: value}
            yield Case(f"config-{name}-{number}", _folder(MEDASSIST, config))
            if number % 3 == 0:
                content = _saved({"model_state_dict": MEDASSIST, "config": config})
                yield Case(f"config-inside-{name}-{number}", _bytes(content, "a.pt", {}))
    for number, changes in enumerate((
        {"hidden_size": 16}, {"rope_scaling": {"type": "linear", "factor": 2}}, {"rope_theta": -1},
        {"rope_layout": "x"},
        {"tie_word_embeddings": False}, {"num_key_value_heads": 4}, {"head_dim": 3}, {"rope_parameters": "none"},
    )):  # fmt: skip
        yield Case(f"config-extra-{number}", _folder(MEDASSIST, NATIVE | changes))
    bias = published.gpt_config(SIZES, qkv_bias=True)
    yield Case("config-bias", _folder(GPT, bias), "qkv_bias")
    for name, value in (("n_heads", 3), ("emb_dim", 12), ("n_layers", 5), ("causal", "yes"), ("vocab_size", 50257)):
        yield Case(
            f"config-gpt-{name}",
            _folder(GPT, published.gpt_config(SIZES, **{name: value})),
            f"{name}|num_|hidden|vocab",
        )
    mask = GPT | {"trf_blocks.0.att.mask": torch.ones(9, 9)}
    yield Case("positions-contradict-mask", _folder(mask, published.gpt_config(SIZES)), "pos_emb.weight.*mask")
    buffers = published.medassist(SIZES, head=None)
    mask = GPT | {"trf_blocks.1.att.mask": torch.ones(9, 9)}
    yield Case("positions-contradict-another-mask", _folder(mask, published.gpt_config(SIZES)), r"trf_blocks\.1.*\(9")
    yield Case("positions-contradict-table", _folder(buffers, NATIVE | {"max_len": 16}), "position_ids")
    base = buffers | {"blocks.0.attn.rope_q.div_term": torch.ones(4)}
    yield Case("another-rotary-table", _folder(base), "div_term")
    base = buffers | {"blocks.1.attn.rope_k.div_term": torch.ones(2)}
    yield Case("another-rotary-table-in-another-layer", _folder(base), r"blocks\.1\.attn\.rope_k\.div_term")
    for name in ("n_heads", "max_len"):
        rest = {n: v for n, v in NATIVE.items() if n != name}
        yield Case(f"config-without-{name}", _folder(MEDASSIST, rest), "--set num_attention_heads=|--set max_pos")
    texts = {
        "list": b"[]", "number": b"3", "null": b"null", "text": b'"x"', "empty": b"", "latin": b'{"a": "\xe9"}',
        "nested": b'{"a":' * 100_000, "lists": b"[" * 200_000, "digits": b'{"vocab_size": ' + b"9" * 5000 + b"}",
        "page": b"<html></html>", "nul": b"\0\0\0",
    }  # fmt: skip
    for name, text in texts.items():
        yield Case(f"config-is-{name}", _config_bytes(text), r"config\.json")
    for number, config in enumerate(("text", [1, 2], 5, {3: 4}, {"config": torch.ones(2), 1: 2})):
        content = _saved({"model_state_dict": MEDASSIST, "config": config})
        yield Case(f"config-inside-{number}", _bytes(content, "a.pt"), "config")
    for depth in (21, 600):
        ends = json.loads("[" * depth + "]" * depth)
        yield Case(
            f"config-deep-{depth}", _folder(MEDASSIST, NATIVE | {"eos_token_id": ends}), "'eos_token_id' is nest"
        )
    deep = json.loads("[" * 150 + "]" * 150)  # deeper ones torch.save cannot write
    many: Any = [1] * 10
    for _ in range(12):
        many = [many] * 10  # 10^13 values in a few bytes
    for name, setting, value, message in (
        ("deep", "eos_token_id", deep, "nested too deeply"), ("many", "eos_token_id", many, "too many values"),
        ("tensor", "hidden_size", torch.tensor([8, 8]), "'hidden_size' holds a Tensor"),
        ("tensor-within", "x", {"y": [torch.ones(1)]}, "'x' holds a Tensor"), ("key", "x", {1: 2}, "'x' has keys"),
        ("dtype", "x", torch.float16, "'x' holds a dtype"),
    ):  # fmt: skip
        for key in ("config", "model_config"):
            content = _saved({"model_state_dict": MEDASSIST, key: NATIVE | {setting: value}})
            yield Case(f"config-inside-{name}-{key}", _bytes(content, "a.pt", {}), message)


def options(rng: random.Random) -> Iterator[Case]:
    def given(*options: str) -> Callable[[Path, Path], Input]:
        return lambda folder, marker: Input(published.write_folder(folder, MEDASSIST, NATIVE), options)

    for number, pair in enumerate((
        "n_heads", "=3", "heads=4", "n_heads=four", "n_heads=3", "num_hidden_layers=1e3", "vocab_size=12",
        "causal=true", "d_ff=null=", "rope_layout=spiral",
    )):  # fmt: skip
        yield Case(f"set-{number}", given("--set", pair))
    yield Case("revision-on-disk", given("--revision", "main"), "--revision")
    for name in ("no_such_encoding", "/no/such/tokenizer.json", "", "/etc"):
        yield Case(f"tokenizer-{name}", given("--tokenizer", name), "tokenizer")

    def broken(content: bytes, explicit: bool) -> Callable[[Path, Path], Input]:
        def build(folder: Path, marker: Path) -> Input:
            published.write_folder(folder, MEDASSIST, NATIVE)
            (folder / "tokenizer.json").write_bytes(content)
            return Input(folder, ("--tokenizer", str(folder / "tokenizer.json") if explicit else "DEFAULT"))

        return build

    for number, content in enumerate(
        (b"", b"{}", b"[]", b'{"model": 3}', b"\xff\xfe", b'{"version": "1.0", "model": null}')
    ):
        yield Case(f"tokenizer-broken-{number}", broken(content, number % 2 == 0), "tokenizer")
    manifest = {"library": "tiktoken", "encoding": "no_such_encoding"}

    def named(folder: Path, marker: Path) -> Input:
        published.write_json(folder / "tokenizer_manifest.json", manifest)
        return Input(published.write_folder(folder, MEDASSIST, NATIVE), ("--tokenizer", "DEFAULT"))

    yield Case("tokenizer-manifest", named, "tokenizer_manifest.json names .*no_such_encoding.*--tokenizer none")


KINDS = (
    truncated, flipped, shapes, keys, values, hostile, archives, files, elements, configurations, options,
)  # fmt: skip
