import pytest
import torch

from tests.evals.boats import Leaky, Talk
from trimaran.engine.engine import Engine
from trimaran.engine.request import EngineSettings
from trimaran.errors import Refusal
from trimaran.evals.play import Group, Played, Player, PlaySettings, seed_of
from trimaran.text.conversation import Conversation
from trimaran.text.tags import THINK_CLOSE

SETTINGS = PlaySettings(max_tokens=40, logprobs=True)


def groups(task, numbers, settings=SETTINGS, samples=2, seed=0):
    return [Group(task, task.prompt(number), settings, samples, seed) for number in numbers]


def facts(played: Played):
    """What of an episode does not depend on who else was played."""
    return (played.prompt.number, played.sample), (played.conversation.ids, played.conversation.spans, played.scores)


def test_episodes_are_the_same_alone_and_together_in_any_order(engine, model, tokenizer):
    task = Talk()
    together = dict(map(facts, Player(engine).play(groups(task, range(5)))))
    assert set(together) == {(number, sample) for number in range(5) for sample in range(2)}
    assert engine.idle and engine.faults() == []
    assert len({tuple(ids) for ids, _, _ in together.values()}) == len(together)
    assert any(scores["answers"] > 3 for _, _, scores in together.values()), "some episode has to have several turns"

    single = Engine(model, tokenizer, EngineSettings(rows=1, memory_bytes=1 << 24, prefix_cache=False))
    alone = dict(map(facts, Player(single).play(groups(task, reversed(range(5))))))
    assert alone == together
    drafting = Engine(model, tokenizer, EngineSettings(memory_bytes=1 << 24, drafter="mtp"))
    assert dict(map(facts, Player(drafting).play(groups(task, range(3))))).items() <= together.items()
    assert drafting.accepted > 0
    fewer = dict(map(facts, Player(engine).play(groups(task, [4, 2], samples=1))))
    assert fewer == {key: together[key] for key in [(2, 0), (4, 0)]}
    other = dict(map(facts, Player(engine).play(groups(task, [2], seed=1))))
    assert other[2, 0] != together[2, 0]


def test_samples_that_began_alike_go_on_by_dice_of_their_own(engine):
    task = Talk()
    groups_of = [
        Group(task, task.prompt(n, split), SETTINGS, seed=s)
        for n in (0, 1)
        for split in ("train", "held_out")
        for s in (0, 1)
    ]
    turns = [seed_of(group, *later) for group in groups_of for later in ((), (0, 1), (1, 1), (0, 2), (1, 2))]
    assert len(set(turns)) == len(turns)
    alike = {}
    for played in Player(engine).play(groups(task, [0], samples=40)):
        if len(played.outputs) > 1:
            first, second = (tuple(output.tokens) for output in played.outputs[:2])
            alike.setdefault(first, []).append(second)
    most = max(alike.values(), key=len)
    assert len(most) > 1 and len(set(most)) > 1


def test_outputs_stand_verbatim_in_the_ids_and_their_log_probabilities_are_the_models(engine, model, tokenizer):
    several = 0
    for played in Player(engine).play(groups(Talk(), range(4))):
        conversation = played.conversation
        assert [conversation.ids[start:stop] for start, stop in conversation.spans] == [
            output.tokens for output in played.outputs
        ]
        assert played.tokens == sum(stop - start for start, stop in conversation.spans)
        assert list(played.trace.messages) == conversation.messages[1:]
        logits = model(torch.tensor([conversation.ids]))[0, :, : tokenizer.vocab_size]
        law = logits.log_softmax(-1)
        for (start, stop), output in zip(conversation.spans, played.outputs, strict=True):
            expected = law[torch.arange(start - 1, stop - 1), conversation.ids[start:stop]]
            torch.testing.assert_close(torch.tensor(output.logprobs, dtype=torch.float64), expected, atol=1e-9, rtol=0)
        several += len(played.outputs) > 1
    assert several
    assert engine.stats().cached_tokens > 0, "later turns read their history again"


def test_a_sequence_of_turns_equals_one_that_is_driven_by_hand(engine, tokenizer):
    task = Talk()
    settings = PlaySettings(max_tokens=40, temperature=0)
    [played] = Player(engine).play(groups(task, [3], settings, samples=1))
    conversation = Conversation(tokenizer)
    conversation.hear(task.prompt(3).messages)
    messages = []
    for output in played.outputs:
        messages.append(conversation.answer(output.tokens))
        reply = task.turn(played.prompt, messages) if output.finish != "length" else ()
        if reply:
            messages += reply
            conversation.hear(reply)
    assert conversation.ids == played.conversation.ids and messages == list(played.trace.messages)


