"""Answers of a given form: a JSON schema, a regular expression, one of several texts, a grammar.

    constraints = Constraints(tokenizer)
    constraint = constraints.schema({"type": "object", "properties": {"age": {"type": "integer"}}})
    Request(prompt, guide=lambda: constraint.guide(opened=True))     # a guide for each sample

llguidance (the extra `constrain`) keeps the grammars. They are compiled once, here; a guide is a copy of the compiled
state. What it costs to compile and to take a step is bounded by counts of work, not by a clock, so that a constraint is
refused or taken alike on every machine.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from trimaran.config import Settings
from trimaran.engine.budget import AfterThought
from trimaran.engine.guide import Guide
from trimaran.errors import Refusal
from trimaran.text.tokenizer import Tokenizer

# Between the signs of JSON: a space, or a new line with its indent. A model that likes white space would never come to
# an end if there were no bound.
JSON_STYLE = {"whitespace_pattern": r"\x20|\n(\x20{1,32}|\t{1,16})?"}


class ConstraintLimits(Settings):
    """How much a constraint may ask for."""

    bytes: int = Field(65536, ge=1)  # of a schema, expression, grammar, or all choices
    depth: int = Field(32, ge=1)  # of a schema's objects and lists within one another
    choices: int = Field(1024, ge=1)
    grammar: int = Field(200_000, ge=1)  # symbols that a schema or grammar may unfold to
    compile_work: int = Field(1_000_000, ge=1)  # steps that build its expressions; about a second at most
    step_work: int = Field(100_000, ge=1)  # steps for one token


class Constraints:
    """Makes constraints for one tokenizer. Raises `Refusal` for what is malformed, too large, or can not be met."""

    def __init__(self, tokenizer: Tokenizer, limits: ConstraintLimits = ConstraintLimits()):  # noqa: B008 (frozen)
        try:
            import llguidance
        except ImportError:
            raise Refusal(
                "a constraint, without llguidance", "free answers", "pip install 'trimaran[constrain]'"
            ) from None
        self.library: Any = llguidance
        self.tokenizer, self.limits = tokenizer, limits
        self.words = llguidance.LLTokenizer(
            tokenizer.marked.to_str(), n_vocab=tokenizer.vocab_size, eos_token=list(tokenizer.stop_ids)
        )
        self.parser_limits = llguidance.LLParserLimits(
            max_grammar_size=limits.grammar,
            initial_lexer_fuel=limits.compile_work,
            step_lexer_fuel=limits.step_work,
            verbose_errors=False,
        )

    def schema(self, schema: Mapping[str, Any] | str) -> "Constraint":
        """JSON that a JSON schema (a table, or its source) describes. Keywords that it can not keep to are refused."""
        if isinstance(schema, str):
            self._check_size(schema, "schema")
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError) as problem:
                raise Refusal(f"a schema that is no JSON ({problem})", "a JSON object", "correct the schema") from None
        if not isinstance(schema, Mapping):
            raise Refusal(f"a schema that is {schema!r:.40}", "a JSON object", "wrap it in one")
        deep = depth(schema, self.limits.depth)
        if deep > self.limits.depth:
            raise Refusal("a schema of too many levels", f"at most {self.limits.depth}", "make it flatter")
        source = json.dumps(schema)
        self._check_size(source, "schema")
        return self._compiled(self.library.LLMatcher.grammar_from_json_schema(source, defaults=JSON_STYLE), "schema")

    def json_object(self) -> "Constraint":
        """Any JSON object."""
        return self.schema({"type": "object"})

    def regex(self, pattern: str) -> "Constraint":
        """A text that `pattern` matches from its first sign to its last."""
        self._check_size(pattern, "regular expression")
        return self._compiled(self.library.LLMatcher.grammar_from_regex(pattern), "regular expression")

    def choice(self, texts: Sequence[str]) -> "Constraint":
        """One of `texts`."""
        if not 1 <= len(texts) <= self.limits.choices or not all(texts):
            allowed = f"1 to {self.limits.choices} that are not empty"
            raise Refusal(f"{len(texts)} choices, {list(texts).count('')} of them empty", allowed, "give other choices")
        self._check_size("".join(texts), "list of choices")
        return self._compiled(self.library.grammar_from("choice", list(texts)), "list of choices")

    def grammar(self, source: str) -> "Constraint":
        """A text of a context-free grammar: Lark's notation as llguidance reads it, or GBNF."""
        self._check_size(source, "grammar")
        try:
            compiled = self.library.grammar_from("grammar", source)
        except ValueError as problem:
            raise refusal("grammar", str(problem)) from None
        return self._compiled(compiled, "grammar")

    def _check_size(self, source: str, kind: str) -> None:
        try:
            size = len(source.encode())
        except UnicodeEncodeError:
            raise Refusal(f"a {kind} with half a surrogate pair", "text that UTF-8 can spell", "correct it") from None
        if size > self.limits.bytes:
            raise Refusal(f"a {kind} of {size} bytes", f"at most {self.limits.bytes}", "make it shorter")

    def _compiled(self, grammar: str, kind: str) -> "Constraint":
        matcher = self.library.LLMatcher(self.words, grammar, log_level=0, limits=self.parser_limits)
        ahead = matcher.deep_copy()  # some limits are met only by a step, the first after what any answer begins with
        ahead.consume_tokens(ahead.compute_ff_tokens())
        ahead.compute_bitmask()
        for one in (matcher, ahead):
            if one.is_error():
                raise refusal(kind, one.get_error())
        return Constraint(matcher, self.tokenizer, kind)


