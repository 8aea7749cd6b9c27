"""Likelihoods in batches against the logits of single texts; lm-eval over them where it is installed, and its own
model class on the same weights as the oracle."""

import json
from types import SimpleNamespace

import pytest
import torch

from tests.evals.test_suites import saved
from tests.models import tiny
from trimaran.engine.folder import Folder
from trimaran.engine.request import EngineSettings
from trimaran.errors import Refusal
from trimaran.evals.likelihood import Reader, batches, likelihoods, sampling_of

SMALL = EngineSettings(rows=4, memory_bytes=1 << 24, tokens_per_pass=64)
PAIRS = [((5, 40, 41, 60), (70, 71)), ((33,), (50,)), (tuple(range(40, 103)), (99, 98, 97)), ((44, 45), (46, 47, 48))]
WHY = "lm-eval is not installed: pip install 'trimaran[lm-eval]'"


@pytest.fixture
def reader(model, tokenizer):
    return Reader(Folder(model, tokenizer, (tokenizer.bos_id,), None), SMALL, tokens=32)


def alone(model, given, more):
    logits = model(torch.tensor([[*given, *more]]))[0, len(given) - 1 : -1].log_softmax(-1)
    return float(logits[range(len(more)), list(more)].sum()), logits.argmax(-1).tolist() == list(more)


@pytest.mark.parametrize("tokens", [1, 12, 1024])
def test_batched_likelihoods_are_those_of_single_texts(model, tokens):
    with torch.no_grad():
        best = int(model(torch.tensor([[44, 45]]))[0, -1].argmax())
        pairs = [*PAIRS, ((44, 45), (best,))]
        found, wanted = likelihoods(model, pairs, tokens), [alone(model, *pair) for pair in pairs]
    for (ours, greedy), (theirs, told) in zip(found, wanted, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9) and greedy == told
    assert found[-1][1] and not all(greedy for _, greedy in found)


def test_a_continuation_longer_than_a_chunk(model, monkeypatch):
    monkeypatch.setattr("trimaran.evals.likelihood.CHUNK", 2)
    with torch.no_grad():
        wanted = [alone(model, *pair) for pair in PAIRS]
    assert likelihoods(model, PAIRS) == [(pytest.approx(value, rel=1e-9), greedy) for value, greedy in wanted]


def test_every_text_is_in_one_batch_within_the_budget():
    lengths = [3, 9, 1, 4, 4, 20]
    made = list(batches(lengths, 10))
    assert sorted(i for batch in made for i in batch) == list(range(6))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 10 for batch in made)


def test_a_text_is_as_likely_as_its_parts_one_after_the_other(reader, tokenizer):
    text = "the boat, a hull"
    ids = tokenizer.encode(text)
    parts = [((tokenizer.bos_id, *ids[:n]), (ids[n],)) for n in range(len(ids))]
    chain = sum(found for found, _ in likelihoods(reader.model, parts))
    assert reader.texts(["", text, ""]) == [0.0, pytest.approx(chain, rel=1e-9), 0.0]
    assert reader.texts([""]) == [0.0]


def test_where_a_context_ends_and_its_continuation_begins(reader, tokenizer):
    def split(context, continuation):
        return [tokenizer.decode(ids, skip_specials=True) for ids in reader.pair(context, continuation)]

    assert split("the boat", " a hull") == ["the boat", " a hull"]
    assert split("the boat ", "a hull") == ["the boat", " a hull"]  # the space is the next word's
    assert split("", "a hull") == ["", "a hull"] and split("  ", "a hull") == ["", "  a hull"]
    given, more = reader.pair("the bo", "at")  # which are one token together
    assert given[0] == tokenizer.bos_id and more and tokenizer.decode([*given[1:], *more]) == "the boat"
    for nothing in [("the boat", ""), ("", ""), ("the boat ", "")]:
        with pytest.raises(Refusal, match="empty continuation"):
            reader.continuations([nothing])


def test_answers_end_at_their_stops(reader):
    contexts = ["the boat", "a hull", "boats", "", "the the"]
    settings = {"max_gen_toks": 24, "do_sample": True, "temperature": 1.0}
    wholes = reader.until([(context, settings) for context in contexts])
    said = [(context, whole, sign) for context, whole in zip(contexts, wholes) for sign in whole[1:] if sign.isascii()]
    context, whole, stop = said[-1]
    asked = [(context, {**settings, "until": stops}) for stops in ([stop, ""], stop)]
    assert [reader.until([one]) for one in asked] == [[whole[: whole.index(stop)]]] * 2


def test_a_context_asked_again_is_sampled_anew_and_the_same_the_next_time(reader):
    settings = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 12, "top_k": 0}
    asked = [("the boat", settings), ("a hull", settings), ("the boat", settings)]
    found = reader.until(asked)
    assert found == reader.until(asked) and found[0] != found[2]


