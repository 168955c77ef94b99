"""Look at a page in a real browser."""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.util
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def widths(page: Path, width: int, folder: Path) -> tuple[int, int]:
    """The width that a window of `width` pixels has for the page, and the width that the page takes."""
    source = html.escape(page.read_text())
    frame = (
        f'<iframe id="f" style="width:{width}px;height:800px" srcdoc="{source}"></iframe>'
        "<script>onload = () => { const d = document.getElementById('f').contentDocument.documentElement;"
        "document.title = d.clientWidth + ' of ' + d.scrollWidth }</script>"
    )
    (folder / "frame.html").write_text(frame)
    dumped = _chromium(folder, "--dump-dom", f"file://{folder}/frame.html")
    client, scroll = re.search(r"<title>(\d+) of (\d+)</title>", dumped).groups()
    return int(client), int(scroll)


def screenshot(page: Path, width: int, folder: Path) -> Path:
    """The page as an image."""
    shot = folder / f"{width}.png"
    _chromium(folder, f"--screenshot={shot}", f"--window-size={width},2000", f"file://{page}")
    return shot


def axe_source() -> str | None:
    """axe-core's script, if a package that carries it is installed: `pip install axe-playwright-python`, or others."""
    for package in ("axe_playwright_python", "axe_core_python", "axe_selenium_python"):
        found = importlib.util.find_spec(package)
        folder = Path(found.origin).parent if found and found.origin else None
        for file in sorted(folder.rglob("axe.min.js")) if folder else []:
            return file.read_text(encoding="utf-8")
    return None


@dataclass(frozen=True)
class Seen:
    """What a browser made of a page."""

    console: list[str]
    """Every message of its console: errors of scripts, and what the page's policy refused."""
    said: object
    """What the scripts of the test said, from JSON."""
    num_elements: int


def look(page: Path, folder: Path, width: int, *scripts: str, is_dark: bool = False) -> Seen:
    """Open `page` in a window of `width` pixels, run `scripts` in it after its own, and see what they `say(...)`.

    The page's own policy holds, but for the scripts of the test, which are added to it by their hashes.
    """
    scripts = ("let said = null; const say = (value) => { said = value; };", *scripts, SAY)
    text = page.read_text(encoding="utf-8")
    hashes = "".join(f" 'sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()}'" for one in scripts)
    text = re.sub(r"(script-src '[^']*')", lambda found: found[1] + hashes, text, count=1)
    text = text.replace("</body>", "".join(f"<script>{one}</script>" for one in scripts) + "</body>")
    copy = folder / f"looked-at-{width}.html"
    copy.write_text(text, encoding="utf-8")
    dark = ["--blink-settings=preferredColorScheme=0"] if is_dark else ["--blink-settings=preferredColorScheme=1"]
    words = ["--dump-dom", "--virtual-time-budget=20000", f"--window-size={width},900", *dark, copy.as_uri()]
    done = _run(folder, "--enable-logging=stderr", *words)
    dom = done.stdout
    said = re.search(r'<meta name="said" content="([^"]*)">', dom)
    assert said, f"the scripts did not come to an end: {done.stderr[-2000:]}"
    count = re.search(r'<meta name="elements" content="(\d+)">', dom)
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return Seen(console, json.loads(html.unescape(said[1])), int(count[1]))


SAY = """
(async () => {
  const result = await said;
  const count = document.querySelectorAll("*").length;
  for (const [name, content] of [["said", JSON.stringify(result)], ["elements", String(count)]]) {
    const meta = document.createElement("meta");
    meta.name = name;
    meta.content = content;
    document.head.append(meta);
  }
})();
"""


def _run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    return subprocess.run([CHROMIUM, *flags, *words], capture_output=True, text=True, check=True)


def _chromium(folder: Path, *words: str) -> str:
    return _run(folder, *words).stdout