class Constraint:
    """A form that answers are to have; compiled, and untouched by the guides it makes."""

    def __init__(self, matcher: Any, tokenizer: Tokenizer, kind: str):
        self.matcher, self.tokenizer, self.kind = matcher, tokenizer, kind

    def guide(self, *, opened: bool = False) -> Guide:
        """A guide for one row. opened: the prompt ends inside a thought, after which the form begins."""
        form = Form(self.matcher.deep_copy(), self.tokenizer.vocab_size, self.kind)
        if not opened:
            return form
        return AfterThought(form, self.tokenizer, opened=True, ends=self.tokenizer.stop_ids)


class Form:
    """The guide of a constraint. Where the text may end, the tokenizer's end tokens are allowed too."""

    def __init__(self, matcher: Any, width: int, kind: str):
        self.matcher, self.width, self.kind = matcher, width, kind

    @property
    def ended(self) -> bool:
        return self.matcher.is_stopped() and not self.matcher.is_error()

    def allowed(self) -> Tensor:
        bits = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        if self.matcher.is_error():
            raise refusal(self.kind, self.matcher.get_error())
        return torch.from_numpy(np.unpackbits(bits, count=self.width, bitorder="little").view(np.bool_))

    def push(self, token: int) -> None:
        self.matcher.consume_token(token)  # one that is not allowed is an error, which `allowed` tells

    def fork(self) -> "Form":
        return Form(self.matcher.deep_copy(), self.width, self.kind)


def refusal(kind: str, problem: str) -> Refusal:
    """What llguidance says about a constraint, its first line."""
    lines = [line.strip() for line in problem.splitlines() if line.strip()]
    return Refusal(
        f"a {kind} that can not be kept to ({'; '.join(lines)[:300]})", "what llguidance reads", "simplify it"
    )


def depth(value: Any, most: int) -> int:
    """Levels of objects and lists within one another, counted up to `most` + 1."""
    level, current = 0, [value]
    while level <= most:
        nested = [one for one in current if isinstance(one, Mapping | list | tuple)]
        if not nested:
            break
        level += 1
        current = [item for one in nested for item in (one.values() if isinstance(one, Mapping) else one)]
    return level
