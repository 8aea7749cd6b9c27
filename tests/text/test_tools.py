import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimaran.errors import Refusal
from trimaran.text.answer import read_answer
from trimaran.text.template import render
from trimaran.text.tools import ToolLimits, Tools, json_of

PLACE = {"type": "object", "properties": {"name": {"type": "string"}}}


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "12", "12"),
        ({"type": "string"}, " null\n", " null\n"),
        ({"type": "string"}, '"quoted"', '"quoted"'),
        ({"type": "integer"}, " 12 ", 12),
        ({"type": "integer"}, "-3.0", -3),
        ({"type": "integer"}, "3.5", "3.5"),
        ({"type": "integer"}, "1_000", "1_000"),
        ({"type": "integer"}, "1" * 5000, "1" * 5000),
        ({"type": "integer"}, "true", "true"),
        ({"type": "number"}, "12", 12),
        ({"type": "number"}, "1.5e3", 1500.0),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "number"}, "twelve", "twelve"),
        ({"type": "boolean"}, "true", True),
        ({"type": "boolean"}, "False", False),
        ({"type": "boolean"}, "1", "1"),
        ({"type": "null"}, "None", None),
        ({"type": "object"}, '{"a": [1, 2.50]}', {"a": [1, 2.5]}),
        ({"type": "object"}, "[1]", "[1]"),
        ({"type": "object"}, '{"a": NaN}', '{"a": NaN}'),
        ({"type": "array"}, "[\n1,\n2\n]", [1, 2]),
        ({"type": "array"}, "[" * 100_000, "[" * 100_000),
        ({"type": ["integer", "null"]}, "null", None),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, "12", "12"),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "12", 12),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "1 2", "1 2"),
        ({"oneOf": [{"type": "array"}, {"type": "boolean"}]}, "true", True),
        ({"anyOf": [{"type": "string"}, {}]}, "12", 12),
        ({"allOf": [{"type": ["string", "integer"]}, {"type": "string"}]}, "12", "12"),
        ({"enum": ["1", 2, None]}, "1", "1"),
        ({"enum": ["1", 2, None]}, "2", 2),
        ({"enum": ["1", 2, None]}, "null", None),
        ({"enum": [1]}, "true", "true"),
        ({"enum": ["a", "b"]}, "c", "c"),
        ({"const": 5}, "5", 5),
        ({"$ref": "#/$defs/count"}, "5", 5),
        ({"anyOf": [{"$ref": "#/$defs/count"}, {"type": "null"}]}, "None", None),
        ({"allOf": [{"$ref": "#/$defs/word"}], "description": "as pydantic writes it"}, "5", "5"),
        ({"$ref": "#/$defs/circle"}, "5", 5),
        ({"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "string"}]}, "5", "5"),
        ({"$ref": "#/$defs/two"}, "1", "1"),
        ({"$ref": "#/$defs/nothing"}, "5", 5),
        ({"description": "anything"}, "5", 5),
        ({"description": "anything"}, "calm", "calm"),
        ({"description": "anything"}, "None", None),
        (True, "5", 5),
    ],
)
def test_values_are_read_by_their_schema(schema, text, value):
    defs = {"count": {"type": "integer"}, "word": {"type": "string"}, "circle": {"$ref": "#/$defs/circle"}}
    defs["two"] = {"enum": ["1", 2]}
    defs["tree"] = {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "array"}]}
    tools = Tools([{"name": "f", "parameters": {"properties": {"a": schema}, "$defs": defs}}])
    source = tools.json_of("f", "a", text)
    read = json.loads(source)
    assert read == value and type(read) is type(value)
    assert not tools.is_text("f", "a") or source == json.dumps(text, ensure_ascii=False)


