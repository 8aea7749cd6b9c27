"""RULER: what the problems are made of, how long they are, and who can solve them."""

import json
import re
from collections import Counter
from itertools import islice, pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tasks.ruler_solver import solve
from trimaran.errors import Refusal
from trimaran.tasks.ruler import PUBLISHED, Ruler, matched, published
from trimaran.tasks.ruler_fit import largest
from trimaran.tasks.ruler_haystack import DEPTHS, NOISE, with_needles
from trimaran.tasks.ruler_lexicon import WORDS, keys, vocabulary
from trimaran.tasks.ruler_niah import Niah
from trimaran.tasks.ruler_qa import Collection, Question
from trimaran.tasks.ruler_words import Frequent, distinct, shares, zeta
from trimaran.tasks.task import GARBAGE, REWARD, Trace
from trimaran.text.conversation import Conversation
from trimaran.text.tokenizer import Tokenizer

# By name: needles in the text, strings that are looked for, tokens that are kept for the answer.
TABLE = {
    "niah_single_1": (1, 1, 128),
    "niah_single_2": (1, 1, 128),
    "niah_single_3": (1, 1, 128),
    "niah_multikey_1": (4, 1, 128),
    "niah_multikey_2": (None, 1, 128),
    "niah_multikey_3": (None, 1, 128),
    "niah_multivalue": (4, 4, 128),
    "niah_multiquery": (4, 4, 128),
    "vt": (None, 5, 30),
    "cwe": (None, 10, 120),
    "fwe": (None, 3, 50),
    "qa_1": (None, 1, 32),
    "qa_2": (None, 1, 32),
}
NEEDLE = re.compile(r"One of the secret (numbers|uuids) for (\S+) is: (\S+)\.")


def message(of: Ruler, number: int, split="held_out") -> str:
    return of.prompt(number, split).messages[0]["content"]


