"""A conversation on the chat page: asked, streamed, stopped, folded, kept, tried again; and what goes wrong."""

import json

from tests.serve.page.browser import ENTER, ESCAPE, LEFT, UP
from tests.serve.page.scripted import Break, Gate, Say, Think

# what goes right


def test_an_answer_streams_in_with_its_thought_folded_and_counted(page, script):
    middle, end = Gate(), Gate()
    thoughts, words = (
        [Think("Let me see. A hull"), middle, Think(" floats.")],
        [Say("It **floats"), end, Say("** well.")],
    )
    script.answers = [[*thoughts, *words]]
    script.drafted, script.cached = (20, 15, 9), 96
    page.type("Does it float?" + ENTER)
    page.until(lambda: page.text(".thought-count").startswith("6 tokens"))
    assert page.text(".thought-name") == "Thinking" and "A hull" in page.text(".glimpse")
    assert page.find("#stop") and not page.find("#send") and not page.find(".thought-text")
    middle.open.set()
    page.until(lambda: page.text(".words") == "It **floats")
    assert page.run("return document.querySelector('.answer').getAttribute('aria-busy')") == "true"
    end.open.set()
    page.done()
    assert page.texts(".words strong") == ["floats"] and page.text(".words") == "It floats well."
    assert page.text(".thought-name") == "Thought" and page.text(".thought-count").startswith("9 tokens")
    assert page.soundings() == {
        "tokens": "16",
        "per second": "61",
        "drafts accepted": "15 of 20",
        "prompt from cache": "96 of 412",
    }
    assert page.text("#said").splitlines()[0] == "It floats well."  # what a screen reader hears
    assert script.body["messages"] == [{"role": "user", "content": "Does it float?"}]
    assert script.body["chat_template_kwargs"] == {"enable_thinking": True}
    assert "thinking_token_budget" not in script.body and "temperature" not in script.body
    assert page.complaints() == []


def test_stop_keeps_what_was_said_and_frees_the_server(page, script):
    script.answers = [[Say("As far as"), Gate()], [Say("Yes.")]]
    page.type("Go on" + ENTER)
    page.until(lambda: page.text(".words") == "As far as")
    page.type(ESCAPE)
    page.done()
    page.until(lambda: script.left == 1)
    assert page.text(".words") == "As far as" and page.text(".problem") == "Stopped."
    assert page.soundings()["tokens"] == "3"
    page.ask("And?")
    assert [message["content"] for message in script.body["messages"]] == ["Go on", "As far as", "And?"]


def test_a_thought_unfolds_by_keyboard_and_pointer(page, script):
    script.answers = [[Think("First *this*,\n\nthen that."), Say("Done.")]]
    page.ask("Think")
    assert page.find(".thought") and not page.find(".thought-text")
    page.type(ENTER, into=".thought summary")
    assert page.text(".thought-text") == "First this,\n\nthen that."
    page.click(".thought summary")
    assert not page.find(".thought-text")


def test_budget_and_switch_reach_the_server_and_survive_a_reload(page, script):
    script.answers = [[Think("Long thoughts"), Gate()], [Say("Aye.")]]
    page.type(*[LEFT] * 7, into="#budget")
    assert page.text("#budget-shown") == "128 tokens"
    assert page.one("#budget").get_attribute("aria-valuetext") == "128 tokens"
    page.type("One" + ENTER)
    page.until(lambda: page.text(".thought-count") == "5 of 128 tokens")
    assert page.one(".scale").get_attribute("aria-label") == "5 of 128 tokens of thought used"
    page.click("#stop")
    page.done()
    assert script.body["thinking_token_budget"] == 128
    page.reload()
    assert page.text("#budget-shown") == "128 tokens"
    page.focus("#thinking")
    page.press(" ")
    assert not page.one("#budget").is_enabled()
    page.ask("Two")
    assert script.body["chat_template_kwargs"] == {"enable_thinking": False}
    assert "thinking_token_budget" not in script.body


def test_a_reload_keeps_the_conversation_and_the_half_written(page, script):
    script.answers = [[Think("Hm."), Say("First.")], [Say("Second, half"), Gate()]]
    page.ask("One")
    page.type("Two" + ENTER)
    page.until(lambda: page.text(".words") == "Second, half")
    page.type("a draft")
    page.reload()
    assert page.texts(".asked") == ["One", "Two"] and page.texts(".words") == ["First.", "Second, half"]
    assert page.text(".problem") == "Stopped." and page.one("#question").get_attribute("value") == "a draft"
    assert page.driver.title == "One · Trimaran"
    page.click("#fresh")
    assert not page.find(".turn") and page.find("#empty")
    page.click("#notice button")
    assert page.texts(".asked") == ["One", "Two"]


