"""A phrase in prompts and answers, through all that can go well or wrong, at debug level, is found nowhere after."""

import base64
import contextlib
import getpass
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from serving.tenants.capture import new_pair
from serving.tenants.store import Store
from tests.databases import postgresql_database
from tests.e2e.server import CHECKPOINT, Server
from tests.serving.gateway.test_privacy import cores_are_files
from tests.serving.tenants.collector import Collector, running_collector
from tests.serving.tenants.redis_server import Server as Redis
from tests.waiting import until

pytestmark = pytest.mark.engine

WORDS = ("qzvorblimp", "xaffundrel", "wjoktremmid", "ykelzhupost")
PHRASE = " ".join(WORDS) + ' "ö\\'
MODEL = "demo"

# All that is logged, at every level, in every process: wherever a level is set, it is DEBUG.
SITE = """
import logging
_basic = logging.basicConfig
def basicConfig(**options):
    _basic(**options)
    logging.getLogger().setLevel(logging.DEBUG)
logging.basicConfig = basicConfig
"""


def forms(ids: list[int]) -> list[bytes]:
    """What the phrase may look like, in lower case."""
    text = PHRASE.encode()
    found = [word.encode() for word in WORDS]
    found += [word.encode().hex().encode() for word in WORDS]
    for shift in range(3):  # where in a longer text it stands
        found.append(base64.b64encode(b" " * shift + " ".join(WORDS).encode())[4:-4])
    found += [urllib.parse.quote(PHRASE).encode(), json.dumps(PHRASE).encode(), text]
    found += [word.encode("utf-16-le") for word in WORDS]
    for between in (", ", ",", " "):
        found.append(between.join(map(str, ids[1:9])).encode())
    return [form.lower() for form in found]


