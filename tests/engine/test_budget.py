"""Budgets of thought: counted to the token, with every way of closing, and never in the way of a thought that ends."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimaran.engine.budget import AfterThought, Thinking
from trimaran.engine.guide import Guides, only
from trimaran.engine.plain import generate
from trimaran.engine.sampler import Sampling
from trimaran.errors import Refusal
from trimaran.text.tokenizer import Tokenizer

TEXTS = ["the boat, the boats\n", "a hull and a hull\n", "a </think> b\n\n", "<think>\nso"] * 5
RESERVED = Tokenizer.train(TEXTS, 300)


def spelled() -> Tokenizer:
    """The same without tokens for the tags, as in models taught to spell them."""
    document = dict(RESERVED.document)
    document["added_tokens"] = [t for t in document["added_tokens"] if t["content"] not in ("<think>", "</think>")]
    return Tokenizer(document, RESERVED.config, None)


SPELLED = spelled()
EITHER = {"reserved": RESERVED, "spelled": SPELLED}
either = pytest.mark.parametrize("tokenizer", EITHER.values(), ids=EITHER)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, specials=True)


def say(guide, script: list[int], forced: list[int] | None = None) -> list[int]:
    """What a model says that has `script` in mind and is forced now and then; it goes on with the script after.
    `forced` takes the places of the tokens that were."""
    said, script = [], list(script)
    while script:
        mask = guide.allowed()
        if mask is None:
            token = script.pop(0)
        else:
            token = int(mask.nonzero())
            if forced is not None:
                forced.append(len(said))
        ahead = guide.fork()
        ahead.push(token)  # looking along a draft changes nothing
        said.append(token)
        guide.push(token)
    return said


def thought_of(tokenizer: Tokenizer, said: list[int]) -> int:
    """Tokens before the closing tag, by its place in the text."""
    text = b"".join(tokenizer.token_bytes[token] for token in said)
    end, place, count = text.find(b"</think>"), 0, 0
    assert end >= 0
    for token in said:
        count += place < end
        place += len(tokenizer.token_bytes[token])
    return count


@either
@pytest.mark.parametrize("close", ["</think>", "\nenough.</think>"])
@pytest.mark.parametrize("budget", [0, 1, 5])
@pytest.mark.parametrize("opened", [True, False])
def test_a_budget_is_that_many_tokens_of_thought(tokenizer, opened, budget, close):
    closing = ids_of(tokenizer, close)
    assert (len(closing) == 1) == (tokenizer is RESERVED and close == "</think>")
    opening = [] if opened else ids_of(tokenizer, "<think>")
    script = opening + ids_of(tokenizer, "the boat and the hull and the boats")
    guide = Thinking(tokenizer, budget, opened=opened, close=closing)
    said = say(guide, script)
    assert said == script[: len(opening) + budget] + closing + script[len(opening) + budget :]
    assert thought_of(tokenizer, said[len(opening) :]) == budget + len(closing) - len(ids_of(tokenizer, "</think>"))
    assert guide.done and guide.allowed() is None


@either
@pytest.mark.parametrize(
    ("budget", "grace", "kept"),
    [
        (3, 0, "the boat"),  # no waiting
        (3, 1, "the boat,"),  # no line end within the grace
        (3, 50, "the boat, the\n"),
        (6, 50, "the boat, the\n"),  # at the end of a line already
        (0, 50, ""),
    ],
)
def test_grace_waits_for_the_end_of_the_line(tokenizer, budget, grace, kept):
    words = ["the", " boat", ",", " the", "\n", "a", " hull", "\n", "a"]
    script = [tokenizer.encode(word) for word in words]
    assert max(map(len, script)) <= 2
    tokens = [token for word in script for token in word]
    said = say(Thinking(tokenizer, budget, grace, opened=True), tokens)
    text = tokenizer.decode(said)
    kept_tokens = tokenizer.encode(kept)
    line = tokens.index(tokenizer.encode("\n")[0]) + 1
    expected = min(line, budget + grace) if 0 < budget <= line else budget
    assert text.index("</think>") == len(tokenizer.decode(tokens[:expected]))
    assert thought_of(tokenizer, said) == expected
    if grace == 50 and budget:
        assert text.startswith(kept + "</think>") and len(kept_tokens) == line


def test_a_tag_under_way_at_the_budget_is_finished_not_begun_again():
    """Where the tag is spelled: tokens of its beginning count until it is whole."""
    tag = [SPELLED.encode(sign)[0] for sign in "</think>"]
    thought = SPELLED.encode("the boat")
    for begun in range(1, len(tag)):
        for close in (None, ids_of(SPELLED, "\nenough.</think>")):
            guide = Thinking(SPELLED, len(thought) + begun, opened=True, close=close)
            said = say(guide, thought + tag[:begun] + SPELLED.encode(" and the hull"))
            assert SPELLED.decode(said) == "the boat</think> and the hull"
            assert guide.count == len(thought)
    # The reserved token is the tag of the other tokenizer; text that looks like one's beginning is thought.
    said = say(Thinking(RESERVED, 3, opened=True), RESERVED.encode("a <") + RESERVED.encode("b"))
    assert RESERVED.decode(said) == "a <</think>b" and said[3] == RESERVED.id_of("</think>")


PIECES = ["the", " boat", "\n", "a hull", "<", "</", "</think", "<think>", ">", "</think>", "<tool_call>", " b\n\n"]


def closed_by(tokenizer: Tokenizer, tokens: list[int], opened: bool) -> int | None:
    """The token that ends the thought of a script: the tag itself, or the last of those that spell it, which count as
    thought until it is whole."""
    guide = Thinking(tokenizer, None, opened=opened)
    for token in tokens:
        guide.push(token)
        if guide.done:
            return token
    return None


def opening_of(tokenizer: Tokenizer, said: list[int]) -> int:
    """Tokens up to the opening tag, it included."""
    text = b""
    for place, token in enumerate(said):
        text += tokenizer.token_bytes[token]
        if b"<think>" in text:
            return place + 1
    raise AssertionError("nothing was opened")


@settings(max_examples=150, deadline=None, database=None)
@given(
    which=st.sampled_from(list(EITHER)),
    script=st.lists(st.sampled_from(PIECES), min_size=1, max_size=25),
    budget=st.integers(0, 40),
    grace=st.integers(0, 10),
    opened=st.booleans(),
)
def test_any_script(which, script, budget, grace, opened):
    """The script with at most one close put in, after at least `budget` and at most budget + grace tokens of thought;
    none where the thought ends before."""
    tokenizer = EITHER[which]
    tokens = [token for piece in script for token in ids_of(tokenizer, piece)]
    guide, forced = Thinking(tokenizer, budget, grace, opened=opened), list[int]()
    said = say(guide, tokens, forced)
    free = Thinking(tokenizer, None, opened=opened)
    assert say(free, tokens) == tokens
    assert [token for place, token in enumerate(said) if place not in forced] == tokens
    assert guide.count <= budget + grace
    if not forced:
        assert free.count <= budget + grace
        return
    first, last = forced[0], forced[-1]
    assert forced == list(range(first, last + 1))
    before = Thinking(tokenizer, None, opened=opened)
    say(before, said[:first])
    assert budget <= before.count <= budget + grace and before.counter.inside
    tag = ids_of(tokenizer, "</think>")
    spelling = 0 if [closed_by(tokenizer, tokens, opened)] == tag else len("</think>")
    # A close that comes just at the budget is the very token that would be forced, which a script cannot leave out.
    assert not free.done or free.count + spelling >= budget
    if guide.done:
        assert tokenizer.decode(said[: last + 1]).endswith("</think>")
        begun = 0 if opened else opening_of(tokenizer, said)
        again = len(ids_of(tokenizer, "<think>")) if opened and "<think>" in script else 0
        assert thought_of(tokenizer, said[begun : last + 1]) <= budget + grace + again


def test_a_tool_call_follows_the_close():
    script = RESERVED.encode("the boat") + ids_of(RESERVED, "<tool_call>\n<function=f>\n</function>\n</tool_call>")
    said = say(Thinking(RESERVED, 2, opened=True), script)
    assert said == script[:2] + ids_of(RESERVED, "</think>") + script[2:]


@pytest.mark.parametrize("draft", [0, 1, 3])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_model_keeps_its_budget_with_and_without_drafts(copier, tokenizer, pattern_prompts, temperature, draft):
    """Prompt-open and model-open thoughts, a close of one token and of several; budgets out of reach change nothing."""
    prompts, close = pattern_prompts(), tokenizer.id_of("</think>")
    sentence = [*tokenizer.encode("\nso "), close]
    sampling = [Sampling(temperature=temperature, max_tokens=16, seed=i, ignore_eos=True) for i in range(6)]

    class Opening:
        """The model's own first word is the tag."""

        def __init__(self, first=True):
            self.first, self.ended = first, False

        def allowed(self):
            return only(tokenizer.id_of("<think>")) if self.first else None

        def push(self, token):
            self.first = False

        def fork(self):
            return Opening(self.first)

    guides = [
        lambda: Thinking(tokenizer, 0, opened=True),
        lambda: Thinking(tokenizer, 1, opened=True, close=sentence),
        lambda: Thinking(tokenizer, 5, opened=True, close=sentence),
        lambda: Guides(Opening(), Thinking(tokenizer, 5, opened=False)),
        lambda: Thinking(tokenizer, 16, opened=True),
        None,
    ]
    outputs = generate(copier, prompts, sampling, tokenizer=tokenizer, draft=draft, guides=guides)
    free = generate(copier, prompts, sampling, tokenizer=tokenizer)
    tokens = [output.tokens for output in outputs]
    assert tokens[0][0] == close
    for row, (budget, end) in enumerate([(0, [close]), (1, sentence), (5, sentence)]):
        assert tokens[row][budget : budget + len(end)] == end
        assert tokens[row][:budget] == free[row].tokens[:budget]
    assert tokens[3][0] == tokenizer.id_of("<think>") and tokens[3][6] == close
    assert tokens[4:] == [output.tokens for output in free[4:]]
    if draft:
        assert tokens == [o.tokens for o in generate(copier, prompts, sampling, tokenizer=tokenizer, guides=guides)]
        assert sum(output.accepted for output in outputs) > 0


