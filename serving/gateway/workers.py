"""The gateway's worker processes: started, watched, replaced and stopped. They share one listening socket.

Standard library only: the process that does this stays small, and outlives the code that its workers run. Connections
wait in the socket while there is no worker, so a worker's end refuses nobody.
"""

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Callable, Iterator
from pathlib import Path

START_LIMIT = 60.0  # seconds until a worker is ready; a busy machine takes several
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0  # seconds before a worker that died is replaced
STABLE_AFTER = 30.0  # seconds of service after which the pause starts again from its first value
MARGIN = 15.0  # seconds that a worker may take to end, beyond the drain it was set to
RETIRE_LIMIT = 3600.0  # seconds that a replaced worker may take to finish its requests, before it drains
# glibc keeps what was freed: each large block raises the size up to which it does, so after a burst of large bodies a
# worker would hold tens of megabytes for ever. Fixed limits give such blocks back at once.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "2"}
_METRICS = "medassist-metrics-"


class WorkerFailed(RuntimeError):
    """A worker ended, or did not become ready, when it was started. It has said why on stderr."""


class Worker:
    """One process.

    Attributes:
        drain: seconds that it is set to let requests run when it is told to end.
        leaving: it was told to end.
    """

    def __init__(self, index: int, process: Process, drain: float, telling: int) -> None:
        """``telling``: the pipe on which it says its ``drain`` when that changes. Closed here."""
        self.index, self.process, self.drain, self._telling = index, process, drain, telling
        self.since = asyncio.get_running_loop().time()
        self.leaving = False
        asyncio.get_running_loop().add_reader(telling, self._hear)

    def _hear(self) -> None:
        if said := os.read(self._telling, 4096):
            self.drain = float(said.split()[-1])
        else:  # it has ended
            asyncio.get_running_loop().remove_reader(self._telling)
            os.close(self._telling)


