"""What a process of the gateway leaves behind when something goes wrong in it."""

import asyncio
import logging
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from serving.gateway import privacy

SECRET = "qzvorblimp"


def python(code: str, folder: Path, *, cores: bool = False) -> subprocess.CompletedProcess[str]:
    def allow_cores() -> None:
        hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
        resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))

    return subprocess.run(
        [sys.executable, "-c", f"import sys\nsecret = sys.argv[1]\n{code}", SECRET],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=allow_cores if cores else None,
    )


def cores_are_files() -> bool:
    """Whether a process that aborts leaves a core in its folder, unless it forbids that."""
    try:
        pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    except OSError:
        return False
    unlimited = resource.getrlimit(resource.RLIMIT_CORE)[1] == resource.RLIM_INFINITY
    return unlimited and pattern.startswith("core")


@pytest.mark.parametrize(
    "failing",
    [
        "raise ValueError(secret)",
        "try:\n    raise KeyError(secret)\nexcept KeyError as e:\n    raise ValueError(secret) from e",
        "raise ExceptionGroup(secret, [ValueError(secret)])",
        "import threading\nt = threading.Thread(target=lambda: int(secret))\nt.start()\nt.join()",
        "class X:\n    def __del__(self): raise ValueError(secret)\nX()",
        "import warnings\nwarnings.warn(secret)",
        "import logging\nlogging.getLogger('aiohttp.client').error('%s', secret)",
        "import logging\ntry:\n    int(secret)\nexcept ValueError:\n    logging.getLogger('serving').exception('')",
        "import asyncio\nasync def f():\n    l = asyncio.get_running_loop()\n    privacy.quiet(l)\n"
        "    l.call_soon(int, secret)\n    asyncio.ensure_future(g())\n    await asyncio.sleep(0.05)\n"
        "    import gc; gc.collect()\nasync def g(): raise ValueError(secret)\nasyncio.run(f(), debug=True)",
    ],
)
def test_types_and_places_are_told_and_no_message(tmp_path: Path, failing: str) -> None:
    code = "from serving.gateway import privacy\nprivacy.seal()\nimport logging\nlogging.getLogger().setLevel(10)\n"
    told = python(code + failing, tmp_path)
    assert SECRET not in told.stdout + told.stderr
    assert ":" in told.stderr, "where it was"
    plain = python("from serving.gateway import privacy\nprivacy.quiet = lambda loop: None\n" + failing, tmp_path)
    assert SECRET in plain.stderr, "it would have been told"


def test_an_exception_is_described_by_its_causes() -> None:
    try:
        try:
            int(SECRET)
        except ValueError as e:
            raise RuntimeError(SECRET) from e
    except RuntimeError as e:
        told = privacy.describe(e)
    assert "RuntimeError at test_privacy.py:" in told
    assert ", from ValueError at test_privacy.py:" in told
    assert SECRET not in told


def test_our_own_messages_are_shown() -> None:
    record = logging.LogRecord("medassist.limits", logging.WARNING, "/x/y.py", 3, "Redis is %s", ("away",), None)
    assert privacy.PlacesOnly().format(record) == "WARNING medassist.limits: Redis is away"
    record.name = "asyncio"
    assert privacy.PlacesOnly().format(record) == "WARNING asyncio: y.py:3"


def test_no_core_is_dumped_nor_by_children(tmp_path: Path) -> None:
    abort = "import os\nos.abort()"
    python(abort, tmp_path, cores=True)
    dumped = [path for path in tmp_path.iterdir() if path.name.startswith("core")]
    assert dumped or not cores_are_files(), "otherwise this test shows nothing"
    for path in dumped:
        path.unlink()
    told = python(
        "from serving.gateway.privacy import forbid_core_dumps\nforbid_core_dumps()\nimport os, subprocess, resource\n"
        'code = \'import resource; print(resource.getrlimit(resource.RLIMIT_CORE), open("/proc/self/coredump_filter")'
        ".read().strip()); import os; os.abort()'\n"
        "subprocess.run([sys.executable, '-c', code])\nos.abort()",
        tmp_path,
        cores=True,
    )
    assert told.returncode < 0
    assert not list(tmp_path.iterdir())
    if sys.platform == "linux" and os.path.exists("/proc/self/coredump_filter"):
        limit = "(0, 0)" if resource.getrlimit(resource.RLIMIT_CORE)[1] == 0 else "(1, 1)"
        assert told.stdout.strip() == f"{limit} 00000000"


def test_a_loop_that_is_quiet_still_tells(capsys: pytest.CaptureFixture[str]) -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()
        privacy.quiet(loop)
        loop.call_soon(int, SECRET)
        await asyncio.sleep(0)

    asyncio.run(test())
    err = capsys.readouterr().err
    assert err.startswith("uncaught in the event loop: ValueError at ")
    assert SECRET not in err
