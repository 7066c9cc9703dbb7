"""The `medassist` command as people type it, against a server that says what a test tells it to."""

import io
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from clients import cli

TOO_LONG = {"message": "This model's maximum context length is 64 tokens", "code": "context_length_exceeded"}


@dataclass
class Reply:
    """``pieces`` as a stream that ends with ``finish``; with an ``error`` as its last event, or in its place."""

    pieces: tuple[str, ...] = ()
    finish: str | None = "stop"
    status: int = 200
    error: dict[str, Any] | None = None
    headers: dict[str, str] = field(default_factory=dict)
    hold: bool = False  # say nothing more until the client leaves


@dataclass
class Server:
    replies: list[Reply] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    client_left: threading.Event = field(default_factory=threading.Event)

    def contents(self, request: int) -> list[str]:
        return [message["content"] for message in self.requests[request]["messages"]]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    scripted = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            models = [{"id": name, "object": "model", "created": 0, "owned_by": "me"} for name in ("small", "large")]
            self.send(200, {"object": "list", "data": models})

        def do_POST(self) -> None:
            scripted.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            scripted.keys.append(self.headers["Authorization"])
            reply = scripted.replies.pop(0)
            if reply.status != 200:
                return self.send(reply.status, {"error": reply.error}, reply.headers)
            self.start(200, {"Content-Type": "text/event-stream"} | reply.headers)
            for piece in reply.pieces:
                self.event({"choices": [{"index": 0, "delta": {"content": piece}}]})
            if reply.hold:
                self.connection.recv(1)  # returns when the client closes the connection
                return scripted.client_left.set()
            if reply.error:
                self.event({"error": reply.error})
            if reply.finish:
                self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": reply.finish}]})

        def send(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
            self.start(status, {"Content-Type": "application/json"} | (headers or {}))
            self.wfile.write(json.dumps(body).encode())

        def start(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        def event(self, data: dict[str, Any]) -> None:
            self.wfile.write(
                b"data: " + json.dumps({"id": "1", "created": 0, "model": "small"} | data).encode() + b"\n\n"
            )

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.02,))
        thread.start()
        for name in ("MEDASSIST_API_KEY", "OPENAI_API_KEY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("MEDASSIST_BASE_URL", f"http://127.0.0.1:{http.server_address[1]}/v1")
        yield scripted
        http.shutdown()
        thread.join()


def medassist(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        cli.main(list(arguments))
    return exit_.value.code  # type: ignore[return-value]


def chat(monkeypatch: pytest.MonkeyPatch, *lines: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return medassist("chat")


def test_ask_prints_the_answer_and_nothing_else_on_standard_output(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.replies = [Reply(("Drink ", "water."))]
    assert medassist("ask", "What helps?") == 0
    assert capsys.readouterr().out == "Drink water.\n"
    assert server.requests == [
        {"model": "small", "messages": [{"role": "user", "content": "What helps?"}], "stream": True}
    ]


def test_ask_sends_the_sampling_parameters_it_is_given(server: Server) -> None:
    server.replies = [Reply(("Yes.",))]
    assert medassist("ask", "Really?", "--model", "large", "--temperature", "0", "--max-tokens", "5") == 0
    sent = server.requests[0]
    assert (sent["model"], sent["temperature"], sent["max_tokens"]) == ("large", 0, 5)


def test_ask_sends_the_key_of_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDASSIST_API_KEY", "secret")
    server.replies = [Reply(("Yes.",))]
    assert medassist("ask", "Really?") == 0
    assert server.keys == ["Bearer secret"]


@pytest.mark.parametrize("arguments", [("ask",), ("ask", "-")])
def test_ask_reads_the_question_from_a_pipe(
    server: Server, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is anaemia?\n"))
    server.replies = [Reply(("Too little haemoglobin.",))]
    assert medassist(*arguments) == 0
    assert server.contents(0) == ["What is anaemia?"]


def test_ask_without_a_question_is_a_mistake_of_usage(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert medassist("ask") == 2
    assert "no question" in capsys.readouterr().err


def test_control_characters_of_an_answer_do_not_reach_the_terminal(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.replies = [Reply(("one\ttwo\n\x1b]0;title\x07\x9b2J\r",))]
    medassist("ask", "What?")
    assert capsys.readouterr().out == "one\ttwo\n]0;title2J\n"


def test_ask_says_how_to_start_a_server_when_nothing_listens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MEDASSIST_BASE_URL", f"http://127.0.0.1:{unused.getsockname()[1]}/v1")
        assert medassist("ask", "Anyone?") == 1
    assert "medassist serve" in capsys.readouterr().err


def test_ask_lists_the_models_when_there_is_none_of_that_name(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.replies = [Reply(status=404, error={"message": "there is no model", "code": "model_not_found"})]
    assert medassist("ask", "What?", "--model", "tiny") == 1
    assert "'tiny'; it has small, large" in capsys.readouterr().err


def test_ask_says_when_to_try_again_when_the_server_is_busy(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.replies = [Reply(status=503, error={"message": "the model is starting"}, headers={"Retry-After": "7"})]
    assert medassist("ask", "What?") == 1
    assert "the model is starting; try again in 7 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (Reply(finish=None, error={"message": "the engine failed"}), "cut off: the engine failed"),
        (Reply(finish=None), "cut off: the server closed the connection"),
        (Reply(finish=None, headers={"Content-Length": "9999"}), "cut off: the connection to the server was lost"),
    ],
)
def test_ask_keeps_what_was_printed_when_the_stream_breaks(
    server: Server, capsys: pytest.CaptureFixture[str], end: Reply, reason: str
) -> None:
    end.pieces = ("Drink ",)
    server.replies = [end]
    assert medassist("ask", "What helps?") == 1
    printed = capsys.readouterr()
    assert printed.out == "Drink \n"
    assert reason in printed.err


def test_chat_sends_the_conversation_with_each_question_until_a_new_one(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.replies = [Reply(("One.",)), Reply(("Two.",)), Reply(("Three.",))]
    assert chat(monkeypatch, "First?", "Second?", "/new", "Third?", "/quit", "never sent") == 0
    assert capsys.readouterr().out == "One.\nTwo.\nThree.\n"
    assert [server.contents(i) for i in range(3)] == [["First?"], ["First?", "One.", "Second?"], ["Third?"]]


def test_chat_goes_on_after_a_refusal_and_leaves_that_question_out(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.replies = [Reply(status=503, error={"message": "busy"}), Reply(("Yes.",))]
    assert chat(monkeypatch, "First?", "Second?") == 0
    assert server.contents(1) == ["Second?"]


def test_chat_remembers_the_part_of_an_answer_that_was_printed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.replies = [Reply(("Half",), finish=None, error={"message": "engine lost"}), Reply(("Yes.",))]
    assert chat(monkeypatch, "First?", "Second?") == 0
    assert server.contents(1) == ["First?", "Half", "Second?"]


def test_chat_forgets_the_oldest_turns_when_the_conversation_no_longer_fits(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [Reply((f"{n}.",)) for n in range(3)]
    server.replies = [*answers, Reply(status=400, error=TOO_LONG), Reply(("last.",))]
    assert chat(monkeypatch, "a?", "b?", "c?", "d?") == 0
    assert server.contents(4) == ["c?", "2.", "d?"]
    printed = capsys.readouterr()
    assert printed.out.endswith("last.\n")
    assert "forgot the oldest 2 turns" in printed.err


def test_chat_gives_up_on_a_question_that_does_not_fit_by_itself(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.replies = [Reply(status=400, error=TOO_LONG)]
    assert chat(monkeypatch, "very long?") == 0
    assert "maximum context length is 64" in capsys.readouterr().err


def test_chat_changes_the_model_only_to_one_that_is_there(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.replies = [Reply(("Yes.",)), Reply(("Yes.",))]
    assert chat(monkeypatch, "/model tiny", "First?", "/model large", "Second?") == 0
    assert [request["model"] for request in server.requests] == ["small", "large"]
    assert "no model 'tiny'" in capsys.readouterr().err


@pytest.mark.timeout(60)
def test_ctrl_c_stops_the_answer_frees_the_server_and_keeps_the_session(server: Server) -> None:
    server.replies = [Reply(("Half",), hold=True), Reply(("Yes.",))]
    command = [sys.executable, "-m", "clients.cli", "chat"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(b"First?\n")
        assert process.stdout.read(4) == b"Half"
        process.send_signal(signal.SIGINT)
        assert server.client_left.wait(30)
        process.stdin.write(b"Second?\n")
        process.stdin.close()
        assert process.stdout.read() == b"\nYes.\n"
    assert process.returncode == 0
    assert server.contents(1) == ["First?", "Half", "Second?"]


def test_an_address_that_is_none_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert medassist("ask", "What?", "--base-url", "localhost:8000/v1") == 2
    printed = capsys.readouterr().err
    assert "--base-url" in printed
    assert printed.count("\n") == 1


def test_a_wrong_setting_of_a_recipe_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert medassist("train", "--out", str(tmp_path / "run"), "--set", "train.stepz=1") == 2
    printed = capsys.readouterr().err
    assert "train.stepz" in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["dmeo"], "'dmeo'"),
        (["--set", "stepz=1"], "stepz"),
        (["--set", "steps"], "key=value"),
        (["--data", "/nowhere"], "data.path: /nowhere"),
        (["--resume", "/nowhere/step-00000001"], "--resume: /nowhere/step-00000001"),
    ],
)
def test_what_training_cannot_start_from_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    assert medassist("train", "--out", str(tmp_path / "run"), *arguments) == 2
    printed = capsys.readouterr().err
    assert named in printed
    assert printed.count("\n") == 1


def test_the_help_of_training_lists_every_field_and_loads_no_torch() -> None:
    code = (
        "import sys; from clients.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit as e: assert not e.code\n"
        "print('LOADED', {'torch', 'vllm', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("LOADED set()\n"), done.stderr
    assert all(field in done.stdout for field in ("train.steps", "optimizer.lr", "watch.prompts", "generation.top_p"))


def test_training_without_its_extra_says_which_to_install(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.modules['torch'] = None; from clients.cli import main; main(['train', '--out', '{tmp_path}'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "medassist: this needs torch: pip install 'medassist[train]'\n"


def test_the_help_loads_none_of_the_heavy_packages() -> None:
    code = (
        "import sys; from clients.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as e: assert not e.code\n"
        "print('LOADED', {'torch', 'vllm', 'transformers', 'openai', 'fastapi'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("LOADED set()\n"), done.stderr
