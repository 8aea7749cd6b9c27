"""A headless Chromium and the chat page in it, as a person meets them: by labels, keys and what can be read."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed; next: pip install -e '.[dev]'")

from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

TAB, ENTER, ESCAPE, LEFT, UP = "\ue004", "\ue007", "\ue00c", "\ue012", "\ue013"
PATIENCE = 20  # seconds for what takes milliseconds on an idle machine


def found(*names: str) -> str | None:
    return next(filter(None, map(shutil.which, names)), None)


def launch() -> Any:
    """A browser, or a skip that says what to install."""
    browser, driver = found("chromium", "chromium-browser", "google-chrome"), found("chromedriver")
    if not browser or not driver:
        pytest.skip("no chromium and chromedriver; next: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for word in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--lang=en"):
        options.add_argument(word)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium's own refuses to run as root; the pages are ours
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=Service(driver))


class Page:
    """The chat page of one address."""

    def __init__(self, driver: Any, url: str, *, wide: int = 1280, high: int = 860, dark: bool = False):
        self.driver = driver
        self.look(wide, high, dark)
        driver.get_log("browser")  # what an earlier page complained of is forgotten
        driver.get(url)
        self.until(lambda: self.text("#ship") != "Trimaran" or self.find("dialog[open], #notice:not([hidden])"))

    def look(self, wide: int, high: int, dark: bool) -> None:
        """The size of the window, in which narrow is a phone, and the system's colours."""
        phone = wide < 500
        metrics = {"width": wide, "height": high, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": phone})
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme, still]})

    def find(self, selector: str) -> list[WebElement]:
        """What is there and can be seen."""
        return [one for one in self.driver.find_elements(By.CSS_SELECTOR, selector) if one.is_displayed()]

    def one(self, selector: str) -> WebElement:
        """The only one, or the last, of what can be seen."""
        self.until(lambda: self.find(selector))
        return self.find(selector)[-1]

    def text(self, selector: str) -> str:
        """The last one's text, seen or not."""
        return self.run("return [...document.querySelectorAll(arguments[0])].at(-1)?.innerText ?? ''", selector)

    def texts(self, selector: str) -> list[str]:
        return [one.text for one in self.find(selector)]

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def module(self, name: str, script: str, *arguments: Any) -> Any:
        """What `script` returns, with the page's module `name` as `m` and the arguments as `a`."""
        body = f"""const a = [...arguments].slice(0, -1), done = [...arguments].at(-1);
            const failed = (error) => done("error: " + error.stack);
            import("/static/{name}.js").then((m) => {{ {script} }}).then(done, failed);"""
        return self.driver.execute_async_script(body, *arguments)

    def until(self, condition: Callable[[], Any]) -> None:
        WebDriverWait(self, PATIENCE, poll_frequency=0.02).until(lambda _: condition())

    def type(self, *keys: str, into: str = "#question") -> None:
        self.one(into).send_keys(*keys)

    def click(self, selector: str) -> None:
        """Brings it to the middle of the page and presses it."""
        self.run("arguments[0].scrollIntoView({ block: 'center' })", self.one(selector))
        self.one(selector).click()

    def focus(self, selector: str) -> None:
        self.run("document.querySelector(arguments[0]).focus()", selector)

    def at_top(self) -> bool:
        return self.run("return scrollY") == 0

    def press(self, key: str) -> None:
        """A key for whatever has the focus."""
        webdriver.ActionChains(self.driver).send_keys(key).perform()

    def ask(self, question: str) -> None:
        """Pastes a question, sends it and waits until its answer has ended."""
        turns = len(self.find(".turn"))
        pasted = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
        self.run(pasted, self.one("#question"), question)
        self.one("#send").click()
        self.until(lambda: len(self.find(".turn")) == turns + 1)
        self.done()

    def done(self) -> None:
        self.until(lambda: self.find("#send") and not self.find(".turn.live"))

    def soundings(self) -> dict[str, str]:
        """The numbers of the last answer."""
        rows = self.driver.find_elements(By.CSS_SELECTOR, ".turn:last-child .soundings div")
        return {one.find_element(By.TAG_NAME, "dt").text: one.find_element(By.TAG_NAME, "dd").text for one in rows}

    def reload(self) -> None:
        self.driver.refresh()
        self.until(lambda: self.text("#ship") != "Trimaran")

    def complaints(self) -> list[str]:
        """What the console holds of errors and warnings: broken scripts, and all that the page's policy stopped."""
        logged = [one for one in self.driver.get_log("browser") if one["level"] in ("SEVERE", "WARNING")]
        return [one["message"] for one in logged if one["source"] != "network"]  # a refused request is no fault of it

    def picture(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.driver.save_screenshot(str(path))
        return path
