"""The commands, and one small measurement whose structure is looked at, not its speed."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from clients.cli import app
from loadtest import benchmark, engine_benchmark
from loadtest.engine_plan import Options
from tests.clients.commands import run as run_command


@pytest.fixture
def gateway_arguments(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the gateway's benchmark is started with, without starting it."""
    seen: list[str] = []

    def note(arguments: list[str]) -> int:
        seen.extend(arguments)
        return 0

    monkeypatch.setattr(benchmark, "main", note)
    return seen


def run(*arguments: str) -> Any:
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}).invoke(app, ["bench", *arguments])


@pytest.mark.parametrize("command", [[], ["gateway"]], ids=["without", "gateway"])
def test_the_gateway_is_measured_with_and_without_its_name(command: list[str], gateway_arguments: list[str]) -> None:
    done = run(*command, "--url", "http://127.0.0.1:1", "--rounds", "4", "--max-tokens", "8", "--report", "r.md")
    assert done.exit_code == 0, done.output
    assert sorted(gateway_arguments) == ["--max-tokens=8", "--report=r.md", "--rounds=4", "--url=http://127.0.0.1:1"]


def test_without_any_argument_the_gateway_of_the_demo_is_measured(gateway_arguments: list[str]) -> None:
    assert run().exit_code == 0
    assert len(gateway_arguments) == 1
    assert gateway_arguments[0].startswith("--checkpoint=")
    assert gateway_arguments[0].endswith("medassist-demo")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["gateway", "engine"]),
        (["gateway"], ["--checkpoint", "--url", "--rounds", "--requests", "--concurrency", "--max-tokens"]),
        (["engine"], ["--architecture", "--preset", "--sequences", "--no-hf", "--minutes", "--profile", "--report"]),
    ],
    ids=["bench", "gateway", "engine"],
)
def test_help(arguments: list[str], words: list[str]) -> None:
    done = run(*arguments, "--help")
    assert done.exit_code == 0
    assert [word for word in words if word not in done.output] == []


def test_options_and_the_command_line_reach_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(engine_benchmark, "main", lambda *arguments: seen.extend(arguments) or 0)
    line = "--preset published_v1 --preset published_v2 --sequences 1,4 --no-hf --minutes 2.5 --report out.md"
    done = run("engine", *line.split())
    assert done.exit_code == 0, done.output
    options, command, report, figures = seen
    expected = Options(presets=("published_v1", "published_v2"), sequences=(1, 4), transformers=False, minutes=2.5)
    assert options == expected
    assert command.startswith("medassist bench engine ")
    assert sorted(command.split()[3:]) == sorted(line.split())
    assert (report, figures) == (Path("out.md"), None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sequences", "1,many"], "--sequences must be numbers"),
        (["--rounds", "3"], "--rounds must be a multiple of 2"),
        (["--preset", "huge"], "none of these architectures has a preset 'huge'"),
        (["--architecture", "llama"], "unknown model_type 'llama'"),
        (["--preset", "tiny", "--new-tokens", "600"], "--new-tokens 600 do not fit"),
    ],
)
def test_mistakes_are_one_paragraph_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run_command(capsys, "bench", "engine", *arguments)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.engine
def test_a_small_measurement(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "clients.cli", "bench", "engine", "--architecture", "medassist_gpt"]
    command += ["--preset", "tiny", "--rounds", "2", "--sequences", "1,3", "--new-tokens", "4", "--prompt", "600"]
    command += ["--threads", "1", "--profile", "all"]
    command += ["--report", str(tmp_path / "out/engine.md"), "--json", str(tmp_path / "out/engine.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"COLUMNS": "200"})
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "out/engine.json").read_text())
    (model,) = figures["models"]
    names = ["decode 4, 1 sequence", "decode 4, 3 sequences", "prefill 511, 1 sequence", "prefill 511, 3 sequences"]
    assert [cell["name"] for cell in model["cells"]] == names
    for cell, tokens in zip(model["cells"], (3, 9, 511, 3 * 511), strict=True):
        order = [(turn["contender"], turn["pair"]) for turn in cell["turns"]]
        assert order == [("ours", 0), ("Llama", 0), ("generate()", 0), ("Llama", 1), ("ours", 1)]
        assert all(turn["tokens"] % tokens == 0 and turn["tokens"] > 0 for turn in cell["turns"])
        assert all(turn["seconds"] > 0 and turn["cpu"] > 0 for turn in cell["turns"])
        assert len({turn["tokens"] for turn in cell["turns"] if turn["contender"] != "generate()"}) == 1
    assert "511 tokens in place of 600" in model["notes"][0]
    # Both engines ran the operators of a decoder; the profile of ours is not that of Llama under another name.
    totals = {name: sum(o[name] for o in model["profiles"][0]["operators"]) for name in ("ours_ms", "llama_ms")}
    assert all(total > 0 for total in totals.values())
    text = (tmp_path / "out/engine.md").read_text()
    for part in ("## medassist_gpt tiny", *names, "vllm", "git commit", "--new-tokens 4", "- threads: 1", "generate()"):
        assert part in text, part
    assert "medassist_gpt tiny: warming up" in done.stderr


@pytest.mark.engine
def test_a_session_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "none_of_these")  # vLLM then does not know the architecture
    with pytest.raises(RuntimeError, match=r"(?s)medassist_gpt tiny failed with exit code 1:.*MedAssistGPT"):
        engine_benchmark.run(Options(("medassist_gpt",), ("tiny",), sequences=(1,), transformers=False))


@pytest.mark.engine
def test_a_control_measures_llama_beside_itself() -> None:
    options = Options(("gpt",), ("tiny",), rounds=2, sequences=(1,), new_tokens=3, prompt=8, threads=1, control=True)
    (model,) = engine_benchmark.run(replace(options, transformers=False, profile="all")).models
    assert model.title == "gpt tiny, control"
    # The same operators as often: GPT has others than Llama (LayerNorm, GELU), and half of its matrices.
    calls = [(o.ours_calls, o.llama_calls) for o in model.profiles[0].operators]
    assert all(ours == llama for ours, llama in calls)
    assert sum(ours for ours, _ in calls) > 0
