"""Which pages and slots are free, who holds them, how a budget is shared out, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models import tiny
from trimaran.engine.paged import Segment
from trimaran.engine.pages import Memory, Pages, readable, share_out
from trimaran.errors import Refusal


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), max_size=60))
@settings(deadline=None, max_examples=200)
def test_pages_are_never_given_twice_or_lost(steps):
    pages, held = Pages(40), []
    for what, count in steps:
        if what < 3:
            after = held[-1][-1] if held and held[-1] and what else None
            free = pages.free
            found = pages.take(count, after)
            assert (found is None) == (count > free)
            if found is None:
                assert pages.free == free
                continue
            assert len(set(found)) == count and not any(set(found) & set(other) for other in held)
            held.append(found)
        elif what == 3 and held:
            for page in held[-1]:
                pages.hold(page)
            for page in held[-1]:
                pages.drop(page)
        elif held:
            for page in held.pop(count % len(held)):
                pages.drop(page)
        assert pages.free == 40 - sum(map(len, held))
        assert [page for page in range(40) if pages.counts[page]] == sorted(page for pages_ in held for page in pages_)


def test_rows_get_room_to_grow():
    """Pages taken in turns by eight rows are eight runs of neighbours."""
    pages, tables = Pages(256), [[] for _ in range(8)]
    for _ in range(20):
        for table in tables:
            table += pages.take(1, table[-1] if table else None)
    assert all(table == list(range(table[0], table[0] + 20)) for table in tables)


def test_a_page_is_free_when_nobody_holds_it():
    pages = Pages(2)
    (page,) = pages.take(1, None)
    pages.hold(page)
    pages.drop(page)
    assert pages.free == 1
    pages.drop(page)
    assert pages.free == 2
    for wrong in (pages.hold, pages.drop):
        with pytest.raises(RuntimeError):
            wrong(page)


def test_slots_are_zeroed_and_come_back():
    memory = Memory(tiny("dense"), rows=2, pages=4, snapshots=1)
    memory.tail.fill_(torch.nan)
    memory.ssm.fill_(torch.nan)
    first, second = memory.open(), memory.open()
    assert memory.open() is None and memory.free_slots == 0
    assert not memory.tail[:, :2].any() and not memory.ssm[:, :2].any()
    snapshot = memory.snapshot(first)
    assert memory.snapshot(second) is None
    memory.release(snapshot)
    with pytest.raises(RuntimeError, match="released"):
        memory.release(snapshot)
    memory.close(first)
    for use in (memory.close, memory.fork, memory.snapshot):
        with pytest.raises(RuntimeError, match="closed"):
            use(first)
    assert (memory.free_slots, memory.free_snapshots) == (1, 1)
    assert memory.open().slot == 0, "the lowest free slot, so that running rows stay neighbours"


def test_what_cannot_be_had_changes_nothing():
    memory = Memory(tiny("dense"), rows=3, pages=4, page=4)
    one = memory.open()
    assert memory.reserve(one, 9) and len(one.pages) == 3
    assert memory.reserve(one, 12) and len(one.pages) == 3
    assert not memory.reserve(one, 17) and len(one.pages) == 3 and memory.free_pages == 1
    one.length = 7  # a full page to share and one to copy
    other = memory.fork(one)
    assert other.pages[0] == one.pages[0] and len(other.pages) == 2 and other.pages[1] not in one.pages
    assert memory.fork(one) is None and (memory.free_slots, memory.free_pages) == (1, 0)
    assert memory.copy_page(one.pages[0], 2) is None
    memory.close(one)
    assert memory.free_pages == 2
    memory.close(other)
    assert (memory.free_slots, memory.free_pages) == (3, 4)


def test_a_fork_shares_what_is_settled():
    """Pages below both the trunk's and the draft block's next place; a draft block that lags will still write."""
    memory = Memory(tiny("latent"), rows=8, pages=40, page=4)
    one = memory.open()
    memory.reserve(one, 16)
    for length, pairs, shared, pages in ((11, 0, 2, 3), (12, 11, 3, 3), (12, 12, 3, 4), (12, 6, 1, 3), (13, 12, 3, 4)):
        one.length, one.mtp_length = length, pairs
        other = memory.fork(one)
        assert (other.length, other.mtp_length, len(other.pages)) == (length, pairs, pages)
        assert [a == b for a, b in zip(one.pages, other.pages)] == [True] * shared + [False] * (pages - shared)
        memory.close(other)


def test_a_restored_sequence_stands_where_the_snapshot_does():
    memory = Memory(tiny("dense"), rows=2, pages=4, page=4, snapshots=1)
    one = memory.open()
    memory.reserve(one, 8)
    one.length = 8
    snapshot = memory.snapshot(one)
    for pages, length in (([one.pages[0]], 4), (one.pages, 7)):
        with pytest.raises(ValueError, match="a snapshot after 8"):
            memory.restore(snapshot, pages, length)
    with pytest.raises(ValueError, match="no snapshot"):
        memory.restore(None, one.pages, 8)
    with pytest.raises(ValueError, match="2 pages, not 1"):
        memory.restore(snapshot, one.pages[:1], 8)
    assert memory.restore(None, [], 0).length == 0


def test_a_model_without_attention_needs_no_pages():
    memory = Memory(tiny("mamba"), rows=2, bytes=1 << 20)
    sequence = memory.open()
    assert memory.reserve(sequence, 10**6) and sequence.pages == [] and memory.total_pages == 0
    assert "no pages" in memory.arithmetic()[-1]


@pytest.mark.parametrize("kind", ["attention", "mamba", "rope", "everything"])
def test_a_budget_is_kept_and_used(kind):
    model = tiny(kind)
    row = share_of(model)
    for budget in (row, 3 * row + 5, 100 * row, 10**7):
        memory = Memory(model, bytes=budget, rows=8, snapshots=4, draft=3)
        ring = memory.total_slots * memory.unit.ring
        assert memory.nbytes + ring <= budget
        assert memory.total_slots >= 1 and memory.total_pages >= (memory.total_slots if memory.unit.kv_token else 0)
        if memory.unit.kv_token:
            assert budget - memory.nbytes - ring < memory.unit.page_bytes or memory.total_slots < 8
        lines = memory.arithmetic()
        assert lines[0] == f"budget {readable(budget)}" and f"{memory.total_slots} rows" in lines[1]
        assert ("(8 asked)" in lines[1]) == (memory.total_slots < 8)
    assert memory.total_slots == 8 and memory.total_snapshots == 4
    with pytest.raises(Refusal, match="for one row"):
        Memory(model, bytes=row - 1, rows=8, draft=3)


@torch.no_grad()
@pytest.mark.parametrize("draft", [0, 1, 3, 15])
def test_states_on_trial_are_told_and_bounded(draft, monkeypatch):
    """What all trials of a pass keep, whatever their lengths: never more than `arithmetic` says."""
    model, kept_any = tiny("mamba", torch.float32), False
    for limit in (1, 10**5, 1 << 20):
        for module in ("paged", "pages"):
            monkeypatch.setattr(f"trimaran.engine.{module}.STEPPED_BYTES", limit)
        memory = Memory(model, rows=6, pages=0, draft=draft, ssm_dtype=torch.float16)
        told = [line for line in memory.arithmetic() if "drafts are verified" in line]
        assert bool(told) == bool(draft) and (not told or readable(memory.trial_bytes) in told[0])
        for counts in ([draft + 1] * 6, [1 + n % (draft + 1) for n in range(6)]):
            rows = [memory.open() for _ in counts]
            segments = [Segment(row, n, trial=draft > 0) for row, n in zip(rows, counts, strict=True)]
            view = memory.view(segments)
            model.hidden(torch.ones(1, sum(counts), dtype=torch.long), state=view)
            written = [trial for layer in view.layers if layer for trial in layer.trials.values()]
            kept = sum(trial.states_KSHPN.nbytes for trial in written if trial.states_KSHPN is not None)
            assert kept <= memory.trial_bytes
            kept_any |= kept > 0
            for row in rows:
                memory.close(row)
    assert kept_any == (draft > 0)


def share_of(model) -> int:
    """The least that `Memory` accepts for one row with a draft of 3."""
    unit = Memory(model, pages=1, rows=1, draft=3).unit
    assert share_out(unit, unit.row_bytes + unit.page_bytes, 8, 0)[0] == 1
    return unit.row_bytes + unit.page_bytes


def test_settings_that_make_no_sense():
    model = tiny("dense")
    for wrong, message in (
        ({"rows": 0, "pages": 1}, "rows = 0"),
        ({"rows": 1, "pages": 1, "page": 0}, "page = 0"),
        ({"rows": 1, "pages": 1, "snapshots": -1}, "snapshots = -1"),
        ({"rows": 1}, "exactly one"),
        ({"rows": 1, "pages": 1, "bytes": 1}, "exactly one"),
        ({"rows": 1, "pages": 1, "ssm_dtype": torch.bfloat16}, "ssm_dtype"),
    ):
        with pytest.raises(Refusal, match=message):
            Memory(model, **wrong)


def test_passes_that_do_not_fit():
    model = tiny("dense")
    memory = Memory(model, rows=3, pages=4, page=4)
    one, two, gone = memory.open(), memory.open(), memory.open()
    memory.close(gone)
    memory.reserve(one, 8)
    tokens = torch.tensor([[1, 2]])
    with pytest.raises(RuntimeError, match="no_grad"):
        memory.view([Segment(one, 1)])
    with torch.no_grad():
        for segments, message in (
            ([], "at least one"),
            ([Segment(one, 1), Segment(one, 1)], "twice"),
            ([Segment(one, 9)], "reserve them first"),
            ([Segment(one, 0)], "reserve them first"),
            ([Segment(two, 1)], "reserve them first"),
        ):
            with pytest.raises(ValueError, match=message):
                memory.view(segments)
        with pytest.raises(RuntimeError, match="closed"):
            memory.view([Segment(gone, 1)])
        view = memory.view([Segment(one, 2, trial=True)])
        with pytest.raises(RuntimeError, match="after the pass"):
            view.keep([1])
        for wrong in (torch.tensor([[1]]), torch.tensor([[1, 2, 3]])):
            with pytest.raises(ValueError, match="for segments of 2"):
                model(wrong, state=view)
        with pytest.raises(ValueError, match="documents of their own"):
            model(tokens, torch.zeros(1, 2, dtype=torch.long), view)
        model(tokens, state=view)
        with pytest.raises(RuntimeError, match="made its pass"):
            model(tokens, state=view)
        for counts in ([3], [-1], [1, 1]):
            with pytest.raises(ValueError):
                view.keep(counts)
        view.keep([1])
        with pytest.raises(RuntimeError, match="once"):
            view.keep([1])
        view = memory.view([Segment(one, 2)])
        model(tokens, state=view)
        with pytest.raises(ValueError, match="keep 1 of 2"):
            view.keep([1])
        view = memory.view([Segment(one, 1)])
        model.version += 1
        with pytest.raises(RuntimeError, match="weights version"):
            model(tokens[:, :1], state=view)
