"""OpenAI's PRM800K: steps of solutions that were judged one by one, made into pairs in a way of our own."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Literal

from alignjax.config import UserError
from alignjax.data.preferences.base import Comparisons, Source, fault, field

URL = "https://media.githubusercontent.com/media/openai/prm800k/main/prm800k/data/"
SHA256 = {  # from the repository's Git LFS pointers
    "phase1_train.jsonl": "e9da6a73f827ffb9a8c0dc644c541d34ed76b3d4d1e4896ff5f7b37ddf5ae34d",
    "phase1_test.jsonl": "f4b3bc5b095e45c816453dc4d748b755c680d61d55f9895d929a335b487c727d",
    "phase2_train.jsonl": "1110237feeb51d1bc200cb37b8f965cfdc1036eac7d506094049366fe7dc1089",
    "phase2_test.jsonl": "6b172efa884ac8341a946dd82e06947c135b7254109fb3f7aa907c715d98aaad",
}


@dataclass(frozen=True)
class Options:
    """Ours, all of them: no recipe that makes pairs of this set is published."""

    phases: Literal["both", "1", "2"] = (
        "both"  # of train; test is phase 2's, or phase 1's if that alone is asked for
    )
    solutions: bool = True  # pair whole solutions too, not steps alone


class PRM800K(Comparisons):
    """Judgements of steps in solutions to MATH problems (Lightman et al. 2023, arXiv:2305.20050), paired by us. MIT.

    Steps: at each step, each alternative rated +1 against each rated -1. The problem and the steps chosen before are
    the context. So that a prompt ends with the user's turn, those steps are part of the user's message, after the
    problem. Whole solutions: of one problem, the first that ended right against the first that ended in error, the
    second against the second, and so on in the files' order, so that none is used twice. Rows of quality control and of
    the screening of labelers are dropped, and those of which no pair came are counted.
    """

    name = "prm800k"
    Options = Options
    HOMEPAGE = "https://github.com/openai/prm800k"

    def sources(self):
        phases = self.builder_config.options.phases
        train = (
            ["phase1_train.jsonl", "phase2_train.jsonl"]
            if phases == "both"
            else [f"phase{phases}_train.jsonl"]
        )
        test = [f"phase{1 if phases == '1' else 2}_test.jsonl"]
        return {
            split: {name: Source(URL + name, SHA256[name]) for name in names}
            for split, names in (("train", train), ("test", test))
        }

    def compare(self, rows, split: str, dropped: Counter):
        right, wrong, idle = defaultdict(list), defaultdict(list), set()
        for row in rows:
            if field(row, "is_quality_control_question", bool):
                dropped["quality control"] += 1
            elif field(row, "is_initial_screening_question", bool):
                dropped["screening of labelers"] += 1
            else:
                problem = field(row, "question.problem", str).strip()
                idle.add(row.id)
                for pair in steps(row, problem):
                    idle.discard(row.id)
                    yield pair
                if self.builder_config.options.solutions:
                    ended, text = solution(row)
                    if text:
                        (right if ended else wrong)[problem].append((row.id, text))
        for problem, solved in right.items():
            for (key, chosen), (other, rejected) in zip(solved, wrong[problem], strict=False):
                if not fault(chosen, rejected):
                    idle -= {key, other}
                    yield (
                        f"{key}-{other}",
                        [{"role": "user", "content": problem}],
                        chosen,
                        rejected,
                        0.0,
                    )
        if idle:
            dropped["no pair in it"] += len(idle)


def steps(row, problem: str):
    """Comparisons of alternative steps: id, prompt, right step, wrong step, 0."""
    before = []
    for i in range(len(field(row, "label.steps", list))):
        rated = defaultdict(list)
        for j in range(len(field(row, f"label.steps.{i}.completions", list, optional=True) or [])):
            at = f"label.steps.{i}.completions.{j}"
            rating = field(
                row, f"{at}.rating", int, optional=True
            )  # null where the labeler flagged the step
            if rating not in (-1, 0, 1, None):
                raise UserError(f"{row.where}: {at}.rating: -1, 0 or 1 wanted, {rating} found")
            rated[rating].append((j, field(row, f"{at}.text", str).strip()))
        prompt = "\n\n".join([problem, "\n".join(before)] if before else [problem])
        for j, chosen in rated[1]:
            for k, rejected in rated[-1]:
                if not fault(chosen, rejected):
                    yield (
                        f"{row.id}/{i}/{j}-{k}",
                        [{"role": "user", "content": prompt}],
                        chosen,
                        rejected,
                        0.0,
                    )
        taken = step_taken(row, i)
        if taken is None:
            return  # the labeler stopped here
        before.append(taken)


def step_taken(row, i: int) -> str | None:
    """The text that the labeler went on from: a completion, or their own where none is chosen."""
    place = field(row, f"label.steps.{i}.chosen_completion", int, optional=True)
    if place is None:
        at = f"label.steps.{i}.human_completion"
        if isinstance(row.value["label"]["steps"][i].get("human_completion"), dict):
            at += ".text"  # as a completion is: both forms are about
        written = field(row, at, str, optional=True)
        return None if written is None else written.strip()
    return field(row, f"label.steps.{i}.completions.{place}.text", str).strip()


def solution(row) -> tuple[bool, str]:
    """Whether a whole solution ended right, and its text; "" where it ended neither right nor in error.

    A solution in error was judged up to its first mistake. The whole of it is in `pre_generated_steps`, which phase 2
    has and phase 1 has not.
    """
    reason = field(row, "label.finish_reason", str, optional=True)
    if reason == "solution":
        taken = [step_taken(row, i) for i in range(len(field(row, "label.steps", list)))]
        return True, "\n".join(text for text in taken if text)
    if (
        reason != "found_error"
        or field(row, "question.pre_generated_steps", list, optional=True) is None
    ):
        return False, ""
    count = len(field(row, "question.pre_generated_steps", list))
    return False, "\n".join(
        field(row, f"question.pre_generated_steps.{i}", str).strip() for i in range(count)
    )
