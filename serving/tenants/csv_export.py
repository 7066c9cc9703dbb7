"""Tables as CSV, for spreadsheets: the ledger's rows, and events of the audit log."""

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from serving.tenants.stored import UsageRow

COUNTS = ("requests", "failed", "prompt_tokens", "completion_tokens", "estimated")
# What begins one in a spreadsheet; the last four are the wide forms of the first.
_FORMULA = re.compile(r"[\t\r\n]|\s*[-=+@\uff0d\uff1d\uff0b\uff20]")


def columns_of(groups: Sequence[str]) -> list[str]:
    """Of the ledger's rows that are told apart by ``groups``."""
    return [*_group_columns(groups), *COUNTS]


def _group_columns(groups: Sequence[str]) -> Iterator[str]:
    for name in dict.fromkeys(groups):
        yield name
        if name == "key":
            yield "name"


def write_rows(file: TextIO, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """As RFC 4180 has it, with a line of names first. A text that a spreadsheet would take for a formula gets an
    apostrophe before it: names are anybody's."""
    writer = csv.writer(file, lineterminator="\r\n")
    writer.writerow([_safe(name) for name in columns])
    for row in rows:
        writer.writerow([_safe(value) for value in row])


def _safe(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def write_csv(file: TextIO, columns: Sequence[str], rows: Sequence["UsageRow"]) -> None:
    """Rows of the ledger."""
    write_rows(file, columns, ([getattr(row, name) for name in columns] for row in rows))


def usage_csv(rows: Sequence["UsageRow"], groups: Sequence[str]) -> str:
    """The whole text."""
    file = io.StringIO(newline="")
    write_csv(file, columns_of(groups), rows)
    return file.getvalue()
