"""A worker of the gateway: ``python -m serving.gateway.worker``. Started by :mod:`serving.gateway.workers`."""

import argparse
import asyncio
import contextlib
import gc
import os
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from serving.gateway import privacy, watch
from serving.gateway.app import Gateway
from serving.gateway.edge import LAME_DUCK, create_server
from serving.gateway.settings import load, restart_only
from serving.gateway.shared_metrics import merge_ended
from serving.gateway.tls import Certificates, keep_fresh
from serving.gateway.web import Web
from serving.gateway.workers import RETIRE_LIMIT
from serving.plugin import die_with_parent

_LAST_WORDS = 3.0  # seconds in which requests that are cut off are told so


def main() -> int:
    """Returns the exit code: 0 after SIGTERM or SIGINT, 2 when the settings are not valid."""
    die_with_parent()
    privacy.seal()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there are settings to read again
    parser = argparse.ArgumentParser(prog="serving.gateway.worker", description="One worker of the gateway.")
    parser.add_argument("--fd", type=int, required=True, help="listening socket")
    parser.add_argument("--admin-fd", type=int, help="listening socket for /metrics and /admin")
    parser.add_argument("--config", type=Path, required=True, help="settings file")
    parser.add_argument("--index", type=int, default=0, help="which of the workers this is")
    parser.add_argument("--workers", type=int, default=1, help="how many share the limits")
    parser.add_argument("--accounts", type=Path, help="the keeper's directory")
    parser.add_argument(
        "--ready-fd",
        type=int,
        help="told the seconds that a drain may take, when requests are taken and when it changes",
    )
    parser.add_argument(
        "--handover-fd", type=int, nargs=2, help="sockets to give connections to other workers, and to take"
    )
    options = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # macOS has no infinite limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    listener = socket.socket(fileno=options.fd)
    admin = [socket.socket(fileno=options.admin_fd)] if options.admin_fd is not None else []
    handover = [socket.socket(fileno=fd) for fd in options.handover_fd or ()]
    work = _work(
        listener, admin, options.config, options.index, options.workers, options.accounts, options.ready_fd, handover
    )
    try:
        import uvloop

        return uvloop.run(work)
    except ImportError:
        return asyncio.run(work)


async def _work(
    listener: socket.socket,
    admin: Sequence[socket.socket],
    config: Path,
    index: int,
    workers: int,
    accounts: Path | None,
    ready_fd: int | None,
    handover: Sequence[socket.socket],
) -> int:
    def report(text: str) -> None:
        with contextlib.suppress(OSError):  # a terminal that has gone
            print(f"worker {index}: {text}", file=sys.stderr, flush=True)

    seen = watch.stamp(config)  # before it is read: what is written meanwhile is read again
    try:
        settings = load(config)
        certificates = Certificates(settings.tls) if settings.tls.certificate else None
        if metrics := os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            merge_ended(Path(metrics))
        gateway = Gateway(settings, workers, accounts)
    except (ValueError, OSError) as e:
        report(f"the settings are not valid: {e}")
        return 2
    refused = gateway.metrics.rejections
    server = create_server(
        gateway, settings.http, lambda reason: refused.labels(reason).inc(), gateway.admit, certificates
    )
    server.web = Web(settings.cors.origins, certificates is not None)
    loop = asyncio.get_running_loop()
    privacy.quiet(loop)
    stop, terminated = asyncio.Event(), asyncio.Event()

    def terminate() -> None:
        terminated.set()
        stop.set()

    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, terminate)
    await gateway.start()
    ready = False

    def tell_drain() -> None:
        if ready_fd is not None and ready:
            os.write(ready_fd, b"%f\n" % settings.drain)  # fails if there is nobody to be told

    reloading = asyncio.Lock()

    async def reload() -> None:
        nonlocal settings, seen
        async with reloading:
            seen = watch.stamp(config)
            try:
                new = load(config)
                await gateway.reload(new)
            except (ValueError, OSError) as e:
                gateway.metrics.reloads.labels("refused").inc()
                report(f"the new settings are not valid, the old ones stay: {e}")
                return
            if index == 0 and (fixed := restart_only(settings, new)):
                report(f"what has changed in {', '.join(fixed)} is used when the gateway is started again")
            settings = new
            server.http = settings.http
            server.web = Web(settings.cors.origins, certificates is not None)
            tell_drain()
            gateway.metrics.reloads.labels("applied").inc()
            report("has new settings")

    async def changed() -> None:
        if watch.stamp(config) != seen:  # otherwise a SIGHUP was first
            await reload()

    watching = asyncio.create_task(watch.watch(config, changed, known=seen))
    tasks: set[asyncio.Task[None]] = set()

    certificates_asked = asyncio.Event()
    if certificates:
        task = asyncio.create_task(keep_fresh(certificates, report, certificates_asked))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    def reload_soon() -> None:
        certificates_asked.set()
        task = asyncio.create_task(reload())
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    loop.add_signal_handler(signal.SIGHUP, reload_soon)
    await server.start([listener], admin)
    if handover:
        giving, taking = handover
        giving.setblocking(False)
        taking.setblocking(False)
        loop.add_signal_handler(signal.SIGUSR1, stop.set)

        def take() -> None:
            with contextlib.suppress(BlockingIOError):  # another worker was quicker
                flags, descriptors, _, _ = socket.recv_fds(taking, 1, 1)
                for fd in descriptors:
                    used, of_admin = flags in b"13", flags in b"23"
                    task = asyncio.create_task(server.adopt(socket.socket(fileno=fd), used, of_admin))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)

        loop.add_reader(taking.fileno(), take)
    # Relaying makes much garbage and few cycles: scanning what lives for ever, again and again, is waste.
    # Cycles that wait for a scan are memory: with 50,000 objects it is 7 MB more than with 10,000.
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    ready = True
    tell_drain()

    await stop.wait()
    watching.cancel()
    if handover:
        loop.remove_reader(taking.fileno())

    drained = asyncio.create_task(server.drained())
    if not terminated.is_set():  # replaced: others take what is new, so there is no hurry
        server.retire(partial(_give, giving))
        waiting = asyncio.create_task(terminated.wait())
        await asyncio.wait((drained, waiting), timeout=RETIRE_LIMIT, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
    if not drained.done():
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, os._exit, 1)  # a second signal does not wait
        gateway.draining = True
        server.begin_drain(min(LAME_DUCK, settings.drain / 2))
        await asyncio.wait((drained,), timeout=settings.drain)
    await gateway.drain(0)
    await asyncio.wait((drained,), timeout=_LAST_WORDS)
    drained.cancel()
    await server.stop()
    await gateway.stop()
    return 0


def _give(giving: socket.socket, fd: int, used: bool, admin: bool) -> bool:
    try:
        socket.send_fds(giving, [b"%d" % (used + 2 * admin)], [fd])
    except OSError:  # as many are on their way as there is room for
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
