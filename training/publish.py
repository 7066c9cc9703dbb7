"""Uploads a checkpoint directory to the Hugging Face Hub, beside the run and never at its expense."""

import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ATTEMPTS = 8
FIRST_WAIT = 2.0  # seconds; doubled after each attempt, so the last comes after four minutes
LONGEST_WAIT = 120.0
# Answers that another attempt may change; of the others, a mistake of ours or of the user's, none will.
PASSING = (408, 425, 429, 500, 502, 503, 504)


class Outcome(NamedTuple):
    """``text`` says where the upload is, or why not and how to try again."""

    done: bool
    text: str


class Upload:
    """One upload, in a thread of its own that begins at once. All files come in one commit, or none.

    The token is read from ``HF_TOKEN`` and written nowhere. Another hub than huggingface.co is chosen by
    ``HF_ENDPOINT``.

    Args:
        directory: a checkpoint directory.
        repo: ``OWNER/NAME``; created if it is not there.
        private: whether a created repository is private.
        say: told of each attempt that fails.
        attempts, first_wait: how often it is tried, and the seconds before the second attempt; doubled each time.
    """

    def __init__(
        self,
        directory: Path,
        repo: str,
        private: bool = True,
        say: Callable[[str], None] = lambda text: None,
        attempts: int = ATTEMPTS,
        first_wait: float = FIRST_WAIT,
    ) -> None:
        self.directory, self.repo, self.private = directory, repo, private
        self._say, self._attempts, self._first_wait = say, attempts, first_wait
        self._given_up = threading.Event()
        self._outcome: Outcome | None = None
        self._thread = threading.Thread(target=self._run, name="upload", daemon=True)
        self._thread.start()

    def finish(self, seconds: float = 900.0) -> Outcome:
        """Waits for the end, for so many seconds at most; Ctrl-C ends the waiting and the upload."""
        reason = f"it has not ended after {seconds:.0f} seconds"
        try:
            self._thread.join(seconds)
        except KeyboardInterrupt:
            reason = "interrupted"
        if self._outcome is None:
            self._given_up.set()
            return self._failed(reason)
        return self._outcome

    def _run(self) -> None:
        try:
            self._outcome = self._try_again_and_again()
        except BaseException as error:  # whatever it is, it is the upload's and not the run's
            self._outcome = self._failed(self._told(error))

    def _try_again_and_again(self) -> Outcome:
        token = os.environ.get("HF_TOKEN")
        if not token:
            return self._failed("there is no token: set HF_TOKEN to one that may write to it")
        wait = self._first_wait
        for attempt in range(1, self._attempts + 1):
            try:
                return Outcome(True, f"uploaded to {self._send(token)}")
            except Exception as error:
                reason = self._told(error)
                if not _passes(error):
                    return self._failed(reason)
            if attempt < self._attempts:
                self._say(f"upload to {self.repo} failed ({reason}); trying again in {wait:.0f} s")
                if self._given_up.wait(wait):
                    break
                wait = min(2 * wait, LONGEST_WAIT)
        return self._failed(f"{self._attempts} attempts failed, the last because: {reason}")

    def _send(self, token: str) -> str:
        """One attempt; returns the address of the repository."""
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # the terminal is the run's
        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
        url = api.create_repo(self.repo, private=self.private, exist_ok=True)
        api.upload_folder(
            repo_id=self.repo,
            folder_path=self.directory,
            commit_message=f"Upload of {self.directory.name}",
            ignore_patterns=["*.partial", ".*"],
        )
        return str(url)

    def _failed(self, reason: str) -> Outcome:
        folder = self.directory.parent if self.directory.name == "final" else self.directory
        return Outcome(
            False, f"not uploaded to {self.repo}: {reason}. To try again: medassist upload {folder} --repo {self.repo}"
        )

    def _told(self, error: BaseException) -> str:
        """An error in one line, without the token and without what the client adds about its own ways."""
        status = _status(error)
        if status in (401, 403):
            return f"the hub answers with status {status}: HF_TOKEN is no token, or one that may not write to it"
        text = re.sub(r"\s+", " ", str(error)).strip()[:300]
        token = os.environ.get("HF_TOKEN")
        text = (text.replace(token, "[hidden]") if token else text).rstrip(". :")
        return f"the hub answers with status {status} ({text})" if status else f"{type(error).__name__}: {text}"


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _passes(error: Exception) -> bool:
    """Whether another attempt may succeed."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return _status(error) in PASSING
    # The rest of what its HTTP client raises is about connections; so is an OSError that is not about a file.
    connection: type[Exception] = HfHubHTTPError.__bases__[0]
    if isinstance(error, OfflineModeIsEnabled | HFValidationError | FileNotFoundError | PermissionError):
        return False
    return isinstance(error, connection | OSError | TimeoutError)


def checkpoint_of(path: Path) -> Path:
    """The checkpoint directory of a run's directory, or the directory itself if it is one.

    Raises:
        ValueError: it is neither.
    """
    for directory in (path / "final", path):
        if (directory / "config.json").exists():
            return directory
    raise ValueError(f"{path} is no finished run and no checkpoint directory: it has neither final/ nor config.json")
