"""Chromium without a window: found, or installed as Debian packages it, and what it finds wrong with a page."""

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

LIMIT = 120_000  # ms: a loaded machine is slow
APT = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "-o", "Dpkg::Use-Pty=0", "chromium"]


@dataclass(frozen=True)
class View:
    """How a page is looked at; a paper is 680 px wide between the margins of A4."""

    width: int
    height: int
    scheme: str = "light"
    media: str = "screen"

    def __str__(self) -> str:
        return f"{self.width}-{self.scheme}" if self.media == "screen" else self.media


PHONE, DESK = View(390, 844), View(1440, 900)
VIEWS = (PHONE, View(390, 844, "dark"), DESK, View(1440, 900, "dark"), View(680, 960, "dark", "print"))


@dataclass
class Opened:
    """A page in a browser, what it asked for, and what it complained of."""

    page: Any
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


def program() -> str:
    """Where Chromium is; where there is none it is installed, by one process at a time."""
    names = ("chromium", "chromium-browser", "google-chrome")
    with Path(tempfile.gettempdir(), "distill-chromium.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = next(filter(None, map(shutil.which, names)), None)
        if found is None:
            _install()
            found = shutil.which("chromium")
    assert found, "apt-get installed chromium, and there is none"
    return found


def _install() -> None:
    if shutil.which("apt-get") is None:
        pytest.skip("there is no Chromium, and no apt-get to install it with")
    if os.geteuid() != 0:
        pytest.skip("there is no Chromium, and installing it takes root")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (APT, ["apt-get", "update", "-qq"], APT):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode == 0 and command is APT:
            return
    pytest.skip(f"Chromium cannot be installed: {done.stderr}")


@contextmanager
def chromium() -> Iterator[Any]:
    """Have a browser run."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    path = program()
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=LIMIT)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, path: Path, view: View = DESK) -> Iterator[Opened]:
    """Open a file; whatever else is asked for is written down, and refused."""
    context = browser.new_context(viewport={"width": view.width, "height": view.height}, color_scheme=view.scheme)
    context.set_default_timeout(LIMIT)
    seen = Opened(context.new_page())
    address = path.resolve().as_uri()

    def refuse(route: Any) -> None:
        if route.request.url.split("#")[0] == address:
            route.continue_()
        else:
            seen.requests.append(route.request.url)
            route.abort()

    context.route("**/*", refuse)
    seen.page.on("console", lambda message: seen.complaints.append(message.text))
    seen.page.on("pageerror", lambda error: seen.complaints.append(str(error)))
    seen.page.emulate_media(media=view.media, color_scheme=view.scheme)
    seen.page.goto(address)
    yield seen
    context.close()


def problems(browser: Any, path: Path, chapters: Sequence[str], view: View, shots: Path | None = None) -> list[str]:
    """What is wrong with a page of a report as it is seen in one way; nothing, one hopes.

    Args:
        browser: of `chromium`.
        path: of the page.
        chapters: the anchors that it must have, in order.
        view: how to look at it.
        shots: a folder for the screenshot; there is another in the folder that the environment's `DISTILL_SCREENSHOTS` names.
    """
    with opened(browser, path, view) as seen:
        found = [f"asks for {address}" for address in seen.requests]
        there = seen.page.evaluate("[...document.querySelectorAll('main > section')].map(section => section.id)")
        if there != list(chapters):
            found.append(f"its chapters are {there}, not {list(chapters)}")
        found += seen.page.evaluate(_WRONG, 8.95 if view.media == "screen" else 0)
        found += [
            f"contrast of {_ratio(*colors):.2f} is less than {least}: {what}"
            for what, least, colors in seen.page.evaluate(_COLORS)
            if _ratio(*colors) < least
        ]
        for folder in filter(None, (shots, os.environ.get("DISTILL_SCREENSHOTS") if shots else None)):
            Path(folder).mkdir(parents=True, exist_ok=True)
            seen.page.screenshot(path=Path(folder, f"{path.stem}-{view}.png"), full_page=True)
        return found + [f"complains: {text}" for text in seen.complaints]


def _ratio(text: Sequence[float], ground: Sequence[float]) -> float:
    """Contrast by WCAG 2.1, of colours in [0, 255]."""
    high, low = sorted((_luminance(text), _luminance(ground)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(color: Sequence[float]) -> float:
    linear = [x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in (c / 255 for c in color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


# What lies outside the page's width (but in boxes that scroll), text too small to read, scripts, and names that are there twice or never.
_WRONG = """least => {
  const wrong = [], root = document.documentElement, wide = root.clientWidth
  const say = element => `<${element.tagName} class="${element.getAttribute('class') ?? ''}"> ${element.textContent.trim().slice(0, 40)}`
  if (root.scrollWidth > wide) wrong.push(`overflows: ${root.scrollWidth} px on ${wide}`)
  for (const box of document.querySelectorAll('.scroll'))
    if (matchMedia('print').matches && box.scrollWidth > box.clientWidth + 1) wrong.push(`cut in print: ${say(box)}`)
  for (const element of document.body.querySelectorAll('*')) {
    const scrolls = element.closest('.scroll, pre'), box = element.getBoundingClientRect()
    if (!box.width || element.matches('.skip') || (scrolls && scrolls !== element)) continue
    const ends = `${Math.round(box.left)} to ${Math.round(box.right)} px`
    if (box.left < -1 || box.right > wide + 1) wrong.push(`overflows: ${ends}: ${say(element)}`)
  }
  for (const text of document.querySelectorAll('svg text')) {
    const size = parseFloat(getComputedStyle(text).fontSize) * text.ownerSVGElement.getScreenCTM().a
    if (size < least) wrong.push(`text of ${size.toFixed(1)} px: ${say(text)}`)
  }
  if (document.scripts.length) wrong.push(`holds a script: ${document.scripts[0].textContent.slice(0, 40)}`)
  const names = [...document.querySelectorAll('[id]')].map(element => element.id), all = new Set(names)
  if (all.size < names.length) wrong.push(`names twice: ${names.filter((name, i) => names.indexOf(name) < i)}`)
  const links = [...document.querySelectorAll('[href^="#"]')].map(element => element.getAttribute('href').slice(1))
  const used = [...document.body.innerHTML.matchAll(/url\\(&quot;#([^)]+)&quot;\\)|url\\(#([^)]+)\\)/g)].map(match => match[1] ?? match[2])
  for (const name of [...links, ...used]) if (!all.has(name)) wrong.push(`refers to #${name}, which is not there`)
  return wrong
}"""

# Every element with words of its own, with their colour and that of their ground, and the lines of models against the page.
_COLORS = """() => {
  const brush = document.createElement('canvas').getContext('2d', {willReadFrequently: true})
  const flat = (color, ground) => {
    brush.fillStyle = `rgb(${ground})`; brush.fillRect(0, 0, 1, 1)
    brush.fillStyle = color; brush.fillRect(0, 0, 1, 1)
    return [...brush.getImageData(0, 0, 1, 1).data].slice(0, 3)
  }
  const ground = element => element ? flat(getComputedStyle(element).backgroundColor, ground(element.parentElement)) : [255, 255, 255]
  const found = []
  for (const element of document.body.querySelectorAll('*')) {
    const words = [...element.childNodes].filter(node => node.nodeType === 3).map(node => node.data).join('').trim()
    if (!words || !element.getClientRects().length || element.tagName === 'desc') continue
    const style = getComputedStyle(element), below = ground(element)
    found.push([words.slice(0, 40), 4.5, [flat(element.closest('svg') ? style.fill : style.color, below), below]])
  }
  const style = getComputedStyle(document.documentElement), below = ground(document.body)
  for (let i = 1; i <= 6; i++) found.push([`the colour --plot-${i}`, 3, [flat(style.getPropertyValue(`--plot-${i}`), below), below]])
  return found
}"""
