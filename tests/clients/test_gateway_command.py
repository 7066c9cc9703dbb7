"""``medassist gateway``, as an operator meets it."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from clients import cli
from serving.tenants.store import Store
from tests.serving.gateway.certificates import Authority
from tests.serving.tenants.redis_server import Server

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "deploy/gateway.example.yaml"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code: Any = 0
    try:
        cli.main(["gateway", *(str(argument) for argument in arguments)])
    except SystemExit as e:
        code = e.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_check_says_what_would_be_served(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--check", "--config", EXAMPLE, "--workers", 3, "--port", 9)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "valid: 127.0.0.1:9, 3 workers",
        "model medassist-86m: http://10.0.0.5:8000, http://10.0.0.6:8000, unix:/run/medassist/engine.sock (draining)",
        "model medassist-86m-cardiology: an adapter of medassist-86m",
        "model medassist-303m: https://engine.example.org",
        "alias default: medassist-86m 100%",
        "alias trial: medassist-303m 10%, medassist-86m 90%",
        "keys: none yet, so this machine only is served, without one",
        "usage: not kept, since there is no store (`medassist keys create` makes one)",
    ]


def test_each_problem_is_a_line_and_the_exit_code_is_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text("models: {demo: {engines: [{url: 'http://x'}], max_queue: -3, 'q\\e': 1}, b: {}}".replace("'", '"'))
    code, out, err = run(capsys, "--config", path)
    assert (code, out) == (2, "")
    assert [line.removeprefix(f"medassist: {path}: ") for line in err.splitlines()] == [
        "models.demo.max_queue must be at least 0, got -3",
        f"models.demo.q\\x1b is not known; known here: {', '.join(known_model_keys())}",
        "models.b.engines must name at least one server (or checkpoint a directory, for medassist serve)",
    ]


def known_model_keys() -> list[str]:
    from serving.gateway.settings import Model

    return list(Model.model_fields)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "either --config FILE, or --engine NAME=URL"),
        (("--config", EXAMPLE, "--engine", "a=http://x"), "either --config FILE, or --engine NAME=URL"),
        (("--config", EXAMPLE, "--drain-seconds", 5), "--drain-seconds is for --engine: set drain in "),
        (("--config", "/nowhere/gateway.yaml"), "No such file or directory: '/nowhere/gateway.yaml'"),
        (("--engine", "http://x:1"), "--engine: must be NAME=URL, such as demo=http://10.0.0.5:8000"),
        (("--engine", "a=x:1"), "--engine a: must be http://HOST[:PORT], https://HOST[:PORT] or unix:/PATH/TO/SOCKET"),
        (("--engine", "a=http://x", "--host", "127.0.0.1.5"), "host 127.0.0.1.5 can be reached by others"),
    ],
)
def test_wrong_options_are_one_line(
    arguments: tuple[object, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert expected in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("medassist: ")


def test_a_taken_port_shows_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = run(capsys, "--engine", "a=http://x", "--port", port)
    assert code == 2
    assert err == f"medassist: cannot listen on 127.0.0.1:{port} (Address already in use): choose another --port\n"


def test_others_are_served_only_when_there_is_a_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDASSIST_HOME", str(tmp_path))
    for host, refused in (("0.0.0.0", True), ("::", True), ("localhost", False), ("127.1.2.3", False), ("::1", False)):
        code, _, err = run(capsys, "--check", "--engine", "a=http://x", "--host", host)
        assert (code == 2) is refused
        assert (
            "make one with `medassist keys create`, or serve this machine only (--host 127.0.0.1)" in err
        ) is refused
    store = Store(f"sqlite:///{tmp_path / 'medassist.db'}")
    store.upgrade()
    key, _ = store.create_key(tenant="acme")
    store.revoke(key.id)  # it was in use once: whoever had it must not be let in now without one
    code, out, _ = run(capsys, "--check", "--engine", "a=http://x", "--host", "0.0.0.0")
    assert code == 0
    assert out.splitlines()[2:] == [
        "keys: needed",
        f"usage: in the store ({tmp_path / 'medassist.db'}), by way of journals in {tmp_path / 'journal'}",
        f"audit log: requests, keys, settings and captures, in {tmp_path / 'audit'}",
        "limits: counted by each worker",
    ]


def test_every_line_of_the_example_can_be_taken_into_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINE_KEY", "key")
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1/0")
    certificate, key = Authority(tmp_path).issue("server")
    url = f"sqlite:///{tmp_path / 'given.db'}"
    Store(url).upgrade()
    text = re.sub(r"^( *)# (\w+: )", r"\1\2", EXAMPLE.read_text(), flags=re.MULTILINE)
    for given, own in (
        ("/etc/medassist/chain.pem", certificate), ("/etc/medassist/key.pem", key),
        ("postgresql://medassist@db.example.org/medassist", url), ("/var/lib/medassist", tmp_path / "kept"),
        ("/var/log/medassist", tmp_path),
    ):  # fmt: skip
        assert given in text
        text = text.replace(given, str(own))
    path = tmp_path / "gateway.yaml"
    path.write_text(text)
    code, out, err = run(capsys, "--check", "--config", path)
    assert code == 0, err
    assert {"home", "store", "redis", "log", "tracing", "tls", "admin", "cors"} <= set(yaml.safe_load(text))
    assert yaml.safe_load(text)["models"]["medassist-303m"]["cache_salts"] is False
    assert [line for line in err.splitlines() if "redis.url_env" not in line] == []
    assert "metrics and admin: 127.0.0.1:8001" in out


def test_it_serves_without_torch_and_vllm_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """From the command line to the end. What it wrote for its own use goes, if not then, at the next start."""
    blocked = tmp_path / "blocked"
    for name in ("torch", "vllm", "transformers", "numpy"):
        (blocked / name).mkdir(parents=True)
        (blocked / name / "__init__.py").write_text("raise ImportError('not installed')")
    own = tmp_path / "tmp"
    own.mkdir()
    os.mkfifo(own / "medassist-gateway-pipe")  # somebody's who wants us to wait for ever
    environment = os.environ | {"PYTHONPATH": f"{blocked}{os.pathsep}{ROOT}", "TMPDIR": str(own)}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "clients.cli", "gateway", "--engine", "demo=http://127.0.0.1:9", "--port"]
    seen: list[Path] = []
    for end in (signal.SIGKILL, signal.SIGTERM):
        process = subprocess.Popen(
            [*command, str(port)], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
        )
        try:
            assert '"demo"' in _get(f"http://127.0.0.1:{port}/v1/models", process)
            (settings,) = own.glob("medassist-gateway-*/gateway.json")
            assert settings.parent.stat().st_mode & 0o777 == 0o700
            seen.append(settings)
        finally:
            process.send_signal(end)
            _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert f"medassist: no keys yet: whoever reaches 127.0.0.1:{port} is served; `medassist keys create` " in errors
    assert len(set(seen)) == 2
    assert [path.name for path in own.iterdir()] == ["medassist-gateway-pipe"]


def test_check_warns_of_what_has_no_effect_or_does_not_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDASSIST_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("REDIS_OF_TEST", "redis://:hunter2@127.0.0.1:1/0")
    path = tmp_path / "gateway.yaml"

    def warnings(*lines: str) -> list[str]:
        path.write_text("\n".join(["models: {demo: {engines: [{url: 'http://x'}]}}", *lines]))
        code, _, err = run(capsys, "--check", "--config", path)
        assert code == 0, err
        assert "hunter2" not in err
        return [line.removeprefix("medassist: warning: ") for line in err.splitlines()]

    assert warnings() == []
    assert warnings("log: {file: a.jsonl}", "admin: {host: 127.0.0.1}") == [
        "log.file has no effect without log.requests: true",
        "admin.host has no effect without admin.port",
    ]
    (line,) = warnings("log: {requests: true, file: logs/a.jsonl}")
    assert line.startswith(f"log.file: there is no folder {tmp_path / 'logs'}")
    (line,) = warnings("redis: {url_env: REDIS_OF_TEST}")
    assert line.startswith("redis.url_env: Redis does not answer (ConnectionError)")
    (line,) = warnings("redis: {url: 'redis://127.0.0.1:1?nonsense=1'}")
    assert line == "redis.url: it has an option that Redis' client does not know"


def test_check_asks_redis_whether_it_takes_the_password(
    short_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(short_path)
    try:
        path = short_path / "gateway.yaml"
        path.write_text("models: {demo: {engines: [{url: 'http://x'}]}}\nredis: {url_env: REDIS_OF_TEST}\n")
        monkeypatch.setenv("REDIS_OF_TEST", server.url)
        assert run(capsys, "--check", "--config", path)[2] == ""
        monkeypatch.setenv("REDIS_OF_TEST", server.url + "?password=hunter2")
        server.client.config_set("requirepass", "another")
        err = run(capsys, "--check", "--config", path)[2]
        assert err == "medassist: warning: redis.url_env: Redis refuses the user or the password\n"
    finally:
        server.kill()


def _get(url: str, process: "subprocess.Popen[str]") -> str:
    deadline = time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return answer.read().decode()
        except OSError as e:
            if process.poll() is not None:
                assert process.stderr is not None
                raise AssertionError(process.stderr.read()) from e
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
