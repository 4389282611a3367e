"""The errors that a user sees, each a single line: bad input, and a command that ended early."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

REASON = 200  # characters of what another library says, in a message


class BadInput(ValueError):
    """Input that the program cannot use. Its text is one line, which the command line prints before
    it exits with code 2.
    """


def of_machine(error: BaseException) -> bool:
    """Whether an error is due to the machine's memory or disk, so that another attempt may succeed;
    other errors follow from the input.

    >>> of_machine(MemoryError()), of_machine(ZeroDivisionError())
    (True, False)
    """
    # PyTorch raises errors of its own; on a CPU without memory, a RuntimeError with this name in it
    return (
        isinstance(error, MemoryError | OSError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator" in str(error)
    )


def one_line(said: object, most: int | None = None) -> str:
    """A text without line breaks, of at most so many characters.

    >>> one_line("no such\\n  file"), one_line("no such\\n  file", most=10)
    ('no such file', 'no such...')
    """
    text = " ".join(str(said).split())
    return text if most is None or len(text) <= most else text[: most - 3] + "..."


def reason_of(error: object) -> str:
    """What an error of another library says, in one line of at most `REASON` characters; the name
    of its kind where it says nothing.

    >>> reason_of(ValueError("no such\\n  file")), reason_of(KeyboardInterrupt())
    ('no such file', 'KeyboardInterrupt')
    """
    return one_line(error, REASON) or type(error).__name__


class Stopped(RuntimeError):
    """A command that cannot continue or got a signal, with its last good state saved. The text is
    one line; `exit_code` is the command's.
    """

    def __init__(self, line: str, exit_code: int = 2) -> None:
        super().__init__(line)
        self.exit_code = exit_code


def nearest(name: str, known: Iterable[str], alike: float = 0.5) -> str | None:
    """The known name most similar to `name`, or None if none has the similarity `alike`, from 0 to
    1 (equal).

    >>> nearest("fedspin", ["fedlora", "fedspine"])
    'fedspine'
    """
    matches = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=alike)
    return matches[0] if matches else None


def unknown(what: str, name: str, known: Iterable[str]) -> BadInput:
    """The error for a name that is not one of `known`, with the nearest valid one.

    >>> str(unknown("method", "fedspin", ["fedspine", "fedlora"]))
    "unknown method 'fedspin'; did you mean 'fedspine'? known: fedlora, fedspine"
    """
    known = sorted(known)
    guess = nearest(name, known)
    hint = f"; did you mean {guess!r}?" if guess else ";"
    return BadInput(f"unknown {what} {name!r}{hint} known: {listed(known)}")


MOST = 10  # names that a message lists


def listed(names: Iterable[Any], most: int = MOST) -> str:
    """The first names of a list, and how many more there are.

    >>> listed("abcd", most=2)
    'a, b and 2 more'
    """
    known = [str(name) for name in names]
    shown = ", ".join(known[:most])
    return f"{shown} and {len(known) - most:,} more" if len(known) > most else shown


def check_ranges(
    fields: object, ranges: Mapping[str, tuple[float, float]], where: str = "method"
) -> None:
    """Raise BadInput for a field outside its range (low, high), which includes its ends, or that is
    NaN; `where` names the fields' table.
    """
    for name, (low, high) in ranges.items():
        if not low <= getattr(fields, name) <= high:
            raise BadInput(
                f"{where}.{name} is {getattr(fields, name)}, but {low} to {high} was expected"
            )