def test_an_episode_ends_where_it_must(engine):
    finishes = {}
    for turns, longest in ((1, 60), (2, 60), (8, 1)):
        settings = PlaySettings(max_tokens=longest, turns=turns)
        for played in Player(engine).play(groups(Talk(), range(3), settings, samples=1)):
            finishes.setdefault((turns, longest), set()).add(played.trace.finish)
            assert len(played.outputs) <= turns
            assert (played.trace.finish == "length") == (played.outputs[-1].finish == "length")
    assert "turns" in finishes[1, 60] | finishes[2, 60] and finishes[8, 1] == {"length"}


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("turn", "ZeroDivisionError: a hole"),
        ("score", "in score"),
        ("reply", "role None"),
        ("nan", "reward = nan"),
        ("endless", "other = inf"),
        ("none", "reward = None"),
    ],
)
def test_a_task_that_breaks_is_recorded_and_nobody_else_notices(engine, how, named):
    settings = PlaySettings(max_tokens=60, thinking=False)
    sound = dict(map(facts, Player(engine).play(groups(Leaky(at=-1), range(4), settings))))
    failed = 0
    for played in Player(engine).play(groups(Leaky(how=how), range(4), settings)):
        key, found = facts(played)
        if played.error is None:
            assert found == sound[key]
            continue
        failed += 1
        assert played.prompt.number == 1 and named in played.error and "Traceback" in played.error
        assert played.trace is None and not played.scores and played.outputs
        with pytest.raises(KeyError):
            played.reward  # noqa: B018
    assert 1 <= failed <= 2 and engine.idle and engine.faults() == []


def test_an_interruption_is_nobodys_failure(engine):
    with pytest.raises(KeyboardInterrupt):
        list(Player(engine).play(groups(Leaky(how="interrupt"), range(4), PlaySettings(max_tokens=60), samples=4)))
    assert engine.idle and engine.faults() == []


def test_groups_are_drawn_as_there_is_room_and_leaving_early_aborts_the_rest(engine):
    drawn = []

    def endless():
        number = 0
        while True:
            drawn.append(number)
            yield Group(Talk(), Talk().prompt(number), SETTINGS)
            number += 1

    episodes = Player(engine).play(endless())
    for _ in range(3):
        next(episodes)
    assert len(drawn) <= 3 + 2 * engine.settings.rows
    episodes.close()
    assert engine.idle and engine.faults() == []
    assert list(Player(engine).play([])) == []


def test_thinking_off_on_and_on_a_budget(engine, tokenizer):
    closes = tokenizer.id_of(THINK_CLOSE)
    numbers = range(4)
    for task, settings in (
        (Talk(), PlaySettings(max_tokens=30, thinking=False)),
        (Talk(thinking=False), PlaySettings(max_tokens=30)),
    ):
        for played in Player(engine).play(groups(task, numbers, settings)):
            (start, _) = played.conversation.spans[0]
            assert played.conversation.ids[start - 1] == closes
            assert all("reasoning_content" not in message for message in played.trace.messages)
    settings = PlaySettings(max_tokens=30, budget=3, tell_budget=True)
    for played in Player(engine).play(groups(Talk(), numbers, settings)):
        for output in played.outputs:
            ended = len(output.tokens) <= 3
            assert ended or closes in output.tokens[:4]
        start = played.conversation.spans[0][0]
        assert "{thinking token budget: 3}" in tokenizer.decode(played.conversation.ids[:start])


@pytest.mark.parametrize(("settings", "found"), [
    ({"grace": 5}, "grace = 5 without a budget"),
    ({"tell_budget": True}, "tell_budget = true without a budget"),
])  # fmt: skip
def test_what_a_budget_needs_is_refused_without_one(settings, found):
    with pytest.raises(Refusal, match=f"^{found}; allowed: a budget; next: set budget, or no "):
        PlaySettings(**settings)
    assert PlaySettings(**settings, budget=0).budget == 0


def test_what_can_never_be_played_is_refused(model, tokenizer):
    with pytest.raises(Refusal, match="without a tokenizer"):
        Player(Engine(model))
    small = Engine(model, tokenizer, EngineSettings(rows=1, memory_bytes=1 << 24))
    with pytest.raises(Refusal, match="what the memory holds"):
        list(Player(small).play(groups(Talk(), [0], PlaySettings(max_tokens=1 << 24))))
    assert small.idle


def test_an_episode_that_outgrows_the_memory_fails_alone(model, tokenizer):
    class Flood(Talk):
        """Its reply to problem 1 is longer than any memory."""

        name = "flood"

        def turn(self, prompt, messages):
            reply = super().turn(prompt, messages)
            return ({"role": "user", "content": "water " * 40_000},) if reply and prompt.number == 1 else reply

    small = Engine(model, tokenizer, EngineSettings(rows=4, memory_bytes=1 << 24))
    settings = PlaySettings(max_tokens=60, thinking=False)
    failed = [played for played in Player(small).play(groups(Flood(), range(3), settings)) if played.error]
    assert failed and all(one.prompt.number == 1 and "what the memory holds" in one.error for one in failed)
    assert small.idle and small.faults() == []
