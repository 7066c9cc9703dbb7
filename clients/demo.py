"""The demo (``make demo``): serves a model, asks it three questions, and stops it again.

    python -m clients.demo [CHECKPOINT]          the shipped model if none is named

The server is the real one, ``medassist serve`` in a child process; its progress lines are the demo's.
"""

import contextlib
import http.client
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

import openai
import typer

from clients.terminal import NOTICE, connect, printable
from loadtest.gateway.processes import free_port

QUESTIONS = (
    "What are the signs of a stroke?",
    "How is asthma treated?",
    "What can I do at home against heartburn?",
)
START_SECONDS = 180.0
STOP_SECONDS = 45.0  # above the 30 s that the server gives running requests

GO_ON = """\
How to go on
  make serve                                serves on http://127.0.0.1:8000/v1; then, in another terminal:
  COMMAND ask "What is asthma?"
  COMMAND chat
  docs/architecture.md                      how it works

  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "MODEL", "messages": [{"role": "user", "content": "What is asthma?"}]}'

  from openai import OpenAI
  client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
  question = {"role": "user", "content": "What is asthma?"}
  answer = client.chat.completions.create(model="MODEL", messages=[question])
  print(answer.choices[0].message.content)"""


class Failed(Exception):
    """The demo cannot go on; the message is for the person at the terminal."""


def demonstrate(arguments: list[str]) -> None:
    """Serves (``arguments`` go to ``medassist serve``), asks, and stops the server.

    Raises:
        Failed: the server did not come up.
        openai.APIError: it did not answer.
    """
    began = time.perf_counter()
    port = free_port()
    typer.secho("Starting the server", bold=True)
    with _server([*arguments, "--port", str(port)]) as server:
        _wait_until_ready(server, port, began + START_SECONDS)
        client = connect(f"http://127.0.0.1:{port}/v1", os.environ.get("MEDASSIST_API_KEY"))
        model = client.models.list().data[0].id
        typer.secho(f"\n{NOTICE}", dim=True)
        answered = [_ask(client, model, question) for question in QUESTIONS]
        typer.secho(f"\n{answered[0] - began:.1f} s from the start to the first answer\n", bold=True)
        command = os.path.relpath(os.path.join(sys.prefix, "bin/medassist"))
        typer.echo(GO_ON.replace("MODEL", model).replace("COMMAND", command) + "\n")


def _ask(client: openai.OpenAI, model: str, question: str) -> float:
    """Prints the question, the answer as it comes, and how fast it came. Returns when its first token came."""
    typer.secho(f"\n{question}", bold=True)
    asked = time.perf_counter()
    times: list[float] = []
    tokens = 0
    with client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        for chunk in stream:
            if chunk.usage:
                tokens = chunk.usage.completion_tokens
            if chunk.choices and chunk.choices[0].delta.content:
                times.append(time.perf_counter())
                typer.echo(printable(chunk.choices[0].delta.content), nl=False)
    if not times:
        raise Failed("the model gave an empty answer")
    took = times[-1] - times[0]
    speed = f"{(tokens - 1) / took:.0f} tokens/s " if took else ""
    typer.secho(f"\ntime to first token {times[0] - asked:.2f} s, {speed}({tokens} tokens)", dim=True)
    return times[0]


@contextlib.contextmanager
def _server(arguments: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """``medassist serve`` while the context lasts."""
    command = [sys.executable, "-m", "clients.cli", "serve", *arguments]
    # In a session of its own: Ctrl-C at the terminal is for the demo, which then stops the server once.
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        yield server
    finally:
        server.terminate()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(STOP_SECONDS)
        finally:  # also after a second Ctrl-C
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def _wait_until_ready(server: subprocess.Popen[bytes], port: int, deadline: float) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxy is set
    while time.perf_counter() < deadline:
        if server.poll() is not None:
            raise Failed(f"the server ended with exit code {server.returncode} before it was ready; see above for why")
        with (
            contextlib.suppress(OSError, http.client.HTTPException),
            direct.open(f"http://127.0.0.1:{port}/ready", timeout=5),
        ):
            return
        time.sleep(0.1)
    raise Failed(f"the server was not ready within {START_SECONDS:.0f} s")


def main() -> int:
    """Runs the demo with the command line's arguments. Returns the exit code."""
    for signum in (signal.SIGTERM, signal.SIGHUP):  # the server is stopped then, too
        signal.signal(signum, signal.default_int_handler)
    try:
        demonstrate(sys.argv[1:])
    except (Failed, openai.APIError) as e:
        typer.secho(f"demo: {e}", err=True, fg="red")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