class Workers:
    """A set of workers, each known by its index.

    Args:
        listener: the socket they accept from; it must be bound. Stays open here.
        config: the settings file they read.
        count: how many.
        report: told in one line what happens to them.
        admin: another such socket, for /metrics and /admin; None: they have no listener of their own.
        accounts: the keeper's folder, see :mod:`serving.tenants.keeper`; None: there is none.
    """

    def __init__(
        self,
        listener: socket.socket,
        config: Path,
        count: int,
        report: Callable[[str], None],
        admin: socket.socket | None = None,
        accounts: Path | None = None,
    ) -> None:
        self._listener, self._config, self._count, self._report = listener, config, count, report
        self._admin, self._accounts = admin, accounts
        self._workers: dict[int, Worker] = {}
        self._retired: set[Worker] = set()  # replaced, with requests that they finish
        self._alive: set[Process] = set()
        # Idle connections of workers that are replaced go through this to those that stay.
        self._handover = socket.socketpair()
        self._locks = [asyncio.Lock() for _ in range(count)]
        self._pauses = [FIRST_PAUSE] * count
        self._rolling = asyncio.Lock()
        self._watching: set[asyncio.Task[None]] = set()
        self._ending: set[asyncio.Task[None]] = set()  # of those that are replaced
        self._stopping = False
        self._metrics: Path | None = None
        self._metrics_lock = -1

    @property
    def pids(self) -> list[int]:
        """Process ids, by index."""
        return [self._workers[index].process.pid for index in sorted(self._workers)]

    async def start(self) -> None:
        """Starts all of them, and returns when they are ready.

        Raises:
            WorkerFailed: one of them cannot start.
        """
        if self._count > 1:
            self._share_metrics()
        for worker in await asyncio.gather(*(self._spawn(index) for index in range(self._count))):
            self._take(worker)

    def reload(self) -> None:
        """Makes them read the settings again. Those that are starting do so anyway."""
        self._signal(signal.SIGHUP)

    async def roll(self) -> None:
        """Replaces them, one after the other: the new one is ready before the old one is told to end, and the next has
        its turn when the old one has ended, or after the seconds of its drain. The old one finishes its requests, in
        :data:`RETIRE_LIMIT`; its connections stay open, and go to the others when they are idle.

        Raises:
            WorkerFailed: a new one cannot start; the old ones that were left are kept.
        """
        async with self._rolling:
            for index, lock in enumerate(self._locks):
                async with lock:
                    if self._stopping:
                        return
                    new = await self._spawn(index)
                    old = self._workers[index]
                    self._take(new)
                    old.leaving = True
                    if old.process.returncode is not None:
                        continue
                    self._retired.add(old)
                # Without the lock: a new one that dies meanwhile is replaced.
                end = asyncio.create_task(self._end(old, RETIRE_LIMIT + old.drain + MARGIN, signal.SIGUSR1))
                self._ending.add(end)
                end.add_done_callback(self._ending.discard)
                await asyncio.wait((end,), timeout=old.drain)

    async def stop(self, seconds: float | None = None) -> None:
        """Lets them finish their requests, and ends those that have not done so in time.

        Args:
            seconds: that they may take; None: what each was set to, and a margin.
        """
        self._stopping = True
        workers = (*self._workers.values(), *self._retired)
        for process in self._alive - {worker.process for worker in workers}:  # starting
            _send(process, signal.SIGTERM)
        ends = [self._end(worker, worker.drain + MARGIN if seconds is None else seconds) for worker in workers]
        await asyncio.gather(*ends)
        self.kill()
        for process in tuple(self._alive):
            await process.wait()
        tasks = (*self._watching, *self._ending)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for end in self._handover:
            end.close()
        if self._metrics is not None:
            shutil.rmtree(self._metrics, ignore_errors=True)
            os.close(self._metrics_lock)
            self._metrics = None

    def kill(self) -> None:
        """Ends all of them at once."""
        self._stopping = True
        for process in self._alive:
            _send(process, signal.SIGKILL)

    async def _spawn(self, index: int) -> Worker:
        command = [
            sys.executable, "-m", "serving.gateway.worker", "--fd", str(self._listener.fileno()),
            "--config", str(self._config), "--index", str(index), "--workers", str(self._count),
            "--handover-fd", *(str(end.fileno()) for end in self._handover),
        ]  # fmt: skip
        inherited = [self._listener.fileno(), *(end.fileno() for end in self._handover)]
        if self._accounts is not None:
            command += ["--accounts", str(self._accounts)]
        if self._admin is not None:
            command += ["--admin-fd", str(self._admin.fileno())]
            inherited.append(self._admin.fileno())
        environment = {**MALLOC, **os.environ}
        if not {"", os.getcwd()} & set(sys.path):
            # `python -m` would look for modules in the working directory first, which can be anybody's.
            environment["PYTHONSAFEPATH"] = "1"
        if self._metrics is not None:
            environment["PROMETHEUS_MULTIPROC_DIR"] = str(self._metrics)
        telling, writing = os.pipe()
        try:
            try:
                process = await asyncio.create_subprocess_exec(
                    *command, "--ready-fd", str(writing),
                    stdin=DEVNULL, env=environment, pass_fds=(*inherited, writing),
                    start_new_session=True,  # Ctrl-C in a terminal is for the process that orders their end
                )  # fmt: skip
            except OSError as e:
                raise WorkerFailed(f"worker {index} cannot be started ({e.strerror})") from e
            finally:
                os.close(writing)
            self._alive.add(process)
            try:
                said = await asyncio.wait_for(_read(telling), START_LIMIT)
            except BaseException as e:
                _send(process, signal.SIGKILL)
                await self._forget(process)
                if isinstance(e, TimeoutError):
                    raise WorkerFailed(f"worker {index} was not ready after {START_LIMIT:g} s") from None
                raise
            if not said:
                code = await self._forget(process)
                raise WorkerFailed(f"worker {index} ended {_how(code)} before it was ready")
        except BaseException:
            os.close(telling)
            raise
        return Worker(index, process, float(said), telling)

    def _take(self, worker: Worker) -> None:
        self._workers[worker.index] = worker
        task = asyncio.create_task(self._watch(worker))
        self._watching.add(task)
        task.add_done_callback(self._watching.discard)

    async def _watch(self, worker: Worker) -> None:
        """Replaces a worker that ends without having been told to."""
        index = worker.index
        code = await self._forget(worker.process)
        self._retired.discard(worker)
        if worker.leaving or self._stopping:
            return
        async with self._locks[index]:
            if self._workers[index] is not worker:  # it died while it was being replaced anyway
                return
            self._report(f"worker {index} (process {worker.process.pid}) ended {_how(code)}: starting another")
            if asyncio.get_running_loop().time() - worker.since > STABLE_AFTER:
                self._pauses[index] = FIRST_PAUSE
            while not self._stopping:
                await asyncio.sleep(self._pauses[index])
                self._pauses[index] = min(2 * self._pauses[index], LONGEST_PAUSE)
                try:
                    new = await self._spawn(index)
                except WorkerFailed as e:
                    self._report(f"{e}: trying again in {self._pauses[index]:g} s")
                else:
                    self._report(f"worker {index} is back (process {new.process.pid})")
                    self._take(new)
                    return

    async def _end(self, worker: Worker, seconds: float, signum: signal.Signals = signal.SIGTERM) -> None:
        worker.leaving = True
        _send(worker.process, signum)
        try:
            await asyncio.wait_for(worker.process.wait(), seconds)
        except TimeoutError:
            self._report(f"worker {worker.index} did not end in {seconds:g} s: killed")
            _send(worker.process, signal.SIGKILL)
            await worker.process.wait()

    def _signal(self, signum: signal.Signals) -> None:
        for worker in self._workers.values():
            _send(worker.process, signum)

    async def _forget(self, process: Process) -> int:
        """Waits for a process's end, and removes what it told of its present state. What it counted stays."""
        code = await process.wait()
        self._alive.discard(process)
        if self._metrics is not None:
            for file in self._metrics.glob(f"gauge_*_{process.pid}.db"):
                file.unlink(missing_ok=True)
        return code

    def _share_metrics(self) -> None:
        """A directory for the workers' metrics. It is locked while it is in use; those whose owner was killed go."""
        for left in Path(tempfile.gettempdir()).glob(f"{_METRICS}*"):
            with contextlib.suppress(OSError), _closing(_open_folder(left)) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                about = os.fstat(lock)
                if about.st_uid == os.getuid() and time.time() - about.st_mtime > START_LIMIT:
                    shutil.rmtree(left, ignore_errors=True)
        self._metrics = Path(tempfile.mkdtemp(prefix=_METRICS))
        self._metrics_lock = os.open(self._metrics, os.O_RDONLY)
        fcntl.flock(self._metrics_lock, fcntl.LOCK_EX)


def _open_folder(path: Path) -> int:
    """Of nothing else: somebody's pipe would be waited for."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


async def _read(fd: int) -> bytes:
    """What a worker writes when it is ready; nothing if it ends before."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(fd, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(fd)
    return os.read(fd, 64)


def _send(process: Process, signum: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signum)


def _how(code: int) -> str:
    return f"by signal {-code}" if code < 0 else f"with exit code {code}"
