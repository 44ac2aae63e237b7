"""A headless Chromium for tests of pages; Debian's, by selenium, without any network."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_FLAGS = (
    "--headless",
    "--no-sandbox",  # the tests may run as root, in a container
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-device-scale-factor=1",
)


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A browser with a fresh profile in `profile`; skips the test where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium: pip install selenium")
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no Chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*_FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # given the path, selenium does not look for a driver on the network
    service = webdriver.ChromeService(executable_path=driver)
    browsing = webdriver.Chrome(options=options, service=service)
    try:
        browsing.set_page_load_timeout(30)
        yield browsing
    finally:
        browsing.quit()


def resized(browser: Any, width: int, height: int = 900) -> None:
    """Gives the page a viewport of this size: a headless window has a least width of its own."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def preferring(browser: Any, **features: str) -> None:
    """What the reader's system asks for: prefers_color_scheme="dark", prefers_reduced_motion="reduce"."""
    told = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": told})
