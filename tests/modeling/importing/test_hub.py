"""Import from a model hub: through its client, against a server on this machine."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from modeling.importing.hub import is_repository
from tests.modeling.importing import published
from tests.modeling.importing.hub_server import Hub, Repository, serve
from tests.modeling.importing.published import Sizes
from tests.modeling.importing.test_import import IDS, logits

SIZES = Sizes(vocab=11, d=8, heads=4, kv=2, ff=6, layers=2, ctx=8)
SECRET = "hf_" + "x" * 34
NEW, OLD = published.medassist(SIZES, seed=1), published.medassist(SIZES, seed=2)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    config = published.hugging(SIZES)
    new = published.write_folder(folder / "new", published.prefixed(NEW), config)
    # Files that an import does not need, and a second format of the weights.
    (new / "README.md").write_text("a card")
    (new / "modeling_gator.py").write_text("raise SystemExit('executed')")
    published.write_folder(new, OLD, None, "pytorch_model.bin")
    published.write_folder(new, OLD, None, "optimizer.pt")
    old = published.write_folder(folder / "old", OLD, config, "pytorch_model.bin")
    shards = published.write_shards(folder / "shards", NEW, config, "bin")
    several = published.write_folder(folder / "several", NEW, config, "a.pt")
    published.write_folder(several, NEW, None, "b.pt")
    card = folder / "card"
    card.mkdir()
    (card / "README.md").write_text("a card")
    repositories = {
        "kunjcr2/MedAssistGPT": Repository({"main": new, "v1": old}),
        "kunjcr2/private": Repository({"main": new}, token=SECRET),
        "kunjcr2/shards": Repository({"main": shards}),
        "kunjcr2/several": Repository({"main": several}),
        "kunjcr2/card": Repository({"main": card}),
        "kunjcr2/broken": Repository({"main": card}, fault=500),
        "kunjcr2/strange": Repository({"main": card}, fault=200),
    }
    with serve(Hub(repositories)) as hub:
        yield hub


# Imports one after the other in one process, which reports on each; the client reads its address and whether it may use
# the network when it is imported.
PROGRAM = """
import contextlib, io, json, os, sys
from clients.cli import main
reports = {}
for name, (arguments, token) in json.load(sys.stdin).items():
    os.environ["HF_TOKEN"] = token
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(["import", *arguments, "--tokenizer", "none"])
        except SystemExit as e:
            code = e.code
    reports[name] = (code, out.getvalue(), err.getvalue())
