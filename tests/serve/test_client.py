"""The official client against a real server on a real port."""

import json

import openai
import pytest
import torch
from openai import OpenAI

from tests.serve.conftest import CALL, SKY, SUM, THOUGHT, WEATHER, call, chat
from trimaran.engine.plain import generate
from trimaran.engine.sampler import Sampling
from trimaran.text.chat import encode_chat


@pytest.fixture
def client(server):
    with OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0) as client:
        yield client


def ids_of(tokenizer, messages, **options):
    return encode_chat(tokenizer, messages, generation_prompt=True, **options).ids


def test_an_answer_with_its_thought_and_usage(client, tokenizer):
    answer = client.chat.completions.create(model="learnt", messages=[SUM], temperature=0)
    message = answer.choices[0].message
    assert (message.role, message.content) == ("assistant", "Four.")
    assert message.reasoning == message.reasoning_content == THOUGHT
    assert answer.choices[0].finish_reason == "stop" and message.tool_calls is None
    usage = answer.usage
    assert usage.prompt_tokens == len(ids_of(tokenizer, [SUM]))
    assert usage.completion_tokens_details.reasoning_tokens == len(tokenizer.encode(THOUGHT + "\n"))
    assert usage.completion_tokens == usage.total_tokens - usage.prompt_tokens
    assert usage.x_trimaran["passes"] == usage.completion_tokens and usage.x_trimaran["tokens_per_second"] > 0


