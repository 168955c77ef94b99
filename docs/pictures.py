"""The pictures of the README and the guide: `python docs/pictures.py [RUN_DIR]`.

`images/method.svg` is drawn here; `images/report.png` and `images/completions.png` are what Chromium shows of
RUN_DIR/report.html, if it is given: its top, and its completions.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

IMAGES = Path(__file__).parent / "images"
BOXES = (
    ("calibrate", "gradients of keys and", "values on the tokens that", "define correctness"),
    ("sketch, reduce", "Frequent Directions on", "each rank, summed over", "all of them"),
    ("project", "the top directions:", "one low-rank subspace", "a site"),
    ("generate", "the model writes its own", "data, keys and values", "held to the subspace"),
    ("finetune", "the untouched model", "learns from what it", "wrote"),
    ("evaluate", "against controls, with", "intervals", ""),
)
WIDTH, HEIGHT, GAP = 158, 92, 22


def method() -> str:
    """The stages from left to right, as SVG."""
    total = len(BOXES) * (WIDTH + GAP) - GAP + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {HEIGHT + 20}" font-family="sans-serif">',
        f'<rect width="{total}" height="{HEIGHT + 20}" fill="white"/>',
    ]
    for number, (verb, *lines) in enumerate(BOXES):
        left, colour = 10 + number * (WIDTH + GAP), ("#dbe9f6", "#fde8d0")[number >= 3]
        parts.append(
            f'<rect x="{left}" y="10" width="{WIDTH}" height="{HEIGHT}" rx="8" fill="{colour}" stroke="#555"/>'
            f'<text x="{left + WIDTH / 2}" y="32" text-anchor="middle" font-size="15" font-weight="bold">{verb}</text>'
        )
        for row, line in enumerate(lines):
            y = 54 + 16 * row
            parts.append(f'<text x="{left + WIDTH / 2}" y="{y}" text-anchor="middle" font-size="12">{line}</text>')
        if number:
            y = 10 + HEIGHT / 2
            parts.append(
                f'<path d="M{left - GAP + 2} {y}h{GAP - 8}" stroke="#555" stroke-width="2"/>'
                f'<path d="M{left - 8} {y - 5}l7 5l-7 5z" fill="#555"/>'
            )
    return "\n".join([*parts, "</svg>"]) + "\n"


ALONE = "<style>main > :not(#completions) { display: none }</style></head>"
"""In place of the end of a page's head: its completions alone are seen."""


def report(page: str, image: Path) -> None:
    """A screenshot of a report's page, given as text, in a real browser."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("error: neither chromium nor google-chrome is installed; without one, leave RUN_DIR out")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "report.html"
        copy.write_text(page, encoding="utf-8")
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={folder}/profile",
        ]
        shot = [f"--screenshot={image.resolve()}", "--window-size=1000,900", copy.as_uri()]
        subprocess.run([browser, *flags, *shot], check=True, capture_output=True)


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    (IMAGES / "method.svg").write_text(method(), encoding="utf-8")
    if len(sys.argv) > 1:
        page = (Path(sys.argv[1]) / "report.html").read_text(encoding="utf-8")
        report(page, IMAGES / "report.png")
        report(page.replace("</head>", ALONE, 1), IMAGES / "completions.png")
