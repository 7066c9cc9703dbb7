"""LangChain's standard tests of a chat model, against the gateway."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.e2e import suites
from tests.e2e.server import Server

pytestmark = pytest.mark.engine
# What the model cannot do; anything else that is skipped would go unseen.
WITHOUT = re.compile(r"tool|json_mode|image|pdf|audio|anthropic|agent_loop|stream_time|structured_few_shot|runnables")
KINDS = ("invoke", "stream", "batch", "conversation", "usage_metadata", "stop_sequence", "structured_output", "name")


def test_every_standard_test_of_what_the_model_can_do_passes(server: Server, tmp_path: Path) -> None:
    suite, report = Path(__file__).with_name("langchain_suite.py"), tmp_path / "report.xml"
    options = ["-c", "/dev/null", "--rootdir", tmp_path, "-p", "pytest_asyncio.plugin", "-p", "no:cacheprovider"]
    # LangChain keeps its connections for the next test, which must then run in the same event loop.
    options += ["-o", "asyncio_mode=auto", "-o", "asyncio_default_test_loop_scope=session", "-W", "ignore"]
    done = suites.run(
        "-m", "pytest", *options, "-q", "--tb=short", f"--junit-xml={report}", suite,
        BASE_URL=server.base_url, MODEL=server.model,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    cases = list(ElementTree.parse(report).iter("testcase"))
    skipped = {case.get("name", "") for case in cases if case.find("skipped") is not None}
    passed = {case.get("name", "") for case in cases} - skipped
    unexpected = {name for name in skipped if not WITHOUT.search(name)}
    assert unexpected == {"test_structured_output_pydantic_2_v1"}  # see the suite
    assert not [kind for kind in KINDS if not any(kind in name for name in passed)], passed
    assert len(passed) == len(cases) - len(skipped) > 25
    assert "Joke" not in server.log
