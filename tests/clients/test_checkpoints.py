"""``medassist import``, ``models`` and ``inspect``, as a person sees them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from clients import cli
from modeling.registry import REGISTRY
from tests.modeling.importing import published
from tests.modeling.importing.published import Sizes

SIZES = Sizes(vocab=11, d=8, heads=4, kv=2, ff=6, layers=2, ctx=8)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code: Any = 0
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as e:
        code = e.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def inspect(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, str]:
    code, out, err = run(capsys, "inspect", *arguments)
    assert (code, err) == (0, "")
    return {
        label.strip(): text for label, _, text in (line.partition("  ") for line in out.splitlines() if line[0] != " ")
    }


def test_what_a_terminal_would_obey_is_printed_as_escapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = published.medassist(SIZES) | {"\x1b[2J\u202eblocks.9": torch.ones(1)}
    source = published.write_folder(tmp_path / "s", state, published.native(SIZES, **{"\x1b]0;x\x07": 1}))
    _, shown, _ = run(capsys, "inspect", source)
    code, _, refusal = run(capsys, "import", source, "--out", tmp_path / "out", "--tokenizer", "none")
    assert code == 2
    sound = published.write_folder(tmp_path / "t", published.medassist(SIZES), published.native(SIZES))
    config = json.loads((sound / "config.json").read_text()) | {"model_type": "\x1b[31mred"}
    published.write_json(sound / "config.json", config)
    code, out, warned = run(capsys, "import", sound, "--out", tmp_path / "out", "--tokenizer", "none")
    assert code == 0
    for text, escaped in ((shown, r"\x1b[2J\u202eblocks.9"), (refusal, r"\x1b[2J"), (warned, r"\x1b[31mred")):
        assert escaped in text
        assert all(line.isprintable() for line in text.split("\n"))
    assert out.isascii()


def test_models_lists_every_preset_with_its_true_size(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "models")
    assert code == 0
    rows = [line.split()[:3] for line in out.splitlines()[1:]]
    assert [(row[0], row[1]) for row in rows] == [(a.model_type, p) for a in REGISTRY.values() for p in a.presets()]
    counts = {(row[0], row[1]): row[2] for row in rows}
    assert counts["medassist_gpt", "published_303m"] == "303,196,160"
    assert counts["medassist_gpt", "published_86m"] == "86,578,176"
    assert counts["gatorgpt", "published_v1"] == "32,587,008"
    assert counts["gpt", "published_211m"] == "211,871,700"
    assert next(line for line in out.splitlines() if "401M" in line).split()[2] == "303,196,160"
    tiny = REGISTRY["tinymorfer"].model_class()(REGISTRY["tinymorfer"].config_class().tiny())
    assert counts["tinymorfer", "tiny"] == f"{sum(p.numel() for p in tiny.parameters()):,}"


def test_import_says_what_it_took_from_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = published.gpt_config(SIZES, context_length=16, colour="blue")
    source = published.write_folder(tmp_path / "source", published.gpt(SIZES), config, "GPT2_211M.pth")
    code, out, err = run(capsys, "import", source, "--out", tmp_path / "out", "--tokenizer", "none")
    assert code == 0
    assert "GPT2_211M.pth" not in err
    assert "max_position_embeddings = 16, the tensors have 8" in err
    assert "'colour'" in err
    assert "as published: causal False" in out
    assert "--set causal=true" in out
    assert f"medassist serve {tmp_path / 'out'}" in out


def test_inspect_tells_what_is_missing_and_how_to_give_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(published.prefixed(published.medassist(SIZES)), path)
    code, out, _ = run(capsys, "inspect", path)
    assert code == 0
    assert "state dictionary (torch.save)" in out
    assert "'_orig_mod.'" in out
    assert "--set num_attention_heads=..." in out
    assert "rms_norm_eps" in out
    lines = inspect(capsys, path, "--set", "n_heads=4")
    assert lines["architecture"].strip().startswith("medassist_gpt")
    assert lines["import"].strip() == "possible"
    trained = {n: t for n, t in published.medassist(SIZES, head=None, buffers=False).items()}
    assert lines["parameters"].strip() == f"{sum(t.numel() for t in trained.values()):,}"
    assert list(tmp_path.iterdir()) == [path]


def test_inspect_names_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = published.write_folder(tmp_path / "s", published.medassist(SIZES), published.native(SIZES, d_ff=7))
    assert "intermediate_size = 7, the tensors say 6" in inspect(capsys, source)["import"]
    other = published.write_folder(tmp_path / "o", {"transformer.wte.weight": torch.ones(3, 3)}, None)
    assert "of no architecture" in inspect(capsys, other)["import"]


def test_inspect_checks_the_fingerprint_of_our_own_directories(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(cli.demo_checkpoint(), directory)
    lines = inspect(capsys, directory)
    assert lines["fingerprint"].strip().startswith("holds")
    assert "chat template" in lines["tokenizer"]
    with (directory / "model.safetensors").open("r+b") as f:
        f.seek(-1, 2)
        f.write(b"\x3f")
    assert inspect(capsys, directory)["fingerprint"].strip().startswith("does not hold: model.safetensors")
    (directory / "fingerprint.json").write_text(json.dumps({"version": 1, "probes": 3, "sha256": {}}))
    assert inspect(capsys, directory)["fingerprint"].strip().startswith("does not hold")


@pytest.mark.parametrize("content", [b"", b"noise" * 100, b"PK\x03\x04"])
def test_inspect_refuses_what_it_cannot_read(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    code, out, err = run(capsys, "inspect", tmp_path / "a.pt")
    assert (code, out, err.count("\n")) == (2, "", 1)
