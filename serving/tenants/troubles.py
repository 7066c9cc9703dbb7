"""Files and folders that cannot be used now, which hold up nothing else."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path


class Troubles:
    """See above.

    Args:
        report: told when it begins, once.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._known: set[Path] = set()

    @contextlib.contextmanager
    def apart(self, path: Path) -> Iterator[None]:
        """What is done with ``path`` within may fail with an OSError, which ends here; nothing is reported of what is
        not there any more."""
        try:
            yield
        except FileNotFoundError:
            self._known.discard(path)
        except OSError as e:
            if path not in self._known:
                self._known.add(path)
                self._report(f"{path} cannot be used ({e.strerror or type(e).__name__}): what is in it waits")
        else:
            self._known.discard(path)
