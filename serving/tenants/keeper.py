"""The keeper: a thread beside the workers' supervisor, which alone speaks to the store while the gateway serves.

It looks once a second whether keys have changed, and tells the workers by files. It reads what the workers write into
their journals, and makes of it lines of the audit log, the request log, spans and the ledger. Each of these is at a
position of its own in every journal. The ledger's is in the store, and moves in the transaction that adds the usage;
the audit log's is in its lines. So nothing is lost there or counted twice, whatever ends when. What the request log
and the traces have not got when a gateway is killed, they never get.

While the store is away the keys stay as they were and the journals grow.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serving.tenants import journal_folders
from serving.tenants.bookkeeping import CONFIG, KeeperFailed
from serving.tenants.intake import Intake
from serving.tenants.journal_folders import JournalFolder
from serving.tenants.key_files import KeyFiles
from serving.tenants.ledger import Batch, Ledger, StoreAway
from serving.tenants.sinks import Sinks
from serving.tenants.troubles import Troubles

INTERVAL = 0.5  # seconds between looks at the journals
POLL = 1.0  # seconds between looks at the keys
SPENT_POLL = 2.0  # seconds between looks at what keys with a monthly budget have spent
ADOPT = 10.0  # seconds between looks for what dead gateways have left
HEAD = 5.0  # seconds between copies of the audit log's head to the store
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 2.0  # seconds before a store that is away is asked again
FORGET = 30 * 86_400.0  # seconds for which a finished journal is remembered
POSITIONS = 200  # journals that the store is asked for at once


def start_keeper(folder: Path, report: Callable[[str], None]) -> "Keeper":
    """The keeper of a folder with its configuration, running: workers can start.

    Raises:
        KeeperFailed: the store cannot be reached, or a folder not be used.
    """
    try:
        keeper = Keeper(folder / CONFIG, report)
        keeper.start()
    except StoreAway as e:
        raise KeeperFailed(f"the store cannot be used: {e}") from None
    except OSError as e:
        raise KeeperFailed(f"keys and usage cannot be kept: {e}") from None
    return keeper


class Keeper:
    """See above.

    Args:
        config: written by :func:`serving.tenants.keeper_config.write_config`; read and removed here, as it can hold the
            password of the store.
        report: told what a person should know, in one line. Called from another thread.

    Raises:
        OSError: the configuration, or a folder, cannot be used.
    """

    def __init__(self, config: Path, report: Callable[[str], None]) -> None:
        content = json.loads(config.read_bytes())
        config.unlink()
        self._report = report
        self._root, self._store_id = Path(content["journals"]), content["store_id"]
        self._settings = Path(content["settings"]) if content["settings"] else None
        self._ledger = Ledger(content["store"]) if content["store"] else None
        self._own = journal_folders.create(self._root, self._store_id)
        self._files = KeyFiles(Path(content["accounts"]), self._own.path)
        self._sinks = Sinks(content, self._own.path.name.rpartition("-")[2], report, self._living)
        self._intake = Intake(self._sinks, report)
        self._troubles = Troubles(report)
        self._adopted: list[JournalFolder] = []
        self._version: str | None = None
        self._budgets = False  # whether a key has one
        self._month = ""
        self._away_since, self._pause, self._retry_at = 0.0, FIRST_PAUSE, 0.0
        self._answers = True  # the store does; whether it takes usage, too, shows when there is some
        self._poll_at = 0.0
        self._due: dict[str, float] = {}
        self._settings_stamp = self._stamp()
        self._told_failure = 0.0
        self._applied_at = time.monotonic()
        self._counts = {"batches": 0, "records": 0, "outages": 0, "refused": 0}
        self._stopping = threading.Event()
        self._stop_by = 0.0
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)

    def start(self) -> None:
        """Tells the workers the keys, and begins.

        Raises:
            StoreAway: the store cannot be reached; whether a key is required is not known.
            OSError: a folder cannot be used.
        """
        try:
            if self._ledger is None:
                self._files.put_keys("", [], [])
            else:
                self._poll(self._ledger)
                self._sinks.anchor(self._ledger)
            self._sinks.event("gateway.started", self._settings)
        except BaseException:
            self._sinks.close(0.0)
            self._own.release()
            raise
        self._put_state()
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """Takes what the workers, which have ended, have left, and ends. What it cannot do now is done by the next
        gateway with this home folder."""
        self._stop_by = time.monotonic() + seconds
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(seconds + 1.0)

    def _run(self) -> None:
        more = False
        while not self._stopping.wait(0.0 if more else INTERVAL):
            more = self._guarded_round()
        while True:
            more = self._guarded_round()
            away = self._ledger is not None and not self._up
            only_audit = not self._sinks.ready and not self._intake.lag()
            hopeless = not more and (away or only_audit)
            if self._intake.is_empty or hopeless or time.monotonic() >= self._stop_by:
                break
            if not more:
                time.sleep(0.02)
        self._sinks.event("gateway.stopped")
        if self._ledger is not None:
            if self._up:
                with contextlib.suppress(StoreAway):
                    self._sinks.anchor(self._ledger)
            self._ledger.close()
        self._sinks.close(max(0.0, self._stop_by - time.monotonic()))
        for folder in (self._own, *self._adopted):
            folder.release()

    def _guarded_round(self) -> bool:
        try:
            return self._round()
        except Exception as e:
            # Nobody else would: keys would stay as they are, and journals would grow, without a word.
            self._failed(e)
            return False

    def _round(self) -> bool:
        """Everything that is due, once; returns whether there is more to do now."""
        if self._ledger is not None and time.monotonic() >= self._poll_at:
            self._look_at_keys(self._ledger)  # first: they wait for nothing else
        if self._is_due("adopt", ADOPT):
            self._adopted += journal_folders.adopt(self._root, self._store_id)
        if (stamp := self._stamp()) != self._settings_stamp:
            self._sinks.event("settings.changed", self._settings)
            self._settings_stamp = stamp
        self._look_at_folders()
        if self._ledger is not None and time.monotonic() >= self._retry_at:
            self._talk(self._ledger)
        unreadable = self._intake.unreadable
        batches, more = self._intake.collect(ledger=self._up)
        if skipped := self._intake.unreadable - unreadable:
            self._report(f"{skipped} records of another version of the gateway were skipped")
        if batches and self._ledger is not None:
            more = self._book(self._ledger, batches) and more
        elif self._up:
            self._back()
        self._intake.remove_finished(self._ledger is not None)
        if self._ledger is not None and not more:
            self._intake.sync()
        if self._ledger is None or (self._up and not more):
            self._applied_at = time.monotonic()
        if self._is_due("state", POLL):
            self._put_state()
        return more

    # The store.

    @property
    def _up(self) -> bool:
        """Whether it is worth a try."""
        return self._ledger is not None and self._answers

    def _look_at_keys(self, ledger: Ledger) -> None:
        """Whether or not the ledger can be written: somebody may have locked that only."""
        self._poll_at = time.monotonic() + POLL
        try:
            self._poll(ledger)
        except OSError as e:  # of our own files; the ledger goes on
            self._failed(e)
        except StoreAway as e:
            self._lost(e)
            self._poll_at = self._retry_at

    def _look_at_folders(self) -> None:
        """Finds new journals. A folder that is gone or cannot be read costs its own journals only."""
        with self._troubles.apart(self._own.path):
            try:
                self._intake.look(self._own.path, own=True)
            except FileNotFoundError:
                self._report(f"{self._own.path} was removed, and is made again")
                self._own.renew()
        for folder in tuple(self._adopted):
            with self._troubles.apart(folder.path):
                try:
                    any_left = self._intake.look(folder.path, own=False)
                except FileNotFoundError:
                    any_left = False
                if not any_left:
                    self._adopted.remove(folder)
                    folder.release()

    def _living(self) -> set[str] | None:
        try:
            return journal_folders.journals(self._root)
        except OSError:
            return None

    def _talk(self, ledger: Ledger) -> None:
        """Finds out where the journals are in the ledger, and tells the store what else is due."""
        try:
            if unknown := self._intake.unknown()[:POSITIONS]:
                for journal, position in ledger.positions(unknown).items():
                    self._intake.place(journal, position)
            if self._is_due("head", HEAD):
                self._sinks.anchor(ledger)
            if self._is_due("forget", 3600.0):
                ledger.forget_journals(time.time() - FORGET)
            self._answers = True
        except StoreAway as e:
            self._lost(e)

    def _poll(self, ledger: Ledger) -> None:
        if self._version is None or ledger.version() != self._version:
            version, keys, captures = ledger.keys()
            self._files.put_keys(version, keys, captures)
            self._version = version
            self._budgets = any(row["tokens_per_month"] is not None for row in keys)
            self._due.pop("spent", None)
        month = time.strftime("%Y-%m", time.gmtime())
        if self._budgets and (self._is_due("spent", SPENT_POLL) or month != self._month):
            self._files.put_spent(month, ledger.spent(month))
            self._month = month
        self._files.touch()

    def _book(self, ledger: Ledger, batches: list[Batch]) -> bool:
        """Returns whether that was done."""
        try:
            moved = ledger.apply(batches)
        except StoreAway as e:
            for batch in batches:
                self._intake.place(batch.journal, None)  # it may have been done
            self._lost(e)
            return False
        self._back()
        self._counts["batches"] += 1
        if refused := ledger.refused - self._counts["refused"]:
            self._counts["refused"] += refused
            self._report(f"{refused} records were left out: the store does not take them")
        for batch in batches:
            if batch.journal in moved:
                self._intake.place(batch.journal, batch.new)
                self._counts["records"] += len(batch.records)
            else:  # somebody else has been here
                self._intake.place(batch.journal, None)
        return True

    def _lost(self, error: StoreAway) -> None:
        now = time.monotonic()
        if not self._away_since:
            self._away_since = now
            self._counts["outages"] += 1
            self._report(f"the store is away ({error}): keys stay as they are, and usage is kept in journals")
        self._answers = False
        self._retry_at = now + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def _back(self) -> None:
        if self._away_since:
            seconds = time.monotonic() - self._away_since
            self._away_since, self._pause = 0.0, FIRST_PAUSE
            self._report(f"the store is back after {seconds:.0f} s")

    # Small things.

    def _failed(self, error: Exception) -> None:
        if time.monotonic() > self._told_failure:
            self._told_failure = time.monotonic() + 60.0
            self._report(f"the keeper failed, and goes on: {_where(error)}")

    def _is_due(self, what: str, seconds: float) -> bool:
        now = time.monotonic()
        if now < self._due.get(what, 0.0):
            return False
        self._due[what] = now + seconds
        return True

    def _put_state(self) -> None:
        lag = self._intake.lag() if self._ledger is not None else 0
        state: dict[str, Any] = {
            **self._counts,
            "lag_bytes": lag,
            "lag_seconds": time.monotonic() - self._applied_at if lag else 0.0,
            "store_up": int(self._ledger is not None and not self._away_since),
        }
        with contextlib.suppress(OSError):
            self._files.put_state(state)

    def _stamp(self) -> tuple[int, int] | None:
        with contextlib.suppress(OSError):
            if self._settings is not None:
                about = self._settings.stat()
                return about.st_mtime_ns, about.st_size
        return None


def _where(error: Exception) -> str:
    """The kind of an error and its place: its text could repeat what it was about."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    place = f" in {Path(last.tb_frame.f_code.co_filename).name}:{last.tb_lineno}" if last else ""
    detail = f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""
    return f"{type(error).__name__}{detail}{place}"
