"""Errors that a user can act on, and how they end a command."""

import errno
import json
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# What the operating system refuses: what was expected, and what the user can do.
ROOM = ("room on the disk", "Remove files, or move the project to a larger disk")
WRITABLE = ("a folder that can be written to", "Make it writable (mount options, owner, permissions)")
PERMITTED = ("the permission to use it", "Change its owner or its permissions")
OPEN_FILES = ("to be allowed one open file more", "Raise the limit (`ulimit -n 4096`)")
REFUSED = {
    errno.ENOSPC: ROOM,
    errno.EDQUOT: ROOM,
    errno.EFBIG: ("to be allowed a file of this size", "Raise the limit (`ulimit -f unlimited`), or use another disk"),
    errno.EROFS: WRITABLE,
    errno.EACCES: PERMITTED,
    errno.EPERM: PERMITTED,
    errno.EIO: ("a disk that works", "See what the system says of it (`dmesg`), and move the project to another one"),
    errno.EMFILE: OPEN_FILES,
    errno.ENFILE: OPEN_FILES,
}
# Nobody tries these out, as one tries whether a file may be read: they are the cause of whatever is raised after them.
FULL = (errno.ENOSPC, errno.EDQUOT)
DISK = (*FULL, errno.EFBIG, errno.EROFS, errno.EIO)
# What h5py says in place of an error number, and what NumPy and SQLite say without one.
NUMBER = re.compile(r"errno = (\d+)|\[Errno (\d+)\]")
FULL_DISK = re.compile(r"\d+ requested and \d+ written|Not enough free space to write|database or disk is full")
# TensorFlow's words, known without importing it; the second is what a full GPU comes out as.
NO_MEMORY = re.compile(
    r"\bOOM\b|(?i:out.of.memory|Dst tensor is not initialized|failed to allocate|bad_alloc|cannot allocate memory"
    r"|pthread_create(\(\))? failed)"
)
SMALLER = (
    "End other programs, run fewer cells at once, or make the study's pictures, its batches or this variant smaller"
)
# What Keras and TensorFlow put around an exception's own words; where those of a network of the user's lie.
COLOURS = re.compile(r"\x1b(\[[0-9;]*[A-Za-z]?)?")  # also where a sequence is cut
WRAPPED = re.compile(r"^Exception encountered when calling .*?\n\n(.*?)(?:\n\nArguments received by .*)?\Z", re.DOTALL)
GRAPH = re.compile(
    r'^(Graph execution error:|Detected at node .*|Node: .*| *File ".*", line \d+, in .*|\s*\[\[.*)$\n?', re.M
)
OTHER_CELLS = (
    "\n`dvc repro --keep-going` trains the other cells, `ablab report --partial` reports those that are there. "
    "The report in reports/ stays as it was."
)
NETWORKS = "networks"
LONGEST = 500  # characters of a reason
WRITING = "while writing "  # a note of `files.whole` on an error of the operating system's, with the folder
# What YAML 1.1 reads as a truth value, and YAML 1.2 as a text.
TRUTHS = {"yes": "true", "y": "true", "on": "true", "no": "false", "n": "false", "off": "false"}
KEPT = "What was finished is kept, and the same command goes on from there."


class LabError(Exception):
    """Something the user can put right. The message says what was expected, what was found, where, and what to do.

    Args:
        text: the message, without the place.
        place: the keys of the setting that is wrong, such as `("train", "optimizer", "momentum")`, with the defaults
            that layers inherit pushed down into them. `params.Params.located` finds the line that the user wrote.
    """

    def __init__(self, text: str, place: tuple[str, ...] = ()):
        super().__init__(text, place)
        self.text, self.place = text, place

    def __str__(self) -> str:
        return f"{'.'.join(self.place)}: {self.text}" if self.place else self.text


def shown(value: Any, most: int = 80) -> str:
    """A value in a message: on one line, not longer than `most`, control characters as escapes."""
    try:
        text = json.dumps(value, default=str, skipkeys=True)
    except (ValueError, RecursionError):  # a mapping that contains itself
        text = json.dumps(type(value).__name__)
    return text if len(text) <= most else text[: most - 3] + "..."


def truth_hint(value: Any) -> str:
    """What a message adds where a text of YAML 1.1's truth values is given."""
    meant = TRUTHS.get(value.lower()) if isinstance(value, str) else None
    return f" Write {meant}: in YAML 1.2, {value} is a text." if meant else ""


