"""Settings <-> TOML <-> overrides: what goes out comes back, and every mistake is named with what is allowed."""

import math
import tomllib
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, create_model

from trimaran import config
from trimaran.config import Settings
from trimaran.errors import Refusal, writing


class Phase(Settings):
    until: float = Field(gt=0, le=1)
    weights: dict[str, float] = Field(default_factory=dict)


class Optim(Settings):
    steps: int = Field(100, ge=1)
    betas: tuple[float, float] = (0.9, 0.95)
    decay: Literal["linear", "minus-sqrt"] = "linear"
    fast: bool = False


class Recipe(Settings):
    run: Path
    title: str = "a run"
    train: Optim = Optim()
    spare: Optim | None = None
    latent: int | None = Field(5, gt=0)
    phases: list[Phase] = Field(default_factory=list)
    corpora: dict[str, Phase] = Field(default_factory=dict)
    sizes: list[Annotated[int, Field(ge=0)]] = Field(default_factory=list)


def refusal(*overrides: str) -> Refusal:
    with pytest.raises(Refusal) as caught:
        config.load(Recipe, None, ["run=x", *overrides])
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("override", "found", "allowed", "next_step"),
    [
        ("train.stepz=1", "unknown key 'train.stepz'", "steps, ", "did you mean train.steps?"),
        ("steps=1", "unknown key 'steps'", "", "did you mean train.steps?"),
        ("spare.stepz=1", "unknown key 'spare.stepz'", "steps, ", "did you mean spare.steps?"),
        ("phases=[{until=1, wights={}}]", "unknown key 'phases.0.wights'", "weights, until", "phases.0.weights"),
        ("corpora.mine.untl=1", "unknown key 'corpora.mine.untl'", "until, weights", "corpora.mine.until"),
        ("train.steps=0", "train.steps = 0", "an integer >= 1", "set train.steps"),
        ("train.steps=abc", "train.steps = 'abc'", "an integer >= 1", ""),
        ("train.steps=1.5", "train.steps = 1.5", "an integer >= 1", ""),
        ("train.steps=true", "train.steps = True", "an integer >= 1", ""),
        ('train.steps="5"', "train.steps = '5'", "an integer >= 1", ""),
        ("train.fast=1", "train.fast = 1", "true or false", ""),
        ("train.fast=yes", "train.fast = 'yes'", "true or false", ""),
        ("train.decay=sqrt", "train.decay = 'sqrt'", "'minus-sqrt' or 'linear'", ""),
        ("train.betas=[1]", "train.betas = [1]", "a list of 2 values (a number, a number)", ""),
        ("train.betas=[1,true]", "train.betas = [1, True]", "a list of 2 values", ""),
        ("train=3", "train = 3", "a table with keys among steps, betas", ""),
        ("train.steps.x=3", "train.steps = {'x': 3}", "an integer", ""),
        ("phases=[{until=2}]", "phases.0.until = 2", "a number > 0 and <= 1", ""),
        ("phases=[{until=0.5, weights={a='b'}}]", "phases.0.weights.a = 'b'", "a number", ""),
        ("corpora.mine.until=x", "corpora.mine.until = 'x'", "a number > 0 and <= 1", ""),
        ("corpora.mine.weights={}", "'corpora.mine.until' is missing", "a number > 0", "corpora.mine.until=VALUE"),
        ("latent=0", "latent = 0", "an integer > 0, or left out", ""),
        ("sizes=[1,-1]", "sizes.1 = -1", "an integer >= 0", ""),
        ("sizes=4", "sizes = 4", "a list of integers", ""),
        ("title=2024", "title = 2024", "a string", "title='\"2024\"' in a shell"),
    ],
)
def test_a_mistake_names_value_alternatives_and_next_step(override, found, allowed, next_step):
    problem = refusal(override)
    assert problem.found == found
    assert allowed in problem.allowed
    assert next_step in problem.next_step


def test_a_missing_field_is_named():
    with pytest.raises(Refusal, match="'run' is missing; allowed: a path; next: set run in the recipe or as run=VALUE"):
        config.load(Recipe)


def test_same_name_inside_and_outside_keeps_both_in_the_path():
    class Inner(Settings):
        model: int = 1

    class Outer(Settings):
        model: Inner = Inner()

    with pytest.raises(Refusal, match=r"^model\.model = True"):
        config.load(Outer, None, ["model.model=true"])


def test_long_key_lists_are_cut_short():
    wide = create_model("Wide", __base__=Settings, **{f"field_{i}": (int, 0) for i in range(20)})
    with pytest.raises(Refusal, match="and 12 more"):
        wide(feild_3=1)


def test_overrides_are_toml_or_bare_text():
    recipe = config.load(
        Recipe,
        None,
        [
            "run=runs/a b",
            "train.steps=1_000",
            "train.decay=minus-sqrt",
            'title="3"',
            "train.fast=true",
            "train.steps=7",
        ],
    )
    assert recipe.run == Path("runs/a b")
    assert recipe.train == Optim(steps=7, decay="minus-sqrt", fast=True)
    assert recipe.title == "3"
    assert config.parse("x\ny = 2") == "x\ny = 2"
    assert config.parse("2024-01-31") == "2024-01-31"
    assert config.parse("") == ""


