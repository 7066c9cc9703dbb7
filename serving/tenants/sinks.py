"""Where the keeper brings records, beside the ledger: the audit log, the request log and the traces."""

import contextlib
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.tenants.intake import News
from serving.tenants.record import Record

if TYPE_CHECKING:
    from serving.tenants.audit import AuditLog
    from serving.tenants.ledger import Ledger
    from serving.tenants.request_log import RequestLog
    from serving.tenants.spans import SpanExporter

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 10.0  # seconds before an audit log that cannot be written is tried again
MOST_EVENTS = 100  # of a gateway that wait for it
PATIENCE = 1.0  # seconds for its lock, which others hold while they append or verify

_AUDITED = (
    "request_id", "key", "tenant", "route", "model", "status", "code", "stream", "prompt_tokens", "completion_tokens",
    "seconds", "replica", "captured",
)  # fmt: skip


class Sinks:
    """What the configuration has of them; each is imported only then.

    Args:
        config: the keeper's, with ``audit``, ``log`` and ``tracing``, each None where it is off.
        gateway: id of this gateway, for the audit log.
        living: names of all journals that there are, whosesoever; None: that cannot be told now.
        report: told what a person should know.

    Raises:
        OSError: the audit log's folder cannot be used. That somebody has its lock is none.
    """

    _audit: "AuditLog | None"
    _log: "RequestLog | None"
    _spans: "SpanExporter | None"

    def __init__(
        self,
        config: Mapping[str, Any],
        gateway: str,
        report: Callable[[str], None],
        living: Callable[[], Set[str] | None] = lambda: None,
    ) -> None:
        self._gateway, self._report, self._living = gateway, report, living
        self._audit = self._log = self._spans = None
        self._events: list[dict[str, Any]] = []  # of this gateway, which the audit log has not got yet
        self._failing = False
        self._pause, self._retry_at = FIRST_PAUSE, 0.0
        self._config = config["audit"]
        self.audits = bool(self._config and self._config["requests"])
        if self._config:
            with contextlib.suppress(TimeoutError):
                self._open()
        if config["log"]:
            from serving.tenants.request_log import RequestLog

            self._log = RequestLog(config["log"], report)
        if config["tracing"]:
            from serving.tenants.spans import SpanExporter

            self._spans = SpanExporter(config["tracing"], report)

    def event(self, name: str, settings: Path | None = None) -> None:
        """An event of this gateway for the audit log.

        Args:
            settings: the file, whose SHA-256 is written down.
        """
        fields: dict[str, Any] = {"event": name, "time": time.time(), "gateway": self._gateway}
        if settings is not None:
            with contextlib.suppress(OSError):
                fields["settings_sha256"] = hashlib.sha256(settings.read_bytes()).hexdigest()
        if self._config:
            self._events = [*self._events, fields][-MOST_EVENTS:]
            self._append([])

    def anchor(self, ledger: "Ledger") -> None:
        """Compares the audit log with what the store knows of it. If it has that line, the store gets its last one.

        Raises:
            StoreAway: the store cannot be used now.
        """
        if not self._config or not self.ready:
            return
        try:
            audit = self._open()
            log = audit.log_id
            sound = audit.compare(ledger.head(log))
        except OSError as e:
            self._failed(e)
            return
        if sound and audit.log_id == log and audit.head[0]:
            ledger.put_head(log, *audit.head)

    @property
    def ready(self) -> bool:
        """The audit log can be written, as far as is known, or is due to be tried again."""
        return not self._failing or time.monotonic() >= self._retry_at

    def audited(self) -> Mapping[str, int] | None:
        try:
            return self._open().positions
        except Exception as e:
            self._failed(e)
            return None

    def audit(self, news: Sequence[News]) -> bool:
        return self._append(
            [
                {
                    "event": "request",
                    "time": record.time,
                    "journal": new.journal,
                    "offset": end,
                    **{name: getattr(record, name) for name in _AUDITED},
                    "seconds": round(record.seconds, 6),
                }
                for new in news
                for record, end in zip(new.records, new.ends, strict=True)
            ]
        )

    def tell(self, records: Sequence[Record]) -> None:
        if self._log is not None:
            self._log.write(records)
        if self._spans is not None:
            self._spans.export(records)

    def forget(self, journal: str) -> None:
        if self._audit is not None:
            self._audit.forget([journal])

    def close(self, seconds: float) -> None:
        """Ends them; the traces have so many seconds to send what they hold."""
        if self._spans is not None:
            self._spans.stop(seconds)
        if self._log is not None:
            self._log.close()

    def _append(self, events: Sequence[Mapping[str, Any]]) -> bool:
        if not self._config:
            return False
        try:
            self._open().append([*self._events, *events])
        except Exception as e:  # whatever it is, the ledger goes on
            self._failed(e)
            return False
        self._events.clear()
        if self._failing:
            self._failing, self._pause = False, FIRST_PAUSE
            self._report("the audit log is written again")
        return True

    def _open(self) -> "AuditLog":
        if self._audit is None:
            from serving.tenants.audit import AuditLog

            self._audit = AuditLog(
                Path(self._config["folder"]), bytes.fromhex(self._config["secret"]), self._config["retention_days"],
                patience=PATIENCE, living=self._living,
            )  # fmt: skip
        return self._audit

    def _failed(self, error: Exception) -> None:
        self._retry_at = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        if not self._failing:
            self._failing = True
            reason = (isinstance(error, OSError) and error.strerror) or type(error).__name__
            self._report(f"the audit log cannot be written ({reason}): its lines wait in the journals")
