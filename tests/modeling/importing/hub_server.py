"""A model hub on this machine that speaks as much of the Hugging Face hub's API as its client asks for."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """``revisions``: branch or tag -> folder with the files. ``token``: who may read it; None for everybody.
    ``fault``: a status with which everything is answered."""

    revisions: dict[str, Path]
    token: str | None = None
    fault: int | None = None

    def commit(self, revision: str) -> str | None:
        """The commit of a branch or tag, or of itself."""
        commits = {name: hashlib.sha1(str(folder).encode()).hexdigest() for name, folder in self.revisions.items()}
        return commits.get(revision) or (revision if revision in commits.values() else None)

    def folder(self, commit: str) -> Path:
        return next(folder for name, folder in self.revisions.items() if self.commit(name) == commit)


@dataclass
class Hub:
    repositories: dict[str, Repository]
    address: str = ""
    requests: list[str] = field(default_factory=list)


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            hub.requests.append(f"{self.command} {path}")
            api = path.startswith("api/models/")
            parts = path.removeprefix("api/models/").split("/")
            repository = hub.repositories.get("/".join(parts[:2]))
            if repository is None or (
                repository.token and self.headers.get("Authorization") != f"Bearer {repository.token}"
            ):
                return self.answer(401, b'{"error": "no"}', {"X-Error-Code": "RepoNotFound"})
            if repository.fault is not None:
                return self.answer(repository.fault, b"{}")
            revision = parts[3] if len(parts) > 3 else "main"
            commit = repository.commit(revision)
            if commit is None:
                return self.answer(404, b'{"error": "no"}', {"X-Error-Code": "RevisionNotFound"})
            folder = repository.folder(commit)
            if api and parts[2:3] in ([], ["revision"]):
                siblings = [{"rfilename": name} for name in names(folder)]
                info = {"id": "/".join(parts[:2]), "sha": commit, "siblings": siblings, "private": False, "tags": []}
                return self.answer(200, json.dumps(info).encode())
            if api and parts[2] == "tree":
                tree = [
                    {"type": "file", "path": n, "size": (folder / n).stat().st_size, "oid": etag(folder / n)}
                    for n in names(folder)
                ]
                return self.answer(200, json.dumps(tree).encode())
            file = folder / "/".join(parts[4:])
            if not file.is_file():
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return self.answer(200, file.read_bytes(), {"ETag": f'"{etag(file)}"', "X-Repo-Commit": commit})

        def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    def names(folder: Path) -> list[str]:
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())

    def etag(path: Path) -> str:
        return hashlib.sha1(path.read_bytes()).hexdigest()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