def test_none_unsets_what_may_be_left_out():
    assert config.load(Recipe, None, ["run=x", "latent=none"]).latent is None
    assert config.load(Recipe, None, ["run=x", "title=none"]).title == "none"


def test_numbers_walk_into_lists():
    tables = {"phases": [{"until": 0.5}, {"until": 1.0}]}
    assert config.override(tables, ["phases.1.until=0.9"])["phases"][1] == {"until": 0.9}
    assert tables["phases"][1] == {"until": 1.0}, "the given tables are left alone"
    with pytest.raises(Refusal, match="no place '2'; allowed: 0 to 1"):
        config.override(tables, ["phases.2.until=0.9"])


@pytest.mark.parametrize("word", ["steps", "=3", "a b=3", "x==1"])
def test_what_is_no_override_is_refused(word):
    with pytest.raises(Refusal, match=r"dotted\.key=value"):
        config.override({}, [word])


def test_a_recipe_that_cannot_be_read(tmp_path):
    (tmp_path / "text.toml").write_text("run = 'x'\n")
    with pytest.raises(Refusal, match=r"no file .*tekst\.toml.*did you mean .*text\.toml"):
        config.read(tmp_path / "tekst.toml")
    with pytest.raises(Refusal, match="is a folder"):
        config.read(tmp_path)
    (tmp_path / "broken.toml").write_text("run = 'x'\n[train\nsteps = 1\n")
    with pytest.raises(Refusal, match=r"broken\.toml: .*line 2"):
        config.read(tmp_path / "broken.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\x89PNG\xff")
    with pytest.raises(Refusal, match="is not text"):
        config.read(tmp_path / "bytes.toml")


def test_a_refusal_says_whether_the_file_or_the_command_line_is_wrong(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text("run = 'x'\n[train]\nstepz = 3\n")
    with pytest.raises(Refusal, match=r"^.*r\.toml: unknown key 'train\.stepz'"):
        config.load(Recipe, path)
    path.write_text("run = 'x'\n")
    with pytest.raises(Refusal, match=r"^unknown key 'train\.stepz'"):
        config.load(Recipe, path, ["train.stepz=3"])


numbers = st.floats(allow_nan=False)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda text: text != "none")
phases = st.builds(
    Phase,
    until=st.floats(0, 1, exclude_min=True),
    weights=st.dictionaries(texts, numbers, max_size=3),
)
optims = st.builds(
    Optim,
    steps=st.integers(1, 2**60),
    betas=st.tuples(numbers, numbers),
    decay=st.sampled_from(["linear", "minus-sqrt"]),
    fast=st.booleans(),
)
recipes = st.builds(
    Recipe,
    run=texts.filter(lambda text: text and "\0" not in text).map(Path),
    title=texts,
    train=optims,
    spare=st.none() | optims,
    latent=st.none() | st.integers(1, 9),
    phases=st.lists(phases, max_size=3),
    corpora=st.dictionaries(texts, phases, max_size=3),
    sizes=st.lists(st.integers(0, 2**40), max_size=3),
)


@given(recipes)
def test_settings_survive_toml(recipe):
    assert Recipe(**tomllib.loads(config.toml(recipe))) == recipe


@given(recipes)
def test_every_scalar_survives_an_override(recipe):
    given_back = config.load(
        Recipe,
        None,
        [
            f"run={config.value_text(str(recipe.run))}",
            f"title={config.value_text(recipe.title)}",
            f"train.betas={config.value_text(list(recipe.train.betas))}",
            f"train.steps={recipe.train.steps}",
        ],
    )
    assert (given_back.run, given_back.title, given_back.train.betas) == (recipe.run, recipe.title, recipe.train.betas)


def test_the_resolved_recipe_is_written_whole_and_readable(tmp_path):
    recipe = Recipe(run="x", train={"betas": [0.9, math.inf]}, latent=None)
    config.write(recipe, tmp_path / "deep" / "recipe.toml", comment="by trimaran\non a laptop")
    text = (tmp_path / "deep" / "recipe.toml").read_text()
    assert text.startswith("# by trimaran\n# on a laptop\n")
    assert "betas = [0.9, inf]" in text and 'latent = "none"' in text and "spare" not in text
    assert config.load(Recipe, tmp_path / "deep" / "recipe.toml") == recipe
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["recipe.toml"]


def test_a_place_that_cannot_be_written_is_a_refusal(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Refusal, match="cannot write"):
        config.write(Recipe(run="x"), tmp_path / "file" / "recipe.toml")
    with pytest.raises(Refusal, match="no space left on device; allowed: a disk with free space"), writing("/dev/full"):
        Path("/dev/full").write_text("x" * 100_000)


def test_names_stand_for_objects():
    registry = {"load": "trimaran.config:load", "here": len}
    assert config.named("load", registry, "thing") is config.load
    assert config.named("here", registry, "thing") is len
    assert config.named("math:pi", registry, "thing") == math.pi
    with pytest.raises(Refusal, match=r"unknown thing 'laod'; allowed: load, here, package.module:object; .*'load'"):
        config.named("laod", registry, "thing")
    with pytest.raises(Refusal, match=r"no module 'trimaran\.nowhere'"):
        config.named("trimaran.nowhere:load", registry, "thing")
    with pytest.raises(Refusal, match=r"'trimaran\.config' has no 'lod'; allowed: load"):
        config.named("trimaran.config:lod", registry, "thing")
