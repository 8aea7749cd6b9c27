"""Every case of `cases_*.py` in real processes; see ranks.py.

One group of processes per world size runs all selected cases of that size when the first of them is asked for.
"""

import fcntl
import json
import os
from pathlib import Path

import pytest

from tests.parallel import ranks

CASES = ranks.cases()
# Of three axes, or second ones of a kind on four ranks: seconds each, since four processes share two cores.
SLOW = (
    "checkpoint of fsdp x ep",
    "drawn apart by 4",
    "fsdp x tp on the sphere",
    "fsdp x tp x ep",
    "muon over cp x pp",
    "muon over fsdp x ep",
    "stages cut too",
    "tp x cp x ep",
)


def listed() -> list[object]:
    assert set(SLOW) <= CASES.keys()
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES]


@pytest.fixture(scope="session")
def verdicts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name -> what went wrong, for all selected cases. Of several pytest processes one runs them, the others wait."""
    items = request.session.items
    selected = {item.callspec.params["name"] for item in items if getattr(item, "originalname", "") == "test_case"}
    folder = tmp_path_factory.getbasetemp()
    shared = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    path = shared / "ranks.json"
    with open(shared / "ranks.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_file():
            path.write_text(json.dumps(run(selected, shared)))
    found: dict[str, str] = json.loads(path.read_text())
    return found


def run(selected: set[str], folder: Path) -> dict[str, str]:
    """One group of processes per world size."""
    found: dict[str, str] = {}
    for size in sorted({CASES[name][0] for name in selected}):
        names = [name for name in CASES if name in selected and CASES[name][0] == size]
        place = folder / f"ranks-{size}"
        place.mkdir()
        found |= ranks.run(size, names, place)
    return found


@pytest.mark.timeout(1200)  # of the first case, which waits for all
@pytest.mark.parametrize("name", listed())
def test_case(name: str, verdicts: dict[str, str]) -> None:
    if verdicts[name]:
        pytest.fail(verdicts[name], pytrace=False)
