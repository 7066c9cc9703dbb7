"""``medassist serve``: engines, the gateway in front of them, and an orderly end."""

import asyncio
import gc
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from serving import fingerprint
from serving.engine import Engine, EngineOptions, StartFailed, on_cpu
from serving.features import MTP, NAME, NGRAM, Features, assign_adapters, check, default_dtype, split_arguments
from serving.gateway.app import Gateway

logger = logging.getLogger("medassist")


@dataclass(frozen=True)
class Options:
    """How to serve.

    Attributes:
        dtype: of weights and activations; "auto" is float32 on CPUs (bfloat16 is slower on most), bfloat16 on GPUs and
            for quantised weights whose kernels have no float32.
        max_model_len: longest sequence in tokens; the model's own maximum if None.
        eager: without torch.compile; None: eager on CPUs, where compiling costs half a minute and gains nothing.
        threads: CPU threads of each rank of each engine; None: all cores but one, shared between all ranks.
        kv_cache_gib: KV cache of each engine on CPUs, GiB. On GPUs vLLM takes what is free.
        drain_seconds: how long running requests may take to finish when the server is told to stop.
        tensor_parallel, pipeline_parallel: ranks that share each layer, and stages of layers, of each engine.
        expert_parallel: ranks hold whole experts of a mixture, instead of a part of each.
        adapters: LoRA adapters, each ``NAME=DIRECTORY`` or ``MODEL:NAME=DIRECTORY``.
        speculative: "ngram", "mtp", or the directory of a checkpoint; drafts ``speculative_tokens`` tokens at a time.
        quantization: vLLM's name of a method that quantises weights while they are loaded.
        vllm_args: further arguments of ``vllm serve``, as in a shell.
        log_dir: folder for the engines' logs and ``engines.json`` (process ids and sockets); None: not kept.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    dtype: str = "auto"
    max_model_len: int | None = None
    eager: bool | None = None
    threads: int | None = None
    kv_cache_gib: float = 1.0
    drain_seconds: float = 30.0
    log_dir: Path | None = None
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    expert_parallel: bool = False
    adapters: tuple[str, ...] = ()
    speculative: str | None = None
    speculative_tokens: int = 4
    quantization: str | None = None
    vllm_args: str = ""

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", *fingerprint.TOLERANCE):
            raise ValueError(f"--dtype must be auto, {', '.join(fingerprint.TOLERANCE)}; got {self.dtype!r}")
        if self.kv_cache_gib <= 0:
            raise ValueError(f"--kv-cache-gib must be above 0, got {self.kv_cache_gib}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {self.threads}")
        for option in ("tensor_parallel", "pipeline_parallel", "speculative_tokens"):
            if getattr(self, option) < 1:
                name = option.replace("_", "-") + ("-size" if "parallel" in option else "")
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, option)}")
        split_arguments(self.vllm_args)


def run(checkpoints: list[Path], options: Options) -> int:
    """Serves until told to stop. Returns the exit code: 0 after SIGTERM or Ctrl-C, 1 when an engine did not start.

    Args:
        checkpoints: checkpoint directories, or ``NAME=DIRECTORY``. A model is called like its directory (or like the
            run, for a run's ``final``).

    Raises:
        ValueError: no such checkpoint, two of one name, features that do not fit a checkpoint, or the port is taken.
    """
    named = name_checkpoints(checkpoints)
    engine_options, notes = plan(named, options)
    listener = _listen(options.host, options.port)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    with tempfile.TemporaryDirectory(prefix="medassist-") as runtime:
        try:
            import uvloop

            return uvloop.run(_serve(named, engine_options, notes, options, listener, Path(runtime)))
        except ImportError:
            return asyncio.run(_serve(named, engine_options, notes, options, listener, Path(runtime)))


def name_checkpoints(checkpoints: list[Path]) -> dict[str, Path]:
    """Names for checkpoint directories.

    Raises:
        ValueError: not a checkpoint directory, or a name is used twice.
    """
    named: dict[str, Path] = {}
    for given in checkpoints:
        name, equals, path = str(given).rpartition("=")
        directory = Path(path).resolve()
        if not (directory / "config.json").is_file():
            raise ValueError(f"{path} is not a checkpoint directory: it has no config.json")
        if not equals:
            name = directory.parent.name if directory.name == "final" else directory.name
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot be a model's name (letters, digits, '.', '_', '-'): say NAME={path}")
        if name in named:
            raise ValueError(f"two checkpoints are called {name!r}: name one with NAME={path}")
        named[name] = directory
    return named


def _listen(host: str, port: int) -> socket.socket:
    """Binds first of all: a taken port shows at once, not after the engines have loaded."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as e:
        listener.close()
        raise ValueError(f"cannot listen on {host}:{port} ({e.strerror}): choose another --port") from e
    return listener


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: ours let running requests finish first."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(
    named: dict[str, Path],
    engine_options: dict[str, EngineOptions],
    notes: list[str],
    options: Options,
    listener: socket.socket,
    runtime: Path,
) -> int:
    began = time.monotonic()

    def report(text: str) -> None:
        print(f"[{time.monotonic() - began:5.1f}s] {text}", file=sys.stderr, flush=True)

    if options.log_dir:
        options.log_dir.mkdir(parents=True, exist_ok=True)
    for note in notes:
        report(note)
    engines = [
        Engine(
            name, path, engine_options[name], runtime, lambda model, text: report(f"{model}: {text}"), options.log_dir
        )
        for name, path in named.items()
    ]
    gateway = Gateway(engines)
    config = uvicorn.Config(gateway, log_level="warning", access_log=False, lifespan="off", timeout_keep_alive=75)
    server = _Server(config)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)

    # The gateway answers from the first moment (503 with Retry-After), so that probes see a start and not a fault.
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    stopping = asyncio.create_task(stop.wait())
    starting = asyncio.gather(*(engine.start() for engine in engines))
    watching: list[asyncio.Task[None]] = []
    code = 0
    try:
        await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            watching = [asyncio.create_task(engine.watch()) for engine in engines]
            _write_state(options.log_dir, engines)
            # Relaying makes much garbage and no cycles: scanning what lives for ever, again and again, is waste.
            gc.freeze()
            gc.set_threshold(50_000, 20, 20)
            host = f"[{options.host}]" if ":" in options.host else options.host
            names = ", ".join(gateway.gate.engines)
            report(f"ready: http://{host}:{listener.getsockname()[1]}/v1 serves {names}  (Ctrl-C stops)")
            await stopping
            report("stopping: no new requests, waiting for the running ones")
            for signum in (signal.SIGTERM, signal.SIGINT):  # a second signal does not wait
                loop.add_signal_handler(signum, lambda: [task.cancel() for task in gateway.gate.running])
            await gateway.gate.drain(options.drain_seconds)
    except (fingerprint.Mismatch, StartFailed) as e:
        report(f"NOT SERVED: {e}")
        code = 1
    finally:
        starting.cancel()
        for task in (*watching, stopping):
            task.cancel()
        await asyncio.gather(starting, *watching, return_exceptions=True)
        await asyncio.gather(*(engine.stop() for engine in engines))
        server.should_exit = True
        await serving
    report("stopped")
    return code


