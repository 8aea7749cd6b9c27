"""The chat page and `trimaran serve` understand each other."""

import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from tests.models import chained
from tests.serve.conftest import SUM, THOUGHT, chat
from tests.serve.page.browser import ENTER, LEFT, Page
from trimaran.model import hub
from trimaran.serve.main import Running, running
from trimaran.text.tokenizer import Tokenizer


def test_the_page_and_the_server_understand_each_other(driver, server: Running):
    page = Page(driver, server.url)
    assert page.text("#ship") == "learnt" and "tokens" in page.text("#cartouche-about")
    page.click("#open-settings")
    page.type("0", into="#temperature")
    page.click("#close-settings")
    page.ask(SUM["content"])
    wanted = chat(server)[1]
    assert page.text(".words") == wanted["choices"][0]["message"]["content"] == "Four."
    page.click(".thought summary")
    assert page.text(".thought-text").replace("\n\n", "\n") == THOUGHT
    usage = wanted["usage"]
    assert page.text(".thought-count").startswith(f"{usage['completion_tokens_details']['reasoning_tokens']} tokens")
    assert page.soundings()["tokens"] == str(usage["completion_tokens"])
    page.type(*[LEFT] * 10, into="#budget")
    page.click(".again")
    page.until(lambda: page.text(".which") == "2 of 2")
    page.done()
    assert page.text(".words") == "Four."  # the thought is shorter than the least budget, which changes nothing
    page.focus("#thinking")
    page.press(" ")
    page.click(".again")
    page.until(lambda: page.text(".which") == "3 of 3")
    page.done()
    assert page.text(".words") == "It is four." and not page.find(".thought")
    names = page.run("return performance.getEntriesByType('resource').map((one) => one.name)")
    assert names and all(name.startswith(server.url) for name in names)
    assert page.complaints() == []
    page.run("localStorage.clear()")


def test_a_base_model_behind_a_key(driver, folder: Path, tmp_path):
    shutil.copytree(folder, tmp_path / "base")
    (tmp_path / "base" / "recipe.toml").write_text('stage = "pretrain"\n')
    with running(tmp_path / "base", ["serve.port=0", "serve.api_key=sesame", "engine.rows=2"]) as server:
        page = Page(driver, server.url)
        page.type("sesame" + ENTER, into="#key")
        page.until(lambda: page.text("#ship") == "base")
        assert page.text("#cartouche-about").startswith("A base model")
        page.ask(SUM["content"])
        assert page.text(".words").startswith(SUM["content"]) and int(page.soundings()["tokens"]) <= 256
        assert page.text(".problem") in ("", "Cut off: the most tokens that were allowed.")
        assert page.complaints() == []
        page.run("localStorage.clear()")


@pytest.fixture
def ponderer(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A run folder of a model that thinks the same line over and over and, once it is made to stop, says Four."""
    line_end = tokenizer.encode("\n")[0]
    thought = [*tokenizer.encode("that is four,"), line_end]
    answer = [tokenizer.id_of("</think>"), *tokenizer.encode("Four."), tokenizer.id_of("<|im_end|>")]
    assert len({*thought, *answer}) == len(thought) + len(answer)
    hub.save(
        chained(dict([*pairwise([line_end, *thought]), *pairwise(answer)]), tokenizer.vocab_size), tmp_path / "run"
    )
    tokenizer.save(tmp_path / "run")
    (tmp_path / "run" / "recipe.toml").write_text('stage = "sft"\n')
    return tmp_path / "run"


def test_the_slider_cuts_a_thought_that_would_go_on(driver, ponderer: Path):
    line = len(Tokenizer.load(ponderer).encode("that is four,")) + 1
    with running(ponderer, ["serve.port=0", "engine.rows=2"]) as server:
        endless = chat(server, max_tokens=300)[1]
        assert endless["choices"][0]["finish_reason"] == "length"
        assert endless["usage"]["completion_tokens_details"]["reasoning_tokens"] == 300
        page = Page(driver, server.url)
        page.click("#open-settings")
        page.type("0", into="#temperature")
        page.click("#close-settings")
        page.type(*[LEFT] * 8, into="#budget")
        for budget in (64, 32):
            assert page.text("#budget-shown") == f"{budget} tokens"
            page.ask(SUM["content"])
            assert page.text(".words") == "Four."
            assert page.text(".thought-count").startswith(f"{budget} tokens")
            page.click(".thought summary")
            lines = page.text(".thought-text").count("that is four,")
            assert lines == (budget + 1) // line  # of the last one the line's end may be missing
            page.type(LEFT, into="#budget")
        assert page.complaints() == []
        page.run("localStorage.clear()")
