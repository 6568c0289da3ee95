"""The page of a run in a real browser: it renders without a complaint, asks for nothing, fits, and can be read.

Chromium is driven over the pipe of its own protocol, so that what is checked is what it did, and nothing need be
installed beside it. `RATOON_CHROMIUM` names one that is not on the path.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ratoon.report.page import write_page
from test_report import HOSTILE, PROMPTS, cut, make_run

CHROMIUM = os.environ.get("RATOON_CHROMIUM") or next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (RATOON_CHROMIUM names one)")

SECTIONS = ("result", "curves", "samples", "ledger", "derived", "recipe", "machine", "next")

LAUNCH = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for end, place in zip(ends, (3, 4)):
    os.dup2(end, place)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Chromium reads its commands from descriptor 3 and answers on 4."""


class Browser:
    """A headless Chromium; `call` sends a command of the DevTools protocol and gives its result."""

    def __init__(self, profile: Path) -> None:
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        flags = (
            "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
            "--disable-component-update --disable-sync --disable-default-apps --disable-dev-shm-usage --hide-scrollbars"
        )
        command = [
            str(CHROMIUM),
            *flags.split(),
            f"--user-data-dir={profile}",
            "--remote-debugging-pipe",
            "about:blank",
        ]
        self._process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, str(to_browser), str(from_browser), *command],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer, self._number = b"", 0
        self.events: list[dict[str, Any]] = []
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._in, 1 << 16)
            assert part, "the browser has gone"
            self._buffer += part
        line, self._buffer = self._buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return message

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, page: Path, *, width: int = 1200, dark: bool = False) -> None:
        """Open the page anew; `events` then holds what happened until it was loaded."""
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 700
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media="", features=[scheme])
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._message()

    def run(self, script: str) -> Any:
        """The value of a script in the page, promises waited for."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def complaints(self) -> list[str]:
        """Whatever the page wrote to the console, threw, or was forbidden."""
        told = {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"}
        return [json.dumps(event["params"]) for event in self.events if event["method"] in told]

    def requests(self) -> list[str]:
        """The addresses that the page asked for."""
        return [
            event["params"]["request"]["url"]
            for event in self.events
            if event["method"] == "Network.requestWillBeSent"
            and not event["params"]["request"]["url"].startswith("data:")
        ]

    def close(self) -> None:
        os.close(self._out)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    made = Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@pytest.mark.parametrize("language", ["en", "zh"])
def test_it_renders_without_a_complaint_and_asks_for_nothing(browser: Browser, tmp_path: Path, language: Any) -> None:
    page = write_page(make_run(tmp_path, language=language), language=language)
    browser.open(page)
    assert browser.run("document.readyState") == "complete"
    for section in SECTIONS:
        box = browser.run(f"(b => [b.width, b.height])(document.getElementById('{section}').getBoundingClientRect())")
        assert box[0] > 600 and box[1] > 60, section
    assert browser.run("document.querySelectorAll('.picture svg').length") == 10
    drawn = browser.run(
        "[...document.querySelectorAll('.picture svg')].filter(s => s.getBoundingClientRect().height > 150).length"
    )
    assert drawn == 5, "the narrow forms wait for a narrow window"
    for prompt in PROMPTS:
        assert browser.run(f"document.body.innerText.includes({json.dumps(prompt)})")
    assert browser.complaints() == [] and browser.requests() == [page.resolve().as_uri()]


def test_the_complaints_and_requests_would_be_seen(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<img src='http://127.0.0.1:9/a.png'><script>console.error('no'); throw 1</script>", "utf-8")
    browser.open(page)
    assert len(browser.complaints()) >= 2 and "http://127.0.0.1:9/a.png" in browser.requests()


def test_hostile_text_does_nothing(browser: Browser, tmp_path: Path) -> None:
    run = make_run(tmp_path, reason=HOSTILE, status="failed", next_commands=[HOSTILE])
    run.append_metrics({"step": 420, "kind": "sample", "prompt": HOSTILE, "text": HOSTILE})
    page = write_page(run)
    browser.open(page)
    assert browser.run(f"document.getElementById('samples').textContent.includes({json.dumps(HOSTILE)})")
    assert browser.run("document.scripts.length") == 1 and browser.run("document.images.length") == 0
    assert browser.complaints() == [] and browser.requests() == [page.resolve().as_uri()]


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("width", [360, 768])
def test_it_fits_a_narrow_window(browser: Browser, tmp_path: Path, width: int, language: Any) -> None:
    run = cut(make_run(tmp_path, status="interrupted", reason="stopped " + "verylongword" * 20), 200)
    browser.open(write_page(run, language=language), width=width)
    assert browser.run("document.documentElement.scrollWidth") <= width
    drawn = browser.run("[...document.querySelectorAll('.plot svg')].map(s => s.getBoundingClientRect().height > 0)")
    assert drawn == ([False, True] if width < 700 else [True, False]) * 5
    letters = browser.run(
        "Math.min(...[...document.querySelectorAll('.plot svg text')].map(t => t.getBoundingClientRect().height)"
        ".filter(h => h))"
    )
    assert letters > 9, "pixels: the numbers at the axes can be read"


CONTRAST = """
(() => {
  const parse = c => { const n = c.match(/[\\d.]+/g).map(Number); return n.length > 3 ? n : [...n, 1]; };
  const light = c => { const f = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    return 0.2126 * f(c[0]) + 0.7152 * f(c[1]) + 0.0722 * f(c[2]); };
  const ground = e => { for (; e; e = e.parentElement) {
    const c = parse(getComputedStyle(e).backgroundColor); if (c[3] > 0.99) return c; } return [255, 255, 255, 1]; };
  const low = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.getClientRects().length || ['SCRIPT', 'STYLE'].includes(e.tagName)) continue;
    const style = getComputedStyle(e);
    const a = light(parse(e.namespaceURI.endsWith('svg') ? style.fill : style.color)), b = light(ground(e));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push(e.tagName + '.' + e.className + ' ' + ratio.toFixed(2) + e.textContent.slice(0, 30));
  }
  return low;
})()
"""


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("status", ["done", "failed", "interrupted"])
def test_every_text_can_be_read_in_light_and_dark(browser: Browser, tmp_path: Path, dark: bool, status: str) -> None:
    browser.open(write_page(make_run(tmp_path, status=status, reason="stopped")), dark=dark)
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    ground = browser.run("getComputedStyle(document.documentElement).backgroundColor")
    assert (int(ground[4:].split(",")[0]) < 60) == dark
    assert browser.run(CONTRAST) == [], "below the 4.5 to 1 of WCAG 2.2, 1.4.3"


def test_a_command_is_copied(browser: Browser, tmp_path: Path) -> None:
    browser.open(write_page(make_run(tmp_path)))
    assert browser.run("document.querySelectorAll('.copy:not([hidden])').length") == 3
    copied = browser.run(
        "new Promise(done => { navigator.clipboard.writeText = t => { done(t); return Promise.resolve(); };"
        " document.querySelector('[data-copy=command-1]').click(); })"
    )
    assert copied == 'ratoon generate garden "The function" --temperature 0.8'
    recipe = browser.run(
        "new Promise(done => { navigator.clipboard.writeText = t => { done(t); return Promise.resolve(); };"
        " document.querySelector('[data-copy=recipe-text]').click(); })"
    )
    assert recipe == (tmp_path / "garden" / "recipe.yaml").read_text(encoding="utf-8")


def test_it_can_be_read_without_its_script(browser: Browser, tmp_path: Path) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(write_page(make_run(tmp_path)))
        nodes = browser.call("DOM.getDocument", depth=-1)["root"]
        text = json.dumps(nodes)
        assert all(section in text for section in SECTIONS)
        assert browser.complaints() == []
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_on_paper_nothing_is_folded_away(browser: Browser, tmp_path: Path) -> None:
    browser.open(write_page(make_run(tmp_path)))
    assert browser.run("document.querySelector('.places').checkVisibility()") is False
    browser.call("Emulation.setEmulatedMedia", media="print", features=[])
    browser.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert browser.run("document.querySelector('.places').checkVisibility()") is True
    assert browser.run("[...document.querySelectorAll('.copy, nav')].every(e => !e.getClientRects().length)")
