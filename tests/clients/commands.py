"""Commands of ``medassist`` in this process."""

from typing import Any

import pytest

from clients import cli


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    code: Any = 0
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as e:
        code = e.code
    captured = capsys.readouterr()
    return code or 0, captured.out, captured.err
