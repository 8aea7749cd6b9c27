"""GSM8K's word problems (Cobbe et al. 2021, arXiv 2110.14168) from its two JSONL files.

A row has a `question`, and an `answer` that ends with #### and a number.
The files are grade_school_math/data/{train,test}.jsonl of github.com/openai/grade-school-math (MIT).
"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from trimaran.tasks.maths import Maths, number

WORKED_OUT = re.compile(r"<<[^<>]*>>")  # a calculator's notes in the solutions


class Gsm8k(Maths):
    """7,473 problems to train on (`train`) and 1,319 held out (`held_out`); the published solution is the thought."""

    name: ClassVar[str] = "gsm8k"

    @staticmethod
    def read(row: Mapping[str, Any]) -> dict[str, str]:
        solution, mark, answer = str(row["answer"]).rpartition("####")
        if not mark or number(answer) is None:
            raise ValueError("an answer that does not end with #### and a number")
        solution = WORKED_OUT.sub("", solution).strip()
        return {"problem": str(row["question"]).strip(), "answer": answer.strip(), "solution": solution}
