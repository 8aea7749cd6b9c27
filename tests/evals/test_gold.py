"""A perfect model earns full rewards: what fine-tuning teaches is what an episode reads back, token for token."""

import pytest

from trimaran.tasks.episode import Said, episode
from trimaran.tasks.names import TASKS, task
from trimaran.tasks.task import REWARD
from trimaran.text.chat import encode_chat
from trimaran.text.conversation import Conversation

NEEDS = {"gsm8k", "gym", "maths"}  # settings of their own: a file, a data set


@pytest.mark.parametrize("name", sorted(set(TASKS) - NEEDS))
def test_gold_episodes_survive_the_template_and_earn_everything(tokenizer, name):
    one = task(name)
    for number in range(6):
        prompt = one.prompt(number, "held_out")
        gold = one.gold(prompt)
        tools = {"tools": list(prompt.tools)} if prompt.tools else {}
        taught = encode_chat(tokenizer, [*prompt.messages, *gold], thinking=prompt.thinking, **tools)
        conversation = Conversation(tokenizer, prompt.tools, thinking=prompt.thinking)
        course, said = episode(one, prompt), None
        for start, stop in taught.spans:
            conversation.hear(next(course) if said is None else course.send(said))
            assert conversation.ids == taught.ids[:start]
            said = Said(conversation.answer(taught.ids[start:stop]))
        with pytest.raises(StopIteration) as over:
            course.send(said)
        trace = over.value.value
        assert one.score(trace)[REWARD] == 1
        assert [message["role"] for message in trace.messages] == [message["role"] for message in gold]
        assert trace.answer == str(gold[-1]["content"])
