"""The page about serving names every setting and every field; the settings say what they can not be."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from trimaran import config
from trimaran.errors import Refusal
from trimaran.serve.requests import ChatRequest, CompletionRequest
from trimaran.serve.settings import ServerSettings

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "serve.md").read_text()


def leaves(settings: type[BaseModel]) -> list[str]:
    every = config.paths(settings)
    return [path for path in every if not any(other.startswith(path + ".") for other in every)]


def test_every_setting_stands_in_the_page():
    missing = [
        path for path in leaves(ServerSettings) if f"`{path}`" not in PAGE and f"`.{path.split('.')[-1]}`" not in PAGE
    ]
    assert not missing


@pytest.mark.parametrize("request_", [ChatRequest, CompletionRequest])
def test_every_field_stands_in_the_page(request_):
    assert not [name for name in request_.model_fields if f"`{name}`" not in PAGE and f"`{name}." not in PAGE]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("serve.port=70000", "<= 65535"),
        ("serve.prot=1", "did you mean serve.port?"),
        ("serve.limits.n=0", ">= 1"),
        ("port=1", "did you mean serve.port?"),
        ("engine.drafter=mtpp", "'mtp'"),
        ("serve.request_seconds=0", "> 0"),
    ],
)
def test_a_setting_that_can_not_be_is_refused(override, said):
    with pytest.raises(Refusal) as refusal:
        config.load(ServerSettings, None, [override])
    assert said in str(refusal.value)
