"""The programs that a measurement starts: on free ports of the loopback interface, stopped at its end."""

import os
import resource
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import psutil  # comes with vLLM

MIB = 2**20
START_TIMEOUT = 120.0  # seconds; LiteLLM needs 15 of them on a quiet machine


@dataclass(frozen=True)
class Program:
    """A program that answers at ``url``. Its children count as part of it. ``key``: that it wants from clients."""

    name: str
    url: str
    pid: int
    key: str = ""

    def cpu_seconds(self) -> float:
        """User and system time so far of the processes that live. The kernel counts in ticks, mostly of 10 ms."""
        return sum(sum(process.cpu_times()[:2]) for process in self.processes())

    def rss(self) -> int:
        """Resident bytes, summed over the processes: pages that two of them share count twice."""
        return sum(process.memory_info().rss for process in self.processes())

    def pss(self) -> int:
        """Resident bytes, with shared pages split between their users."""
        return sum(process.memory_full_info().pss for process in self.processes())

    def processes(self) -> list[psutil.Process]:
        """It and all its descendants."""
        root = psutil.Process(self.pid)
        return [root, *root.children(recursive=True)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def program(
    name: str,
    command: Sequence[str],
    url: str,
    folder: Path,
    ready: str = "/health",
    env: Mapping[str, str] | None = None,
    cores: Sequence[int] = (),
    timeout: float = START_TIMEOUT,
    unix: str = "",
) -> Iterator[Program]:
    """Runs ``command`` until the block ends, which begins when ``url + ready`` has answered 200.

    Args:
        folder: its output goes to ``NAME.log`` there.
        ready: a path, or a whole URL.
        env: changes to the environment.
        cores: those that it may run on; all if empty.
        timeout: seconds to get ready in.
        unix: the Unix socket that it listens on, in place of ``url``.

    Raises:
        RuntimeError: it ended, or did not get ready; the message has the end of its output.
    """
    log = folder / f"{name.replace('/', '-')}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=os.environ | (env or {})
        )
    try:
        if cores:
            os.sched_setaffinity(process.pid, cores)
        deadline = time.monotonic() + timeout
        address = ready if "://" in ready else url + ready
        while (status_at(unix, ready) if unix else status(address)) != 200:
            if process.poll() is not None or time.monotonic() > deadline:
                how = f"did not answer {unix or address} within {timeout:g} s"
                if process.returncode is not None:
                    how = f"exited with code {process.returncode}"
                raise RuntimeError(f"{name} {how}: {shlex.join(command)}\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.1)
        yield Program(name, url, process.pid)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def status(url: str, headers: Mapping[str, str] | None = None) -> int:
    """HTTP status of a GET, straight to the server whatever proxy is set; 0 when there was no answer."""
    try:
        with build_opener(ProxyHandler({})).open(Request(url, headers=dict(headers or {})), timeout=5) as response:
            return int(response.status)
    except HTTPError as e:
        return e.code
    except OSError:
        return 0


def status_at(unix: str, path: str) -> int:
    """The same over a Unix socket."""
    try:
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(5)
            s.connect(unix)
            s.sendall(f"GET {path} HTTP/1.0\r\nHost: engine\r\n\r\n".encode())
            return int(s.recv(4096).split()[1])
    except (OSError, IndexError):
        return 0


def upstream(folder: Path, *arguments: str, cores: Sequence[int] = ()) -> AbstractContextManager[Program]:
    """The double of an engine, :mod:`loadtest.gateway.upstream`."""
    port = free_port()
    command = [sys.executable, "-m", "loadtest.gateway.upstream", "--port", str(port), *arguments]
    return program("upstream", command, f"http://127.0.0.1:{port}", folder, cores=cores)


def gateway(
    folder: Path, *arguments: str, cores: Sequence[int] = (), ready: str = "/ready", name: str = "medassist"
) -> AbstractContextManager[Program]:
    """``medassist gateway ARGUMENTS`` on a free port."""
    port = free_port()
    command = [sys.executable, "-m", "clients.cli", "gateway", *arguments, "--port", str(port)]
    return program(name, command, f"http://127.0.0.1:{port}", folder, ready, cores=cores)


def allow_many_connections() -> None:
    """Raises the limit of open files to what the system lets this process have."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
