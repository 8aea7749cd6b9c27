"""Texts of key recall as a corpus: which they are, and that nothing held out is among them."""

from trimaran.data.recalled import Recalled
from trimaran.data.shards import write
from trimaran.tasks.recall import Recall
from trimaran.text.tokenizer import Tokenizer

TASK = Recall(words=60, facts=4, repeats=4)


def texts(corpus: Recalled) -> list[str]:
    return [one.text for one in corpus.documents()]


def test_a_seed_is_a_set_of_texts_and_a_digest_says_which():
    one, again, other = Recalled(TASK, 30, 1), Recalled(TASK, 30, 1), Recalled(TASK, 30, 2)
    assert texts(one) == texts(again) and set(texts(one)).isdisjoint(texts(other))
    digests = {made.digest for made in (one, other, Recalled(TASK, 31, 1), Recalled(TASK.replace(facts=5), 30, 1))}
    assert one.digest == again.digest and len(digests) == 4


def test_held_out_problems_are_not_learnt():
    held = {TASK.document(number, "held_out") for number in range(100)}
    assert len(texts(Recalled(TASK, 100))) == 100 and held.isdisjoint(texts(Recalled(TASK, 100)))


def test_it_is_encoded_as_any_corpus_is(tmp_path):
    corpus = Recalled(TASK, 12)
    tokenizer = Tokenizer.train(texts(corpus), 400)
    shards = write(corpus, tokenizer, tmp_path / "shards")
    assert len(shards) == 12 and tokenizer.decode(shards.document(3)).count(texts(corpus)[3]) == 1
    assert write(Recalled(TASK, 12), tokenizer, tmp_path / "shards").total_tokens == shards.total_tokens