def test_a_sampled_answer_is_that_of_the_plain_generator(client, model, tokenizer):
    said = client.chat.completions.create(
        model="learnt", messages=[SUM], temperature=1.7, top_p=0.9, seed=11, n=2, max_tokens=40, logprobs=True
    )
    settings = Sampling(
        temperature=1.7, top_p=0.9, seed=11, samples=2, max_tokens=40, stop_ids=tokenizer.stop_ids, logprobs=True
    )
    outputs = generate(model, [ids_of(tokenizer, [SUM])], settings, tokenizer=tokenizer)
    for choice, output in zip(said.choices, outputs, strict=True):
        entries = choice.logprobs.content
        assert [bytes(entry.bytes) for entry in entries] == [tokenizer.token_bytes[token] for token in output.tokens]
        torch.testing.assert_close(
            torch.tensor([entry.logprob for entry in entries]), torch.tensor(output.logprobs), atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("fields", [{}, {"n": 3, "temperature": 1.5, "seed": 3}, {"stop": [" that", "zzz"]}])
def test_a_stream_adds_up_to_the_whole(client, fields):
    asked = {"model": "learnt", "messages": [SUM], "temperature": 0, "max_tokens": 60, **fields}
    whole = client.chat.completions.create(**asked)
    texts = [{"content": "", "reasoning": "", "finish": None} for _ in whole.choices]
    usage = None
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text = texts[choice.index]
            text["content"] += choice.delta.content or ""
            text["reasoning"] += getattr(choice.delta, "reasoning", None) or ""
            text["finish"] = choice.finish_reason or text["finish"]
    for choice, text in zip(whole.choices, texts, strict=True):
        reasoning = getattr(choice.message, "reasoning", "")
        assert text == {"content": choice.message.content, "reasoning": reasoning, "finish": choice.finish_reason}
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.completion_tokens_details == whole.usage.completion_tokens_details


def test_a_tool_is_called_and_its_answer_read(client, tokenizer):
    asked = {"model": "learnt", "messages": [SKY], "tools": [WEATHER], "temperature": 0}
    whole = client.chat.completions.create(**asked).choices[0]
    assert (whole.finish_reason, whole.message.content, whole.message.reasoning) == ("tool_calls", None, "I ask.")
    (made,) = whole.message.tool_calls
    assert (made.type, made.function.name) == ("function", "weather")
    assert json.loads(made.function.arguments) == CALL["function"]["arguments"]

    with client.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion().choices[0].message
    assert final.tool_calls[0].function.arguments == made.function.arguments

    history = [SKY, whole.message, {"role": "tool", "tool_call_id": made.id, "content": "clear"}]
    again = client.chat.completions.create(**{**asked, "messages": history}, max_tokens=4)
    spoken = [SKY, {"role": "assistant", "reasoning_content": "I ask.", "tool_calls": [CALL]}]
    spoken.append({"role": "tool", "content": "clear"})
    assert again.usage.prompt_tokens == len(ids_of(tokenizer, spoken, tools=[WEATHER]))


def test_tools_that_may_not_be_called_are_not_shown(server, tokenizer):
    status, said = chat(server, SKY, tools=[WEATHER], tool_choice="none", max_tokens=1)
    assert status == 200 and said["usage"]["prompt_tokens"] == len(ids_of(tokenizer, [SKY]))


def test_continuations_of_many_prompts(client, model, tokenizer):
    prompts = ["What is", [40, 41, 42]]
    said = client.completions.create(
        model="learnt", prompt="What is", max_tokens=6, temperature=0.9, seed=5, n=2, logprobs=2, echo=False
    )
    ids = [tokenizer.bos_id, *tokenizer.encode("What is")]
    settings = Sampling(temperature=0.9, seed=5, samples=2, max_tokens=6, stop_ids=tokenizer.stop_ids)
    outputs = generate(model, [ids], settings, tokenizer=tokenizer)
    assert [choice.text for choice in said.choices] == [output.text for output in outputs]
    columns = said.choices[0].logprobs
    assert len(columns.tokens) == len(columns.token_logprobs) == len(columns.text_offset) == len(outputs[0].tokens)
    assert all(1 <= len(tops) <= 2 for tops in columns.top_logprobs)

    several = client.completions.create(model="learnt", prompt=[prompts[1], prompts[1]], max_tokens=3, temperature=0)
    assert [choice.index for choice in several.choices] == [0, 1]
    assert several.choices[0].text == several.choices[1].text and several.usage.prompt_tokens == 6

    echoed = client.completions.create(model="learnt", prompt="What is", echo=True, max_tokens=2, temperature=0)
    pieces = client.completions.create(
        model="learnt", prompt="What is", echo=True, max_tokens=2, temperature=0, stream=True
    )
    assert "".join(piece.choices[0].text for piece in pieces) == echoed.choices[0].text
    assert echoed.choices[0].text.startswith("What is")


def test_models_and_words(client, server, tokenizer):
    (card,) = client.models.list().data
    assert card.id == "learnt" and card.object == "model" and card.base is None
    assert client.models.retrieve("learnt").id == "learnt"
    status, _, raw = call(server, "POST", "/tokenize", {"prompt": "two <think>", "return_token_strs": True})
    told = json.loads(raw)
    assert status == 200 and told["tokens"] == [tokenizer.bos_id, *tokenizer.encode("two <think>")]
    assert (
        told["count"] == len(told["tokens"]) == len(told["token_strs"]) and told["max_model_len"] == card.max_model_len
    )
    status, _, raw = call(server, "POST", "/v1/detokenize", {"tokens": told["tokens"][1:]})
    assert (status, json.loads(raw)) == (200, {"prompt": "two <think>"})
    _, _, raw = call(
        server, "POST", "/v1/tokenize", {"messages": [SUM], "chat_template_kwargs": {"enable_thinking": False}}
    )
    assert json.loads(raw)["tokens"] == ids_of(tokenizer, [SUM], thinking=False)


def test_errors_are_the_client_s_own_exceptions(client):
    with pytest.raises(openai.NotFoundError, match="no model 'learned' here; allowed: learnt"):
        client.chat.completions.create(model="learned", messages=[SUM])
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="learnt", messages=[SUM], frequency_penalty=0.5)
    assert (bad.value.type, bad.value.code) == ("invalid_request_error", None)
    assert "frequency_penalty is not done by this server" in bad.value.message
    ok = client.chat.completions.create(
        model="learnt", messages=[SUM], frequency_penalty=0, logit_bias={}, store=False, user="me", max_tokens=1
    )
    assert ok.choices[0].finish_reason == "length"


def test_a_later_turn_finds_the_earlier_one_in_the_cache(client):
    first = client.chat.completions.create(model="learnt", messages=[SUM], temperature=0)
    talk = [SUM, first.choices[0].message, {"role": "user", "content": "And how is the sky, then?"}]
    second = client.chat.completions.create(model="learnt", messages=talk, max_tokens=1)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 2
