"""How changes of keys and captures get into the audit log of this machine."""

import errno
import os
from pathlib import Path
from typing import Any

from serving.tenants.audit import AuditLog
from serving.tenants.store import Announce, Head, StoredHead, StoreError

_ADVICE = "set home or MEDASSIST_HOME"


def announce_in(home: Path, retention_days: int) -> Announce:
    """For :class:`serving.tenants.store.Store`: writes its events to ``home/audit``, beside a running keeper's."""

    def announce(event: dict[str, Any], secret: bytes, stored: StoredHead) -> Head | None:
        try:
            make_home(home)
        except ValueError as e:
            raise StoreError(str(e)) from None  # nobody's request was wrong
        log = AuditLog(home / "audit", secret, retention_days)
        sound = log.compare(stored(log.log_id))
        log.append([event])
        return (log.log_id, *log.head) if sound else None

    return announce


def make_home(home: Path) -> None:
    """The folder of database, journals and audit log, for its owner alone; one that is there must be so.

    Raises:
        ValueError: others can use it, or it cannot be written. The message says what to do.
    """
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        try:
            home.mkdir(mode=0o700)
        except FileExistsError:
            if not home.is_dir():
                raise
            if home.stat().st_mode & 0o066:
                raise ValueError(f"home {home} is open to others: chmod 700 it, or name another folder") from None
        if not os.access(home, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as e:
        raise ValueError(f"home {home} cannot be written ({e.strerror}): {_ADVICE}") from None


def make_folders(home: Path, *names: str) -> None:
    """Folders in ``home``, and that. Raises as :func:`make_home`."""
    make_home(home)
    for name in names:
        try:
            (home / name).mkdir(mode=0o700, exist_ok=True)
            if not os.access(home / name, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as e:
            raise ValueError(f"home {home} cannot be written ({name}: {e.strerror}): {_ADVICE}") from None
