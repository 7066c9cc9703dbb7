"""What the reports of this package have in common."""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path


def command_line(module: str, arguments: Sequence[str]) -> str:
    """The command for a report; of absolute paths, which are this machine's alone, only the last part, and of URLs only
    their scheme."""
    shown = [os.path.basename(a.rstrip("/")) if a.startswith("/") else a for a in arguments]
    shown = [re.sub(r"://.*", ":URL", a) for a in shown]
    return "python -m " + shlex.join([module, *shown])


def how(doc: str | None) -> str:
    """A module's docstring without its first sentence and its usage."""
    return "\n\n".join((doc or "").strip().split("\n\n")[2:])


def checked(checks: Sequence[tuple[str, bool]]) -> str:
    """A line for each promise: the figure and whether it was kept."""
    return "\n".join(f"- {'met' if kept else '**NOT MET**'}: {what}" for what, kept in checks)


def tell(sections: Sequence[str], report: Path | None) -> None:
    """Prints a report and writes it to a file where one is named."""
    text = "\n\n".join(section for section in sections if section).rstrip() + "\n"
    print(text)
    if report:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(text)
