"""Questions from the terminal to an OpenAI-compatible server: :func:`ask` one, or :func:`chat` in turns.

Standard output gets the answers and nothing else, so that they can be piped; notices and errors go to standard error.
"""

import contextlib
import re
import signal
import sys
import threading
from collections.abc import Callable, Generator
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import openai
import typer

NOTICE = "A small demo model, not medical advice. In an emergency, call your local emergency services."
COMMANDS = """\
/new          start a new conversation
/models       list the server's models
/model NAME   ask another model
/help         this list
/quit         leave (also Ctrl-C or Ctrl-D); Ctrl-C while an answer comes stops that answer"""

Message = dict[str, str]


class NoAnswer(Exception):
    """The server gave no answer, or not all of it; the message is for the person at the terminal."""


class TooLong(NoAnswer):
    """The conversation does not fit the model."""


def printable(text: str) -> str:
    """Without control characters: an answer has no business moving the cursor or setting a window's title."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)


def connect(base_url: str, api_key: str | None) -> openai.OpenAI:
    """A client that reports errors at once instead of retrying in silence.

    Raises:
        ValueError: ``base_url`` is not an http(s) address.
    """
    try:
        url = urlsplit(base_url)
        valid = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(f"--base-url must look like http://127.0.0.1:8000/v1, got {base_url!r}")
    # A proxy named in the environment cannot reach this machine's loopback.
    local = url.hostname in ("localhost", "127.0.0.1", "::1")
    http_client = openai.DefaultHttpxClient(trust_env=False) if local else None
    return openai.OpenAI(base_url=base_url, api_key=api_key or "none", max_retries=0, http_client=http_client)


class Assistant:
    """A model of a server.

    Args:
        base_url: of the API, such as ``http://127.0.0.1:8000/v1``.
        api_key: None where the server wants none.
        model: the server's first if None.
        sampling: parameters of the request such as ``temperature``; those that are None are the server's to choose.

    Raises:
        ValueError: ``base_url`` is not an http(s) address.
    """

    def __init__(self, base_url: str, api_key: str | None, model: str | None, **sampling: float | None) -> None:
        self.client = connect(base_url, api_key)
        self.base_url = base_url
        self.sampling: dict[str, Any] = {name: value for name, value in sampling.items() if value is not None}
        self.finish_reason: str | None = None  # of the last answer; None if it was not finished
        if model:
            self.model = model

    @cached_property
    def model(self) -> str:
        return self.models()[0]

    def models(self) -> list[str]:
        """Names of the server's models, at least one.

        Raises:
            NoAnswer: the server does not list any.
        """
        try:
            names = [model.id for model in self.client.models.list()]
        except openai.NotFoundError:
            raise NoAnswer(f"{self.base_url} is not an OpenAI API: should --base-url end in /v1?") from None
        except openai.APIError as e:
            raise self._explained(e) from e
        if not names:
            raise NoAnswer(f"{self.base_url} serves no model")
        return names

    def answer(self, messages: list[Message]) -> Generator[str]:
        """The answer's text as it comes. Closing the generator closes the connection, which frees the server's work.

        Raises:
            TooLong: the messages do not fit the model.
            NoAnswer: the server refused, or the answer broke off.
        """
        self.finish_reason = None
        try:
            request: dict[str, Any] = {"model": self.model, "messages": messages, **self.sampling}
            stream = self.client.chat.completions.create(stream=True, **request)
        except openai.APIError as e:
            raise self._explained(e) from e
        with stream:
            try:
                for chunk in stream:
                    for choice in chunk.choices:
                        self.finish_reason = choice.finish_reason or self.finish_reason
                        if choice.delta.content:
                            yield printable(choice.delta.content)
            except Exception as e:  # not only openai's: version 2 lets those of its transport through
                lost = not isinstance(e, openai.APIError) or isinstance(e, openai.APIConnectionError)
                reason = "the connection to the server was lost" if lost else _message(e)
                raise NoAnswer(f"the answer was cut off: {reason}") from e
        if self.finish_reason is None:
            raise NoAnswer("the answer was cut off: the server closed the connection")

    def _explained(self, error: openai.APIError) -> NoAnswer:
        """The error, with what to do about it."""
        if isinstance(error, openai.APITimeoutError):
            return NoAnswer(f"{self.base_url} did not answer in time")
        if isinstance(error, openai.APIConnectionError):
            return NoAnswer(f"nothing answers at {self.base_url}: start `medassist serve`, or set --base-url")
        message = _message(error)
        if not isinstance(error, openai.APIStatusError):
            return NoAnswer(f"{self.base_url} did not answer in OpenAI's format: {message}")
        if error.status_code == 404:
            return NoAnswer(f"{self.base_url} has no model {self.model!r}; it has {', '.join(self.models())}")
        if error.status_code == 401:
            return NoAnswer(f"{message} (set --api-key or MEDASSIST_API_KEY)")
        if error.status_code in (429, 503):
            seconds = error.response.headers.get("retry-after", "")
            return NoAnswer(f"{message}; try again in {f'{seconds} s' if seconds.isdecimal() else 'a moment'}")
        if error.code == "context_length_exceeded" or "context length" in message:
            return TooLong(message)
        return NoAnswer(f"the server refused ({error.status_code}): {message}")


class Conversation:
    """Questions and answers so far, sent with each new question."""

    def __init__(self, assistant: Assistant) -> None:
        self.assistant = assistant
        self.turns: list[tuple[str, str]] = []

    def ask(self, question: str) -> None:
        """Prints the answer as it comes. What was printed is remembered, even if the answer was not finished.

        Raises:
            NoAnswer: the server refused, or the answer broke off.
        """
        said: list[str] = []
        try:
            while True:
                try:
                    return _print_answer(self.assistant, self._messages(question), said)
                except TooLong:
                    if not self.turns:
                        raise
                    forgotten = (len(self.turns) + 1) // 2
                    del self.turns[:forgotten]
                    turns = "turn" if forgotten == 1 else f"{forgotten} turns"
                    _note(f"(the conversation no longer fits the model: forgot the oldest {turns})")
        finally:
            if said:
                self.turns.append((question, "".join(said)))

    def _messages(self, question: str) -> list[Message]:
        messages = []
        for asked, answered in self.turns:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        return [*messages, {"role": "user", "content": question}]


def ask(assistant: Assistant, question: str) -> int:
    """Prints the answer to one question as it comes. Returns the exit code."""
    try:
        _print_answer(assistant, [{"role": "user", "content": question}], [])
    except NoAnswer as e:
        _fail(e)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def chat(assistant: Assistant) -> int:
    """Converses until the person leaves. Returns the exit code."""
    try:
        _note(f"{assistant.model} at {assistant.base_url}; /help lists the commands\n{NOTICE}")
    except NoAnswer as e:
        _fail(e)
        return 1
    if threading.current_thread() is threading.main_thread():
        # Started in the background by a script, a program is told to ignore Ctrl-C; here it has a meaning.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    conversation = Conversation(assistant)
    read = _reader()
    while True:
        try:
            line = read().strip()
        except (EOFError, KeyboardInterrupt):
            return 0
        if line == "/quit":
            return 0
        try:
            if line.startswith("/"):
                _command(line, conversation)
            elif line:
                conversation.ask(line)
        except KeyboardInterrupt:
            _note("(stopped)")
        except NoAnswer as e:
            _fail(e)


def _command(line: str, conversation: Conversation) -> None:
    assistant = conversation.assistant
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    if name == "/new":
        conversation.turns.clear()
        _note("(a new conversation)")
    elif name == "/models":
        _note("\n".join(f"{'*' if model == assistant.model else ' '} {model}" for model in assistant.models()))
    elif name == "/model" and argument:
        if argument not in (models := assistant.models()):
            raise NoAnswer(f"there is no model {argument!r}; there are {', '.join(models)}")
        assistant.model = argument
        _note(f"(now asking {argument})")
    else:
        _note(COMMANDS)


def _reader() -> Callable[[], str]:
    """Reads one line: with editing and recall at a terminal, plainly from a pipe."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return input
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession()  # remembers in memory only
    return lambda: session.prompt("\n> ")


def _print_answer(assistant: Assistant, messages: list[Message], said: list[str]) -> None:
    """Prints an answer as it comes, and collects in ``said`` what was printed, also when it raises."""
    with contextlib.closing(assistant.answer(messages)) as pieces:
        try:
            for piece in pieces:
                said.append(piece)
                print(piece, end="", flush=True)
        finally:
            if said:
                print(flush=True)
    if not said:
        _note("(the answer is empty)")
    if assistant.finish_reason == "length":
        _note("(stopped at the limit of length: --max-tokens, or what the model can hold)")


def _message(error: Exception) -> str:
    """The server's own words, where it gave any."""
    body = getattr(error, "body", None)
    message = body.get("message") if isinstance(body, dict) else None
    return str(message or error)


def _note(text: str) -> None:
    typer.secho(text, err=True, dim=True)


def _fail(error: Exception) -> None:
    typer.secho(f"medassist: {error}", err=True, fg="red")
