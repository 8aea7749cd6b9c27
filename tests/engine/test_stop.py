"""Stop strings and streamed text: the same text however it was cut into tokens."""

import itertools

import pytest

from trimaran.engine.plain import generate, stream
from trimaran.engine.sampler import Sampling
from trimaran.engine.stop import Reader

TEXT = "né, 日本🙂 and a hull; the boats\n\nEND of a\u0301 text"


def read(tokenizer, ids: list[int], stops: tuple[str, ...]) -> tuple[list[str], str | None]:
    reader = Reader(tokenizer.stream(), stops)
    pieces = []
    for token in ids:
        pieces.append(reader.push(token))
        if reader.stopped is not None:
            break
    return [*pieces, reader.finish()], reader.stopped


@pytest.mark.parametrize("one_byte_each", [False, True])
def test_pieces_concatenate_to_the_text(tokenizer, one_byte_each):
    ids = tokenizer.encode(TEXT)
    if one_byte_each:
        ids = [tokenizer.token_bytes.index(bytes([byte])) for byte in TEXT.encode()]
    pieces, stopped = read(tokenizer, ids, ())
    assert "".join(pieces) == TEXT and stopped is None
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize(
    ("stops", "kept", "which"),
    [
        (("\n\n",), TEXT.index("\n\n"), "\n\n"),
        (("END",), TEXT.index("END"), "END"),
        (("ENDLESS", "boats and"), len(TEXT), None),
        (("日本",), TEXT.index("日"), "日本"),
        (("本🙂 ", "日本🙂 and"), TEXT.index("本"), "本🙂 "),  # the one that is complete first
        (("hull; the", "ll; "), TEXT.index("ll; "), "ll; "),
        (("text",), TEXT.index("text"), "text"),
        (("textual",), len(TEXT), None),
    ],
)
def test_stop_strings_across_token_borders(tokenizer, stops, kept, which):
    ids = tokenizer.encode(TEXT)
    single = [tokenizer.token_bytes.index(bytes([byte])) for byte in TEXT.encode()]
    for cut in (ids, single):
        pieces, stopped = read(tokenizer, cut, stops)
        assert "".join(pieces) == TEXT[:kept]
        assert stopped == which


def test_an_unfinished_character_at_the_end_is_shown_as_such(tokenizer):
    pieces, _ = read(tokenizer, tokenizer.encode("a日")[:-1], ())
    assert "".join(pieces) == "a\ufffd"


@pytest.mark.parametrize("draft", [0, 3])
def test_generation_ends_before_a_stop_string(copier, tokenizer, pattern_prompts, draft):
    prompts = pattern_prompts()
    free = generate(copier, prompts, Sampling(temperature=0, max_tokens=40), tokenizer=tokenizer)
    for number, whole in enumerate(free):
        for start, size in itertools.product((0, 3, 9), (1, 2, 4)):
            stop = whole.text[start : start + size]
            if len(stop) < size or "\ufffd" in stop:
                continue
            one = Sampling(temperature=0, max_tokens=40, stop=(stop, "never said"))
            cut = generate(copier, [prompts[number]], one, tokenizer=tokenizer, draft=draft)[0]
            assert cut.text == whole.text[: whole.text.index(stop)]
            assert (cut.finish, cut.stop) == ("stop", stop)
            assert cut.tokens == whole.tokens[: len(cut.tokens)]
            assert stop in tokenizer.decode(cut.tokens) and stop not in tokenizer.decode(cut.tokens[:-1])


@pytest.mark.parametrize("draft", [0, 4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_streamed_pieces_are_the_output(copier, tokenizer, pattern_prompts, temperature, draft):
    prompts = pattern_prompts()
    settings = [
        Sampling(temperature=temperature, max_tokens=10 + 7 * i, seed=i, stop=("é日",) if i % 2 else ())
        for i in range(len(prompts))
    ]
    tokens, texts, outputs = [[] for _ in prompts], [""] * len(prompts), {}
    for piece in stream(copier, prompts, settings, tokenizer=tokenizer, draft=draft):
        assert piece.row not in outputs, "nothing after the end"
        tokens[piece.row] += piece.tokens
        texts[piece.row] += piece.text
        if piece.output is not None:
            outputs[piece.row] = piece.output
    assert sorted(outputs) == list(range(len(prompts)))
    for row, output in outputs.items():
        assert output.tokens == tokens[row] and output.text == texts[row]
        if output.finish == "length":
            assert output.text == tokenizer.decode(output.tokens)
    assert [o.text for o in generate(copier, prompts, settings, tokenizer=tokenizer)] == texts


def test_ids_that_the_tokenizer_lacks_are_never_chosen(copier, tokenizer):
    assert tokenizer.vocab_size < copier.config.vocab_size
    outputs = generate(
        copier, [[40, 41]], Sampling(temperature=50.0, samples=40, max_tokens=20, seed=0), tokenizer=tokenizer, draft=2
    )
    assert all(token < tokenizer.vocab_size for output in outputs for token in output.tokens)
