"""The `medassist` command against the real server, each as a process of its own."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.e2e.server import Server

pytestmark = pytest.mark.engine

QUESTION = "What are the symptoms of diabetes?"


@pytest.fixture
def environment(server: Server) -> dict[str, str]:
    ours = {"MEDASSIST_BASE_URL": server.base_url, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    return os.environ | ours


def medassist(environment: dict[str, str], *arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "clients.cli", *arguments]
    return subprocess.run(command, input=typed, env=environment, capture_output=True, text=True, timeout=120)


def test_ask_prints_an_answer(environment: dict[str, str]) -> None:
    done = medassist(environment, "ask", QUESTION, "--temperature", "0")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 3
    assert done.stderr == ""


def test_ask_gives_a_question_from_a_pipe_the_same_answer(environment: dict[str, str]) -> None:
    given = medassist(environment, "ask", QUESTION, "--temperature", "0")
    piped = medassist(environment, "ask", "--temperature", "0", typed=f"{QUESTION}\n")
    assert piped.returncode == 0, piped.stderr
    assert piped.stdout == given.stdout


def test_ask_for_an_unknown_model_lists_those_there_are(environment: dict[str, str], server: Server) -> None:
    done = medassist(environment, "ask", QUESTION, "--model", "no-such-model")
    assert done.returncode == 1
    assert done.stdout == ""
    assert server.model in done.stderr


def test_ask_for_more_than_the_model_holds_tells_its_limit(environment: dict[str, str]) -> None:
    done = medassist(environment, "ask", "-", typed="fever " * 5000)
    assert done.returncode == 1
    assert "maximum context length" in done.stderr


def test_chat_answers_the_turns_of_a_pipe(environment: dict[str, str]) -> None:
    done = medassist(environment, "chat", "--temperature", "0", typed=f"{QUESTION}\nhow is it treated\n/quit\n")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip().splitlines()) >= 2
    assert "not medical advice" in done.stderr


def test_chat_goes_on_when_the_conversation_outgrows_the_model(environment: dict[str, str]) -> None:
    done = medassist(environment, "chat", "--max-tokens", "20", typed=("fever " * 300 + "\n") * 8)
    assert done.returncode == 0
    assert "forgot the oldest" in done.stderr
    assert "medassist:" not in done.stderr


# prompt_toolkit has the terminal bracket what is pasted into a prompt, from the prompt's start to its end.
PROMPT, ANSWER = "\x1b[?2004h", "\x1b[?2004l"


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.shown = ""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execve(command[0], command, environment)

    def type(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def read_until(self, pattern: str) -> str:
        """What was shown since the last call, up to the end of the regular expression."""
        deadline = time.monotonic() + 60
        while not (found := re.search(pattern, self.shown, re.DOTALL)):
            ready, _, _ = select.select([self.fd], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{pattern!r} did not show; there is {self.shown!r}"
            self.shown += os.read(self.fd, 65536).decode(errors="replace")
        shown, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return shown

    def wait(self) -> int:
        """Waits for the command to end, and returns its exit code."""
        deadline = time.monotonic() + 30
        while (ended := os.waitpid(self.pid, os.WNOHANG)) == (0, 0):
            assert time.monotonic() < deadline, "the command did not end"
            time.sleep(0.05)
        self.pid = 0
        return os.waitstatus_to_exitcode(ended[1])

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)


def open_chat(environment: dict[str, str]) -> Terminal:
    # At this temperature answers ramble: there is time to stop one.
    return Terminal([sys.executable, "-m", "clients.cli", "chat", "--temperature", "2"], environment)


@pytest.fixture
def chat(environment: dict[str, str]) -> Iterator[Terminal]:
    terminal = open_chat(environment)
    yield terminal
    terminal.close()


def test_ctrl_c_stops_an_answer_and_the_next_question_is_answered(environment: dict[str, str]) -> None:
    for _ in range(8):  # an answer can be over before the key is pressed
        chat = open_chat(environment)
        try:
            chat.read_until(re.escape(PROMPT))
            chat.type(f"{QUESTION}\r")
            chat.read_until(re.escape(ANSWER) + r"\w+")
            chat.type("\x03")
            if "(stopped)" not in chat.read_until(re.escape(PROMPT)):
                continue
            chat.type("how is it treated\r")
            chat.read_until(re.escape(ANSWER))
            assert re.search(r"\w{2}", chat.read_until(re.escape(PROMPT)))
            chat.type("/quit\r")
            assert chat.wait() == 0
            return
        finally:
            chat.close()
    raise AssertionError("Ctrl-C stopped no answer")


@pytest.mark.parametrize("key", ["\x03", "\x04"])
def test_ctrl_c_and_ctrl_d_at_the_prompt_leave(chat: Terminal, key: str) -> None:
    chat.read_until(re.escape(PROMPT))
    chat.type(key)
    assert chat.wait() == 0
