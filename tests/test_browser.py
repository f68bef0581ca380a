"""The report in a real browser: opened from disk, driven by mouse and keyboard, without a single request.

Needs chromium and chromedriver, as Debian packages them, and is skipped where they are missing. Where
``LEANVIT_NEEDS_BROWSER`` is set, as in continuous integration, it fails there instead.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import leanvit
from leanvit.measure import compare
from leanvit.report.gather import page_of
from leanvit.report.page import Page, Source, write

from .contract import small_vit
from .everything import Everything

ARROWS = {"left": "\ue012", "up": "\ue013", "right": "\ue014", "down": "\ue015"}
ENTER, TAB, ESCAPE = "\ue007", "\ue004", "\ue00c"
"""Keys, as WebDriver numbers them."""

PATIENCE = 20.0
"""Seconds to wait for what should be there at once, on a busy machine."""

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


PROGRAMS = {"chromium": "chromium", "chromedriver": "chromium-driver"}


def ask_for_browser() -> None:
    """Skip what follows where there is no browser, or fail where there must be one."""
    absent = [f"{program} (Debian: {package})" for program, package in PROGRAMS.items() if not shutil.which(program)]
    if not find_spec("selenium"):
        absent.append("the Python package selenium")
    if absent:
        (pytest.fail if os.environ.get("LEANVIT_NEEDS_BROWSER") else pytest.skip)(f"{', '.join(absent)} is missing")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    ask_for_browser()
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    driver.set_page_load_timeout(300)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page about two models of which one offers every kind of data, with a training curve."""
    root = tmp_path_factory.mktemp("report")
    generator = np.random.default_rng(0)
    for kind in range(10):
        (root / "photos" / f"kind {kind}").mkdir(parents=True)
        for number in range(2):
            coarse = Image.fromarray(generator.integers(0, 255, (5, 5, 3), dtype=np.uint8))
            coarse.resize((64, 64)).save(root / "photos" / f"kind {kind}" / f"{number}.png")
    dense = small_vit()
    models = {"glad": leanvit.slim(dense, leanvit.GLAD(at=(2, 3))), "everything": leanvit.slim(dense, Everything())}
    table = compare(dense, models, root / "photos", batch_sizes=(1, 2), iterations=1, progress=False)
    page = page_of(dense, models, table, Source("noise", "leanvit compare …"), progress=False)
    rows = [{"epoch": epoch, "train_loss": 1 / epoch, "val_top1": 50.0 + epoch} for epoch in (1, 2, 3)]
    return write(Page(**{**vars(page), "curves": {"glad": rows}}), root / "report.html")


@pytest.fixture
def page(browser: Any, report: Path) -> Any:
    """The page, freshly opened, its photo drawn."""
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # what earlier tests left
    show(browser, 1100, "light")
    browser.get(report.as_uri())
    wait_until(lambda: browser.find_element("id", "maps").text)
    choose_model(browser, "glad")  # which one comes first depends on the figures
    wait_until(lambda: text(browser, "block-text").startswith("4 tokens"))
    wait_until(lambda: len(browser.find_elements("css selector", "#maps canvas")) == 1)
    click_patch(browser, 0.6, 0.6)  # so does the patch
    wait_until(lambda: "column 3, row 3" in text(browser, "patch-text"))
    return browser


def show(browser: Any, width: int, scheme: str, media: str = "") -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": [feature]})


def wait_until(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, "nothing changed"
        time.sleep(0.02)
    return found


def pixels(browser: Any, selector: str = "#patches") -> str:
    return str(browser.execute_script(f"return document.querySelector('{selector}').toDataURL()"))


def text(browser: Any, name: str) -> str:
    return str(browser.find_element("id", name).text)


def send(browser: Any, *keys: str) -> None:
    """Type keys to whatever has the focus."""
    browser.switch_to.active_element.send_keys(*keys)


def focus(browser: Any, selector: str) -> Any:
    element = browser.find_element("css selector", selector)
    browser.execute_script("arguments[0].focus()", element)
    return element


def click_patch(browser: Any, across: float, down: float) -> None:
    """Click the photo at a place, both from 0 to 1."""
    from selenium.webdriver import ActionChains

    canvas = browser.find_element("id", "patches")
    width, height = canvas.size["width"], canvas.size["height"]
    place = int((across - 0.5) * width), int((down - 0.5) * height)
    ActionChains(browser).move_to_element_with_offset(canvas, *place).click().perform()


def choose_model(browser: Any, name: str) -> None:
    from selenium.webdriver.support.select import Select

    Select(browser.find_element("id", "model")).select_by_visible_text(name)


def test_opens_from_disk_without_errors_or_requests(page: Any, report: Path) -> None:
    for button in page.find_elements("css selector", "#strip button"):
        button.click()
    assert page.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert report.as_uri() in asked
    assert [url[:80] for url in asked if url != report.as_uri() and not url.startswith("data:")] == []


def test_a_request_would_be_refused(page: Any) -> None:
    blocked = page.execute_async_script(
        "const done = arguments[0]; document.addEventListener('securitypolicyviolation', () => done(true));"
        "const image = new Image(); image.onload = () => done(false); image.src = 'http://127.0.0.1:9/x.png';"
    )
    assert blocked is True


def test_photos_are_there_within_a_second(browser: Any, report: Path) -> None:
    browser.get("about:blank")
    browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})  # other programs do not count
    browser.get(report.as_uri())
    wait_until(lambda: text(browser, "maps"))
    metrics = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    browser.execute_cdp_cmd("Performance.disable", {})
    assert next(one["value"] for one in metrics if one["name"] == "TaskDuration") < 1.0
    pictures = browser.find_elements("css selector", "#strip img")
    assert len(pictures) == 12 and all(picture.get_property("naturalWidth") > 100 for picture in pictures)


