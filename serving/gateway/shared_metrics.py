"""What workers that have ended counted.

Each worker keeps its metrics in files of its own, and the sum is told over all files. Without this there would be more
of them with every restart.
"""

import contextlib
import fcntl
import os
import re
from collections import defaultdict
from pathlib import Path

from prometheus_client.mmap_dict import MmapedDict

_OF_WORKER = re.compile(r"(counter|histogram)_(\d+)\.db")
_EXEMPLARS = re.compile(r"exemplars_(\d+)\.map")


def merge_ended(directory: Path) -> None:
    """Adds up the counters and histograms of ended workers, in one file of each; drops their exemplars."""
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended: dict[str, list[Path]] = defaultdict(list)
        for file in directory.iterdir():
            if (match := _OF_WORKER.fullmatch(file.name)) and not _is_running(int(match[2])):
                ended[match[1]].append(file)
            elif (match := _EXEMPLARS.fullmatch(file.name)) and not _is_running(int(match[1])):
                file.unlink(missing_ok=True)  # the next traced requests have others
        for kind, files in ended.items():
            total: dict[str, float] = defaultdict(float)
            merged, new = directory / f"{kind}_ended.db", directory / f"{kind}_ended.new"
            for file in (*files, *([merged] if merged.exists() else [])):
                for key, value, *_ in MmapedDict.read_all_values_from_file(str(file)):
                    total[key] += value
            new.unlink(missing_ok=True)  # of a worker that was killed here
            values = MmapedDict(str(new))
            for key, value in total.items():
                values.write_value(key, value, 0.0)
            values.close()
            os.replace(new, merged)
            for file in files:
                with contextlib.suppress(FileNotFoundError):
                    file.unlink()


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
