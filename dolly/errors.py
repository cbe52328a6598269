"""What a person is told when something that they can mend went wrong."""

import contextlib
import sys


class UserError(Exception):
    """A mistake that the reader of the message can mend: what was wrong, where, and what to do about it."""

    exit_code = 2


@contextlib.contextmanager
def told_plainly():
    """Ends the process with the message and the exit code of a `UserError`, without a traceback."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None