def test_another_answer_is_kept_beside_the_first_and_an_edit_replaces_both(page, script):
    script.answers = [[Say("Red.")], [Say("Blue.")], [Say("Seven.")]]
    page.ask("A colour")
    page.click(".again")
    page.until(lambda: page.text(".words") == "Blue.")
    page.done()
    assert script.body["messages"] == [{"role": "user", "content": "A colour"}]
    assert page.text(".which") == "2 of 2"
    page.click(".earlier")
    assert page.text(".words") == "Red." and page.text(".which") == "1 of 2"
    page.type(UP)
    assert page.one("#question").get_attribute("value") == "A colour" and page.find("#editing")
    page.type(ESCAPE)
    assert page.one("#question").get_attribute("value") == "" and not page.find("#editing")
    page.click(".edit")
    page.type(" or a number" + ENTER)
    page.until(lambda: page.text(".words") == "Seven.")
    page.done()
    assert page.texts(".asked") == ["A colour or a number"] and not page.find(".versions")


def test_settings_are_sent_and_what_cannot_be_sent_opens_them(page, script):
    page.click("#open-settings")
    page.type("You are a sailor.", into="#system")
    page.type("0.5", into="#temperature")
    page.type("42", into="#seed")
    page.type("END\n\nSTOP", into="#stop-texts")
    page.type("-3", into="#max_tokens")
    page.type(ESCAPE, into="#seed")
    page.type("Ahoy" + ENTER)
    page.until(lambda: page.find("#drawer"))
    assert script.requests == [] and page.run("return document.activeElement.id") == "max_tokens"
    page.run("document.getElementById('max_tokens').value = ''")
    page.type("64", into="#max_tokens")
    page.click("#close-settings")
    page.click("#send")
    page.done()
    sent = script.body
    assert sent["messages"][0] == {"role": "system", "content": "You are a sailor."}
    assert (sent["temperature"], sent["seed"], sent["max_tokens"]) == (0.5, 42, 64) and "top_p" not in sent
    assert sent["stop"] == ["END", "STOP"]


def test_a_base_model_goes_on_with_the_text(opened, script):
    script.base = "it was pretrained and nothing more"
    script.answers = [[Say("(self, *parts*):\n    <b>pass</b>")]]
    page = opened()
    assert not page.find("#thinking-rein") and not page.find("#budget")
    page.ask("def join")
    path, sent = script.requests[-1]
    assert path == "/v1/completions" and sent["prompt"] == "def join" and sent["max_tokens"] == 256
    assert page.text(".words") == "def join(self, *parts*):\n    <b>pass</b>"
    page.reload()
    assert page.text(".words") == "def join(self, *parts*):\n    <b>pass</b>"


# what goes wrong


def test_failures_are_told_in_words_and_can_be_tried_again(page, script):
    script.refusal = (429, "the queue is full", {"Retry-After": "7"})
    script.answers = [[Say("Half of"), Break()], [Say("Whole.")]]
    page.ask("Go")
    assert page.text(".problem") == "the queue is full Try again in 7 s." and not page.find(".words > *")
    page.click(".again")
    page.until(lambda: page.text(".problem").startswith("The connection"))
    page.done()
    assert page.text(".words") == "Half of"
    page.click(".again")
    page.until(lambda: page.text(".words") == "Whole.")
    assert page.text(".which") == "2 of 2"  # the refusal, which said nothing, is not among them


def test_a_key_is_asked_for_and_kept_only_when_that_is_wished(opened, script):
    script.key = "sesame"
    page = opened()
    page.type("wrong" + ENTER, into="#key")
    page.until(lambda: page.text("#key-said") == "wrong or no key")
    page.type("sesame" + ENTER, into="#key")
    page.until(lambda: page.text("#ship") == "hybrid-nano")
    page.ask("In?")
    assert page.text(".words") == "Aye."
    assert "sesame" not in json.dumps(page.run("return {...localStorage}"))
    script.key = "changed"
    page.ask("And now?")
    page.click("#keep-key")
    page.type("changed" + ENTER, into="#key")
    page.until(lambda: page.texts(".words") == ["Aye.", "Aye."])
    assert json.loads(page.run("return localStorage['trimaran.key']")) == "changed"
    page.click("#open-settings")
    page.click("#forget-key")
    assert "changed" not in json.dumps(page.run("return [{...localStorage}, {...sessionStorage}]"))
