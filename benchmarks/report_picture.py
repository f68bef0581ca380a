"""The picture of docs/report.md: a report's photo viewer, on scikit-learn's two sample photos, as chromium shows it.

    python benchmarks/report_picture.py DATA_DIR

DATA_DIR holds ``deit_tiny_patch16_224.safetensors``. Needs chromium, chromedriver and selenium.
"""

from __future__ import annotations

import argparse
import base64
import shutil
import tempfile
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from sklearn.datasets import load_sample_images

from leanvit import compare, slim
from leanvit.methods import parse
from leanvit.report.gather import page_of
from leanvit.report.page import Source, write
from leanvit.store import resolve_model

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "report.png"
CLASSES = {"china.jpg": "n03877845", "flower.jpg": "n11939491"}  # palace, daisy
METHOD = "pruning:at=3,6,9"
BLOCK = 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path)
    checkpoint = parser.parse_args().data_dir / "deit_tiny_patch16_224.safetensors"
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        for file in load_sample_images().filenames:
            (photos / CLASSES[Path(file).name]).mkdir(parents=True)
            shutil.copy(file, photos / CLASSES[Path(file).name])
        dense = resolve_model("deit_tiny_patch16_224", checkpoint=checkpoint)
        lean = {METHOD: slim(dense, *parse(METHOD))}
        table = compare(dense, lean, photos, batch_sizes=(1,))
        page = write(page_of(dense, lean, table, Source("sample photos")), Path(folder) / "report.html")
        PICTURE.write_bytes(screenshot(page))


def screenshot(page: Path) -> bytes:
    """The viewer, its slider at `BLOCK`, as a PNG."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--force-color-profile=srgb"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    try:
        driver.set_window_size(1000, 1400)
        driver.get(page.as_uri())
        driver.execute_script(
            "document.getElementById('predictions').hidden = true;"  # times belong to a quiet machine
            "const slider = document.getElementById('block'); slider.value = arguments[0];"
            "slider.dispatchEvent(new Event('input'))",
            BLOCK,
        )
        time.sleep(2)  # pictures decode
        place = driver.find_element("css selector", ".viewer").rect
        clip = {name: place[name] for name in ("x", "y", "width", "height")} | {"scale": 1}
        found = driver.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
        return base64.b64decode(found["data"])
    finally:
        driver.quit()


if __name__ == "__main__":
    main()
