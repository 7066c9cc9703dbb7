"""``medassist serve``: engines, the gateway's workers in front of them, changes while they run, and an orderly end."""

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp

from serving import fingerprint
from serving.engine import StartFailed
from serving.fleet import Fleet, together
from serving.gateway import watch
from serving.gateway.listener import listen
from serving.gateway.privacy import forbid_core_dumps
from serving.gateway.settings import restart_only
from serving.gateway.supervisor import KEEPER_LIMIT
from serving.gateway.workers import WorkerFailed, Workers
from serving.plan import Options, Plan, make
from serving.tenants.bookkeeping import Bookkeeping, KeeperFailed
from serving.tenants.keeper_config import examine, open_to, write_config

logger = logging.getLogger("medassist")

# On macOS a Unix socket's path has 104 bytes; the engines' names take up to 40.
LONGEST_DIRECTORY = 60
SLOW = 10.0  # seconds after which models that are not ready are named


def run(checkpoints: list[Path], options: Options) -> int:
    """Serves until told to stop. Returns the exit code: 0 after SIGTERM or Ctrl-C, 1 when an engine did not start.

    Args:
        checkpoints: checkpoint directories, or ``NAME=DIRECTORY``; none with ``options.config``.

    Raises:
        ValueError: nothing that could be served (:func:`serving.plan.make`), or the port is taken.
        OSError: the configuration cannot be read.
    """
    stamp = watch.stamp(options.config) if options.config else None
    plan = make(checkpoints, options)
    standing = examine(plan.settings)
    listener = listen(plan.settings.host, plan.settings.port)
    admin, tls = plan.settings.admin, plan.settings.tls
    if tls.certificate:
        from serving.gateway.tls import create_context

        create_context(tls)  # it is the workers that need it, but it is now that somebody looks
    operators = listen(admin.host, admin.port, "admin.port") if admin.port is not None else None
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    forbid_core_dumps()
    with tempfile.TemporaryDirectory(prefix="medassist-") as runtime:
        if len(os.fsencode(runtime)) > LONGEST_DIRECTORY:
            raise ValueError(f"{runtime} is too long for the path of a socket: set TMPDIR to a shorter directory")
        lock = os.open(runtime, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_SH)  # systemd-tmpfiles leaves alone what is locked
        accounts = Path(runtime) / "accounts"
        write_config(plan.settings, accounts, options.config)
        server = _Server(checkpoints, options, plan, listener, Path(runtime), stamp, operators, accounts)
        if not standing.keys:
            server.report(open_to(listener))
        try:
            import uvloop

            return uvloop.run(server.run())
        except ImportError:
            return asyncio.run(server.run())
        finally:
            os.close(lock)


