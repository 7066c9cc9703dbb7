"""What of an engine's output is kept."""

import importlib.util
import logging
from pathlib import Path

import pytest

from serving import engine_log
from serving.engine_log import LONGEST, WITHHELD, EngineLog, Lines

PREFIX = "(EngineCore pid=4242) ERROR 11-25 16:07:12 [launch.py:1512]"


@pytest.fixture
def sealed() -> EngineLog:
    log = EngineLog()
    log.sealed = True
    return log


def test_until_it_serves_all_passes() -> None:
    log = EngineLog()
    for line in ("ValueError: there is no such model: runs/x", f"{PREFIX} RuntimeError: no memory", "anything"):
        assert log.pass_on(line) == line


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        (
            "(APIServer pid=1) DEBUG 11-25 16:07:12 [plugin.py:804] Received messages request {\"x\": \"secret\"}",
            "(APIServer pid=1) DEBUG 11-25 16:07:12 [plugin.py:804] (not shown)",
        ),
        (f"{PREFIX} ValueError: secret is not valid", f"{PREFIX} ValueError"),
        (f"{PREFIX} vllm.v1.engine.exceptions.EngineDeadError: secret", f"{PREFIX} EngineDeadError"),
        (f"{PREFIX} secret: secret", f"{PREFIX} {WITHHELD}"),
        (f"{PREFIX} Traceback (most recent call last):", f"{PREFIX} Traceback (most recent call last):"),
        (
            f'{PREFIX}   File "{engine_log.__file__}", line 12, in secret',
            f'{PREFIX} File "{engine_log.__file__}", line 12',
        ),
        (f'{PREFIX}   File "/secret/secret.py", line 12, in x', f"{PREFIX} {WITHHELD}"),
        (f"{PREFIX}     raise ValueError(secret)", f"{PREFIX} {WITHHELD}"),
        (
            "INFO 11-25 16:07:12 [plugin.py:273] Engine 000: Avg prompt throughput: 12.5 tokens/s, Avg generation "
            "throughput: 3.0 tokens/s, Running: 1 reqs, Waiting: 0 reqs, CPU KV cache usage: 0.1%, Prefix cache hit "
            "rate: 33.3%",
            None,
        ),
        ("INFO 11-25 16:07:12 [plugin.py:273] Engine 000: secret: 12.5 tokens/s",
         "INFO 11-25 16:07:12 [plugin.py:273] (not shown)"),
        # Names of processes and files that are none.
        ("(Worker Jane Doe HIV positive)", WITHHELD),
        ("(Worker_Jane pid=12) INFO 11-25 16:07:12 [plugin.py:1] x", WITHHELD),
        ("[Jane.Doe/HIV/x.py:1]", WITHHELD),
        ("INFO 11-25 16:07:12 [Jane.Doe/HIV/x.py:1] x", f"INFO 11-25 16:07:12 {WITHHELD}"),
        ("INFO 11-25 16:07:12 [Jane.Doe/HIV/plugin.py:1] x", f"INFO 11-25 16:07:12 [plugin.py:1] {WITHHELD}"),
        ("(Worker_PP0_TP12_EP3 pid=12) INFO 11-25 16:07:12 [plugin.py:1] x",
         f"(Worker_PP0_TP12_EP3 pid=12) INFO 11-25 16:07:12 [plugin.py:1] {WITHHELD}"),
        ("(ApiServer_0 pid=1) x", f"(ApiServer_0 pid=1) {WITHHELD}"),
        ("INFO 11-25 16:07:12 [plugin.py:1] Engine 000: Running: 4915112345678 reqs",
         f"INFO 11-25 16:07:12 [plugin.py:1] {WITHHELD}"),
        ("KeyError: 'secret'", "KeyError"),
        ("SecretError: x", WITHHELD),
        ("secret", WITHHELD),
    ],
)  # fmt: skip
def test_then_only_what_cannot_hold_a_word_of_a_request(sealed: EngineLog, line: str, kept: str | None) -> None:
    assert sealed.pass_on(line) == (line if kept is None else kept)


def test_long_texts_take_one_line(sealed: EngineLog) -> None:
    assert [sealed.pass_on(line) for line in ("one", "two", "three")] == [WITHHELD, None, None]
    sealed.pass_on(f"{PREFIX} four")
    assert sealed.pass_on("five") == WITHHELD


def test_lines_of_vllms_own_formatter_keep_their_place(sealed: EngineLog) -> None:
    formatter = logging.Formatter("%(levelname)s %(asctime)s [%(filename)s:%(lineno)d] %(message)s", "%m-%d %H:%M:%S")
    record = logging.LogRecord("vllm", logging.WARNING, str(Path("/a/features.py")), 839, "rejected: secret", (), None)
    line = sealed.pass_on(formatter.format(record))
    assert line is not None
    assert line.endswith("[features.py:839] (not shown)")
    assert line.startswith("WARNING ")


def test_no_file_is_looked_for_whose_name_came_from_a_line(
    sealed: EngineLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    existing = tmp_path / "Jane Doe HIV.py"
    existing.touch()
    sealed.pass_on(f'File "{engine_log.__file__}", line 1')
    for name in ("stat", "lstat", "scandir", "listdir", "open"):
        monkeypatch.setattr(f"os.{name}", lambda *a, **k: pytest.fail("touches the file system"))
    for path in (str(existing), "/forbidden/x.py", "x" * 290 + ".py", "\0.py", "/proc/self/mem.py"):
        assert sealed.pass_on(f'{PREFIX} File "{path}", line 12, in x') == f"{PREFIX} {WITHHELD}"
    assert sealed.pass_on(f'{PREFIX} File "{engine_log.__file__}", line 12, in x') != f"{PREFIX} {WITHHELD}"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")
def test_places_in_vllm_are_known(sealed: EngineLog) -> None:
    line = "(EngineCore pid=1) ERROR 11-25 16:07:12 [v1/engine/core.py:1512]"
    assert sealed.pass_on(f"{line} x") == f"(EngineCore pid=1) ERROR 11-25 16:07:12 [core.py:1512] {WITHHELD}"
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    file = Path(spec.origin).parent / "v1/engine/core.py"
    assert sealed.pass_on(f'File "{file}", line 12, in x') == f'File "{file}", line 12'


def test_lines_are_cut_wherever_they_were_read() -> None:
    text = "ä line\r\n\nanother\nlast"
    for size in (1, 2, 3, 100):
        lines, data = Lines(), text.encode()
        found = [line for at in range(0, len(data), size) for line in lines.feed(data[at : at + size])]
        assert [*found, lines.rest()] == ["ä line", "", "another", "last"]


def test_the_rest_of_a_line_without_end_is_dropped() -> None:
    lines = Lines()
    for _ in range(40):
        assert lines.feed(b"x" * LONGEST) == []
    assert lines.feed(b"y\nnext\n") == ["x" * LONGEST, "next"]
