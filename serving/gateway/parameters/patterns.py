"""Regular expressions within a JSON schema, which engines turn into automata: small ones only."""

import re
import warnings

from serving.gateway.parameters.refusals import wrong

MAX_LENGTH = 256  # characters
MAX_REPEATS = 1000  # product of counted repetitions within each other
MAX_ATOMS = 5000  # characters and classes, counted repetitions written out
MAX_WIDE = 8  # classes with characters beyond Latin-1
WIDE_CLASS = 1024  # cost of each
EACH = 16  # any pattern
_WIDE = re.compile(r"[^\x00-\xff]|\\[uUN]")
_COUNT = re.compile(r"\{(\d{1,9})(,(\d{0,9}))?\}")


class _Group:
    """What lies between two parentheses.

    Attributes:
        atoms: after writing out repetitions.
        last: of those, what a quantifier that comes next repeats.
        product: the largest product of counted repetitions in it.
        unbounded: holds a repetition without end; ``last_product`` and ``last_unbounded`` are the last atom's.
    """

    def __init__(self) -> None:
        self.atoms, self.last, self.product, self.last_product = 0, 0, 1, 1
        self.unbounded = self.last_unbounded = False

    def add(self, atoms: int, product: int = 1, unbounded: bool = False) -> None:
        self.atoms += atoms
        self.last, self.last_product, self.last_unbounded = atoms, product, unbounded
        self.product, self.unbounded = max(self.product, product), self.unbounded or unbounded


def check_pattern(pattern: object, param: str) -> None:
    """Refuses patterns that can blow up: repetition without end within another, large counted repetition,
    backreferences, look-around; and those that are malformed. Python's dialect.

    Raises:
        ApiError: 400, with ``param``.
    """
    if reason := problem(pattern):
        raise wrong(param, reason, "invalid_schema")


def problem(pattern: object) -> str | None:
    """Why a pattern is refused, as it follows the field's name; None: it is not."""
    if not isinstance(pattern, str):
        return "must be a string with a regular expression"
    if len(pattern) > MAX_LENGTH:
        return f"must have at most {MAX_LENGTH} characters"
    if pattern.count("[") > MAX_WIDE and cost(pattern) > MAX_WIDE * WIDE_CLASS + EACH + len(pattern):
        return f"must have at most {MAX_WIDE} classes of characters beyond Latin-1"
    if reason := _danger(pattern):
        return f"is a regular expression with {reason}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return "is not a valid regular expression"
    return None


def cost(pattern: str) -> int:
    """What compiling takes, in characters of some 2 µs. A class beyond Latin-1 takes two milliseconds in Python."""
    if "[" not in pattern or not _WIDE.search(pattern):
        return EACH + len(pattern)
    wide, i = 0, 0
    while i < len(pattern):
        if pattern[i] == "[":
            end = _class_end(pattern, i)
            wide += _WIDE.search(pattern, i, end) is not None
            i = end
        else:
            i += 2 if pattern[i] == "\\" else 1
    return EACH + len(pattern) + wide * WIDE_CLASS


def _danger(pattern: str) -> str | None:
    groups, i = [_Group()], 0
    while i < len(pattern):
        char, group = pattern[i], groups[-1]
        if char == "\\":
            if pattern[i + 1 : i + 2] in tuple("123456789kg"):
                return "a backreference"
            group.add(1)
            i += 2
        elif char == "[":
            i = _class_end(pattern, i)
            group.add(1)
        elif char == "(":
            if pattern.startswith("(?", i) and not pattern.startswith("(?:", i):
                return "look-around, flags or a named group"
            groups.append(_Group())
            i += 3 if pattern.startswith("(?:", i) else 1
        elif char == ")":
            if len(groups) == 1:
                return "a parenthesis that was not opened"
            groups.pop()
            groups[-1].add(group.atoms, group.product, group.unbounded)
            i += 1
        elif char in "*+?{":
            end, most = _quantifier(pattern, i)
            if most is None:
                if group.last_unbounded:
                    return "a repetition without end within another"
                group.unbounded = group.last_unbounded = True
            elif most > 1:
                group.atoms += group.last * (most - 1)
                group.last *= most
                group.last_product *= most
                group.product = max(group.product, group.last_product)
                if group.product > MAX_REPEATS:
                    return f"more than {MAX_REPEATS} repetitions"
            i = end
        else:
            group.add(1)
            i += 1
        if groups[-1].atoms > MAX_ATOMS:
            return f"more than {MAX_ATOMS} characters when its repetitions are written out"
    return None


def _class_end(pattern: str, start: int) -> int:
    """Where the character class that opens at ``start`` has ended."""
    i = start + 1
    i += pattern.startswith("^", i)
    i += pattern.startswith("]", i)  # first, it stands for itself
    while i < len(pattern) and pattern[i] != "]":
        i += 2 if pattern[i] == "\\" else 1
    return i + 1


def _quantifier(pattern: str, start: int) -> tuple[int, int | None]:
    """Where it has ended, with a "?" or "+" that makes it lazy or possessive, and how often it repeats at most; None:
    without end."""
    most: int | None = None if pattern[start] in "*+" else 1
    end = start + 1
    if pattern[start] == "{" and (found := _COUNT.match(pattern, start)):
        end = found.end()
        low, comma, high = found.groups()
        # A lower bound is written out even where there is no upper one.
        most = int(high) if high else int(low) if not comma or int(low) > MAX_REPEATS else None
    return end + pattern.startswith(("?", "+"), end), most