def test_slider_walks_the_blocks(page: Any) -> None:
    slider = focus(page, "#block")
    assert slider.get_property("value") == "3" and text(page, "block-text").startswith("4 tokens for 16 patches")
    seen = [pixels(page)]
    for block, tokens in ((2, 8), (1, 16)):
        send(page, ARROWS["left"])
        wait_until(lambda tokens=tokens: text(page, "block-text").startswith(f"{tokens} tokens"))
        assert text(page, "block-number") == f"{block} (of 0 to 3)"
        seen.append(pixels(page))
    assert len(set(seen)) == 3


def test_clicking_a_patch_shows_its_connections(page: Any) -> None:
    before = text(page, "patch-text"), pixels(page), pixels(page, "#maps canvas")
    assert "column 3, row 3" in before[0]
    click_patch(page, 0.1, 0.1)
    wait_until(lambda: "column 1, row 1" in text(page, "patch-text"))
    assert pixels(page) != before[1]
    wait_until(lambda: pixels(page, "#maps canvas") != before[2])


def test_arrow_keys_choose_a_patch(page: Any) -> None:
    focus(page, "#patches")
    for key, place in (("up", "column 3, row 2"), ("right", "column 4, row 2"), ("right", "column 4, row 2")):
        send(page, ARROWS[key])
        wait_until(lambda place=place: place in text(page, "patch-text"))
    send(page, ARROWS["down"], ARROWS["down"], ARROWS["down"])
    wait_until(lambda: "column 4, row 4" in text(page, "patch-text"))


def test_map_shows_what_was_recorded(page: Any) -> None:
    # In `Everything` each token attends to the next one alone: one bright patch, or as many as share that token.
    choose_model(page, "everything")
    wait_until(lambda: text(page, "block-text").startswith("8 tokens for 16 patches, "))
    focus(page, "#block")
    send(page, ARROWS["left"], ARROWS["left"], ARROWS["left"])
    wait_until(lambda: text(page, "block-number").startswith("0 "))
    wait_until(lambda: len(page.find_elements("css selector", "#maps canvas")) == 5)
    bright = page.execute_script(
        "const sheet = document.querySelector('#maps canvas'), pen = sheet.getContext('2d'), found = [];"
        "const image = document.querySelector('#strip img'), own = document.createElement('canvas');"
        "own.width = sheet.width; own.height = sheet.height;"
        "const other = own.getContext('2d'); other.drawImage(image, 0, 0, own.width, own.height);"
        "for (let row = 0; row < 4; row++) for (let column = 0; column < 4; column++) {"
        "  const at = [(column + .5) * sheet.width / 4, (row + .5) * sheet.height / 4, 1, 1];"
        "  const sum = from => from.getImageData(...at).data.slice(0, 3).reduce((a, b) => a + b);"
        "  if (sum(pen) > .8 * sum(other)) found.push(4 * row + column);"
        "} return found"
    )
    assert bright == [11]  # the chosen patch is 10