def test_what_no_schema_names_is_json_or_a_string():
    tools = Tools([{"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}}, {"name": "g"}])
    for function, parameter in (("f", "b"), ("g", "a"), ("h", "a")):
        assert tools.json_of(function, parameter, "5") == "5"
        assert tools.json_of(function, parameter, "five") == '"five"'
        assert not tools.is_text(function, parameter)
    assert tools.is_text("f", "a")


def test_numbers_and_tables_keep_their_own_source():
    for text in ("0.10", "1e400", '{"a":  1.0, "b": 12345678901234567890.123}', "[1,2]"):
        assert json_of(text, {}, {}) == text


@given(
    st.text(st.sampled_from('0123456789.-+eE"[]{}: ,\ntruefalsn_') | st.characters(exclude_categories=["Cs"])),
    st.data(),
)
@settings(max_examples=300, deadline=None)
def test_whatever_is_written_becomes_json(text, data):
    kinds = ["array", "boolean", "integer", "null", "number", "object", "string"]
    schema = {"type": data.draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=3))}
    value = json.loads(json_of(text, schema, {}), parse_constant=lambda name: pytest.fail(name))
    assert value == text or not isinstance(value, str)


def weather(**changes):
    return {"type": "function", "function": {"name": "weather", "parameters": PLACE, **changes}}


def nested(depth):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return {"type": "object", "properties": {"a": schema}}


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("weather", "tools of type str; allowed: a list"),
        ([weather()] * 129, "129 tools; allowed: at most 128"),
        ([weather(), weather()], "two tools called 'weather'"),
        (["weather"], "tool 0: a str"),
        ([{"type": "retrieval"}], "tool 0: of type 'retrieval'; allowed: 'function'"),
        ([{"type": "function", "function": []}], r"tool 0: function = \[\]"),
        ([{"type": "function"}], "tool 0: name = None"),
        ([weather(name="a b")], "tool 0: name = 'a b'"),
        ([weather(name="a>\n<b")], "tool 0: name = "),
        ([weather(name="a" * 200)], "tool 0: name = 'aaa"),
        ([weather(description=["a"])], "weather: a description that is no text"),
        ([weather(description="\ud800")], "text that UTF-8 can spell"),
        ([weather(description="a" * 300_000)], "tool definitions of 300... characters; allowed: at most 262144"),
        ([weather(parameters=[])], "weather: parameters: a list"),
        ([weather(parameters=True)], "weather: parameters that are no object"),
        ([weather(parameters={"type": "string"})], "weather: parameters that are no object"),
        ([weather(parameters={"properties": {"a>b": {}}})], "weather: parameter 'a>b'"),
        ([weather(parameters={"properties": []})], r"weather: parameters: properties = \[\]"),
        (
            [weather(parameters={"properties": {"a": {"type": "text"}}})],
            "properties.*a: type = 'text'|a: type = 'text'",
        ),
        ([weather(parameters={"properties": {"a": {"type": [1]}}})], r"type = \[1\]; allowed: array, boolean"),
        ([weather(parameters={"properties": {"a": {"type": []}}})], r"type = \[\]"),
        ([weather(parameters={"properties": {"a": {"pattern": 5}}})], "a: pattern = 5"),
        ([weather(parameters={"properties": {"a": {"enum": []}}})], r"a: enum = \[\]"),
        ([weather(parameters={"properties": {"a": {"anyOf": {}}}})], "a: anyOf = {}"),
        ([weather(parameters={"properties": {"a": {"items": 5}}})], "a.items: a int"),
        ([weather(parameters={"required": [1]})], r"required = \[1\]"),
        ([weather(parameters={"default": {"type": 5}, "$ref": "#/default"})], "type = 5"),
        ([weather(parameters={"maximum": float("inf")})], "inf in a tool definition"),
        ([weather(parameters={1: 2})], "1 in a tool definition"),
        ([weather(parameters=nested(20_000))], "nested too deeply; allowed: 32 levels"),
    ],
)
def test_definitions_that_are_refused(tools, message):
    with pytest.raises(Refusal, match=message):
        Tools(tools)


def test_limits_can_be_set():
    with pytest.raises(Refusal, match="allowed: at most 1"):
        Tools([weather(), weather(name="now")], ToolLimits(count=1))
    with pytest.raises(Refusal, match="allowed: 5 levels"):
        Tools([weather(parameters=nested(2))], ToolLimits(depth=5))
    assert Tools([weather(parameters=nested(14))]).names == ["weather"]


def test_a_long_chain_of_references_ends():
    defs = {f"d{place}": {"anyOf": [{"$ref": f"#/$defs/d{place + 1}"}] * 2} for place in range(3000)}
    tools = Tools([{"name": "f", "parameters": {"properties": {"a": {"$ref": "#/$defs/d0"}}, "$defs": defs}}])
    assert tools.json_of("f", "a", "5") == "5"


def test_the_template_gets_what_it_can_show():
    bare = Tools([weather(description=None, strict=True)]).definitions
    assert bare == [weather()] == Tools([weather()["function"]]).definitions
    text = render([{"role": "user", "content": "?"}], tools=bare)
    assert "None" not in text and "strict" not in text


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "properties", "a", "$ref", "anyOf", "enum", "items", "parameters", "name", "required"]
            ),
            inner | st.sampled_from(["string", "object", "#/properties/a", "weather"]),
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(ANYTHING, st.sampled_from(["5", "a", "null", "[1]"]))
@settings(max_examples=500, deadline=None)
def test_any_json_is_refused_or_can_be_called(parameters, text):
    """No definition that is let in breaks the reading of an answer."""
    try:
        tools = Tools([{"type": "function", "function": {"name": "weather", "parameters": parameters}}])
    except Refusal:
        return
    call = f"<tool_call>\n<function=weather>\n<parameter=a>\n{text}\n</parameter>\n</function>\n</tool_call>"
    (made,) = read_answer(call, False, tools).calls
    assert str(json.loads(made.arguments)["a"]) in (text, str(json.loads(text)) if text != "a" else "a")
    render([{"role": "user", "content": "?"}], tools=tools.definitions)
