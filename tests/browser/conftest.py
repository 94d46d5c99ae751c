"""A real browser for the pages, where there is one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no chromium on this machine (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield found
        found.close()


@pytest.fixture
def visit(browser):
    """Opens a file as a reader would; whatever the browser complains of or asks the network for fails the test."""
    contexts, complaints = [], []

    def opened(path: Path, *, width: int = 1280, scheme: str = "light", touch: bool = False):
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, has_touch=touch, reduced_motion="reduce"
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request", lambda request: None if request.url.startswith("file://") else complaints.append(request.url)
        )
        page.goto(path.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def faults():
    """Serious and critical faults that axe-core finds in a page."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()

    def found(page) -> list[str]:
        # A picture is one image with a label: what is drawn in it is judged by no rule, and there are thousands.
        seen = axe.run(page, context={"exclude": [["svg"]]}, options={"resultTypes": ["violations"]})
        return [
            f"{item['id']}: {item['help']} at {node['target']}"
            for item in seen.response["violations"]
            if item["impact"] in ("serious", "critical")
            for node in item["nodes"][:3]
        ]

    return found


@pytest.fixture
def overflow():
    """By how many pixels a page is wider than its window."""
    return lambda page: page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
