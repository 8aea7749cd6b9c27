"""RULER's question answering: one or two documents of many hold the answer.

    Document 1: …        the paragraphs that answer, among others of the same article and of anywhere
    Question: …          any of the accepted answers counts

`squad`: a file of SQuAD 2.0's form ({"data": [{"paragraphs": [{"context", "qas": [{"question", "answers"}]}]}]}), whose
unanswerable questions are left out. `hotpot`: a file of HotpotQA's form ([{"question", "answer", "context": [[title,
[sentence, …]], …]}]). Without a file, documents of the same shape are made up: ships, their captains, and the towns
these come from; `squad` asks for one fact, `hotpot` for two that hang together.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, ClassVar, Literal

from trimaran.errors import Refusal
from trimaran.tasks.draw import split_of
from trimaran.tasks.ruler import Ruler
from trimaran.tasks.ruler_lexicon import ADJECTIVES, NOUNS
from trimaran.tasks.task import GARBAGE, Split

Form = Literal["squad", "hotpot"]
PROMPT = (
    "Answer the question from the documents below. Give the answer alone, and no other words.\n\n"
    "These are the documents.\n\n{context}\n\n"
    "Answer the question from the documents above. Give the answer alone, and no other words.\n\n"
    "Question: {question} Answer:"
)
TOWNS = ("haven", "ford", "wick", "mouth", "stead", "holm", "field", "gate", "ness", "burgh")
STEMS = ("Al", "Bren", "Cor", "Dun", "El", "Far", "Gor", "Hal", "Ist", "Jar", "Kel", "Lor", "Mar", "Nor", "Or", "Pel")
NAMES = ("Ada", "Bo", "Cleo", "Dora", "Eli", "Finn", "Gus", "Hana", "Ida", "Jon", "Kai", "Lena", "Milo", "Nell", "Otto")


@dataclass(frozen=True)
class Question:
    """A question with its accepted answers; near: paragraphs that come first, the ones that answer it among them."""

    text: str
    answers: tuple[str, ...]
    gold: tuple[str, ...]
    near: tuple[str, ...] = ()


@dataclass(frozen=True)
class Collection:
    """The questions of a file and all its paragraphs, theirs included, each once; places: of each split's questions
    among them."""

    questions: tuple[Question, ...]
    paragraphs: tuple[str, ...]

    @cached_property
    def places(self) -> Mapping[Split, list[int]]:
        found: dict[Split, list[int]] = {"train": [], "held_out": []}
        for place, one in enumerate(self.questions):
            found[split_of(f"question {one.text}")].append(place)
        return found

    def near_first(self, question: Question, random: Random) -> Iterator[str]:
        """All paragraphs, the question's first and the others in random order. Drawn one by one (Fisher and Yates'
        shuffle, of which only what has moved is kept): a problem takes a few of tens of thousands."""
        known = dict.fromkeys([*question.gold, *question.near])
        yield from known
        moved, count = dict[int, int](), len(self.paragraphs)
        for place in range(count):
            other = random.randrange(place, count)
            paragraph = self.paragraphs[moved.get(other, other)]
            moved[other] = moved.get(place, place)
            if paragraph not in known:
                yield paragraph


class Qa(Ruler):
    """Problem i of a file is its i-th question of that split, as published; numbers beyond begin anew."""

    name: ClassVar[str] = "ruler_qa"
    answer_tokens: ClassVar[int] = 32
    every: ClassVar[bool] = False
    form: Form = "squad"
    file: Path | None = None

    @property
    def made_of(self) -> str:
        return str(self.file) if self.file else "made-up documents (no file was given)"

    @property
    def collection(self) -> Collection:
        assert self.file is not None
        return collection(self.file, self.form)

    def size(self, split: Split = "train") -> int | None:
        return None if self.file is None else len(self.collection.places[split])

    def drawn(self, number: int, split: Split) -> dict[str, Any]:
        if self.file is None:
            return super().drawn(number, split)
        found = self.collection.places[split]
        if not found:
            raise Refusal(f"{self.file} has no question of the split {split}", "more questions", "give a longer file")
        question = self.collection.questions[found[number % len(found)]]
        return {"place": found[number % len(found)], "answers": list(question.answers), "seed": number}

    def draw(self, random: Random) -> dict[str, Any]:
        return {"seed": random.getrandbits(48)}

    def identity(self, drawn: Mapping[str, Any]) -> str:
        return f"question {made_up(self.form, drawn['seed'])}"

    def question(self, drawn: Mapping[str, Any]) -> Question:
        return made_up(self.form, drawn["seed"]) if self.file is None else self.collection.questions[drawn["place"]]

    def least(self, drawn: Mapping[str, Any]) -> int:
        return len(self.question(drawn).gold)

    def most(self, drawn: Mapping[str, Any]) -> int | None:
        if self.file is None:
            return None
        return len(self.collection.paragraphs)

    def text(self, drawn: Mapping[str, Any], units: int) -> str:
        question, random = self.question(drawn), Random(drawn["seed"])
        if self.file is None:
            documents = [*question.gold, *others(question, random, units - len(question.gold))]
        else:
            documents = list(islice(self.collection.near_first(question, random), units))
        random.shuffle(documents)
        context = "\n\n".join(f"Document {place}:\n{document}" for place, document in enumerate(documents, 1))
        return PROMPT.format(context=context, question=question.text)

    def answers(self, secret: Mapping[str, Any]) -> list[str]:
        return list(secret.get("answers") or self.question(secret).answers)


def made_up(form: Form, seed: int) -> Question:
    """A question about one ship, of which no other document tells."""
    random = Random(seed)
    ship, person, town = ship_of(random), person_of(random), town_of(random)
    year = str(random.randint(1700, 1899))
    if form == "squad":
        return Question(f"In which year was the {ship} built?", (year,), (about_ship(ship, person, town, year),))
    gold = (about_ship(ship, person, town_of(random), year), about_person(person, town))
    return Question(f"In which town was the captain of the {ship} born?", (town,), gold)


def others(question: Question, random: Random, count: int) -> list[str]:
    """Documents about other ships and other captains."""
    told = " ".join([question.text, *question.gold])
    found: dict[str, None] = {}
    while len(found) < count:
        ship, person = ship_of(random), person_of(random)
        if ship not in told and person not in told:
            town, year = town_of(random), str(random.randint(1700, 1899))
            found[about_ship(ship, person, town, year) if random.random() < 0.5 else about_person(person, town)] = None
    return list(found)


def ship_of(random: Random) -> str:
    return f"{random.choice(ADJECTIVES).title()} {random.choice(NOUNS).title()}"


def person_of(random: Random) -> str:
    return f"{random.choice(NAMES)} {random.choice(STEMS)}{random.choice(NOUNS)}"


def town_of(random: Random) -> str:
    return f"{random.choice(STEMS)}{random.choice(NOUNS)}{random.choice(TOWNS)}"


def about_ship(ship: str, person: str, town: str, year: str) -> str:
    return (
        f"{ship}\nThe {ship} is a ship of the northern coast. She was built in {year}, in a yard of {town}. "
        f"Her captain for many years was {person}, and her crew told of calm seas and of long winters."
    )


def about_person(person: str, town: str) -> str:
    return (
        f"{person}\n{person} was born in the town of {town} and went to sea early. Later years were spent ashore, "
        "with a garden, a small boat and a great many letters."
    )


@lru_cache(maxsize=4)  # a file is read once for all its problems
def collection(file: Path, form: Form) -> Collection:
    """What a file holds. Raises Refusal for one that is missing, or of another form."""
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
        found = squad(read) if form == "squad" else hotpot(read)
    except OSError as problem:
        raise Refusal(
            f"no file {str(file)!r} to read ({problem.strerror})", f"a JSON file of the {form} form", "correct the path"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError) as problem:
        what = f"{file} is not of the {form} form ({type(problem).__name__}: {problem})"
        raise Refusal(what, "its published JSON form", "see docs/ruler.md") from None
    if not found.questions:
        raise Refusal(f"{file} has no question with an answer", f"a JSON file of the {form} form", "give another")
    return found


def squad(read: Mapping[str, Any]) -> Collection:
    questions, paragraphs = [], dict[str, None]()
    for article in read["data"]:
        near = tuple(dict.fromkeys(one["context"] for one in article["paragraphs"]))
        for one in article["paragraphs"]:
            paragraphs[one["context"]] = None
            for asked in one["qas"]:
                answers = tuple(dict.fromkeys(answer["text"] for answer in asked["answers"]))
                if answers and not asked.get("is_impossible") and telling(answers):
                    questions.append(Question(asked["question"], answers, (one["context"],), near))
    return Collection(tuple(questions), tuple(paragraphs))


def hotpot(read: Sequence[Mapping[str, Any]]) -> Collection:
    questions, paragraphs = [], dict[str, None]()
    for asked in read:
        documents = tuple(f"{title}\n{''.join(sentences)}" for title, sentences in asked["context"])
        paragraphs.update(dict.fromkeys(documents))
        if telling((asked["answer"],)):
            questions.append(Question(asked["question"], (asked["answer"],), documents))
    return Collection(tuple(questions), tuple(paragraphs))


def telling(answers: Sequence[str]) -> bool:
    """Whether no meaningless answer contains one of these, as it would a single letter."""
    empty = [one.casefold() for one in GARBAGE]
    return not any(one.casefold() in said and one.casefold() != said.strip() for one in answers for said in empty)