def answered(of: Ruler, number: int, text: str, finish="stop") -> float:
    prompt = of.prompt(number, "held_out")
    return of.score(Trace(prompt, ({"role": "assistant", "content": text},), finish))[REWARD]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer that was trained on such problems."""
    texts = [message(published(name, 3000), number) for name in TABLE for number in range(2)]
    place = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train(texts, 2048).save(place)
    return place


@pytest.mark.parametrize("length", [1024, 2048, 5000])
@pytest.mark.parametrize("name", PUBLISHED)
def test_whoever_reads_the_message_solves_it(name, length):
    of = published(name, length)
    for number in range(4):
        said = solve(message(of, number))
        assert answered(of, number, said) == answered(of, number, said.upper()) == 1
        assert answered(of, number, said, "length") == 1  # as published, an answer may be cut off
        assert answered(of, number, "") == 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_answer_sets(name):
    needles, answers, tokens = TABLE[name]
    of = published(name, 2048)
    prompt = of.prompt(3, "held_out")
    expected = of.answers(prompt.secret)
    assert len(set(expected)) == len(expected) == answers and of.answer_tokens == tokens
    if needles is not None:
        assert len(NEEDLE.findall(prompt.messages[0]["content"])) == needles


@pytest.mark.parametrize("name", PUBLISHED)
def test_tasks_check_themselves(name):
    published(name, 1024).check(4)


@pytest.mark.parametrize("length", [1500, 4096])
@pytest.mark.parametrize("name", PUBLISHED)
def test_lengths_are_kept_within_one_unit(name, length, folder):
    of = published(name, length, folder)
    for number in range(2):
        prompt = of.prompt(number, "held_out")
        conversation = Conversation(Tokenizer.load(folder), thinking=False)
        conversation.hear(prompt.messages)
        assert len(conversation.ids) + of.answer_tokens <= length
        assert len(conversation.ids) == of.counter.tokens(prompt.messages[0]["content"]) + of.counter.overhead
        assert of.counter.tokens(of.text(prompt.secret, prompt.secret["units"] + 1)) > of.budget


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_length_that_nothing_fits_is_refused(name):
    for length in (1, 60):
        with pytest.raises(Refusal, match="smallest problem"):
            published(name, length).prompt(0)


def test_a_million_tokens():
    of = published("niah_single_1", 1 << 20)
    assert of.budget - of.counter.tokens(message(of, 0)) < 10


@given(st.integers(1, 50), st.integers(0, 300), st.integers(1, 40), st.integers(0, 5000), st.integers(0, 9))
def test_the_search_ends_and_finds_the_border(least, fixed, each, room, noise):
    asked = []

    def tokens(units):
        asked.append(units)
        return fixed + each * units + Random(units).randint(0, noise)

    budget = tokens(least) + room
    asked.clear()
    found = largest(tokens, budget, least)
    assert tokens(found) <= budget < tokens(found + 1) and len(asked) < 60
    assert tokens(largest(tokens, budget, least, most=least + 7)) <= budget
    with pytest.raises(Refusal, match="smallest problem"):
        largest(tokens, tokens(least) - 1, least)


def test_the_search_ends_where_nothing_grows():
    assert largest(lambda units: 5, 10, 1, most=1000) == 1000
    assert largest(lambda units: 5 + (units > 700), 5, 1, most=1000, guess=3) == 700


def test_needles_lie_on_the_grid_of_depths():
    assert len(DEPTHS) == 40 == len(set(DEPTHS)) and (DEPTHS[0], DEPTHS[-1]) == (0, 100)
    text = with_needles([f"{number}." for number in range(200)], ["a", "b", "c"], [0, 50, 100])
    assert text.split().index("a") == 0 and text.split().index("b") == 101 and text.split()[-1] == "c"
    of, found = published("niah_single_2", 2000), set()
    for number in range(60):
        text = message(of, number)
        found.add(round(10 * text.index("One of the secret") / len(text)))
    assert len(found) >= 8  # early, late and between


def test_one_needle_is_asked_for_in_the_singular_and_four_in_order():
    assert "Which secret number does" in message(published("niah_single_1", 1024), 0)
    of = published("niah_multiquery", 1024)
    prompt = of.prompt(0)
    assert "Which secret numbers does" in prompt.messages[0]["content"]
    assert len(prompt.secret["asked"]) == 4
    assert "{}, {}, {}, and {}?".format(*prompt.secret["asked"]) in prompt.messages[0]["content"]


def test_distractors_are_other_keys_with_other_values():
    for name in ("niah_multikey_2", "niah_multikey_3"):
        found = NEEDLE.findall(message(published(name, 3000), 1))
        assert len(found) > 40
        assert len({key for _, key, _ in found}) == len({value for *_, value in found}) == len(found)


def test_the_numbers_of_words_are_those_published():
    for length, often, seldom in ((2048, 6, 1), (5000, 30, 3)):
        text = message(published("cwe", length), 2)
        text = text[text.rindex("numbered list") :]
        counts = Counter(re.findall(r"\d+\. (\w+)", text[: text.index("Question:")]))
        assert sorted(counts.values(), reverse=True)[:11] == [often] * 10 + [seldom]
        assert set(counts.values()) == {often, seldom}
    of = published("fwe", 3000)
    prompt = of.prompt(0)
    text = prompt.messages[0]["content"]
    counts = Counter(text[text.index("word. ") + 6 : text.index("\nQuestion")].split())
    ranked = [count for _, count in counts.most_common()]
    units = prompt.secret["units"]
    assert counts["..."] == ranked[0] == int(units / (3.141592653589793**2 / 6))
    assert ranked == shares(units, 2.0)
    assert zeta(2.0) == pytest.approx(3.141592653589793**2 / 6, abs=1e-12)
    assert zeta(4.0) == pytest.approx(3.141592653589793**4 / 90, abs=1e-12)


def test_a_chain_is_told_in_order_after_an_example_of_500_tokens(folder):
    of = published("vt", 4096, folder)
    prompt = of.prompt(0)
    example, text = re.split(r"\n\n(?=Variables)", prompt.messages[0]["content"])
    assert 450 < of.counter.tokens(example) <= 500
    [(value, names)] = prompt.secret["chains"]
    told = [line for line in text.split("\n") if line.startswith("VAR")]
    assert told == [f"VAR {names[0]} = {value}"] + [f"VAR {b} = VAR {a}" for a, b in pairwise(names)]
    assert {len(name) for name in names} == {5} and len(names) == 5 and 10_000 <= int(value) < 99_999


def test_more_chains_than_asked_for():
    of = published("vt", 2000).replace(chains=3)
    for number in range(5):
        assert answered(of, number, solve(message(of, number))) == 1
        assert len(re.findall("^VAR", message(of, number), re.MULTILINE)) == 5 + 15


def test_shares_of_several_strings_and_the_length_of_an_answer():
    of = published("niah_multivalue", 1024)
    values = of.answers(of.prompt(0, "held_out").secret)
    assert answered(of, 0, values[2]) == 0.25
    assert answered(of, 0, f"{values[0]}\x00{values[3]}") == 0.5
    assert answered(of, 0, " ".join(["no"] * 128 + values)) == 0  # beyond the published number of tokens
    assert answered(of, 0, message(of, 0)) < 1  # the whole haystack
    assert matched("An Ox", ["ox", "cow"], every=False) == 1 and matched("An Ox", ["ox", "cow"], every=True) == 0.5


# haystacks and documents


def test_a_haystack_of_ones_own(tmp_path):
    (tmp_path / "b.txt").write_text("Beta is here. " * 30)
    (tmp_path / "a.json").write_text(json.dumps({"text": "Alpha was there. " * 30}))
    (tmp_path / "c.bin").write_bytes(b"\xff")
    of = published("niah_multikey_1", 1000, path=tmp_path)
    text = message(of, 0)
    assert text.index("Alpha was") < text.index("Beta is") and text.count("Alpha was") > 60  # begun anew at its end
    assert answered(of, 0, solve(text)) == 1 and of.made_of == str(tmp_path)
    assert "no path was given" in published("niah_multikey_1", 1000).made_of
    assert all(line in message(published("niah_single_1", 1000), 0) for line in NOISE)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.txt", None, "no file or folder"),
        ("empty.txt", b"", "no words"),
        ("bytes.txt", b"\xff\xfe", "no UTF-8"),
        ("list.json", b"[1]", "no JSON object with a text"),
        ("torn.json", b'{"text": "a', "no JSON object with a text"),
        ("folder.txt", "folder", "cannot read"),
    ],
)
def test_haystacks_that_are_none(tmp_path, name, content, said):
    path = tmp_path / name
    if content == "folder":  # named like a text among others
        path.mkdir()
        path = tmp_path
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(Refusal) as refusal:
        published("niah_single_2", 1000, path=path).prompt(0)
    assert said in refusal.value.found


@pytest.mark.parametrize("haystack", ["noise", "needle"])
def test_a_text_that_no_haystack_is_made_of_is_refused(tmp_path, haystack):
    with pytest.raises(Refusal, match="path"):
        Niah(haystack=haystack, path=tmp_path)


@pytest.mark.parametrize(("name", "said"), [("qa_2", "made-up documents"), ("niah_single_3", "made-up sentences")])
def test_a_problem_says_what_it_is_made_of(name, said):
    assert said in published(name, 1024).prompt(0).secret["made_of"]


def squad_file(place, articles=6, paragraphs=8):
    data = []
    for article in range(articles):
        told = [
            {
                "context": f"Article {article}, part {part}: lake {article}{part} is {article + 7 * part} deep.",
                "qas": [
                    {
                        "question": f"How deep is lake {article}{part}?",
                        "answers": [{"text": f"{article + 7 * part} deep"}, {"text": f"is {article + 7 * part}"}],
                    },
                    {"question": f"Who owns lake {article}{part}?", "answers": [], "is_impossible": True},
                ],
            }
            for part in range(paragraphs)
        ]
        data.append({"title": f"lakes {article}", "paragraphs": told})
    place.write_text(json.dumps({"version": "v2.0", "data": data}))
    return place


def hotpot_file(place, questions=20):
    rows = [
        {
            "question": f"Where was the wife of king {number} born?",
            "answer": f"Castle {number}",
            "context": [[f"{number}.{part}", ["He was a king. ", f"Castle {number}."]] for part in range(10)],
        }
        for number in range(questions)
    ]
    place.write_text(json.dumps(rows))
    return place


def test_questions_of_a_squad_file(tmp_path):
    of = published("qa_1", 400, file=squad_file(tmp_path / "dev.json"))
    assert sum(of.size(split) or 0 for split in ("train", "held_out")) == 48  # the unanswerable are left out
    prompt = of.prompt(0, "held_out")
    text, (first, second) = prompt.messages[0]["content"], of.answers(prompt.secret)
    [gold] = [part for part in text.split("\n\n") if first in part and part.startswith("Document")]
    article = re.findall(r"Article (\d)", gold)[0]
    documents = re.findall(r"Article (\d), part (\d)", text)
    assert len(set(documents)) == len(documents) > 8 and sum(one == article for one, _ in documents) == 8
    assert answered(of, 0, f"it is {second[3:]}") == answered(of, 0, first) == 1 and answered(of, 0, "wet") == 0
    of.check(4)
    with pytest.raises(Refusal, match="all 48 documents have but"):
        published("qa_1", 4096, file=tmp_path / "dev.json").prompt(0)


def test_questions_of_a_hotpot_file(tmp_path):
    of = published("qa_2", 600, file=hotpot_file(tmp_path / "dev.json"))
    prompt = of.prompt(1, "held_out")
    number = of.answers(prompt.secret)[0].split()[1]
    assert prompt.messages[0]["content"].count(f"\n{number}.") == 10
    of.check(2)


def test_a_problem_costs_what_it_takes_of_a_file_not_the_whole_file():
    class Counting(Random):
        drawn = 0

        def randrange(self, *bounds):
            self.drawn += 1
            return super().randrange(*bounds)

    paragraphs = tuple(f"{place}" for place in range(3000))
    held = Collection((), paragraphs)
    question = Question("which?", ("7",), ("7",), ("5", "7", "9"))
    random = Counting(3)
    few = list(islice(held.near_first(question, random), 40))
    assert few[:3] == ["7", "5", "9"] and random.drawn <= 40
    every = list(held.near_first(question, Random(3)))
    assert every[:40] == few and sorted(every) == sorted(paragraphs)  # each once, and fewer are the first of more
    places = [int(one) for one in every[3:]]
    assert abs(sum(places[:300]) / 300 - 1500) < 5 * 866 / 300**0.5  # evenly from the whole file


@pytest.mark.parametrize("form", ["qa_1", "qa_2"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no file"),
        (b"folder", "no file"),
        (b"\xff", "form"),
        (b"{", "form"),
        (b"[]", "no question|form"),
        (b'{"data": [{"paragraphs": [{}]}]}', "form"),
        (b'{"data": []}', "no question|form"),
        (b'[{"question": "q"}]', "form"),
    ],
)
def test_files_that_are_of_another_form(tmp_path, form, content, said):
    if content == b"folder":
        (tmp_path / "dev.json").mkdir()
    elif content is not None:
        (tmp_path / "dev.json").write_bytes(content)
    with pytest.raises(Refusal, match=said):
        published(form, 1000, file=tmp_path / "dev.json").prompt(0)


def test_two_folders_of_one_tokenizer_are_the_same_settings(folder, tmp_path):
    Tokenizer.load(folder).save(tmp_path / "twin")
    one, other = (published("cwe", 2048, place) for place in (folder, tmp_path / "twin"))
    assert one.model_dump(mode="json") == other.model_dump(mode="json")
    assert message(one, 0) == message(other, 0)


def test_no_word_is_in_a_garbage_answer():
    assert not [(word, said) for word in WORDS for said in GARBAGE if word in said.casefold()]
    published("cwe", 1024).check()  # as SFT, RL and `score` check it


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_tokenizer_of_few_words_leaves_room_for_the_answer(name, tmp_path):
    Tokenizer.train(["the sea is calm " * 9], 300).save(tmp_path)
    of = published(name, 9000, tmp_path)
    prompt = of.prompt(0, "held_out")
    text = message(of, 0)
    assert of.counter.tokens(text) + of.counter.overhead + of.kept <= 9000 and of.kept >= of.answer_tokens
    assert answered(of, 0, solve(text)) == of.score(Trace(prompt, of.gold(prompt)))[REWARD] == 1


def test_longer_answers_than_published_have_room():
    published("vt", 4096).replace(hops=20).check(2)
    published("niah_multivalue", 4096).replace(values=100).check(2)
    assert published("vt", 4096).kept == 30 and published("niah_multivalue", 4096).kept == 128


@pytest.mark.parametrize("alpha", [1.1, 1.5, 2.0, 3.0])
def test_the_third_word_is_never_in_doubt(alpha):
    least = Frequent(alpha=alpha).least({})
    assert all(distinct(shares(units, alpha)) for units in range(least, least + 3000))
    assert not distinct(shares(least - 1, alpha))


def test_words_never_run_short():
    assert len(set(keys(Random(0), 40_000))) == 40_000
    assert len(set(vocabulary(Random(0), 3 * len(WORDS)))) == 3 * len(WORDS)
    with pytest.raises(Refusal, match="RULER task 'niah_single'"):
        published("niah_single", 1000)
    assert isinstance(published("niah_single_1", 1000), Niah)