class Digits:
    """Allows digits alone, three of them."""

    def __init__(self, tokenizer, count=0):
        self.tokenizer, self.count, self.pushed = tokenizer, count, []
        self.ids = [tokenizer.encode(digit)[0] for digit in "0123456789"]

    @property
    def ended(self):
        return self.count == 3

    def allowed(self):
        return sum(map(only_wide, self.ids)) > 0

    def push(self, token):
        assert token in self.ids
        self.count += 1

    def fork(self):
        return Digits(self.tokenizer, self.count)


def only_wide(token):
    mask = only(token)
    return torch.cat([mask, mask.new_zeros(300 - len(mask))])


@either
def test_rules_begin_where_the_thought_ends(tokenizer):
    guide = AfterThought(Digits(tokenizer), tokenizer, opened=True, ends=tokenizer.stop_ids)
    assert not guide.allowed()[list(tokenizer.stop_ids)].any(), "ending inside the thought would leave the rules unmet"
    for token in ids_of(tokenizer, "a hull </think>"):
        assert guide.allowed()[token] and guide.allowed().sum() > 200
        guide.fork().push(token)
        guide.push(token)
    digits, line = guide.guide.ids, tokenizer.encode("\n")[0]
    assert set(digits) < set(guide.allowed().nonzero()[:, 0].tolist())
    for _ in range(2):
        assert guide.allowed()[line]
        guide.push(line)
    assert set(digits) == set(guide.allowed().nonzero()[:, 0].tolist())
    for digit in digits[:3]:
        assert not guide.ended
        guide.push(digit)
        assert not guide.allowed()[line]
    assert guide.ended
    at_once = AfterThought(Digits(tokenizer), tokenizer, opened=False)
    assert set(digits) == set(at_once.allowed().nonzero()[:, 0].tolist())


