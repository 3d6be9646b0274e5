"""A report in a headless Chromium, wide and narrow; skipped where no Chromium is installed.

The browser is talked to by pipes, in its DevTools protocol, so that no driver and no package is
needed: messages are JSON, each ended by a zero byte, and come and go by its file descriptors 3
and 4.
"""

import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
TIMEOUT_S = 60.0


PROGRAM = next((found for name in NAMES if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason=f"none of {', '.join(NAMES)} is installed (apt-get install chromium)"
)


class Browser:
    """One page of one browser: what its console complained of, and what it asked for."""

    def __init__(self, program: str, profile: Path) -> None:
        flags = "headless=new remote-debugging-pipe disable-gpu disable-dev-shm-usage "
        flags += "disable-background-networking no-first-run hide-scrollbars"
        if os.geteuid() == 0:
            flags += " no-sandbox"  # root has no other way
        words = [program, f"--user-data-dir={profile}", *(f"--{flag}" for flag in flags.split())]
        pipes = 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1'
        self.process = subprocess.Popen(
            ["sh", "-c", pipes, "sh", *words, "about:blank"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self.numbers = itertools.count(1)
        self.received = b""
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.session: dict[str, str] = {}
        targets = self.ask("Target.getTargets")["targetInfos"]
        [page] = [target for target in targets if target["type"] == "page"]
        attached = self.ask("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def open(self, page: Path, width: int, scheme: str = "light") -> None:
        """Load a page anew in a window of some width, in the light or dark scheme."""
        self.events = []
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.ask("Emulation.setEmulatedMedia", features=features)
        self.ask("Page.navigate", url=page.resolve().as_uri())
        while not self.heard("Page.loadEventFired"):
            self._hear()

    def heard(self, method: str) -> list[dict[str, Any]]:
        """Return what events of a kind said since the page was opened."""
        return [values for name, values in self.events if name == method]

    @property
    def requests(self) -> list[str]:
        """What was asked for besides the page."""
        return [values["request"]["url"] for values in self.heard("Network.requestWillBeSent")][1:]

    @property
    def messages(self) -> list[dict[str, Any]]:
        """What the console complained of."""
        said = self.heard("Runtime.consoleAPICalled")
        complaints = [values for values in said if values["type"] in ("error", "warning")]
        return complaints + self.heard("Log.entryAdded") + self.heard("Runtime.exceptionThrown")

    def value(self, expression: str) -> Any:
        """Return what an expression is worth in the page."""
        result = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def close(self) -> None:
        """End the browser."""
        self.process.kill()
        self.process.communicate()

    def ask(self, method: str, **values: Any) -> dict[str, Any]:
        """Send a message and return the answer."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": values, **self.session}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message).encode() + b"\0")
        while (answer := self._hear()).get("id") != number:
            pass
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer["result"]
        return result

    def _hear(self) -> dict[str, Any]:
        """Return the next message, and keep it if it is an event."""
        until = time.monotonic() + TIMEOUT_S
        receiver = self.process.stdout
        assert receiver is not None
        while b"\0" not in self.received:
            ready, _, _ = select.select([receiver], [], [], max(0.0, until - time.monotonic()))
            assert ready, f"the browser said nothing for {TIMEOUT_S:g} seconds"
            part = receiver.read(1 << 16)
            assert part, "the browser ended"
            self.received += part
        text, self.received = self.received.split(b"\0", 1)
        message: dict[str, Any] = json.loads(text)
        if "method" in message:
            self.events.append((message["method"], message["params"]))
        return message


SIZES = (1280, 390)
"""A desktop and a phone, in CSS pixels."""
OPEN = "document.querySelectorAll('details').forEach(each => {each.open = true})"
CUT = (
    "[...document.querySelectorAll('table, pre, p, li')].filter(each => {"
    " const box = each.getBoundingClientRect();"
    " return box.right > window.innerWidth || each.scrollWidth > each.clientWidth + 1})"
    ".map(each => each.tagName + ': ' + each.textContent.slice(0, 60))"
)
DRAWN = (
    "[...document.querySelectorAll('figure svg')].map(each => {"
    " const box = each.getBoundingClientRect();"
    " return [box.width, box.height, box.right, each.querySelectorAll('path').length]})"
    ".filter(each => each[0] > 0)"
)
TEXT_HEIGHTS = (
    "[...document.querySelectorAll('figure svg text')]"
    ".filter(each => each.getBoundingClientRect().height > 0)"
    ".filter(each => !each.getAttribute('transform')?.includes('rotate(-90'))"
    ".map(each => each.getBoundingClientRect().height)"
)
COLOURS = (
    "getComputedStyle(document.querySelector('figure svg text')).fill + ' on ' +"
    " getComputedStyle(document.body).backgroundColor"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all tests."""
    assert PROGRAM is not None
    opened = Browser(PROGRAM, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.mark.parametrize("width", SIZES)
def test_the_page_is_short_whole_and_legible_and_fits_the_window(browser, page, width):
    colours = set()
    for scheme in ("light", "dark"):
        browser.open(page, width, scheme)
        assert browser.messages == []
        assert browser.requests == []
        words = browser.value("document.body.innerText.split(/\\s+/).filter(Boolean).length")
        assert 300 < words < 1200
        if width == 1280:
            assert browser.value("document.documentElement.scrollHeight") <= 8000

        for state in ("closed", "opened"):
            assert browser.value("window.innerWidth") == width, state
            assert browser.value("document.documentElement.scrollWidth") == width, state
            assert browser.value(CUT) == [], state
            browser.value(OPEN)

        drawn = browser.value(DRAWN)
        assert len(drawn) == page.read_text(encoding="utf-8").count("<figure") == 3
        for figure_width, height, right, shapes in drawn:
            assert figure_width > 0.8 * min(width, 528)
            assert height > 100
            assert right <= width
            assert shapes > 5
        heights = browser.value(TEXT_HEIGHTS)
        assert len(heights) > 40
        assert min(heights) > 8
        colours.add(browser.value(COLOURS))
    assert len(colours) == 2


def test_a_table_that_is_too_wide_scrolls_and_the_page_does_not(browser, page):
    browser.open(page, 720)
    browser.value(OPEN)
    assert any(cut.startswith("TABLE") for cut in browser.value(CUT))
    assert browser.value("document.documentElement.scrollWidth") == 720


def test_the_pictures_of_the_markdown_open(browser, page, tmp_path):
    pictures = sorted((page.with_name("report_figures")).glob("*.png"))
    assert len(pictures) == 3
    tags = "".join(f'<img src="{picture.as_uri()}">' for picture in pictures)
    (tmp_path / "pictures.html").write_text(tags, encoding="utf-8")
    browser.open(tmp_path / "pictures.html", 1280)
    widths = browser.value("[...document.images].map(each => each.naturalWidth)")
    assert widths == [1440, 1440, 672]


def test_a_page_with_faults_is_noticed(browser, tmp_path):
    (tmp_path / "bad.html").write_text(
        "<script>console.error('no')</script><img src='http://127.0.0.1:9/x.png'>"
        "<div style='width: 2000px'>wide</div><p style='width: 2000px'>cut</p>",
        encoding="utf-8",
    )
    browser.open(tmp_path / "bad.html", 390)
    assert any("'no'" in str(message) for message in browser.messages)
    assert browser.requests == ["http://127.0.0.1:9/x.png"]
    assert browser.value("document.documentElement.scrollWidth") > 390
    assert browser.value(CUT) == ["P: cut"]
