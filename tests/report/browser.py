"""A real Chromium that shows a page of ours from a file, and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# Without these, a fresh Chromium asks home for updates and accounts before it shows a page.
OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    *("--disable-default-apps", "--hide-scrollbars"),
)

# sRGB as in WCAG 2.2: the contrast of each text with the nearest ground that is painted below it.
CONTRASTS = """
const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
const luminance = (colour) => {
  const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const [r, g, b] = channels(colour).map((c) => linear(c / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = (node) => {
  for (let at = node; at; at = at.parentElement) {
    const colour = getComputedStyle(at).backgroundColor;
    if ((channels(colour)[3] ?? 1) > 0) return colour;
  }
  return "rgb(255, 255, 255)";
};
const ownText = (node) => [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
return [...document.body.querySelectorAll("*:not(script):not(noscript)")].filter(ownText).map((node) => {
  const style = getComputedStyle(node);
  const colour = node instanceof SVGElement ? style.fill : style.color;
  const [dark, light] = [luminance(colour), luminance(ground(node))].sort((a, b) => a - b);
  return [(light + 0.05) / (dark + 0.05), node.textContent.trim().slice(0, 40)];
});
"""


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """Start Chromium with an empty profile in that folder; skip where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("chromium and chromedriver are not both installed")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for option in (*OPTIONS, f"--user-data-dir={profile}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # With the path given, selenium looks for no driver and downloads none.
    session = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    try:
        yield session
    finally:
        session.quit()


def show(session: Any, path: Path, width: int, height: int, scheme: str = "light", media: str = "") -> None:
    """Open a page in a window of that size; charts are drawn when this returns."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    session.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    session.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    session.get(path.as_uri())
    session.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
