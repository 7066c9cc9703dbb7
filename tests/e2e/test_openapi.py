"""schemathesis with the gateway's own OpenAPI document: nothing 5xx, and every answer as the document says."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import suites
from tests.e2e.server import Server

pytestmark = pytest.mark.engine
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
# What the model of the tests can do. It has no embeddings: that route is only refused.
ANSWERED = ("chat/completions", "completions", "responses", "messages")


def schemathesis(server: Server, directory: Path, *options: object, timeout: int = 300) -> dict[str, Any]:
    """The report of a run, which must be without failures and end within ``timeout`` seconds."""
    report = directory / "report.json"
    done = suites.run(
        "-m", "schemathesis.cli", "run", f"{server.root}/openapi.json", "--checks", CHECKS, "--request-timeout", 30,
        "--generation-database", "none", "--continue-on-failure", "--no-color",
        "--report", "json", "--report-json-path", report, *options,
        cwd=directory, path=Path(__file__).parent, timeout=timeout,
        SCHEMATHESIS_HOOKS="openapi_hooks", MODEL=server.model,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(report.read_text())
    operations = result["operations"]
    assert operations["tested"] == operations["total"] > len(ANSWERED)
    assert not result["errors"]
    for route in ANSWERED:
        rates = result["valid_rates"].get(f"POST /v1/{route}", {})
        assert sum(phase["accepted"] for phase in rates.values()) > 0, f"no request to {route} was answered: {rates}"
    return result


def test_the_document_is_true(server: Server, tmp_path: Path) -> None:
    """The limits of every field, and a few requests of everything else: the same each time."""
    options = ["--phases", "examples,coverage,fuzzing", "--max-examples", 20, "--seed", 1]
    assert schemathesis(server, tmp_path, *options)["test_cases"]["generated"] > 1000


@pytest.mark.slow
def test_the_document_is_true_for_longer(server: Server, tmp_path: Path) -> None:
    """Ten minutes, of other requests each time, and of some in a row."""
    options = ["--phases", "examples,coverage,fuzzing,stateful", "--max-time", 600]
    assert schemathesis(server, tmp_path, *options, timeout=900)["test_cases"]["generated"] > 5000
