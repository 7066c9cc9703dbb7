"""Rules of the repository that no linter checks."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def tracked() -> list[Path]:
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in names.split("\0") if name and (ROOT / name).is_file()]


def test_no_python_file_is_longer_than_500_lines() -> None:
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in tracked() if path.suffix == ".py"}
    assert lengths
    assert {str(path): lines for path, lines in lengths.items() if lines > 500} == {}


def test_no_module_is_called_utils() -> None:
    assert [str(path) for path in tracked() if path.name == "utils.py"] == []


def test_requirements_and_lock_files_name_no_hosts() -> None:
    """They must work with whatever package index an installation is given."""
    pins = [
        path
        for path in tracked()
        if path.suffix == ".lock"
        or path.name == "package-lock.json"
        or (re.match(r"(requirements|constraints)", str(path.relative_to(ROOT))) and path.suffix in (".txt", ".in"))
        or (re.match(r"(requirements|constraints)", path.name) and path.suffix in (".txt", ".in"))
    ]
    host = re.compile(r"https?://|--(extra-)?index-url|--find-links|--trusted-host", re.IGNORECASE)
    assert [str(path.relative_to(ROOT)) for path in pins if host.search(path.read_text())] == []
