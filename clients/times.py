"""Times and durations as people write them on a command line."""

import re
import time
from datetime import UTC, date, datetime

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
DURATION = "a number with a unit, such as 30m, 24h, 90d or 2w"


def parse_duration(text: str, option: str) -> int:
    """Seconds.

    Args:
        option: for the message.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"(\d{1,9})([smhdw])", text.strip())
    if not found:
        raise ValueError(f"{option} must be {DURATION}, got {text!r}")
    return int(found[1]) * _UNITS[found[2]]


def parse_time(text: str, option: str) -> int:
    """Seconds since the epoch: of a duration from now on, the beginning of a day in UTC, or a time, in UTC unless it
    says otherwise.

    Raises:
        ValueError: it is none.
    """
    if re.fullmatch(r"\d+[a-z]", text.strip()):
        return int(time.time()) + parse_duration(text, option)
    try:
        at = datetime.fromisoformat(text.strip())
    except ValueError:
        raise ValueError(f"{option} must be a date such as 2027-01-31, or {DURATION}, got {text!r}") from None
    return int((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp())


def parse_day(text: str, option: str) -> date:
    """Raises ValueError where it is none."""
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{option} must be a day such as 2026-11-30, got {text!r}") from None


def parse_month(text: str, option: str) -> tuple[date, date]:
    """Its first and last day. Raises ValueError where it is none."""
    try:
        first = date.fromisoformat(f"{text}-01")
    except ValueError:
        raise ValueError(f"{option} must be a month such as 2026-11, got {text!r}") from None
    after = date(first.year + first.month // 12, first.month % 12 + 1, 1)
    return first, date.fromordinal(after.toordinal() - 1)


def show_time(seconds: int | None, never: str = "never") -> str:
    """In UTC, to the minute."""
    return never if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))
