"""Uploads to a hub on this machine, that speaks the endpoints the client needs, fails, hangs or is not there."""

import base64
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from training.publish import Upload, checkpoint_of

TOKEN = "hf_" + "s" * 20


class Hub(ThreadingHTTPServer):
    """Keeps the files of the commits it gets. Its first answers to a commit are ``failures``."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.failures: list[int] = []
        self.created: list[dict[str, Any]] = []
        self.tokens: set[str | None] = set()
        self.hang = threading.Event()
        self.hang.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self._answer(200, {"id": "me/tiny", "sha": "0" * 40, "siblings": [], "private": True})

    def do_POST(self) -> None:
        hub, body = self.server, self._body()
        hub.hang.wait(20)
        hub.tokens.add(self.headers.get("Authorization"))
        if self.path == "/api/validate-yaml":  # the card's front matter
            self._answer(200, {"warnings": [], "errors": []})
        elif self.path == "/api/repos/create":
            hub.created.append(json.loads(body))
            self._answer(200, {"url": f"{hub.url}/me/tiny"})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            self._answer(200, {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
        elif "/commit/" in self.path:
            if hub.failures:
                self._answer(hub.failures.pop(0), {"error": "not now"})
                return
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer(200, {"commitUrl": f"{hub.url}/me/tiny/commit/1", "commitOid": "1" * 40, "success": True})
        else:
            self._answer(404, {"error": self.path})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.hang.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def final(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "final"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\ntags:\n- medassist\n---\n# tiny\n")
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    (folder / "left.partial").write_text("half a file")
    return folder


def test_all_files_come_after_two_failures(hub: Hub, final: Path) -> None:
    hub.failures, said = [503, 503], []
    outcome = Upload(final, "me/tiny", private=True, say=said.append, first_wait=0.05).finish(60)
    assert outcome.done, outcome.text
    assert outcome.text == f"uploaded to {hub.url}/me/tiny"
    assert sorted(hub.files) == ["README.md", "config.json", "model.safetensors"]
    assert hub.files["model.safetensors"] == bytes(range(256))
    assert hub.created[0]["name"] == "tiny"
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in "".join(said)


@pytest.mark.parametrize("status", [401, 403, 400])
def test_a_refusal_is_not_repeated_and_says_how_to_try_again(hub: Hub, final: Path, status: int) -> None:
    hub.failures, said = [status] * 5, []
    outcome = Upload(final, "me/tiny", say=said.append, first_wait=0.05).finish(60)
    assert not outcome.done
    assert not said
    assert len(hub.failures) == 4
    assert str(status) in outcome.text
    assert f"medassist upload {final.parent} --repo me/tiny" in outcome.text
    assert TOKEN not in outcome.text


def test_a_hub_that_is_not_there_fails_after_the_last_attempt(final: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # taken, and nothing listens
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        said: list[str] = []
        upload = Upload(final, "me/tiny", say=said.append, attempts=3, first_wait=0.05)
        outcome = upload.finish(60)
    assert not outcome.done
    assert len(said) == 2
    assert "3 attempts failed" in outcome.text
    assert "medassist upload" in outcome.text


def test_a_hub_that_hangs_is_waited_for_no_longer_than_asked(hub: Hub, final: Path) -> None:
    hub.hang.clear()
    begun = time.monotonic()
    outcome = Upload(final, "me/tiny").finish(0.3)
    assert time.monotonic() - begun < 30
    assert not outcome.done
    assert "medassist upload" in outcome.text


def test_without_a_token_nothing_is_sent(hub: Hub, final: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    outcome = Upload(final, "me/tiny").finish(10)
    assert not outcome.done
    assert "set HF_TOKEN" in outcome.text
    assert not hub.created


def test_the_command_takes_a_run_or_a_checkpoint(hub: Hub, final: Path) -> None:
    from typer.testing import CliRunner

    from clients.cli import app

    assert checkpoint_of(final.parent) == checkpoint_of(final) == final
    with pytest.raises(ValueError, match="no finished run"):
        checkpoint_of(final.parent.parent)
    result = CliRunner().invoke(app, ["upload", str(final.parent), "--repo", "me/tiny"])
    assert result.exit_code == 0, result.output
    assert f"uploaded to {hub.url}/me/tiny" in result.output
    hub.failures = [401]
    result = CliRunner().invoke(app, ["upload", str(final), "--repo", "me/tiny"])
    assert result.exit_code == 1