def test_settings_of_a_generation(tokenizer):
    controls = tokenizer.controls
    assert sampling_of({}, controls).temperature == 0 and sampling_of({}, controls).max_tokens == 256
    assert sampling_of({"temperature": 0.7}, controls).temperature == 0.7
    assert sampling_of({"temperature": 0.7, "do_sample": False, "top_p": None}, controls).temperature == 0
    ends = sampling_of({"until": ["\n\n", "<|im_end|>"], "max_new_tokens": 5, "max_tokens": 5}, controls)
    assert ends.stop == ("\n\n",) and ends.stop_ids == (controls["<|im_end|>"],) and ends.max_tokens == 5
    for wrong, said in [({"num_beams": 4}, "num_beams"), ({"max_tokens": 4, "max_gen_toks": 5}, "2 lengths")]:
        with pytest.raises(Refusal, match=said):
            sampling_of(wrong, controls)


@pytest.mark.parametrize("pair", [((), (5,)), ((5,), ())])
def test_nothing_before_a_continuation_or_in_it_is_refused(model, pair):
    with pytest.raises(Refusal, match="empty continuation"):
        likelihoods(model, [pair])


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.api.model", None)
    monkeypatch.delitem(__import__("sys").modules, "trimaran.evals.lm_eval", raising=False)
    with pytest.raises(Refusal, match="pip install 'trimaran"):
        import trimaran.evals.lm_eval  # noqa: F401


@pytest.fixture
def llama(tokenizer, tmp_path):
    """A folder that transformers opens too."""
    model = tiny("llama", vocab_size=tokenizer.vocab_size, initializer_range=0.1)
    return str(saved(model, tokenizer, tmp_path / "run"))


def asked(*args):
    return [SimpleNamespace(args=one) for one in args]


def test_lm_evals_own_class_finds_the_same(llama):
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason=WHY)
    from trimaran.evals.lm_eval import Trimaran

    theirs = huggingface.HFLM(pretrained=llama, device="cpu", dtype="float64", batch_size=2)
    ours = Trimaran(llama, engine=SMALL, dtype="float64")
    texts = [("the boat", " a hull"), ("", "a hull"), ("the boat\n", "a hull"), ("a hull, ", "the boat")]
    led = [(context and f"<|bos|>{context}", more) for context, more in texts]  # we put it there ourselves
    others = theirs.loglikelihood(asked(*led))
    for (mine, greedy), (other, told) in zip(ours.loglikelihood(asked(*texts)), others, strict=True):
        assert mine == pytest.approx(other, rel=1e-5) and greedy == told
    wholes = asked(("the boat, a hull",), ("boats " * 30,))
    assert ours.loglikelihood_rolling(wholes) == pytest.approx(theirs.loglikelihood_rolling(wholes), rel=1e-5)
    settings = {"until": ["zzz"], "max_gen_toks": 9}
    contexts = ["the boat", "a hull and a"]
    answers = ours.generate_until(asked(*((context, settings) for context in contexts)))
    assert answers == theirs.generate_until(asked(*((f"<|bos|>{context}", settings) for context in contexts)))
    assert all(answers)


def test_lm_eval_asks_through_the_adapter(llama, tmp_path):
    lm_eval = pytest.importorskip("lm_eval", reason=WHY)
    from trimaran.evals.lm_eval import Trimaran

    lm = Trimaran(llama, engine=SMALL, dtype="float64")
    choices = ["a hull", "boats"]
    liked = max(range(2), key=lambda place: lm.loglikelihood(asked(("the boat", f" {choices[place]}")))[0][0])
    lines = [{"question": "the boat", "choices": choices, "gold": gold} for gold in (liked, liked, 1 - liked)]
    (tmp_path / "three.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = {
        "task": "boats",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "three.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    }
    found = lm_eval.simple_evaluate(lm, tasks=[task], bootstrap_iters=0)["results"]["boats"]
    assert found["acc,none"] == pytest.approx(2 / 3)
    text = {**task, "task": "text", "output_type": "loglikelihood_rolling", "doc_to_target": "{{question}}"}
    text |= {"doc_to_text": "", "metric_list": [{"metric": "bits_per_byte"}]}
    del text["doc_to_choice"]
    found = lm_eval.simple_evaluate(lm, tasks=[text], bootstrap_iters=0)["results"]["text"]
    (whole,) = lm.loglikelihood_rolling(asked(("the boat",)))
    assert found["bits_per_byte,none"] == pytest.approx(-whole / len("the boat") / torch.log(torch.tensor(2.0)).item())
    with pytest.raises(Refusal, match="apply_chat_template"):
        lm_eval.simple_evaluate(lm, tasks=[task], bootstrap_iters=0, apply_chat_template=True)