@contextmanager
def explained(exit_status: int = 1, advice: str = "") -> Iterator[None]:
    """End the process with a message instead of a traceback when the user can do something about what gets here.

    That is a `LabError`, what `explanation` knows, Ctrl-C and SIGTERM. Anything else is a mistake in this program or in
    a network of the user's: its traceback comes first, then its `reason`, and the process returns 1. Enter it before
    slow imports, in which a signal may come as well.

    Args:
        exit_status: what the process returns after an error. After Ctrl-C it is 130 and after SIGTERM 143, as in a
            shell; both unwind the stack, so that what is open is closed.
        advice: what is printed after an error.
    """
    received: list[int] = []

    def stop(number: int, _: object) -> None:
        received.append(number)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    signals = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell's background job is not for Ctrl-C
        signals.append(signal.SIGINT)
    for number in signals:
        signal.signal(number, stop)
    try:
        yield
    except BaseException as error:
        # Whatever the libraries between here and there have made of it.
        if received or isinstance(error, KeyboardInterrupt):
            print("\ninterrupted: what was finished is kept, the next call goes on from there", file=sys.stderr)
            sys.exit(128 + (received or [signal.SIGINT])[0])
        text = str(error) if isinstance(error, LabError) else explanation(error)
        if text is None:
            if not isinstance(error, Exception):
                raise
            print(COLOURS.sub("", "".join(traceback.format_exception(error))), end="", file=sys.stderr)
            text, exit_status = reason(error), 1
        print(f"\nerror: {text}" + (f"\n{advice}" if advice else ""), file=sys.stderr)
        sys.exit(exit_status)
    finally:
        for number in signals:
            signal.signal(number, signal.SIG_DFL)  # what is left is Python's own end, which has its own ways with them


def explanation(error: BaseException) -> str | None:
    """What to tell about a full disk, a file that can't be written, or too little memory; None about anything else."""
    if _lacks_memory(error):
        found = words(error).splitlines() or ["none left"]
        return f"memory: Expected more of it. Found: {found[0][:200]}. {SMALLER}. {KEPT}"
    for one in _chain(error):
        number = _number(one)
        if number not in REFUSED or (one is not error and number not in DISK):
            continue
        place = _place(one) or _place(error)
        if place is None:
            if number in (errno.EACCES, errno.EPERM):
                continue  # not about a file
            place = Path.cwd()
        expected, remedy = REFUSED[number]
        free = f" ({_free(place) / 1e6:,.1f} MB are free)" if number in FULL else ""
        return f"{place}: Expected {expected}. Found: {os.strerror(number)}{free}. {remedy}. {KEPT}"
    return None


def reason(error: BaseException) -> str:
    """An exception in at most `LONGEST` characters: where in a network of the user's it was raised, if it was, its type
    and its own words."""
    told = f"{type(error).__name__}: {words(error)}".removesuffix(": ")
    frames = traceback.extract_tb(error.__traceback__)
    own = [one for one in frames if Path(one.filename).parent.name == NETWORKS and "site-packages" not in one.filename]
    if own:
        told = f"{NETWORKS}/{Path(own[-1].filename).name}, line {own[-1].lineno}, in {own[-1].name}: {told}"
    return told if len(told) <= LONGEST else f"{told[: LONGEST - 1]}…"


def words(error: BaseException) -> str:
    """An exception's own words, without what Keras and TensorFlow put around them, and without colours."""
    text = error.args[0] if len(error.args) == 1 and isinstance(error.args[0], str) else str(error)
    text = re.sub(r"\{\{function_node .*?\}\} ", "", COLOURS.sub("", text))
    if wrapped := WRAPPED.match(text):
        text = wrapped[1]
    if text.startswith("Graph execution error:"):
        text = GRAPH.sub("", text)
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip())


def _lacks_memory(error: BaseException) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    if "OSError" in names:
        return getattr(error, "errno", None) == errno.ENOMEM
    tensorflows = names & {"ResourceExhaustedError", "InternalError"}
    return "MemoryError" in names or bool(tensorflows and NO_MEMORY.search(str(error)))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those that came before it: closing a file that couldn't be written raises another one."""
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__ or one.__context__


def _number(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno:
        return error.errno
    if FULL_DISK.search(str(error)):
        return errno.ENOSPC
    told = NUMBER.search(str(error))
    return int(told[1] or told[2]) if told else None


def _place(error: BaseException) -> Path | None:
    named = getattr(error, "filename", None)
    if isinstance(named, str | bytes | os.PathLike):
        return Path(os.fsdecode(named))
    notes = getattr(error, "__notes__", [])
    return next((Path(note.removeprefix(WRITING)) for note in notes if note.startswith(WRITING)), None)


def _free(place: Path) -> int:
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free
