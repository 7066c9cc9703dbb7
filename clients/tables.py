"""Tables for terminals and pipes."""

import sys
from collections.abc import Sequence

from clients.installation import printable


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """To standard output: drawn by rich in a terminal, in columns of plain text elsewhere."""
    rows = [[printable(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*head, box=None)
        for row in rows:
            table.add_row(*map(Text, row))  # as it is: a name can look like markup
        Console().print(table)
        return
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
