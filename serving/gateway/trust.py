"""What a replica's canaries have shown so far: whether its numbers can be trusted, and whether it answers at all."""

import math
from dataclasses import replace

from serving.gateway.canary import Verdict

RECHECK = 10.0  # seconds until an engine whose canary got no answer is asked again
REPEAT = 2.0  # the same, for an answer that may have been an accident
LATE = 2  # canaries in a row without an answer, to them or to a request, after which an engine hangs


class Trust:
    """See the module. Times are the loop's, in seconds.

    Attributes:
        given: as much as a canary can show was shown, since the engine was last gone.
        refusal: why its numbers are wrong; "": as far as is known they are not.
        hangs: why it is taken to hang, though its health looks well; "": it is not.
        turn: of the next canary; a fingerprint's last probe is its longest, which tells most.
        due_at: when the next canary is to be sent.
        asked_at: when the last one was.
        answered_at: when a request last had an answer.
    """

    def __init__(self) -> None:
        self.given, self.refusal, self.hangs = False, "", ""
        self.turn, self.due_at, self.asked_at = -1, 0.0, 0.0
        self.answered_at = -math.inf
        self._left_at = -math.inf  # when a client left that had waited long in vain
        self._compared = False  # its answers could be compared, so they always should be
        self._doubts = 0  # doubtful answers in a row
        self._late_since: list[float] = []  # when those were asked that got no answer, in a row
        self._drops = 0  # of the baseline, when it was last compared with it

    def switch_off(self) -> None:
        """There are no canaries."""
        self.given, self.refusal, self.hangs = True, "", ""

    def restarted(self) -> None:
        """It may be another process now. What was refused has to show more than that it cannot be asked."""
        self.given, self.hangs = False, ""
        self._compared = bool(self.refusal)
        self._late_since, self._doubts = [], 0

    def vouch(self, until: float) -> None:
        """Someone else has compared it just now; the next canary is to be sent then."""
        self.given, self.due_at = True, until

    def hurry(self, at: float) -> None:
        """The next canary is to be sent no later."""
        self.due_at = min(self.due_at, at)

    def unanswered(self, seconds: float, now: float) -> None:
        """A client left after so long without a byte; tells something if nobody had an answer meanwhile."""
        if seconds >= RECHECK and self.answered_at < now - seconds:
            self._left_at = now

    def due(self, now: float, drops: int) -> bool:
        """Whether a canary is to be sent.

        Args:
            drops: how often numbers were forgotten that it was to agree with.
        """
        if not self.given or now >= self.due_at:
            return True
        if self.refusal and drops != self._drops:
            return True
        return not self._late_since and self._left_at > max(self.answered_at, self.asked_at)

    def asked(self, now: float, drops: int) -> None:
        """A canary is sent."""
        self.asked_at, self._drops = now, drops

    def conclude(self, verdict: Verdict, now: float, interval: float) -> Verdict:
        """Takes note of what a canary has found, and returns what that means, knowing those before.

        Args:
            interval: seconds between canaries.
        """
        self._note_lateness(verdict.late)
        if verdict.outcome == "unsupported" and self._compared:
            verdict = Verdict("deviates", f"its answers can no longer be checked ({verdict.reason})", doubtful=True)
        self._doubts = self._doubts + 1 if verdict.doubtful else 0
        if self._doubts == 1:  # once may be an accident
            verdict = replace(verdict, outcome="failed")
        if verdict.outcome == "deviates":
            self.refusal, self.given, self._compared = verdict.reason, True, True
        elif verdict.outcome == "failed":
            # A busy engine is none that computes garbage. One that was refused stays so.
            interval = min(interval, REPEAT if verdict.doubtful else RECHECK)
            self.given = self.given or not verdict.doubtful
        else:
            self.refusal, self.given = "", True
            self.turn += 1  # not before: what it failed at is what it has to show
            self._compared = verdict.outcome == "ok"
        self.due_at = now + interval
        return verdict

    def _note_lateness(self, late: bool) -> None:
        """An engine that answers neither canaries nor requests hangs, however well it says that it is."""
        if not late:
            self._late_since, self.hangs = [], ""
            return
        self._late_since.append(self.asked_at)
        if self.answered_at > self._late_since[0]:
            self._late_since = []
        elif len(self._late_since) >= LATE:
            self.hangs = "answers neither requests nor canaries"
