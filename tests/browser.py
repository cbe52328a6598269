"""Driving the page as a visitor does: the app as a subprocess, and Chromium through Playwright.

As a command it takes the picture of the README: python tests/browser.py docs/chat.png models/demo
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@contextlib.contextmanager
def app(*arguments, folder: Path = ROOT, said: Path | None = None, **variables: str) -> Iterator[str]:
    """The address of `python app.py ARGUMENTS`, which runs until the end of the block; it prints into `said`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | variables
    command = [sys.executable, "app.py", "--port", str(port), *map(str, arguments)]
    with said.open("w+") if said else tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield answering(f"http://127.0.0.1:{port}", server, log)
        finally:
            server.terminate()
            server.wait(10)


def answering(address: str, server: subprocess.Popen, log, patience: float = 90) -> str:
    """Waits until the server answers. Raises `RuntimeError` with its log when it ended instead."""
    started = time.monotonic()
    while server.poll() is None and time.monotonic() - started < patience:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(address, timeout=5).close()
            return address
        time.sleep(0.1)
    log.seek(0)
    raise RuntimeError(f"the app does not answer:\n{log.read()}")


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


expect.set_options(timeout=20_000)  # a machine may be busy
BOT, SAID = "[data-testid=bot]", "[data-testid=user], [data-testid=bot]"  # messages of the conversation


def ask(page: Page, question: str) -> None:
    page.locator("#message textarea").fill(question)
    page.keyboard.press("Enter")


def answered(page: Page):
    """Waits for the end of an answer; its text is the last of the assistant's."""
    expect(page.locator("#status [role=status]")).to_be_visible(timeout=30_000)
    return page.locator(BOT).last


def picture(path: str, model: str) -> None:
    with app("--model", model) as address, chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900}, device_scale_factor=2)
        page.goto(address)
        page.get_by_role("tabpanel").get_by_role("button").first.click()
        answered(page)
        page.screenshot(path=path)


if __name__ == "__main__":
    picture(*sys.argv[1:])