class Place:
    """A server with all that can write something down."""

    def __init__(self, folder: Path, tmp: Path, collector: Collector, redis: Redis, store: str) -> None:
        self.folder, self.collector, self.redis, self.store_url = folder, collector, redis, store
        self.home, self.site, self.tmp = folder / "home", folder / "site", tmp / "t"
        for made in (self.home, self.site, self.tmp):
            made.mkdir(mode=0o700)
        (self.site / "sitecustomize.py").write_text(SITE)
        with Store(store) as opened:
            opened.upgrade()
            self.key, self.secret = opened.create_key(tenant="clinic", metrics=True, by="test")
            self.captured, self.captured_secret = opened.create_key(tenant="clinic", by="test")
            opened.start_capture(
                key=self.captured.id, recipient=new_pair()[1], reason="test", created_by="test", seconds=3600
            )
        config = folder / "gateway.yaml"
        config.write_text(
            f"models: {{{MODEL}: {{checkpoint: {CHECKPOINT}, max_queue: 1, max_concurrency: 2, limits: {{allow: "
            "[structured_outputs, chat_template_kwargs]}}}\n"
            f"home: {self.home}\n"
            f"store: {{url: '{store}'}}\n"
            f"redis: {{url: '{redis.url}'}}\n"
            f"tracing: {{endpoint: '{collector.url}'}}\n"
            f"log: {{requests: true, file: {folder / 'requests.log'}}}\n"
            "probes: {canary_interval: 1}\n"
            "workers: 2\n"
        )
        environment = {
            "VLLM_LOGGING_LEVEL": "DEBUG",
            "VLLM_DEBUG_LOG_API_SERVER_RESPONSE": "1",
            "PYTHONASYNCIODEBUG": "1",
            "PYTHONFAULTHANDLER": "1",
            "PYTHONWARNINGS": "always",
            "OTEL_LOG_LEVEL": "debug",
            "PYTHONPATH": str(self.site),
            "TMPDIR": str(self.tmp),
            # Compiled code, which takes a minute to make anew.
            "TORCHINDUCTOR_CACHE_DIR": f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}",
        }
        with allowing_cores():
            self.server = Server(None, folder / "server", "--config", str(config), env=environment)

    def ask(self, path: str, secret: str = "", timeout: float = 60, **body: Any) -> tuple[int, str]:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {secret or self.secret}"}
        return self.send(path, json.dumps({"model": MODEL} | body).encode(), headers, timeout)

    def send(self, path: str, body: bytes, headers: dict[str, str], timeout: float = 60) -> tuple[int, str]:
        """Status and answer; 0 where there was none."""
        request = urllib.request.Request(self.server.root + path, body, headers, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as e:
            return e.code, e.read().decode()
        except OSError:
            return 0, ""

    def chat(self, secret: str = "", **body: Any) -> tuple[int, str]:
        messages = [{"role": "user", "content": f"Repeat: {PHRASE}"}]
        return self.ask("/v1/chat/completions", secret, **{"messages": messages, "max_tokens": 8} | body)

    @contextlib.contextmanager
    def streaming(self) -> Iterator[None]:
        """An answer that has begun, and goes on for as long as nobody stops it."""
        body = {
            "model": MODEL, "prompt": f"{PHRASE} " * 3, "max_tokens": 600, "n": 8, "ignore_eos": True, "stream": True,
        }  # fmt: skip
        data = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {self.secret}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        deadline = time.monotonic() + 60
        while True:
            with socket.create_connection(("127.0.0.1", self.server.port), timeout=60) as client:
                client.sendall(head.encode() + data)
                said = client.recv(65536)
                if said.startswith(b"HTTP/1.1 200"):
                    yield
                    return
            # What was ended before may still take its place.
            assert said.startswith(b"HTTP/1.1 503"), said
            assert time.monotonic() < deadline, said
            time.sleep(0.5)

    def writes(self) -> Iterator[tuple[str, bytes]]:
        """Everything that somebody could look at afterwards, but memory: a name and the content."""
        for path in (*self.folder.rglob("*"), *self.tmp.rglob("*")):
            with contextlib.suppress(FileNotFoundError):
                if path.is_file():
                    yield str(path), path.read_bytes()
        for number, body in enumerate(self.collector.bodies):
            yield f"the collector's {number}", body
        for name in self.redis.client.scan_iter():
            yield f"Redis: {name!r}", name + repr(_value(self.redis.client, name)).encode()
        with Store(self.store_url) as store, store.read() as connection:
            from serving.tenants import schema

            for table in schema.metadata.sorted_tables:
                for row in connection.execute(table.select()):
                    yield f"table {table.name}", repr(row).encode()


def _value(client: Any, name: bytes) -> Any:
    kind = client.type(name)
    if kind == b"hash":
        return client.hgetall(name)
    if kind == b"zset":
        return client.zrange(name, 0, -1)
    return client.get(name) if kind == b"string" else client.dump(name)


@contextlib.contextmanager
def allowing_cores() -> Iterator[None]:
    """Processes started meanwhile may dump core as far as the machine lets them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))


def cores(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("core*") if path.is_file() and path.read_bytes()[:4] == b"\x7fELF"]


@pytest.fixture
def place(tmp_path: Path, short_path: Path) -> Iterator[Place]:
    with contextlib.ExitStack() as stack:
        try:
            store = stack.enter_context(postgresql_database())
        except pytest.skip.Exception:
            store = f"sqlite:///{tmp_path}/store.db"
        collector = stack.enter_context(running_collector())
        redis = Redis(short_path)
        stack.callback(redis.kill)
        place = Place(tmp_path, short_path, collector, redis, store)
        stack.callback(place.server.stop)
        place.server.wait_ready()
        yield place


@pytest.mark.timeout(600)
def test_a_canary_is_found_nowhere(place: Place) -> None:
    server = place.server
    ids = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")).encode(PHRASE).ids
    assert len(ids) >= 9

    _succeed(place)
    _fail(place, ids)
    _be_late_and_leave(place)
    _overload(place)
    metrics = [server.request("GET", "/metrics", headers={"Authorization": f"Bearer {place.secret}"})[1]]
    metrics.append(_metrics_of_the_engine(server))
    assert all("_total" in text for text in metrics)

    running = list(place.writes())  # the runtime folder with it, which goes with the server
    _kill(place)
    server.stop()
    assert until(lambda: server.process.poll() is not None, 60)

    found = [
        (name, form)
        for name, content in [*running, *place.writes(), *(("metrics", text.encode()) for text in metrics)]
        for form in forms(ids)
        if form in content.lower()
    ]
    assert not found
    assert any(name.startswith(str(place.tmp)) for name, _ in running)
    assert not [*cores(place.folder), *cores(place.tmp)]
    _check_that_things_were_written(place)


def _succeed(place: Place) -> None:
    assert until(lambda: place.ask("/tokenize", prompt=PHRASE)[0] == 200, 30)
    assert place.chat()[0] == 200
    status, said = place.chat(structured_outputs={"choice": [" ".join(WORDS)]}, max_tokens=200)
    assert (status, WORDS[1] in said) == (200, True), "it is in an answer"
    status, said = place.ask("/v1/completions", prompt=PHRASE, echo=True, max_tokens=2, stream=True)
    assert (status, WORDS[1] in said) == (200, True)
    assert place.chat(place.captured_secret)[0] == 200
    status, _ = place.ask("/v1/messages", messages=[{"role": "user", "content": PHRASE}], max_tokens=4)
    assert status == 200
    assert place.ask("/v1/responses", input=PHRASE, max_output_tokens=4)[0] in (200, 404)


def _fail(place: Place, ids: list[int]) -> None:
    refused = [
        place.chat(temperature=99),
        place.chat(model=PHRASE),
        place.chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": PHRASE}}}),
        place.chat(structured_outputs={"regex": f"({PHRASE}"}),
        place.chat(structured_outputs={"grammar": PHRASE}),
        place.chat(max_tokens=10**6),
        place.chat(messages=PHRASE),
        place.chat(messages=[{"role": PHRASE, "content": PHRASE}]),
        place.chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PHRASE}}]}]),
        place.chat(stop=[PHRASE] * 100),
        place.chat(tools=[{"type": "function", "function": {"name": PHRASE, "parameters": {"type": PHRASE}}}]),
        place.chat(chat_template_kwargs={PHRASE: PHRASE}, tool_choice=PHRASE),
        place.chat(**{WORDS[0]: PHRASE}),
        place.ask("/v1/completions", prompt=[*ids, 10**9]),
        place.ask("/v1/completions", prompt=f"{PHRASE} " * 2000),
        place.ask("/v1/completions", prompt={"text": PHRASE}),
        place.ask(f"/v1/{WORDS[0]}?q={WORDS[1]}", prompt=PHRASE),
        place.chat("ma_" + WORDS[0]),
    ]
    assert all(400 <= status < 500 or status in (200, 500) for status, _ in refused), refused
    assert sum(400 <= status < 500 for status, _ in refused) > 12
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {place.secret}"}
    for body in (f'{{"prompt": "{PHRASE}', f"{PHRASE}", '{"model": "demo", "prompt": "\\ud800 ' + WORDS[0] + '"}'):
        assert place.send("/v1/completions", body.encode(), headers)[0] == 400
    assert place.send("/v1/completions", b"{}", {**headers, "Content-Type": PHRASE[:40]})[0] == 415
    with socket.create_connection(("127.0.0.1", place.server.port), timeout=10) as client:
        client.sendall(f"{WORDS[0]} {WORDS[1]}\r\n\r\n{PHRASE}".encode())
        client.recv(4096)


def _be_late_and_leave(place: Place) -> None:
    headers = {
        "Content-Type": "application/json", "Authorization": f"Bearer {place.secret}", "X-Request-Timeout": "0.3"
    }  # fmt: skip
    body = {"model": MODEL, "prompt": PHRASE, "max_tokens": 600, "n": 8, "ignore_eos": True}
    assert place.send("/v1/completions", json.dumps(body).encode(), headers)[0] == 504
    with place.streaming():
        pass
    with contextlib.suppress(TimeoutError):
        place.ask("/v1/completions", timeout=0.2, prompt=PHRASE, max_tokens=600, n=8, ignore_eos=True)


def _overload(place: Place) -> None:
    statuses: list[int] = []

    def ask() -> None:
        statuses.append(place.chat(max_tokens=60, ignore_eos=True)[0])

    threads = [threading.Thread(target=ask) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 200 in statuses
    assert {429, 503} & set(statuses), "it was not too much"


def _kill(place: Place) -> None:
    """Workers and the engine, in the middle of an answer, in ways that leave a core where cores are left."""
    server = place.server
    with allowing_cores():
        # That this machine writes cores here, if it does, makes the rest of this worth something.
        subprocess.run([sys.executable, "-c", "import os; os.abort()"], cwd=server.log_dir, check=False)
    left = cores(place.folder)
    assert left or not cores_are_files()
    for core in left:
        core.unlink()
    for signum in (signal.SIGSEGV, signal.SIGABRT):
        with place.streaming():
            before = set(server.state["workers"])
            for worker in before:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signum)
            assert until(lambda old=before: not old & set(server.state["workers"]), 60)  # type: ignore[misc]
        assert until(lambda: place.chat()[0] == 200, 60)
    for signum in (signal.SIGKILL, signal.SIGABRT):
        with place.streaming():
            engine = server.engine["pid"]
            os.kill(engine, signum)
            time.sleep(1)
            place.chat()
        if signum == signal.SIGKILL:
            assert until(lambda: place.chat()[0] == 200, 240), server.log


def _metrics_of_the_engine(server: Server) -> str:
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(str(server.engine["socket"]))
        s.sendall(b"GET /metrics HTTP/1.0\r\nHost: engine\r\n\r\n")
        return b"".join(iter(lambda: s.recv(65536), b"")).decode()


def _check_that_things_were_written(place: Place) -> None:
    """A search in nothing finds nothing."""
    log = (place.folder / "requests.log").read_text().splitlines()
    assert len(log) > 40
    assert {json.loads(line)["status"] for line in log} >= {200, 400, 401, 404, 499, 504}
    assert place.collector.spans
    audit = b"".join(path.read_bytes() for path in (place.home / "audit").glob("*.jsonl"))
    assert audit.count(b'"event":"request"') > 40
    assert list((place.home / "captures").rglob("*.capture")), "the captured key's are there, and not to be read"
    with Store(place.store_url) as store:
        assert store.usage(by=())[0].requests > 10
    engine = next((place.folder / "server").glob("engine-*.log")).read_text()
    assert "Received messages request" not in engine
    assert "(not shown)" in engine
    assert "DEBUG" in engine
    assert " asyncio: " in place.server.log, "workers log what libraries say, and not the words"
