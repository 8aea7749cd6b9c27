"""`trimaran generate` and `trimaran chat` as real processes, on pipes and on a terminal."""

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.models import tiny
from trimaran.engine import chat as chat_verb
from trimaran.engine import generate as generate_verb
from trimaran.engine.folder import FolderSettings, open_folder
from trimaran.engine.plain import generate
from trimaran.engine.sampler import Sampling
from trimaran.errors import Refusal
from trimaran.model import hub
from trimaran.text.chat import encode_chat

PROMPT = "é日é日é日é"


def pipe_in(monkeypatch, given: bytes) -> None:
    """Makes `given` the stdin of this process, through a real pipe."""
    read, write = os.pipe()
    os.write(write, given)
    os.close(write)
    monkeypatch.setattr(sys, "stdin", open(read))  # noqa: SIM115 (closed with the test's last reference)


def trimaran(*words: object, stdin: str, python: tuple[str, ...] = ()) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of the command with `stdin` piped in."""
    command = [sys.executable, *python, "-m", "trimaran", *map(str, words)]
    ran = subprocess.run(command, input=stdin.encode(), capture_output=True, timeout=120)
    return ran.returncode, ran.stdout.decode(), ran.stderr.decode()


def expected(folder: Path, prompt: str, settings: Sampling) -> list[str]:
    opened = open_folder(str(folder), FolderSettings())
    ids = [opened.tokenizer.bos_id, *opened.tokenizer.encode(prompt)]
    return [output.text for output in generate(opened.model, [ids], settings, tokenizer=opened.tokenizer)]


def test_generate_continues_and_tells_what_it_took(base_run, capsys):
    text = expected(base_run, PROMPT, Sampling(temperature=0, max_tokens=30, stop_ids=(4,)))[0]
    generate_verb.main(str(base_run), ["temperature=0", "max_tokens=30", "seed=5"], PROMPT)
    out, err = capsys.readouterr()
    assert out == PROMPT + text + "\n"
    assert re.fullmatch(r"prompt of \d+ tokens in [\d.]+ s · \d+ tokens, \d+ tokens/s · seed 5\n", err)


def test_generate_reads_a_pipe_and_imports_little(base_run):
    text = expected(base_run, PROMPT, Sampling(temperature=0, max_tokens=30, stop_ids=(4,)))[0]
    words = ("generate", base_run, "temperature=0", "max_tokens=30", "draft=3", "echo=false")
    code, out, err = trimaran(*words, stdin=PROMPT + "\n", python=("-X", "importtime"))
    assert (code, out) == (0, text + "\n"), "the prompt is what was piped, less its line end"
    assert re.search(r"drafts accepted [1-9]\d* of \d+ \(\d+%\) · [\d.]+ tokens per pass · seed", err)
    imported = set(re.findall(r"\|\s*([a-z_0-9]+)[\w.]*$", err, re.MULTILINE))
    assert "torch" in imported and not {"transformers", "matplotlib", "fastapi", "triton"} & imported


def test_generate_shows_samples_in_turn(base_run, capsys):
    one = Sampling(samples=3, seed=1, max_tokens=12, stop_ids=(4,))
    texts = expected(base_run, "", one)
    generate_verb.main(str(base_run), ["samples=3", "seed=1", "max_tokens=12"], "")
    titles = [f"--- sample {number} of 3 ---\n" for number in (1, 2, 3)]
    assert capsys.readouterr().out == "".join(f"{title}{text}\n" for title, text in zip(titles, texts, strict=True))


@pytest.mark.parametrize(
    ("words", "stdin", "said"),
    [
        (["temperature=-1"], b"a", "temperature = -1; allowed: a number >= 0"),
        (["temprature=1"], b"a", "unknown key 'temprature'; allowed: temperature, "),
        (["draft=-1"], b"a", "draft = -1; allowed: an integer >= 0"),
        (["device=gpu"], b"a", "device = 'gpu'; allowed: cpu, cuda"),
        (["dtype=fp4"], b"a", "dtype = 'fp4'; allowed: 'float"),
        ([], b"\xff\xfe", "input is not text (byte 0); allowed: UTF-8"),
    ],
)
def test_generate_refuses(base_run, words, stdin, said, capsys, monkeypatch):
    pipe_in(monkeypatch, stdin)
    with pytest.raises(Refusal) as refusal:
        generate_verb.main(str(base_run), words)
    assert str(refusal.value).startswith(said)
    assert capsys.readouterr().out == ""


def test_folders_that_cannot_be_opened(tmp_path, base_run, tokenizer):
    with pytest.raises(Refusal, match=r"^no folder '.*/none'; allowed: a run or hub folder with config\.json; next: "):
        generate_verb.main(str(tmp_path / "none"), [], "a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refusal, match=r"config\.json"):
        generate_verb.main(str(tmp_path / "empty"), [], "a")
    shutil.copytree(base_run, tmp_path / "mute")
    (tmp_path / "mute" / "tokenizer.json").unlink()
    with pytest.raises(Refusal, match=r"^no tokenizer\.json in "):
        generate_verb.main(str(tmp_path / "mute"), [], "a")
    hub.save(tiny("dense", vocab_size=330), tmp_path / "plain")
    tokenizer.save(tmp_path / "plain")
    with pytest.raises(Refusal, match=r"^draft = 2; allowed: 0, for this model has no draft block"):
        generate_verb.main(str(tmp_path / "plain"), ["draft=2"], "a")
    with pytest.raises(Refusal, match=r"^samples = 2; allowed: 1"):
        chat_verb.main(str(base_run), ["samples=2"])


def test_chat_on_a_base_model_says_so_and_completes(base_run, capsys, monkeypatch):
    texts = expected(base_run, PROMPT, Sampling(temperature=0, max_tokens=12, stop_ids=(4,)))
    pipe_in(monkeypatch, f"{PROMPT}\n\n{PROMPT}".encode())
    chat_verb.main(str(base_run), ["temperature=0", "max_tokens=12"])
    out, err = capsys.readouterr()
    assert out == f"{PROMPT}{texts[0]}\n" * 2
    assert "is a base model (it was pretrained and nothing more): it completes your text" in err


def test_a_hub_folder_without_a_template_is_a_base_model(base_run, chat_run, tmp_path):
    for source, template, base in ((base_run, False, True), (base_run, True, False)):
        folder = tmp_path / f"hub-{template}"
        shutil.copytree(source, folder)
        (folder / "recipe.toml").unlink()
        if not template:
            (folder / "chat_template.jinja").unlink()
        assert (open_folder(str(folder), FolderSettings()).base is not None) == base
    assert open_folder(str(chat_run), FolderSettings()).base is None


def test_chat_answers_each_line_from_all_that_was_said(chat_run):
    words = ("temperature=0.5", "seed=3", "max_tokens=20", "thinking=false", "system=Be brief.")
    code, out, err = trimaran("chat", chat_run, *words, stdin="hull\nboats\n/new\nhull\n/quit\nnot read\n")
    opened = open_folder(str(chat_run), FolderSettings())
    one = Sampling(temperature=0.5, seed=3, max_tokens=20, stop_ids=opened.tokenizer.stop_ids)
    said, answers = [{"role": "system", "content": "Be brief."}], []
    for line in ("hull", "boats"):
        said.append({"role": "user", "content": line})
        ids = encode_chat(opened.tokenizer, said, generation_prompt=True, thinking=False).ids
        answers.append(generate(opened.model, [ids], one, tokenizer=opened.tokenizer)[0].text)
        said.append({"role": "assistant", "content": answers[-1]})
    assert code == 0 and out == f"{answers[0]}\n{answers[1]}\n{answers[0]}\n"
    assert "base model" not in err


def read_until(terminal: int, wanted: str, seconds: float = 60) -> str:
    """What the terminal shows until `wanted` is there."""
    shown, end = b"", time.monotonic() + seconds
    while wanted not in shown.decode(errors="ignore"):
        assert time.monotonic() < end, f"{wanted!r} is not in {shown.decode(errors='replace')!r}"
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                shown += os.read(terminal, 4096)
            except OSError:  # the other end has been closed
                break
    return shown.decode(errors="replace")


def test_chat_on_a_terminal(chat_run):
    ours, theirs = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "trimaran",
        "chat",
        chat_run,
        "max_tokens=2000",
        "ignore_eos=true",
        "thinking=false",
    ]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=own
    )
    os.close(theirs)
    try:
        assert "/quit or Ctrl-D leaves" in read_until(ours, "you> ")
        os.write(ours, b"boat\n")
        read_until(ours, "boat\r\n")
        time.sleep(0.5)
        os.write(ours, b"\x03")  # Ctrl-C: the answer ends, the chat goes on
        read_until(ours, "you> ")
        os.write(ours, b"\x04")  # Ctrl-D
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def own() -> None:
    """Makes the terminal on stdin that of the new session, so that Ctrl-C reaches it."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