print(json.dumps(reports))
"""


@dataclass(frozen=True)
class Report:
    code: int
    stdout: str
    stderr: str

    def assert_paragraph(self, message: str) -> None:
        assert (self.code, self.stdout) == (2, "")
        assert self.stderr.startswith("medassist: cannot ") or "kunjcr2" in self.stderr
        assert self.stderr.count("\n") == 1
        assert re.search(message, self.stderr), self.stderr


def run(address: str, home: Path, work: list[tuple[str, Path, str]], **environment: str) -> dict[str, Report]:
    """Imports each (source and options, out, token), and returns the reports by the name of out."""
    clean = {n: v for n, v in os.environ.items() if not n.startswith(("HF_", "HUGGING")) and "proxy" not in n.lower()}
    given = {out.name: ([*source.split(), "--out", str(out)], token) for source, out, token in work}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps(given), capture_output=True, text=True, timeout=200,
        env=clean | {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return {name: Report(*report) for name, report in json.loads(done.stdout).items()}


@dataclass(frozen=True)
class Session:
    """What happened against the hub, online first, then without it; ``fetched`` are the files of the first import."""

    folder: Path
    reports: dict[str, Report]
    fetched: set[str]
    offline_requests: list[str]

    def assert_imported(self, name: str, state: published.State) -> None:
        assert self.reports[name].code == 0, self.reports[name].stderr
        want = published.medassist_logits(state, SIZES, IDS)
        torch.testing.assert_close(logits(self.folder / name), want, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def session(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Session:
    folder = tmp_path_factory.mktemp("imports")
    home, published_id = folder / "home", "kunjcr2/MedAssistGPT"
    work = [
        (published_id, "first", ""), (f"{published_id} --revision v1", "revision", ""),
        ("kunjcr2/shards", "shards", ""),
        ("kunjcr2/private", "opened", SECRET), ("kunjcr2/private", "closed", ""),
        ("kunjcr2/private", "wrong", "hf_wrong"),
        ("kunjcr2/nothing", "nothing", ""), (f"{published_id} --revision v9", "no-revision", ""),
        ("kunjcr2/several", "several", ""), ("kunjcr2/card", "card", ""), ("kunjcr2/a..b", "name", ""),
        ("kunjcr2/broken", "broken", ""), ("kunjcr2/strange", "strange", ""),
        ("kunjcr2/several/b.pt", "chosen", ""), ("kunjcr2/several/c.pt", "absent", ""),
    ]  # fmt: skip
    online = run(hub.address, home, [(source, folder / name, token) for source, name, token in work])
    main = f"GET {published_id}/resolve/{hub.repositories[published_id].commit('main')}/"
    fetched = {request.removeprefix(main) for request in hub.requests if request.startswith(main)}
    hub.requests.clear()
    offline = run(
        hub.address, home, [(published_id, folder / "offline", ""), ("kunjcr2/other", folder / "offline-unknown", ""),
         ("kunjcr2/several/b.pt", folder / "offline-chosen", "")],
        HF_HUB_OFFLINE="1",
    )  # fmt: skip
    requests = list(hub.requests)
    dead = run(
        "http://127.0.0.1:9", home,
        [(published_id, folder / "dead", ""), ("kunjcr2/other", folder / "dead-unknown", "")],
    )  # fmt: skip
    return Session(folder, online | offline | dead, fetched, requests)


def test_only_what_is_needed_is_fetched(session: Session) -> None:
    session.assert_imported("first", NEW)
    assert session.fetched == {"config.json", "model.safetensors"}


def test_cached_repository_is_imported_without_the_hub(session: Session) -> None:
    session.assert_imported("offline", NEW)
    session.assert_imported("dead", NEW)
    assert session.offline_requests == []


def test_one_of_several_weight_files_is_chosen_by_its_name(session: Session) -> None:
    session.assert_imported("chosen", NEW)
    session.assert_imported("offline-chosen", NEW)


def test_revision_shards_and_token_are_honoured(session: Session) -> None:
    session.assert_imported("revision", OLD)
    session.assert_imported("shards", NEW)
    session.assert_imported("opened", NEW)
    assert all(SECRET not in report.stdout + report.stderr for report in session.reports.values())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("closed", "private.*HF_TOKEN"), ("wrong", "private.*HF_TOKEN"), ("nothing", "no such repository"),
        ("no-revision", "no such revision"), ("several", r"a\.pt, b\.pt \(such as kunjcr2/several/a\.pt\)"),
        ("absent", r"has no file c\.pt; it has a\.pt, b\.pt"), ("strange", "its client fails with KeyError"),
        ("card", "no weights"),
        ("name", r"kunjcr2/a\.\.b"), ("broken", "status 500"), ("offline-unknown", "HF_HUB_OFFLINE"),
        ("dead-unknown", "does not answer"),
    ],
)  # fmt: skip
def test_what_cannot_be_fetched_is_one_paragraph(name: str, message: str, session: Session) -> None:
    session.reports[name].assert_paragraph(message)
    assert not [path for path in session.folder.iterdir() if name in path.name.split(".")]


def test_names_of_repositories_are_told_from_paths() -> None:
    assert all(map(is_repository, ("kunjcr2/MedAssistGPT", "a/b", "kunjcr2/MedAssist-GPT-401M", "x.y/z_1")))
    assert is_repository("kunjcr2/MedAssistGPT/step_17000.pt")
    # The last is a path with a mistake: there is such a folder here.
    assert not any(map(is_repository, ("a/b/c/d.pt", "a/b/config.json", "../b/c.pt", "tests/nothing/c.pt")))
    assert not any(map(is_repository, ("gpt2", "runs/step.pt", "a/b/c", "/a", "a/", "../a", "a/b.safetensors", "")))
