"""What a model is asked: the program with numbered lines, executions to learn the form from, the call to execute.

The parts and their order are those of L0-Bench's prompts (arXiv 2503.22832); the words are our own.
"""

from collections.abc import Sequence

TASK = (
    "Execute a program by hand and write down its trace: one line for each line of the program as it is executed, in "
    "order, with the number of the line, the variable that it changed and the variable's value after it."
)
THOUGHT = "I go through the program line by line."  # of a perfect answer: the trace itself is the work
ASK = "Write the trace in the same form, beginning with ```L2,"
FORMS = (
    # 1: one paragraph
    f"{TASK} A line of the trace reads `L4,a:7`: line 4 was executed, and a is 7 after it. Lists are written whole and "
    "without spaces: `L5,lst_x:[4,0,7]`. A line that changes nothing (if, while, return) has its number alone: `L6,`.",
    # 2: a specification
    "Specification of a program trace\n"
    "- One line per executed line of the program, in the order of execution; line 1, the def, is left out.\n"
    "- Assignment: `L<number>,<variable>:<value after the line>`, such as `L4,a:7`.\n"
    "- append and pop: the list after the line, without spaces, such as `L5,lst_x:[4,0,7]`.\n"
    "- if, while and return: `L<number>,`, such as `L6,`.\n"
    "- Loops are written out: every round, and the last test that ends them. Nothing may be left out.",
    # 3: the role of a machine
    "You are a machine that executes programs line by line. After each line you print its number, a comma, the "
    "variable that it changed, a colon and the new value: `L4,a:7`, or `L5,lst_x:[4,0,7]` for a list. After if, while "
    "and return you print the number and the comma alone: `L6,`. You print nothing else and skip no round of any loop.",
)

Shown = tuple[str | None, str, Sequence[str]]  # a program where it is another one, the call, its trace


def question(program: str | None, call: str, shown: Sequence[Shown], form: int) -> str:
    """The prompt. program: None keeps it hidden; form: which wording, 1 to 3, where nothing is shown."""
    parts = [TASK if shown else FORMS[form - 1]]
    others = any(other is not None for other, _, _ in shown)
    if program is not None and not others:
        parts.append(f"Program:\n{fenced([program])}")
    for other, one, trace in shown:
        parts += [f"Program:\n{fenced([other])}"] if other is not None else []
        parts.append(f"Input:\n{fenced([one])}\n\nOutput:\n{fenced(trace)}")
    if program is not None and others:
        parts.append(f"Program:\n{fenced([program])}")
    return "\n\n".join(
        [*parts, f"Input:\n{fenced([call])}", ASK if shown else ASK.replace("the same", "this"), "Output:"]
    )


def fenced(lines: Sequence[str]) -> str:
    """Lines between two fences."""
    return "\n".join(["```", *lines, "```"])
