"""What of an engine's output may be kept: nothing that can hold a prompt or an answer.

vLLM, and all that it is made of, write what they like: requests at debug level, the message of a validation error with
the value that was wrong, a scheduler's state with its token ids, a native library's last words. Everything comes
through one pipe, so it is sealed there, whatever wrote it and at whatever level. Until the engine serves, lines pass as
they are: there is no request yet, and they say why a start has failed. From then on a line shows its process, level and
place, an exception its type, a traceback its files; a message passes only where it is one of those below, which have
numbers. Names of files are compared with those of vLLM's and our own modules: never is a file looked for whose name
came from a line.
"""

import builtins
import importlib.util
import os
import re
from functools import cache
from pathlib import Path

LONGEST = 2**16  # bytes of a line that are read; the rest is dropped

# As vLLM writes them: "(EngineCore_DP0 pid=12) ERROR 11-25 16:07:12 [v1/engine/core.py:1512] ...".
_PROCESS = re.compile(
    r"\((?:APIServer|ApiServer|EngineCore|Worker|DPCoordinator|DPSupervisor)"
    r"(?:_(?:DP|PP|PCP|TP|DCP|EP)?\d{1,4}){0,6} pid=\d{1,8}\) ?"
)
_LEVEL = re.compile(r"(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d")
_PLACE = re.compile(r" \[(?:[\w.]{1,64}/){0,8}(\w{1,64}\.py):(\d{1,5})\]")
_RATES = (
    "Avg prompt throughput|Avg generation throughput|Running|Waiting|Deferred|Preemptions|[CG]PU KV cache usage"
    "|Prefix cache hit rate|External prefix cache hit rate|MM cache hit rate"
)
_KNOWN = re.compile(
    rf"Engine \d{{3}}: (?:(?:, )?(?:{_RATES}): \d{{1,8}}(?:\.\d{{1,3}})?(?:%| tokens/s| reqs)?)+"
    r"|EngineCore encountered a fatal error\.|AsyncLLM output_handler failed\."
    r"|Application (?:startup|shutdown) complete\."
)
_FILE = re.compile(r'File "([^"]{1,300})", line (\d{1,5})\b.*')
_EXCEPTION = re.compile(r"(?:[A-Za-z_]\w*\.)*([A-Za-z_]\w*)(?::.*)?", re.DOTALL)
_EXCEPTIONS = frozenset(
    name for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, BaseException)
) | {
    "AcceleratorError", "EngineDeadError", "EngineGenerateError", "OutOfMemoryError", "TemplateError",
    "TimeoutError", "VLLMError", "VLLMNotFoundError", "VLLMValidationError", "ValidationError",
}  # fmt: skip
_TRACEBACK = "Traceback (most recent call last):"
WITHHELD = "(not shown)"


class Lines:
    """Cuts output into lines. Of one longer than ``LONGEST`` bytes the rest is dropped, so that nothing that an engine
    writes fills the memory or stops its reader."""

    def __init__(self) -> None:
        self._begun = bytearray()

    def feed(self, data: bytes) -> list[str]:
        """The lines that end in ``data``."""
        found = []
        *ends, begun = data.split(b"\n")
        for end in ends:
            self._add(end)
            found.append(self.rest())
        self._add(begun)
        return found

    def rest(self) -> str:
        """What there is of a line that has no end yet."""
        line = self._begun.decode(errors="replace").rstrip()
        self._begun.clear()
        return line

    def _add(self, part: bytes) -> None:
        self._begun += part[: LONGEST - len(self._begun)]


class EngineLog:
    """Lines of one engine's output.

    Attributes:
        sealed: the engine serves, or has served.
    """

    def __init__(self) -> None:
        self.sealed = False
        self._withheld = False

    def pass_on(self, line: str) -> str | None:
        """What may be kept of a line; None: nothing of it."""
        if not self.sealed:
            return line
        prefix, message = _split(line)
        shown = _allowed(message.strip())
        if shown is None and not prefix:
            # Once for what may be a long text.
            again, self._withheld = self._withheld, True
            return None if again else WITHHELD
        self._withheld = False
        return f"{prefix} {shown or WITHHELD}".strip()


def _split(line: str) -> tuple[str, str]:
    """Process, level and place, as far as they are what vLLM writes; and what comes after."""
    shown, at = "", 0
    if found := _PROCESS.match(line):
        shown, at = found[0].strip(), found.end()
    if found := _LEVEL.match(line, at):
        shown, at = f"{shown} {found[0]}".strip(), found.end()
        if found := _PLACE.match(line, at):
            at = found.end()
            if found[1] in _modules()[0]:
                shown += f" [{found[1]}:{found[2]}]"
    return shown, line[at:]


def _allowed(message: str) -> str | None:
    if message == _TRACEBACK or _KNOWN.fullmatch(message):
        return message
    if (found := _FILE.fullmatch(message)) and found[1] in _modules()[1]:
        return f'File "{found[1]}", line {found[2]}'
    if (found := _EXCEPTION.fullmatch(message)) and found[1] in _EXCEPTIONS:
        return found[1]
    return None


@cache
def _modules() -> tuple[frozenset[str], frozenset[str]]:
    """Names and paths of the files of vLLM's modules and ours: some thousands, looked for once."""
    ours = Path(__file__).resolve().parents[1]
    folders = [str(ours / name) for name in ("modeling", "serving")]
    vllm = importlib.util.find_spec("vllm")  # which does not import it
    folders += (vllm and vllm.submodule_search_locations) or []
    paths = {
        os.path.join(folder, file)
        for top in folders
        for folder, _, files in os.walk(top)
        for file in files
        if file.endswith(".py")
    }
    return frozenset(map(os.path.basename, paths)), frozenset(paths)
