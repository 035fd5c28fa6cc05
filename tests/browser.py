"""A page's address enters; the page in a real headless Chromium leaves, at a desk's width or a phone's.

`with chromium() as browser:` gives a selenium driver; the fixture `browser` is one for the whole session. A test that
asks for it fails in CI where the browser is missing, and is skipped elsewhere.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

WIDE, PHONE = (1280, 900), (390, 844)
"""Widths and heights of a window, CSS pixels."""

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextlib.contextmanager
def chromium(size: tuple[int, int] = WIDE) -> Iterator:
    """A browser of its own, with a fresh profile; what its pages write to the console is kept."""
    program = next(filter(None, map(shutil.which, _BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        reason = "no chromium or chromedriver (Debian: apt-get install chromium chromium-driver)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    from selenium import webdriver

    with tempfile.TemporaryDirectory(prefix="chromium_") as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = program
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        for flag in (*_FLAGS, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}"):
            options.add_argument(flag)
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        try:
            browser.set_page_load_timeout(60)
            yield browser
        finally:
            browser.quit()


def resize(browser, size: tuple[int, int]) -> None:
    """Sets the page's own width and height, which may be below the least that a window can have."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size[0] < 600},
    )


def screenshot(browser, path: Path) -> Path:
    """The whole page, as PNG."""
    import base64

    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True})
    path.write_bytes(base64.b64decode(shot["data"]))
    return path


def complaints(browser) -> list[str]:
    """What went wrong in the pages shown since the last call: script errors, refused or failed requests."""
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def overflow(browser) -> int:
    """By how many pixels the page is wider than its window; above 0, a reader has to scroll sideways."""
    return browser.execute_script("return document.documentElement.scrollWidth - document.documentElement.clientWidth")


def axe(browser) -> list[str]:
    """What axe-core finds wrong with the page as it is shown that keeps somebody from using it."""
    from axe_core_python.selenium import Axe

    found = Axe().run(browser)["violations"]
    return [
        f"{each['id']}: {node['html'][:120]}"
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]


def dark(browser, wanted: bool) -> None:
    """Whether the reader prefers dark pages."""
    features = [{"name": "prefers-color-scheme", "value": "dark" if wanted else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


@pytest.fixture(scope="session")
def browser() -> Iterator:
    with chromium() as driver:
        yield driver