class _Server:
    """Engines and workers, and what they are told while they run."""

    def __init__(
        self,
        checkpoints: list[Path],
        options: Options,
        plan: Plan,
        listener: socket.socket,
        runtime: Path,
        stamp: watch.Stamp | None,
        operators: socket.socket | None,
        accounts: Path,
    ) -> None:
        """``operators``: the admin listener. ``accounts``: the keeper's folder."""
        self._checkpoints, self._options, self._listener, self._stamp = checkpoints, options, listener, stamp
        self._operators = operators
        self._began = time.monotonic()
        self._told_to_stop = asyncio.Event()
        self._changes: asyncio.Queue[Callable[[], Awaitable[None]]] = asyncio.Queue()
        self._asked: list[Callable[[], Awaitable[None]]] = []  # what is in the queue
        self.fleet = Fleet(plan, runtime, self.report, self._publish, options.log_dir, self._write_state)
        self.workers = Workers(
            listener, self.fleet.settings_file, plan.settings.workers, self._report_worker, operators, accounts
        )
        self._books = Bookkeeping(accounts, self.report)
        self._watching: asyncio.Task[str] | None = None  # for a store

    def report(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a terminal that has gone
            print(f"[{time.monotonic() - self._began:5.1f}s] {text}", file=sys.stderr, flush=True)

    def _report_worker(self, text: str) -> None:
        self.report(text)
        asyncio.get_running_loop().call_soon(self._write_state)

    def _publish(self) -> None:
        self.workers.reload()

    async def run(self) -> int:
        """Serves until told to stop; returns the exit code."""
        if self._options.log_dir:
            self._options.log_dir.mkdir(parents=True, exist_ok=True)
        for note in self.fleet.plan.notes:
            self.report(note)
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._told_to_stop.set)
        loop.add_signal_handler(signal.SIGUSR2, self._ask_for, self._restart)
        if self._options.config:
            loop.add_signal_handler(signal.SIGHUP, self._ask_for, self._reload)
        else:  # there is nothing to read again: a terminal was closed
            loop.add_signal_handler(signal.SIGHUP, self._told_to_stop.set)

        serving = asyncio.ensure_future(self._serve())
        stopping = asyncio.ensure_future(self._told_to_stop.wait())
        code = 0
        try:
            await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
            if self._watching is not None and self._watching.done():
                self.report(f"NOT SERVED any more: {self._watching.result()}")
                code = 1
            else:
                self.report("stopping: no new requests, waiting for the running ones")
        except (fingerprint.Mismatch, StartFailed, WorkerFailed, KeeperFailed) as e:
            self.report(f"NOT SERVED: {e}")
            code = 1
        finally:
            for signum in (signal.SIGTERM, signal.SIGINT):  # a second signal does not wait
                loop.add_signal_handler(signum, self.workers.kill)
            tasks = (serving, stopping, *([self._watching] if self._watching is not None else ()))
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._listener.close()
            if self._operators is not None:
                self._operators.close()
            await self.workers.stop()
            await asyncio.to_thread(self._books.stop, KEEPER_LIMIT)
            await self.fleet.stop()
        self.report("stopped")
        return code

    async def _serve(self) -> None:
        """Starts everything, then carries out one change after the other, for ever.

        Raises:
            fingerprint.Mismatch, StartFailed, WorkerFailed: something did not start.
        """
        await asyncio.to_thread(self._books.start)
        self._watching = asyncio.create_task(self._books.watch())
        self._watching.add_done_callback(lambda _: self._told_to_stop.set())
        # The workers answer long before the engines (503 with Retry-After): probes see a start and not a fault.
        await together(self.workers.start(), self.fleet.start())
        self._write_state()
        async with asyncio.TaskGroup() as beside:
            beside.create_task(self._tell_when_ready())
            if self._options.config:
                beside.create_task(watch.watch(self._options.config, self._file_changed, known=self._stamp))
            while True:
                change = await self._changes.get()
                self._asked.remove(change)
                try:
                    await change()
                except (fingerprint.Mismatch, StartFailed, WorkerFailed, OSError) as e:
                    self.report(f"what has not been exchanged stays as it was: {e}")
                except Exception:
                    logger.exception("a change failed")
                self._write_state()

    async def _tell_when_ready(self) -> None:
        """Reports once all workers can serve all models."""
        host, port = self._listener.getsockname()[:2]
        address = f"[{host}]" if ":" in host else host
        within = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, address)
        ready, since, told = 0, time.monotonic(), False
        # A connection of its own for each question: any worker may get it.
        connector = aiohttp.TCPConnector(force_close=True, ssl=False)  # it is our own certificate
        tls = self.fleet.plan.settings.tls
        root = f"http{'s' if tls.certificate else ''}://{within}:{port}"
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=5)) as session:
            while ready < len(self.workers.pids):
                states: dict[str, str] = {}
                if tls.client_ca:  # the listeners would refuse us
                    states = {engine.model: engine.state for engine in self.fleet.engines}
                    if all(state == "ready" for state in states.values()):
                        break
                    await asyncio.sleep(0.1)
                    continue
                try:
                    async with session.get(f"{root}/ready") as response:
                        ready = ready + 1 if response.status == 200 else 0
                        states = (await response.json()).get("engines", {})  # not told where keys are required
                except (aiohttp.ClientError, OSError, ValueError, KeyError):
                    ready = 0
                if not ready:
                    await asyncio.sleep(0.1)
                missing = [f"{model} ({state})" for model, state in states.items() if state != "ready"]
                if not told and missing and time.monotonic() - since > SLOW:
                    self.report(f"the engines of this server run; not ready yet: {', '.join(missing)}")
                    told = True
        models = self.fleet.plan.settings.models
        names = ", ".join(name for model, s in models.items() for name in (model, *s.adapters))
        self.report(f"ready: http{'s' if tls.certificate else ''}://{address}:{port}/v1 serves {names}  (Ctrl-C stops)")

    # What is told by signals, and by the configuration.

    async def _file_changed(self) -> None:
        assert self._options.config is not None
        if watch.stamp(self._options.config) != self._stamp:
            self._ask_for(self._reload)

    def _ask_for(self, change: Callable[[], Awaitable[None]]) -> None:
        if change not in self._asked:
            self._asked.append(change)
            self._changes.put_nowait(change)

    async def _reload(self) -> None:
        config = self._options.config
        assert config is not None
        self._stamp = watch.stamp(config)
        running = self.fleet.plan
        try:
            plan = await asyncio.to_thread(make, self._checkpoints, self._options)
        except (ValueError, OSError) as e:
            self.report(f"the new configuration cannot be used, and everything stays as it was: {e}")
            return
        if plan == running:
            self.report(f"{config} says what is running already")
            return
        for note in plan.notes:
            self.report(note)
        for key in restart_only(running.settings, plan.settings):
            self.report(f"{config}: {key} changes when the server is started again")
        await self.fleet.apply(plan)
        self.report(f"{config} is in use")

    async def _restart(self) -> None:
        self.report("restarting workers and engines, one after the other")
        await self.workers.roll()
        self._write_state()
        await self.fleet.roll()
        self.report("every worker and every engine has been restarted")

    def _write_state(self) -> None:
        """For tools on this machine: where the engines are."""
        if self._options.log_dir is None:
            return
        engines = [
            {"model": e.model, "names": list(e.names), "pid": e.pid, "socket": str(e.socket), "state": e.state}
            for e in self.fleet.engines
        ]
        state = {"pid": os.getpid(), "workers": self.workers.pids, "engines": engines}
        new = self._options.log_dir / "engines.json.new"
        with contextlib.suppress(OSError):  # the folder is full or gone, which must not stop anything else
            new.write_text(json.dumps(state) + "\n")
            new.replace(self._options.log_dir / "engines.json")
