"""Errors that a user can act on, and how they end a command."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class LabError(Exception):
    """Something the user can put right. The message says what was expected, what was found, where, and what to do."""


@contextmanager
def explained(exit_status: int = 1) -> Iterator[None]:
    """End the process with a message instead of a traceback when a `LabError` or Ctrl-C gets here.

    Args:
        exit_status: what the process returns after a `LabError`. After Ctrl-C it is 130 and after SIGTERM 143, as in a
            shell; both unwind the stack, so that what is open is closed.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    except LabError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        sys.exit(exit_status)
    except KeyboardInterrupt:
        print("\ninterrupted: what was finished is kept, the next call goes on from there", file=sys.stderr)
        sys.exit(130)
