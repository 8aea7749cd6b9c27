"""Fields of OpenAI's and vLLM's requests that are known here but not honoured.

A client may spell out what it does not want: a field that holds its neutral value asks for nothing and is let pass.
With any other value it asks for something that would not happen, and silence would be a lie, so it is refused.
"""

from collections.abc import Collection, Mapping
from typing import Any

from trimaran.errors import nearest_first

# Values beside null that ask for nothing; None: whatever it holds changes no answer (labels, hints to a host).
Neutral = Mapping[str, tuple[Any, ...] | None]

BOTH: Neutral = {
    "user": None,
    "metadata": None,
    "safety_identifier": None,
    "service_tier": ("auto", "default"),
    "store": (False,),
    "prompt_cache_key": None,
    "prompt_cache_options": None,
    "prompt_cache_retention": None,
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "include_stop_str_in_output": (False,),
    "min_tokens": (0,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "logits_processors": ([],),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "skip_special_tokens": (True, False),  # the tokens that end an answer are never in it; others keep their names
    "spaces_between_special_tokens": (True, False),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "cache_salt": (),
    "kv_transfer_params": (),
    "vllm_xargs": ({},),
    "guided_decoding_backend": None,
    "guided_whitespace_pattern": (),
    "structural_tag": (),
}
CHAT: Neutral = {
    **BOTH,
    "audio": (),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "verbosity": ("medium",),
    "web_search_options": (),
    "functions": ([],),
    "function_call": ("none",),
    "echo": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (False,),
    "documents": ([],),
    "chat_template": (),
    "mm_processor_kwargs": (),
}
COMPLETION: Neutral = {**BOTH, "suffix": ("",)}
MESSAGE: Neutral = {"name": None, "refusal": (), "audio": (), "annotations": ([],), "function_call": (), "id": None}
TOOL: Neutral = {"cache_control": None}


def without_neutral(value: Any, neutral: Neutral, fields: Collection[str]) -> Any:
    """`value`, a table of a request, without the fields that ask for nothing; `fields` are those that are honoured.

    Raises ValueError for fields that ask for what is not done here, and for fields that nobody knows.
    """
    if not isinstance(value, Mapping):
        return value
    kept = {}
    for name, given in value.items():
        if name in fields:
            kept[name] = given
        elif name not in neutral:
            raise ValueError(f"unknown field {name!r}; the nearest known: {', '.join(nearest_first(name, fields)[:3])}")
        elif not asks_for_nothing(given, neutral[name]):
            raise ValueError(f"{name} is not done by this server; leave it out")
    return kept


def asks_for_nothing(given: Any, values: tuple[Any, ...] | None) -> bool:
    """Whether `given` is null or one of the values; True is not 1 here."""
    if given is None or values is None:
        return True
    return any(given == value and isinstance(given, bool) == isinstance(value, bool) for value in values)
