"""A browser for the tests of the pages, the reports they open, and pages that several tests share."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("tests.browser")

if TYPE_CHECKING:
    from playwright.sync_api import Page

    from qvis.report import Report
    from tests.browser import Chromium


# The same examples each time, however long they take; --hypothesis-profile=default looks for others.
settings.register_profile(
    "steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)
settings.load_profile("steady")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the files of tests/golden anew")
    parser.addoption("--slow-browser", type=float, default=1, metavar="N", help="run the pages N times slower")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Every test, with its fixtures, begins with the same random numbers, whichever tests came before it."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    if "keras" in sys.modules:
        sys.modules["keras"].utils.set_random_seed(0)


@pytest.fixture(scope="session")
def browser(pytestconfig: pytest.Config) -> Iterator[Chromium]:
    """One Chromium for all tests."""
    from playwright.sync_api import Error, expect, sync_playwright

    from tests.browser import PATIENCE, Chromium

    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        try:
            browser, reason = Chromium(playwright, pytestconfig.getoption("--slow-browser")), ""
        except Error as error:
            browser, reason = None, str(error).strip().splitlines()[0]
        if browser is None:
            pytest.fail(f"no Chromium for the tests: install it or set CHROMIUM to its path ({reason})", pytrace=False)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Report]:
    """Makes the reports named in ``tests.browser.make_report``, each once."""
    from tests.browser import make_report

    return cache(lambda name: make_report(name, tmp_path_factory.mktemp("report")))


SHARED = pytest.StashKey["SharedPages"]()


class SharedPages:
    """Opens each report once, for the tests that can take turns."""

    def __init__(self, browser: Chromium, report: Callable[[str], Report], stack: ExitStack) -> None:
        self.browser, self.report, self.stack = browser, report, stack
        self.open: dict[str, Page] = {}
        self.visited: dict[str, Page] = {}
        """Those that the current test uses."""

    def __call__(self, name: str) -> Page:
        from tests.browser import opened

        if name not in self.open:
            self.open[name] = self.stack.enter_context(opened(self.browser, self.report(name).path))
        self.visited[name] = self.open[name]
        return self.open[name]


@pytest.fixture(scope="session")
def shared_page(
    pytestconfig: pytest.Config, browser: Chromium, report: Callable[[str], Report]
) -> Iterator[SharedPages]:
    """Opens each report once, for the tests that can take turns."""
    with ExitStack() as stack:
        pytestconfig.stash[SHARED] = SharedPages(browser, report, stack)
        yield pytestconfig.stash[SHARED]


@pytest.fixture
def visit(shared_page: SharedPages) -> Iterator[Callable[..., Page]]:
    """Shows a layer of a report, the worst by default; the page must stay silent during the test."""
    from tests.browser import show

    shared_page.visited.clear()

    def open_at(name: str, layer: str | None = None) -> Page:
        page = shared_page(name)
        show(page, layer)
        return page

    yield open_at
    for page in shared_page.visited.values():
        assert page.watch.messages == []
        assert page.watch.foreign_requests == []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Where a shared page is no longer drawn, say so, and let the next test open it anew."""
    if "visit" not in getattr(item, "fixturenames", ()):
        return (yield)
    from tests.browser import StalledError, telling_stalls

    pages = item.config.stash[SHARED]
    try:
        with telling_stalls(pages.browser, pages.visited.values()):
            return (yield)
    except StalledError:
        pages.open.clear()
        raise
