"""A bare engine on a Unix socket, started as ``medassist serve`` starts its own."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from loadtest.gateway.processes import program
from serving.engine import Engine, EngineOptions, on_cpu
from serving.features import Features, default_dtype


@contextmanager
def engine(
    folder: Path, checkpoint: Path, model: str, cores: Sequence[int] = (), replica: int = 0, timeout: float = 300
) -> Iterator[str]:
    """Runs an engine until the block ends. Yields its socket's path.

    Args:
        folder: for the socket and the log; its path must be short, as a Unix socket's must.
        model: the name that it serves ``checkpoint`` under.
        cores: those that it may run on, with a thread for each but the one that its server needs.

    Raises:
        RuntimeError: it did not get ready; the message has the end of its log.
    """
    options = EngineOptions(
        dtype=default_dtype(checkpoint, Features(), on_cpu()),
        eager=on_cpu(),
        threads=max(1, len(cores) - 1),
        kv_cache_gib=1.0,
    )
    engine = Engine(model, checkpoint.resolve(), options, folder, replica=replica)
    unix = str(engine.socket)
    name = f"engine-{replica}"
    with program(name, engine.command(), "", folder, "/health", engine.environment(), cores, timeout, unix):
        yield unix
