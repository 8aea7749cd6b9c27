"""Scores as a table of plain text."""

from collections.abc import Mapping, Sequence

from trimaran.evals.tally import Score, Tally

COLUMNS = ("task", "answers", "reward", "95 %", "solved", "of k", "tokens", "thought", "cut", "n", "failed")


def table(scores: Mapping[str, Score]) -> str:
    """A line per task and way of answering. solved: the share of episodes with reward 1, of k: of problems with one
    among their k samples; cut: the share of episodes that ended at their longest answer."""
    rows: list[Sequence[str]] = [COLUMNS]
    for name, score in scores.items():
        for mode, tally in (("greedy", score.greedy), ("sampled", score.sampled)):
            if tally is not None:
                rows.append((name, f"{mode} x {tally.samples}", *figures(tally)))
    empty = {place for place, title in enumerate(COLUMNS) if title == "failed"} if not total_failed(scores) else set()
    return aligned([[cell for place, cell in enumerate(row) if place not in empty] for row in rows])


def figures(tally: Tally) -> tuple[str, ...]:
    most = max(tally.pass_at)
    return (
        f"{tally.reward:.1%}",
        f"{tally.low:.1%} to {tally.high:.1%}",
        f"{tally.pass_at[1]:.1%}",
        f"{tally.pass_at[most]:.1%} ({most})" if most > 1 else "-",
        f"{tally.tokens:.1f}",
        f"{tally.thought_tokens:.1f}",
        f"{tally.finish.get('length', 0):.1%}",
        str(tally.n),
        str(tally.failed),
    )


def total_failed(scores: Mapping[str, Score]) -> int:
    return sum(score.failed for score in scores.values())


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width: the first two to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) if place < 2 else cell.rjust(width) for place, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    return "\n".join(line.rstrip() for line in lines)
