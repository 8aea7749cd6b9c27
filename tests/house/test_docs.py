"""What the pages promise is carried out: python fences run, verbs, switches, make targets and links exist.

A page is one program: its ```python fences run in order in one namespace and an empty folder. A fence that cannot run
here is marked ```python no-run: REASON.
"""

import re
from pathlib import Path

import pytest

from trimaran.cli import VERBS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "reproductions").rglob("*.md")])
FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def fences(page: Path) -> list[tuple[int, str, str]]:
    """(line of the first line inside, words after the ticks, text) of every fence."""
    text = page.read_text()
    return [(text[: found.start(2)].count("\n"), found[1].strip(), found[2]) for found in FENCE.finditer(text)]


def code(page: Path) -> str:
    """What a page writes as commands: its fences but for python, and its inline code."""
    inline = re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text()))
    return "\n".join([*(text for _, words, text in fences(page) if not words.startswith("python")), *inline])


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_python_in_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "__page__"}
    for line, words, text in fences(page):
        if words == "python":
            exec(compile("\n" * line + text, str(page), "exec"), namespace)
        elif words.startswith("python"):
            assert re.fullmatch(r"python no-run: \S.+", words), f"{named(page)}:{line}: say why it does not run"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_in_a_page_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in code(page).splitlines():
        for name, words in re.findall(r"(?:^|[\s/])trimaran ([a-z][\w-]*)([^#|>&]*)", line):
            assert name in VERBS, f"{line!r} in {named(page)}: {name} is no verb"
            switches = set(re.findall(r"\s--([a-z][\w-]*)", words)) - {"help"}
            assert switches <= {*VERBS[name].flags, *VERBS[name].options}, f"{line!r} in {named(page)}"
        for name in re.findall(r"^(?:\$ )?make ([a-z][\w-]*)", line):
            assert name in targets, f"{line!r} in {named(page)}: {name} is no target of the Makefile"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_between_pages_lead_somewhere(page):
    text = FENCE.sub("", page.read_text())
    for place in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text):
        assert (page.parent / place).exists(), f"{place} in {named(page)}"


def test_every_verb_has_its_words_in_the_page_of_the_command_line():
    page = (ROOT / "docs" / "cli.md").read_text()
    for name, verb in VERBS.items():
        assert f"`trimaran {name}" in page
        for flag in (*verb.flags, *verb.options):
            assert f"--{flag}" in page
