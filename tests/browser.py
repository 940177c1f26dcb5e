"""The web page as its visitors meet it: served by the command, in a headless Chromium."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
WAIT = 60_000  # milliseconds, on a busy machine
# Notes every address that the server's process connects to, or looks up, beyond this machine.
_AUDIT = """
import sys

def note(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        address = arguments[1] if event == "socket.connect" else arguments[0]
        host = address[0] if isinstance(address, tuple) else address
        if str(host) not in ("127.0.0.1", "::1", "localhost", "None", "0.0.0.0"):
            with open({path!r}, "a") as file:
                file.write(f"{{event}} {{address}}\\n")

sys.addaudithook(note)
"""


class Served:
    """A page that is being served.

    Attributes:
        url: where.
        log: what the command writes.
        beyond: addresses beyond this machine that it connected to.
        status: its exit status, once it has ended.
    """

    def __init__(self, url: str, log: Path, addresses: Path):
        self.url, self.log, self._addresses = url, log, addresses
        self.status: int | None = None

    @property
    def beyond(self) -> str:
        return self._addresses.read_text() if self._addresses.exists() else ""


@contextlib.contextmanager
def served(folder: Path, arguments: Sequence[str], **environment: str) -> Iterator[Served]:
    """Serve the page on a free port, and end it by Ctrl-C.

    Args:
        folder: for what the server leaves behind.
        arguments: of the command.
        environment: beyond this process's.
    """
    addresses, log = folder / "addresses.txt", folder / "log.txt"
    (folder / "sitecustomize.py").write_text(_AUDIT.format(path=str(addresses)))
    root = Path(__file__).parents[1]
    paths = os.pathsep.join([str(folder), str(root), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "jaxpercept.app", "--port=0", *arguments]
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stderr=file,
            stdout=file,
            env={**os.environ, **environment, "PYTHONPATH": paths},
        )
    try:
        while "ready: " not in log.read_text():
            if process.poll() is not None:
                raise RuntimeError(f"the page is not served:\n{log.read_text()}")
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
        page = Served(log.read_text().split("ready: ")[1].split()[0], log, addresses)
        yield page
        process.send_signal(signal.SIGINT)
        page.status = process.wait(30)
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def browser(profile: Path, **options: Any) -> Iterator[Any]:
    """A browser with this profile, as Playwright's context."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=CHROMIUM,
            viewport={"width": 1200, "height": 900},
            accept_downloads=True,
            **options,
        )
        context.set_default_timeout(WAIT)
        yield context
        context.close()


class Tab:
    """A tab of the browser in which the page is open.

    Attributes:
        page: Playwright's.
        requests: the addresses of all that it asked for.
        complaints: errors in the browser's console, and of scripts.
    """

    def __init__(self, context: Any, url: str):
        self.page, self.url = context.new_page(), url
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(url)
        self.page.wait_for_selector("#examples img")

    def _note(self, message: Any) -> None:
        if message.type == "error":
            self.complaints.append(message.text)

    @property
    def beyond(self) -> list[str]:
        """Requests to other hosts."""
        own = (self.url, "data:", "blob:")
        return [address for address in self.requests if not address.startswith(own)]

    def upload(self, path: Path) -> None:
        self.page.set_input_files("#drop input[type=file]", path)

    def status(self, words: str, wrong: bool = False) -> str:
        """Wait until the line below the picture has these words; returns all of it."""
        sentence = self.page.locator("#status p.wrong" if wrong else "#status p:not(.wrong)")
        sentence.filter(has_text=words).wait_for()
        return sentence.inner_text()

    def look_for(self, phrase: str) -> None:
        self.page.fill("#phrase textarea", phrase)
        self.page.click("#find")

    def correct(self, unwanted: str) -> None:
        self.page.fill("#unwanted textarea", unwanted)
        self.page.click("#correct")

    def rounds(self, count: int) -> list[str]:
        """Wait until so many rounds are shown; returns their captions."""
        captions = self.page.locator("#rounds .caption-label")
        captions.nth(count - 1).wait_for()
        return captions.all_inner_texts()

    def picture(self, selector: str) -> bytes:
        """The file of the picture that is shown."""
        image = self.page.locator(f"{selector} img")
        image.wait_for()
        return self.page.request.get(image.get_attribute("src")).body()

    def click_at(self, x: float, y: float) -> None:
        """Click on the prediction, at these shares of its width and height."""
        image = self.page.locator("#result img")
        box = image.bounding_box()
        image.click(position={"x": x * box["width"], "y": y * box["height"]})

    def download(self, selector: str, folder: Path) -> Path:
        with self.page.expect_download() as started:
            self.page.click(selector)
        path = folder / started.value.suggested_filename
        started.value.save_as(path)
        return path