def test_the_last_token_of_a_spelled_tag_says_nothing_behind_it():
    documents = dict(SPELLED.document)
    model = documents["model"]
    words = {word: place for word, place in model["vocab"].items() if place not in (5, 6)}  # the tags' old places
    documents["model"] = {**model, "vocab": {**words, ">x": 5, ">ĊĊ": 6}}
    odd = Tokenizer(documents, SPELLED.config, None)
    bad = next(token for token, piece in enumerate(odd.token_bytes) if piece == b">x")
    good = next(token for token, piece in enumerate(odd.token_bytes) if piece == b">\n\n")
    guide = AfterThought(Digits(odd), odd, opened=True)
    assert guide.allowed()[[bad, good]].all()
    for token in odd.encode("a </think"):
        guide.push(token)
    assert not guide.allowed()[bad] and guide.allowed()[good]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"budget": -1}, "budget = -1; allowed: 0 or more tokens; next: "),
        ({"budget": 1, "grace": -2}, "grace = -2; allowed: 0 or more tokens; next: "),
        (
            {"budget": 1, "close": RESERVED.encode("stop")},
            "a close that spells 'stop'; allowed: tokens that spell </th",
        ),
    ],
)
def test_refusals(given, said):
    with pytest.raises(Refusal) as refusal:
        Thinking(RESERVED, opened=True, **given)
    assert str(refusal.value).startswith(said)
