"""Pushes a package once for every request of a push and every fault at it, in one process.

    python tests/every_fault.py PACKAGE    JSON lines: at, request, fault, lasting, code, said, whole, sent

A passing fault happens once; a lasting one stays until the push has ended, and then the same command runs again
without it. `whole`: the repository holds the package in the end; `sent`: how often its weights were sent. The waits
between attempts are left out.
"""

import contextlib
import io
import json
import os
import sys
import time
import traceback
from pathlib import Path

from fakehub import CUT_OFF, TOKEN, Fault, Hub

PASSING = {"503": (503, {}), "cut off": (CUT_OFF, {}), "429": (429, {"Retry-After": "7"}), "412": (412, {})}
LASTING = {"500": (500, {}), "cut off": (CUT_OFF, {}), "403": (403, {}), "429": (429, {"Retry-After": "3600"})}


def push(package: Path) -> tuple[int, str]:
    """The exit code and what was printed."""
    from dolly.__main__ import main

    said = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    sys.argv = ["dolly", "push", str(package), "dolly"]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except Exception:
            code = 99
            traceback.print_exc()
    return code, said.buffer.getvalue().decode()


def main():
    package = Path(sys.argv[1])
    files = {path.name: path.read_bytes() for path in package.iterdir()}
    time.sleep = lambda seconds: None
    with Hub() as hub:
        os.environ |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}

        def fresh():
            for kept in (hub.repos, hub.blobs, hub.requests, hub.fail):
                kept.clear()

        code, said = push(package)
        assert code == 0, said
        trace = list(hub.requests)
        for at, request in enumerate(trace):
            for lasting, faults in enumerate((PASSING, LASTING)):
                for name, (status, headers) in faults.items():
                    fresh()
                    hub.fail.append(Fault("", status, headers=headers, skip=at, times=10**6 if lasting else 1))
                    code, said = push(package)
                    hub.fail.clear()
                    if lasting:
                        again, more = push(package)
                        assert again == 0, more
                    got = hub.repos["model", "alice/dolly"].at()[1]
                    row = {
                        "at": at,
                        "request": request,
                        "fault": name,
                        "lasting": bool(lasting),
                        "code": code,
                        "said": said,
                    }
                    row |= {"whole": files.items() <= got.items(), "sent": len(hub.asked("PUT /_lfs/"))}
                    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
