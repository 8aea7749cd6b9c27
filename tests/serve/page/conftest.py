"""One browser for all pages, and a scripted server for each."""

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest

from tests.serve.page.browser import Page, launch
from tests.serve.page.scripted import Script, Stage, application, serving


@pytest.fixture(scope="session")
def driver() -> Iterator[Any]:
    driver = launch()
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def theatre() -> Iterator[tuple[Stage, int, Iterator[int]]]:
    """The scripted server: its stage, its port, and numbers for its performances."""
    stage = Stage()
    with serving(application(stage)) as port:
        yield stage, port, count()


@pytest.fixture
def script(theatre: tuple[Stage, int, Iterator[int]]) -> Script:
    theatre[0].script = Script()
    return theatre[0].script


@pytest.fixture
def opened(driver: Any, script: Script, theatre: tuple[Stage, int, Iterator[int]]) -> Iterator[Callable[..., Page]]:
    """Opens the page of the scripted server, at an address of its own: a browser keeps things by address."""
    _, port, numbers = theatre
    url = f"http://test{next(numbers)}.localhost:{port}/"  # browsers take all of .localhost to be this machine
    yield lambda **look: Page(driver, url, **look)
    driver.get("about:blank")


@pytest.fixture
def page(opened: Callable[..., Page]) -> Page:
    return opened()
