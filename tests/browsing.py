"""Look at a page in a real browser."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
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


def _chromium(folder: Path, *words: str) -> str:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    return subprocess.run([CHROMIUM, *flags, *words], capture_output=True, text=True, check=True).stdout
