"""What a person is told when something that they can mend went wrong."""

import contextlib
import errno
import os
import sys


class UserError(Exception):
    """A mistake that the reader of the message can mend: what was wrong, where, and what to do about it."""

    exit_code = 2


@contextlib.contextmanager
def told_plainly():
    """Ends the process with the message and the exit code of a `UserError`, without a traceback."""
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at the exit
        if error.errno == errno.ENOSPC:
            print(f"error: {error.strerror}.", file=sys.stderr)
            raise SystemExit(UserError.exit_code) from None
        raise SystemExit(141) from None  # 128 + SIGPIPE, as `head` ends others
