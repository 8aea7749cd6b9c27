"""Every recipe loads, and every name in the command line's tables stands for something."""

import re
from pathlib import Path

import pytest

from trimaran import config
from trimaran.cli import STAGES, VERBS

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path for folder in ("recipes", "src") for path in (ROOT / folder).rglob("*.toml"))
NAMES = {f"verb {name}": verb.function for name, verb in VERBS.items()}
NAMES |= {f"stage {name}: {place}": place for name, stage in STAGES.items() for place in (stage.settings, stage.main)}


def settings_of(path: Path) -> type[config.Settings]:
    """What a recipe's stage says; a table without one is a list of tasks to score."""
    stage = config.read(path).get("stage")
    place = "trimaran.evals.run:ScoreSettings" if stage is None else config.named(stage, STAGES, "stage").settings
    return config.imported(place)


def overrides_of(path: Path) -> list[str]:
    """What the recipe's first comment says one adds: `# trimaran train THIS data.path=notes`."""
    command = re.search(r"^# .*trimaran train \S+(.*)$", path.read_text(), re.MULTILINE)
    return [word for word in command[1].split() if config.OVERRIDE.match(word)] if command else []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_recipe_loads_and_survives_being_written(path, tmp_path):
    settings = settings_of(path)
    recipe = config.load(settings, path, overrides_of(path))
    config.write(recipe, tmp_path / "recipe.toml")
    assert config.load(settings, tmp_path / "recipe.toml") == recipe


@pytest.mark.parametrize("place", NAMES.values(), ids=NAMES)
def test_a_name_stands_for_a_function(place):
    assert callable(config.imported(place))
