import os
import shutil

import pytest
from browsing import Tab
from synthetic import searched, write_analyses, write_comparison, write_run

from ecoflap.report import html, write_compare, write_report
from ecoflap.report.charts import static

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@pytest.fixture(scope="session", autouse=True)
def _each_chart_drawn_once():
    """Most pages here show the same run: matplotlib draws each of its charts once, for all tests."""
    drawn = {}

    def svg(chart, prefix):
        key = (repr(chart), prefix)
        if key not in drawn:
            drawn[key] = static.svg(chart, prefix)
        return drawn[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html, "svg", svg)
        yield


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """An installed Chromium without a window; the tests that need one are skipped where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        pytest.skip("no Chromium is installed: apt-get install chromium, or set CHROMIUM to its path")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


@pytest.fixture(scope="session")
def report(tmp_path_factory):
    return write_report(write_analyses(write_run(tmp_path_factory.mktemp("run"), allocation=searched())))


@pytest.fixture(scope="session")
def compared(tmp_path_factory):
    return write_compare(write_comparison(tmp_path_factory.mktemp("compared")))


@pytest.fixture
def open_tab(browser):
    tabs = []

    def opened(path, **options):
        tabs.append(Tab(browser, path, **options))
        return tabs[-1]

    yield opened
    for tab in tabs:
        tab.context.close()
        assert tab.said == []  # no error, no breach of the policy
        assert all(url.startswith(("file:", "data:", "blob:")) for url in tab.asked)
