"""``python -m serving.gateway.supervisor``: the process that ``medassist gateway`` becomes.

It keeps the listening socket, the workers and the keeper, and imports nothing that the workers run:

    SIGHUP          the workers read their settings again
    SIGUSR2         the workers are replaced one after the other, without a failed request
    SIGTERM, SIGINT running requests finish, then all ends; a second one does not wait
"""

import sys

if __name__ == "__main__":  # asyncio does without OpenSSL, which would be a quarter of this process's memory
    sys.modules["ssl"] = None  # type: ignore[assignment]

import argparse
import asyncio
import contextlib
import shutil
import signal
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from serving.gateway.privacy import forbid_core_dumps
from serving.gateway.workers import WorkerFailed, Workers

if TYPE_CHECKING:
    from serving.tenants.bookkeeping import Bookkeeping

KEEPER_LIMIT = 5.0  # seconds that the keeper may take for the last records


def main() -> int:
    """Returns the exit code: 0 after SIGTERM or SIGINT, 1 when the workers cannot start."""
    parser = argparse.ArgumentParser(prog="serving.gateway.supervisor", description="Supervises the gateway's workers.")
    parser.add_argument("--fd", type=int, required=True, help="listening socket")
    parser.add_argument("--admin-fd", type=int, help="listening socket for /metrics and /admin")
    parser.add_argument("--tls", action="store_true", help="the listeners speak TLS")
    parser.add_argument("--config", type=Path, required=True, help="settings file")
    parser.add_argument("--workers", type=int, default=1, help="how many")
    parser.add_argument("--accounts", type=Path, help="the keeper's directory, with its configuration")
    parser.add_argument("--remove", type=Path, help="directory to remove at the end")
    options = parser.parse_args()
    forbid_core_dumps()
    try:
        books = None
        if options.accounts:
            from serving.tenants.bookkeeping import Bookkeeping, KeeperFailed

            books = Bookkeeping(options.accounts, report)
            try:
                books.start()
            except KeeperFailed as e:
                report(f"NOT SERVED: {e}")
                return 1
        listener = socket.socket(fileno=options.fd)
        admin = socket.socket(fileno=options.admin_fd) if options.admin_fd is not None else None
        workers = partial(Workers, listener, options.config, options.workers, report, admin, options.accounts)
        return asyncio.run(_supervise(workers, listener, options.workers, options.tls, books))
    finally:
        if options.remove is not None:
            shutil.rmtree(options.remove, ignore_errors=True)


def report(text: str) -> None:
    with contextlib.suppress(OSError):  # a terminal that has gone
        print(text, file=sys.stderr, flush=True)


async def _supervise(
    make_workers: Callable[[], Workers], listener: socket.socket, count: int, tls: bool, books: "Bookkeeping | None"
) -> int:
    workers = make_workers()
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    rolls: set[asyncio.Task[None]] = set()

    async def roll() -> None:
        report("replacing the workers")
        try:
            await workers.roll()
        except WorkerFailed as e:
            report(f"{e}: the workers that have not been replaced stay")
        else:
            report("the workers have been replaced")

    def start_roll() -> None:
        if rolls:
            report("the workers are being replaced already")
            return
        task = loop.create_task(roll())
        rolls.add(task)
        task.add_done_callback(rolls.discard)

    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    loop.add_signal_handler(signal.SIGHUP, workers.reload)
    loop.add_signal_handler(signal.SIGUSR2, lambda: None)  # workers that are starting are new
    starting = loop.create_task(workers.start())
    stopping = loop.create_task(stop.wait())
    watching = loop.create_task(books.watch()) if books is not None else None
    if watching is not None:
        watching.add_done_callback(lambda _: stop.set())
    code = 0
    try:
        await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            loop.add_signal_handler(signal.SIGUSR2, start_roll)
            host, port = listener.getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            report(f"ready: http{'s' * tls}://{host}:{port}/v1 with {count} worker{'s' * (count > 1)}  (Ctrl-C stops)")
            await stopping
        if watching is not None and watching.done():
            report(f"NOT SERVED any more: {watching.result()}")
            code = 1
        elif starting.done():
            report("stopping: no new requests, waiting for the running ones")
    except WorkerFailed as e:
        report(f"NOT SERVED: {e}")
        code = 1
    finally:
        for signum in (signal.SIGTERM, signal.SIGINT):  # a second signal does not wait
            loop.add_signal_handler(signum, workers.kill)
        tasks = (starting, stopping, *([watching] if watching is not None else ()), *rolls)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await workers.stop()
        if books is not None:
            await asyncio.to_thread(books.stop, KEEPER_LIMIT)
    report("stopped")
    return code


if __name__ == "__main__":
    sys.exit(main())
