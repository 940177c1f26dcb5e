"""The pictures of docs/app.md, taken of the page in a headless Chromium.

    python tests/app_pictures.py runs/referring docs/images
    python tests/app_pictures.py CHECKPOINT FOLDER EXAMPLE X Y

EXAMPLE is the number of an example, X and Y where to click, as shares of its width and height: on
what is not meant.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from browser import Tab, browser, served
from PIL import Image


def save(page: bytes, path: Path) -> None:
    """As a PNG file of few kilobytes."""
    image, method = Image.open(io.BytesIO(page)).convert("RGB"), Image.Quantize.MAXCOVERAGE
    few = image.quantize(256, method, kmeans=3, dither=Image.Dither.NONE)
    few.save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


def main(checkpoint: str, folder: str = "docs/images", *where: str) -> None:
    """Take them."""
    example, x, y = (int(where[0]), *map(float, where[1:])) if where else (0, 0.29, 0.85)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        with (
            served(work, [f"--checkpoint={checkpoint}"]) as page,
            browser(work / "profile") as context,
        ):
            tab = Tab(context, page.url)
            tab.page.locator("#examples button").nth(example).click()
            tab.status("Round 0")
            tab.click_at(x, y)
            print(tab.status("That is '"))
            tab.page.wait_for_timeout(1000)
            save(tab.page.screenshot(full_page=True), Path(folder) / "app_first.png")
            tab.page.click("#correct")
            tab.status("Round 1")
            print(tab.rounds(2))
            tab.page.wait_for_timeout(1000)
            save(tab.page.screenshot(full_page=True), Path(folder) / "app_rounds.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
