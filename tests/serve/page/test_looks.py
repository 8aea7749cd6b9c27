"""The chat page to eyes and hands: wide and narrow, light and dark, by keyboard and by touch."""

import os
from pathlib import Path

import pytest
from PIL import Image

from tests.serve.page.browser import ENTER, ESCAPE, LEFT, TAB, Page
from tests.serve.page.scripted import Gate, Say, Script, Think

WIDE, PHONE, NARROW = (1280, 860), (390, 844), (320, 600)
LOOKS = {"wide": (*WIDE, False), "wide-dark": (*WIDE, True), "phone-dark": (*PHONE, True), "narrow": (*NARROW, False)}
ANSWER = """A trimaran carries **three hulls**: a slender main hull, the *vaka*, and two floats, the *amas*, joined to \
it by beams called `akas`. Its stability comes from width and not from ballast, so it stays light and sails fast.

How much of its righting moment the wind has taken up is one line:

```python
def heeling(force, arm, weight, beam):
    \"\"\"Share of the righting moment that the wind takes up.\"\"\"
    return force * arm / (weight * beam / 2)  # no unit is left
```

Two things follow:

1. Doubling the **beam** doubles the moment. So does doubling the weight, at a price.
2. A gust is answered by *accelerating*, not by heeling.

| hull | length | buoyancy |
|:-----|-------:|---------:|
| main | 10.6 m | 82 % |
| float | 9.1 m | 9 % at rest |
"""
MUSING = """They ask about stability. The moment is weight times half of the beam, until one hull lifts.

A short function, then what follows."""


def sail(page: Page, script: Script) -> None:
    """A conversation worth a picture."""
    script.answers = [[Think(MUSING), Say(ANSWER)]]
    script.drafted, script.cached = (96, 71, 52), 384
    page.ask("Why is a trimaran stable without a keel?")


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_everything_can_be_read_named_and_pressed(opened, script, look):
    page = opened(wide=look[0], high=look[1], dark=look[2])
    faults = (Path(__file__).parent / "faults.js").read_text()
    assert page.run(faults) == []
    sail(page, script)
    page.click(".thought summary")
    script.refusal = (400, "a word " * 30 + "w" * 300, {})
    page.ask("x" * 300)
    assert page.run(faults) == []
    page.click("#open-settings")
    assert page.run(faults) == []


def test_the_whole_page_works_by_keyboard(page, script):
    """Tab goes through everything in the order it is read, and shows where it is."""
    page.ask("Hello")
    page.focus(".skip")
    seen = []
    for _ in range(14):
        name, ring = page.run(
            """const one = document.activeElement;
            const ring = getComputedStyle(one.matches("[role=switch]") ? one.nextElementSibling : one).outlineStyle;
            return [one.id || one.className || one.tagName, ring !== "none" || one.id === "question"];"""
        )
        assert ring or name == "skip", f"{name} does not show that it has the focus"
        seen.append(name)
        if name == "send":
            break
        page.press(TAB)
    assert seen == [
        *("skip", "fresh", "theme", "open-settings"),
        *("quiet edit", "quiet copy", "quiet again", "question", "thinking", "budget", "send"),
    ]
    page.type(ENTER, into="#open-settings")
    assert page.run("return document.querySelector('dialog').contains(document.activeElement)")
    page.press(ESCAPE)
    assert page.run("return document.activeElement.id") == "open-settings" and not page.find("dialog")
    page.press("/")
    assert page.run("return document.activeElement.id") == "question"


def test_a_chosen_colour_scheme_outlives_the_page(page):
    water = "return getComputedStyle(document.documentElement).backgroundColor"
    light = page.run(water)
    page.click("#theme")  # light, whatever the system says
    page.click("#theme")
    dark = page.run(water)
    assert dark != light and "dark" in page.one("#theme").get_attribute("aria-label")
    page.reload()
    assert page.run(water) == dark
    page.click("#theme")
    assert page.run(water) == light


def test_a_phone_keeps_enter_for_new_lines_and_follows_the_answer(opened, script):
    page = opened(wide=360, high=640)
    script.answers = [[Say("A line.\n\n" * 60), Gate()]]
    page.type("one" + ENTER + "two")
    assert script.requests == []
    page.click("#send")
    page.until(lambda: page.text(".words").count("A line.") == 60)
    beneath = "return document.documentElement.scrollHeight - innerHeight - scrollY"
    page.until(lambda: page.run(beneath) < 2)
    page.run("window.scrollTo(0, 0)")
    page.click("#latest")
    page.until(lambda: page.run(beneath) < 2 and not page.find("#latest"))
    assert script.body["messages"][0]["content"] == "one\ntwo"


def test_pictures(opened, script, tmp_path):
    """Of the page in daylight and of a phone at night. `TRIMARAN_PICTURES=docs/images` keeps them there."""
    folder = Path(os.environ.get("TRIMARAN_PICTURES", tmp_path))
    for name, (wide, high, dark) in {"chat.png": (1280, 860, False), "chat-phone.png": (390, 844, True)}.items():
        page = opened(wide=wide, high=high, dark=dark)
        page.run("localStorage.clear()")
        page.reload()
        page.type(*[LEFT] * 5, into="#budget")
        sail(page, script)
        page.run("document.activeElement.blur(); window.scrollTo(0, 0)")
        page.until(page.at_top)
        picture = Image.open(page.picture(folder / name))
        scale = 2 if wide < 500 else 1
        assert picture.size == (wide * scale, high * scale)
        colours = picture.convert("RGB").getcolors(2**24)
        assert len(colours) > 100
        assert (max(colours)[1][0] < 40) == dark
