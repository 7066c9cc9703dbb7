"""PostgreSQL and Redis of one's own, on Unix sockets in a folder, to be killed and started again."""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil

START = 30.0  # seconds that a server may take to answer


class Server:
    """A server in a folder of its own. Started and stopped as a context manager."""

    folder: Path
    _process: "subprocess.Popen[bytes] | None" = None

    def start(self) -> None:
        """Starts it, and returns when it answers. RuntimeError: it did not."""
        deadline = time.monotonic() + START
        with (self.folder / "log").open("ab") as log:
            while time.monotonic() < deadline:
                self._process = self._run(*self._command(), stdout=log, wait=False)
                while self._process.poll() is None and time.monotonic() < deadline:
                    if self._answers():
                        return
                    time.sleep(0.05)
                time.sleep(0.1)  # what the one before had is not free yet
        raise RuntimeError(f"{type(self).__name__} does not start: {(self.folder / 'log').read_text()[-1000:]}")

    def kill(self) -> None:
        """As a crash would: SIGKILL for all of its processes."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Stops all of its processes, so that connections stay open and nobody answers."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, signum: signal.Signals) -> None:
        """To each by itself: PostgreSQL's have groups of their own."""
        assert self._process is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self._process.pid)
            for process in (root, *root.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signum)

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    def _command(self) -> list[str]:
        raise NotImplementedError

    def _answers(self) -> bool:
        raise NotImplementedError

    def _run(self, *command: str, stdout: object = subprocess.DEVNULL, wait: bool = True) -> "subprocess.Popen[bytes]":
        user = "postgres" if os.getuid() == 0 and isinstance(self, Postgres) else None
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stdout,  # type: ignore[call-overload]
            stderr=subprocess.STDOUT,
            start_new_session=True,
            user=user,
            cwd=self.folder,
        )
        if wait and process.wait() != 0:
            raise RuntimeError(f"{command[0]} ended with {process.returncode}")
        return process


class Postgres(Server):
    """A new cluster.

    Args:
        folder: to be made; its path must be short, since a socket lies in it.

    Raises:
        RuntimeError: there is no PostgreSQL here.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
        found = shutil.which("initdb") or next((str(path / "initdb") for path in reversed(programs)), None)
        if found is None:
            raise RuntimeError("there is no PostgreSQL here (initdb)")
        self._programs = Path(found).resolve().parent
        if not (self._programs / "postgres").exists():
            self._programs = programs[-1]
        folder.mkdir(mode=0o700)
        if os.getuid() == 0:  # PostgreSQL does not run as root
            try:
                entry = pwd.getpwnam("postgres")
            except KeyError:
                raise RuntimeError("PostgreSQL does not run as root, and there is no user postgres") from None
            os.chown(folder, entry.pw_uid, entry.pw_gid)
        self._run(str(self._programs / "initdb"), "-D", str(folder / "data"), "-U", "postgres", "-A", "trust", "-N")

    @property
    def url(self) -> str:
        return f"postgresql://postgres@/postgres?host={self.folder}"

    def _command(self) -> list[str]:
        data, socket = str(self.folder / "data"), str(self.folder)
        return [str(self._programs / "postgres"), "-D", data, "-k", socket, "-c", "listen_addresses="]

    def _answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.url, connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True


class RedisServer(Server):
    """Redis without a disk. RuntimeError: there is none here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if shutil.which("redis-server") is None:
            raise RuntimeError("there is no redis-server here")
        folder.mkdir(mode=0o700)

    @property
    def url(self) -> str:
        return f"unix://{self.folder}/redis.sock"

    def _command(self) -> list[str]:
        socket = str(self.folder / "redis.sock")
        return ["redis-server", "--port", "0", "--unixsocket", socket, "--save", "", "--appendonly", "no"]

    def _answers(self) -> bool:
        import redis

        try:
            return bool(redis.Redis.from_url(self.url).ping())
        except (redis.ConnectionError, redis.TimeoutError):
            return False