def plan(named: Mapping[str, Path], options: Options) -> tuple[dict[str, EngineOptions], list[str]]:
    """How each engine is started, and what to tell about it.

    Raises:
        ValueError: a feature that a checkpoint cannot have.
    """
    cpu = on_cpu()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = options.tensor_parallel * options.pipeline_parallel
    adapters = assign_adapters(options.adapters, named)
    draft = options.speculative
    engines: dict[str, EngineOptions] = {}
    notes = []
    for model, checkpoint in named.items():
        features = Features(
            tensor_parallel=options.tensor_parallel,
            pipeline_parallel=options.pipeline_parallel,
            expert_parallel=options.expert_parallel,
            adapters=adapters[model],
            speculative=Path(draft).resolve() if draft and draft not in (NGRAM, MTP) else draft,
            speculative_tokens=options.speculative_tokens,
            quantization=options.quantization,
            vllm_args=split_arguments(options.vllm_args),
        )
        notes += [f"{model}: {note}" for note in check(model, checkpoint, features, cpu, options.max_model_len)]
        if cpu and features.adapters and options.eager is False:
            notes.append(f"{model}: not compiled, because vLLM has no adapters on CPUs when it compiles")
        engines[model] = EngineOptions(
            dtype=options.dtype if options.dtype != "auto" else default_dtype(checkpoint, features, cpu),
            eager=cpu if options.eager is None else options.eager,
            threads=options.threads or max(1, (cores - 1) // (len(named) * ranks)),
            kv_cache_gib=options.kv_cache_gib,
            max_model_len=options.max_model_len,
            features=features,
        )
    if cpu and len(named) * ranks > cores:
        notes.append(f"WARNING: {len(named) * ranks} engine ranks share {cores} cores; they will wait for each other")
    return engines, notes


def _write_state(log_dir: Path | None, engines: list[Engine]) -> None:
    """For tools on this machine: where the engines are."""
    if log_dir:
        state = {
            "pid": os.getpid(),
            "engines": [
                {"model": e.model, "names": list(e.names), "pid": e.pid, "socket": str(e.socket)} for e in engines
            ],
        }
        (log_dir / "engines.json").write_text(json.dumps(state) + "\n")