def test_what_is_left_out_is_connected_to_nothing(page: Any) -> None:
    choose_model(page, "everything")
    wait_until(lambda: text(page, "block-text").startswith("8 tokens for 16 patches, "))
    data = json.loads(page.execute_script("return document.getElementById('data').textContent"))
    (everything,) = (model for model in data["models"] if model["name"] == "everything")
    tokens = data["layouts"][everything["photos"][0]["blocks"][3]["maps"][0]["rows"]]
    assert tokens.count(-1) == 8
    for _ in range(2):
        for patch, says in ((tokens.index(-1), "is left out here, and connected to nothing"), (tokens.index(0), "")):
            click_patch(page, 0.25 * (patch % 4) + 0.1, 0.25 * (patch // 4) + 0.1)
            if says:
                wait_until(lambda says=says: says in text(page, "maps"))
            else:
                wait_until(lambda: len(page.find_elements("css selector", "#maps canvas")) == 6)


def test_usage_of_heads_and_sublayers(page: Any) -> None:
    assert page.find_elements("css selector", "#usage table") == []
    choose_model(page, "everything")
    wait_until(lambda: page.find_elements("css selector", "#usage table"))
    rows = {
        row.find_element("css selector", "th").text: [
            "on" in cell.get_attribute("class").split() for cell in row.find_elements("css selector", "td")
        ]
        for row in page.find_elements("css selector", "#usage tbody tr")
    }
    assert rows["head 0"] == [False] * 4 and rows["head 1"] == [True] * 4
    assert rows["attention"] == [True] * 4 and rows["MLP"] == [False, True, False, True]


def test_choosing_a_photo_by_keyboard(page: Any) -> None:
    before = pixels(page), text(page, "predictions")
    second = page.find_elements("css selector", "#strip button")[1]
    page.execute_script("arguments[0].focus()", second)
    send(page, ENTER)
    wait_until(lambda: pixels(page) != before[0] and text(page, "predictions") != before[1])
    pressed = [one.get_attribute("aria-pressed") for one in page.find_elements("css selector", "#strip button")]
    assert pressed == ["false", "true"] + ["false"] * 10


def test_table_sorts(page: Any) -> None:
    def column(heading: str) -> list[str]:
        headings = [one.text.split(" ↕")[0] for one in page.find_elements("css selector", ".sortable th")]
        return [
            row.find_elements("css selector", "td")[headings.index(heading)].get_attribute("data-value")
            for row in page.find_elements("css selector", ".sortable tbody tr")
        ]

    def sorter(heading: str) -> Any:
        buttons = page.find_elements("css selector", ".sortable button")
        return next(one for one in buttons if one.text.startswith(heading))

    for heading, convert in (("Images/s", float), ("Model", str)):
        button = sorter(heading)
        page.execute_script("arguments[0].focus()", button)
        for reverse, state in ((False, "ascending"), (True, "descending")):
            send(page, ENTER)
            values = [convert(value) for value in column(heading)]
            assert values == sorted(values, reverse=reverse) and len(values) == 6
            assert button.find_element("xpath", "..").get_attribute("aria-sort") == state
        assert len(page.find_elements("css selector", ".sortable th[aria-sort]")) == 1
    button = sorter("Top-1 change")
    for _ in range(2):  # what is not known stays below
        button.click()
        assert column("Top-1 change")[-2:] == ["", ""]


def test_points_say_what_they_are(page: Any) -> None:
    from selenium.webdriver import ActionChains

    tip = page.find_element("id", "tip")
    assert not tip.is_displayed()
    point = focus(page, ".point.lean")
    assert tip.is_displayed() and "the dense model's speed" in tip.text
    send(page, ESCAPE)
    assert not tip.is_displayed()
    ActionChains(page).move_to_element(point.find_element("css selector", "circle")).perform()
    wait_until(tip.is_displayed)


def test_everything_can_be_reached_by_keyboard(page: Any) -> None:
    reached = set()
    page.execute_script("document.activeElement.blur(); scrollTo(0, 0)")
    for _ in range(80):
        send(page, TAB)
        where = "const one = document.activeElement; return one.id || one.closest('[id]')?.id || one.tagName"
        reached.add(page.execute_script(where))
    assert {"strip", "patches", "block", "model", "runs", "cost", "source-1"} <= reached


@pytest.mark.parametrize("width", [320, 390, 800, 1400])
def test_nothing_sticks_out(page: Any, width: int) -> None:
    show(page, width, "light")
    wide = page.execute_script("return document.documentElement.scrollWidth")
    assert wide <= width
    names = page.execute_script(
        "return [...document.querySelectorAll('.chart text')].map(one => one.getBoundingClientRect().height)"
    )
    assert min(names) >= 9


def test_dark(page: Any) -> None:
    def brightness() -> tuple[float, float]:
        colours = page.execute_script(
            "const style = getComputedStyle(document.body); return [style.backgroundColor, style.color]"
        )
        paper, ink = (sum(map(float, one[one.index("(") + 1 : -1].split(",")[:3])) / 765 for one in colours)
        return paper, ink

    paper, ink = brightness()
    assert paper > 0.9 and ink < 0.2
    show(page, 1100, "dark")
    paper, ink = brightness()
    assert paper < 0.15 and ink > 0.8


def test_prints(page: Any) -> None:
    printed = page.execute_cdp_cmd("Page.printToPDF", {})
    assert base64.b64decode(printed["data"]).startswith(b"%PDF") and len(printed["data"]) > 50_000
    assert all(one.get_property("open") for one in page.find_elements("css selector", "details"))
    show(page, 1100, "light", media="print")
    assert not page.find_element("css selector", "nav").is_displayed()


def test_missing_browser_fails_only_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("LEANVIT_NEEDS_BROWSER", "1")
    with pytest.raises(pytest.fail.Exception, match=r"is missing"):
        ask_for_browser()
    monkeypatch.delenv("LEANVIT_NEEDS_BROWSER")
    with pytest.raises(pytest.skip.Exception, match=r"is missing"):
        ask_for_browser()
