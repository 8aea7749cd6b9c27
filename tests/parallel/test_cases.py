"""Every case of `cases_*.py` in real processes; see ranks.py.

One group of processes per world size runs all selected cases of that size when the first of them is asked for.
"""

from pathlib import Path

import pytest

from tests.parallel import ranks

CASES = ranks.cases()


@pytest.fixture(scope="session")
def verdicts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name -> what went wrong, for all selected cases."""
    items = request.session.items
    selected = {item.callspec.params["name"] for item in items if getattr(item, "originalname", "") == "test_case"}
    found: dict[str, str] = {}
    for size in sorted({CASES[name][0] for name in selected}):
        names = [name for name in CASES if name in selected and CASES[name][0] == size]
        folder: Path = tmp_path_factory.mktemp(f"ranks-{size}")
        found |= ranks.run(size, names, folder)
    return found


@pytest.mark.timeout(1200)  # of the first case, which waits for all
@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("name", CASES)
def test_case(name: str, verdicts: dict[str, str]) -> None:
    if verdicts[name]:
        pytest.fail(verdicts[name], pytrace=False)
