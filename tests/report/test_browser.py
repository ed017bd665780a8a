"""Proves in a real headless browser that the page can be read: its style applies, it fits, it runs and loads nothing.

Run: pytest tests/report/test_browser.py        (needs Debian's chromium, or another on the PATH or in GLM4FT_CHROMIUM)
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from report_samples import TOKENIZER, founding_bug, hostile, row_of, with_losses

from glm4ft.report.content import Content
from glm4ft.report.html_page import render_page

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--virtual-time-budget=2000",
)  # fmt: skip
PROBE = Path(__file__).with_name("probe.html")

pytestmark = pytest.mark.browser


@dataclass(frozen=True)
class Browser:
    """A headless browser.

    Args:
        program: The path of the browser.
    """

    program: str

    def run(self, folder: Path, *args: str) -> str:
        """Run the browser, with its profile in the folder, and return its stdout."""
        command = [self.program, *FLAGS, f"--user-data-dir={folder / 'profile'}", *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    def measure(self, folder: Path, pages: Mapping[str, tuple[Content, int]], *args: str) -> dict[str, dict[str, Any]]:
        """Measure each page at its width with the probe, in one start of the browser for all pages."""
        for name, (content, _) in pages.items():
            (folder / f"{name}.html").write_text(render_page(content), "utf-8")
        wanted = json.dumps([[name, f"{name}.html", width] for name, (_, width) in pages.items()])
        probe = folder / "probe.html"
        probe.write_text(PROBE.read_text("utf-8").replace("/*WANTED*/ []", wanted), "utf-8")
        # lets the probe read the frames; the security policy of the pages in them still applies
        shown = self.run(folder, "--allow-file-access-from-files", *args, "--dump-dom", probe.as_uri())
        found = re.search(r'<pre id="out">(.+?)</pre>', shown, re.S)
        assert found, shown[-2000:]
        figures: dict[str, dict[str, Any]] = json.loads(html.unescape(found[1]))
        return figures


@pytest.fixture(scope="module")
def browser() -> Browser:
    """The headless Chromium; the tests are skipped if there is none."""
    given = os.environ.get("GLM4FT_CHROMIUM")
    found = given or next(filter(None, map(shutil.which, NAMES)), None)
    if not found or not shutil.which(found):
        pytest.skip(f"needs a headless browser; found none of {', '.join(NAMES)} and no GLM4FT_CHROMIUM")
    return Browser(found)


def long() -> Content:
    """A conversation of 1,000 tokens in each of two scripts, one without a space to break at."""
    rows = (with_losses(row_of("why " * 300, "so " * 600)), with_losses(row_of("河" * 300, "x" * 900), body=1.0))
    bug = founding_bug()
    return Content("a long one " + "long" * 60, bug.headline, TOKENIZER, rows=rows, num_rows=2, curves=bug.curves)


@pytest.fixture(scope="module")
def light(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The measurements of several pages."""
    levels = replace(founding_bug(), rows=tuple(with_losses(row_of("a", "b"), body=x) for x in (0.01, 0.1, 1.0, 5.0)))
    pages = {"bug": (founding_bug(), 1000), "levels": (levels, 1000), "screen": (long(), 1000), "phone": (long(), 360)}
    return browser.measure(tmp_path_factory.mktemp("light"), {**pages, "hostile": (hostile(), 1000)})


@pytest.fixture(scope="module")
def dark(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The measurements of a page in dark mode."""
    pages = {"bug": (founding_bug(), 1000)}
    return browser.measure(tmp_path_factory.mktemp("dark"), pages, "--blink-settings=preferredColorScheme=0")


def test_the_policy_lets_the_style_sheet_through_in_light_and_dark(light: Any, dark: Any) -> None:
    assert (light["bug"]["paper"], dark["bug"]["paper"]) == ("rgb(255, 255, 255)", "rgb(20, 23, 27)")
    assert (light["bug"]["curve"], dark["bug"]["curve"]) == ("rgb(10, 93, 181)", "rgb(122, 183, 255)")


def test_every_text_stands_out_from_what_is_behind_it(light: Any, dark: Any) -> None:
    """WCAG 2.2 AA asks for a contrast of 4.5."""
    least = min(light["bug"]["contrast"], light["levels"]["contrast"], dark["bug"]["contrast"])
    assert least[0] >= 4.5, least


def test_levels_of_loss_differ_by_more_than_colour(light: Any) -> None:
    colours, lines = zip(*light["levels"]["levels"], strict=True)
    assert len(set(colours)) == len(set(lines)) == 4


@pytest.mark.parametrize("name", ["screen", "phone", "hostile"])
def test_nothing_is_wider_than_the_page(light: Any, name: str) -> None:
    """It fits with Chinese text too, and with text that has no place to break."""
    assert (light[name]["overflow"], light[name]["wide"]) == (0, [])


def test_long_conversations_stay_folded(light: Any) -> None:
    folds = light["screen"]["folds"]
    assert len(folds) >= 3
    assert all(not is_open and height < 60 for is_open, height in folds)


def test_hostile_text_becomes_no_element_of_a_browser(light: Any) -> None:
    """The page has no script, image, link or form, and its title is the hostile text itself."""
    assert light["hostile"]["elements"] == [0, 0, 0, 0]
    assert light["hostile"]["title"].startswith("<script>alert(1)</script>")


def test_the_page_of_a_real_run_prints_on_few_pages(browser: Browser, tmp_path: Path, learnt: Any) -> None:
    page = (learnt.output / "report.html").as_uri()
    browser.run(tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'page.pdf'}", page)
    assert 1 <= len(re.findall(rb"/Type /Page\b", (tmp_path / "page.pdf").read_bytes())) <= 6
