"""OpenAI's PRM800K: steps of solutions that were judged one by one.

The way that pairs are made of them is our own.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from alignjax.config import UserError
from alignjax.data.preferences.base import Comparisons, Pair, Source
from alignjax.data.preferences.rows import Row, fault, field

URL = "https://media.githubusercontent.com/media/openai/prm800k/main/prm800k/data/"
SHA256 = {  # from the repository's Git LFS pointers
    "phase1_train.jsonl": "e9da6a73f827ffb9a8c0dc644c541d34ed76b3d4d1e4896ff5f7b37ddf5ae34d",
    "phase1_test.jsonl": "f4b3bc5b095e45c816453dc4d748b755c680d61d55f9895d929a335b487c727d",
    "phase2_train.jsonl": "1110237feeb51d1bc200cb37b8f965cfdc1036eac7d506094049366fe7dc1089",
    "phase2_test.jsonl": "6b172efa884ac8341a946dd82e06947c135b7254109fb3f7aa907c715d98aaad",
}


@dataclass(frozen=True)
class Options:
    """Which pairs to make. All of these are ours: no recipe for this set is published."""

    # The phases of train; test is phase 2's, or phase 1's if only that is asked for.
    phases: Literal["both", "1", "2"] = "both"
    solutions: bool = True  # pair whole solutions too, not only steps


class SolutionText(NamedTuple):
    """A whole solution, and the row that it is from."""

    row_id: str
    text: str


class PRM800K(Comparisons):
    """Judgements of steps in solutions to MATH problems, paired by us.

    Lightman et al. 2023, arXiv:2305.20050. MIT licence.

    Steps: at each step, each alternative rated +1 against each rated -1. The problem and the steps
    chosen before are the context. They are all one message of the user, the steps after the
    problem, so a prompt ends with the user's turn.

    Whole solutions: of one problem, the first that ended right against the first that ended in
    error, the second against the second, and so on in the files' order, so none is used twice.

    Rows of quality control and of the screening of labelers are dropped. Rows that no pair came
    from are counted.
    """

    name = "prm800k"
    Options = Options
    HOMEPAGE = "https://github.com/openai/prm800k"

    def sources(self) -> dict[str, dict[str, Source]]:
        """Return the files of the phases that are asked for."""
        phases = self.builder_config.options.phases
        train_phases = ("1", "2") if phases == "both" else (phases,)
        names = {
            "train": [f"phase{phase}_train.jsonl" for phase in train_phases],
            "test": [f"phase{1 if phases == '1' else 2}_test.jsonl"],
        }
        return {
            split: {name: Source(URL + name, SHA256[name]) for name in names[split]}
            for split in names
        }

    def compare(self, rows: Iterator[Row], split: str, dropped: Counter) -> Iterator[Pair]:
        """Yield the pairs of steps row by row, then the pairs of whole solutions."""
        right = defaultdict(list)  # whole solutions by problem
        wrong = defaultdict(list)
        unused = set()  # rows that no pair has come from yet
        for row in rows:
            if field(row, "is_quality_control_question", bool):
                dropped["quality control"] += 1
                continue
            if field(row, "is_initial_screening_question", bool):
                dropped["screening of labelers"] += 1
                continue
            problem = field(row, "question.problem", str).strip()
            unused.add(row.id)
            for pair in step_pairs(row, problem):
                unused.discard(row.id)
                yield pair
            if self.builder_config.options.solutions:
                solution = right_solution(row)
                if solution:
                    right[problem].append(SolutionText(row.id, solution))
                solution = wrong_solution(row)
                if solution:
                    wrong[problem].append(SolutionText(row.id, solution))
        for problem, solutions in right.items():
            for chosen, rejected in zip(solutions, wrong[problem], strict=False):
                if not fault(chosen.text, rejected.text):
                    unused -= {chosen.row_id, rejected.row_id}
                    yield Pair(
                        id=f"{chosen.row_id}-{rejected.row_id}",
                        prompt=[{"role": "user", "content": problem}],
                        chosen=chosen.text,
                        rejected=rejected.text,
                    )
        if unused:
            dropped["no pair in it"] += len(unused)


class RatedStep(NamedTuple):
    """One alternative of a step: its place among them, and its text."""

    place: int
    text: str


def step_pairs(row: Row, problem: str) -> Iterator[Pair]:
    """Yield comparisons of alternative steps, right against wrong."""
    steps_before = []
    for step in range(len(field(row, "label.steps", list))):
        rated = rated_steps(row, step)
        context = [problem, "\n".join(steps_before)] if steps_before else [problem]
        prompt = [{"role": "user", "content": "\n\n".join(context)}]
        for right in rated[1]:
            for wrong in rated[-1]:
                if not fault(right.text, wrong.text):
                    yield Pair(
                        id=f"{row.id}/{step}/{right.place}-{wrong.place}",
                        prompt=prompt,
                        chosen=right.text,
                        rejected=wrong.text,
                    )
        taken = step_taken(row, step)
        if taken is None:
            return  # the labeler stopped here
        steps_before.append(taken)


def rated_steps(row: Row, step: int) -> dict[int | None, list[RatedStep]]:
    """Return the alternatives of a step by rating; None is of those that the labeler flagged."""
    rated = defaultdict(list)
    completions = field(row, f"label.steps.{step}.completions", list, optional=True) or []
    for place in range(len(completions)):
        path = f"label.steps.{step}.completions.{place}"
        rating = field(row, f"{path}.rating", int, optional=True)
        if rating not in (-1, 0, 1, None):
            raise UserError(f"{row.where}: {path}.rating: expected -1, 0 or 1, found {rating}")
        rated[rating].append(RatedStep(place, field(row, f"{path}.text", str).strip()))
    return rated


def step_taken(row: Row, step: int) -> str | None:
    """Return the text that the labeler went on from; None if the labeler stopped there.

    It is a completion, or the labeler's own text where none is chosen.
    """
    chosen = field(row, f"label.steps.{step}.chosen_completion", int, optional=True)
    if chosen is not None:
        return field(row, f"label.steps.{step}.completions.{chosen}.text", str).strip()
    path = f"label.steps.{step}.human_completion"
    # Two forms of it are published: a text, and an object as a completion is.
    if isinstance(row.value["label"]["steps"][step].get("human_completion"), dict):
        path += ".text"
    written = field(row, path, str, optional=True)
    return None if written is None else written.strip()


def right_solution(row: Row) -> str:
    """Return the whole of a solution that ended right; "" if the row's did not."""
    if field(row, "label.finish_reason", str, optional=True) != "solution":
        return ""
    count = len(field(row, "label.steps", list))
    steps = [step_taken(row, step) for step in range(count)]
    return "\n".join(text for text in steps if text)


def wrong_solution(row: Row) -> str:
    """Return the whole of a solution that ended in error; "" if the row's did not.

    It was judged up to its first mistake. The whole of it is in `pre_generated_steps`, which
    phase 2 has and phase 1 has not.
    """
    if field(row, "label.finish_reason", str, optional=True) != "found_error":
        return ""
    steps = field(row, "question.pre_generated_steps", list, optional=True)
    if steps is None:
        return ""
    texts = [
        field(row, f"question.pre_generated_steps.{place}", str) for place in range(len(steps))
    ]
    return "\n".join(text.strip() for text in texts)
