"""Compare how transformers and alignjax read Hugging Face checkpoints, over a grid of small ones.

python benchmarks/checkpoints.py --torch PYTHON
python benchmarks/checkpoints.py --torch PYTHON --docs docs/data.md

PYTHON is the interpreter of an environment that has torch, transformers 5.23 and safetensors. It
builds the checkpoints of checkpoint_cases.py and computes their logits in float32. Each case ends
in one of three ways: both compute the same, both refuse, or alignjax alone refuses and says why.
Anything else is printed as a fault, and the exit code is 1. --docs writes the two tables to the
page, between its markers. --only takes the cases with a text in their name. All of them take about
four minutes on two cores.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from alignjax.config import Model, UserError  # noqa: E402
from alignjax.models import transformer  # noqa: E402
from alignjax.sampling.rollout import generate  # noqa: E402
from alignjax.sampling.types import Prompts, SamplingSettings  # noqa: E402
from alignjax.weights import hf  # noqa: E402

sys.path.insert(0, str(HERE))
import checkpoint_cases  # noqa: E402
from checkpoint_cases import Case  # noqa: E402

JUDGE = HERE / "peers" / "checkpoints_judge.py"
LARGEST_DIFFERENCE = 1e-4  # of logits, relative to the largest
BEGIN = "<!-- written by benchmarks/checkpoints.py -->"
END = "<!-- end -->"
SHOWN_CHARACTERS = 150  # of a refusal in the table


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What both sides did with a case.

    greedy: the share of the tokens decoded greedily that are the same; None if none are decoded.
    difference: largest difference of the logits, relative to the largest; None if a side refused.
    theirs: the error of transformers, or "".
    made_up: the tensors that transformers drew at random because they were missing.
    ours: our error, or "".
    crash: an error of ours that is no answer to the user's mistake, or "".
    """

    greedy: float | None = None
    difference: float | None
    theirs: str
    made_up: str
    ours: str
    crash: str

    @property
    def fault(self) -> str:
        """Say what is wrong, or nothing."""
        if self.crash:
            return f"crash: {self.crash}"
        if "\n" in self.ours:
            return f"an error of several lines: {self.ours}"
        if self.theirs and not self.ours:
            return f"only transformers refuses: {self.theirs}"
        if self.difference is not None and not self.difference < LARGEST_DIFFERENCE:
            return f"logits differ by {self.difference:.2g}"
        if self.greedy is not None and self.greedy < 1:
            return f"{1 - self.greedy:.1%} of the tokens that are decoded differ"
        return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, print the tables and the faults, and return the exit code."""
    parser = argparse.ArgumentParser(
        description="Compare how transformers and alignjax read checkpoints."
    )
    parser.add_argument("--torch", required=True, metavar="PYTHON", help="an interpreter")
    parser.add_argument("--docs", type=Path, metavar="PAGE", help="write the tables to this page")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with it in their name")
    arguments = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    cases = checkpoint_cases.all_cases(arguments.only)
    with tempfile.TemporaryDirectory(prefix="checkpoints-") as temporary:
        directory = Path(temporary) / "cases"
        subprocess.run([arguments.torch, str(JUDGE), str(directory), arguments.only], check=True)
        outcomes = {case.name: compare(case, directory) for case in cases}
    text = tables(cases, outcomes)
    print(text)
    if arguments.docs:
        write_between_markers(arguments.docs, text)
    faults = {name: outcome.fault for name, outcome in outcomes.items() if outcome.fault}
    for name, fault in faults.items():
        print(f"FAULT {name}: {fault}")
    return 1 if faults else 0


def compare(case: Case, directory: Path) -> Outcome:
    """Read a checkpoint, and compare with what transformers made of it."""
    judged = directory / "judged"
    verdict = json.loads((judged / f"{case.name}.json").read_text())
    tokens = np.load(judged / "tokens.npy")
    ours = ""
    crash = ""
    difference = None
    greedy = None
    try:
        head = case.head if "architectures" in case.fields else hf.head_of(directory / case.name)
        model, params = hf.load_hf(directory / case.name, head)
        # Where RoPE depends on the length of a sequence, that of the longest one is needed.
        model = dataclasses.replace(model, max_length=tokens.shape[1])
        logits = np.asarray(compute(model, params, tokens))
        if case.greedy and not verdict["error"]:
            theirs = np.load(judged / f"{case.name}.greedy.npy")
            length = checkpoint_cases.PROMPT + checkpoint_cases.NEW_TOKENS
            short = dataclasses.replace(model, max_length=length)
            greedy = float((decode(short, params, tokens) == theirs).mean())
    except UserError as error:
        ours = without_path(str(error), directory / case.name)
    except Exception as error:
        crash = f"{type(error).__name__}: {error}"
    if not (ours or crash or verdict["error"]):
        theirs = np.load(judged / f"{case.name}.npy")
        difference = float(np.abs(logits - theirs).max() / np.abs(theirs).max())
    return Outcome(
        greedy=greedy,
        difference=difference,
        theirs=verdict["error"],
        made_up=verdict["made_up"],
        ours=ours,
        crash=crash,
    )


def compute(model: Model, params: dict, tokens: np.ndarray) -> jax.Array:
    """Return the logits of each token, or the score of each row if the head is a scalar."""
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    with jax.default_matmul_precision("highest"):
        output = transformer.apply(model, params, tokens, positions, np.ones_like(tokens))
        if "bias" in params.get("head", {}):
            return transformer.scalar(params, output.hidden)[:, -1:]
        return transformer.logits(model, params, output.hidden)


def decode(model: Model, params: dict, tokens: np.ndarray) -> np.ndarray:
    """Return the most probable tokens after the first of each row, decoded with the cache."""
    prompts = Prompts(
        tokens=jnp.asarray(tokens[:, : checkpoint_cases.PROMPT]),
        lengths=jnp.full(len(tokens), checkpoint_cases.PROMPT),
        index=jnp.arange(len(tokens)),
    )
    settings = SamplingSettings(
        model=model,
        samples_per_prompt=1,
        response_length=checkpoint_cases.NEW_TOKENS,
        temperature=0.0,
        top_p=1.0,
        end_tokens=(-1,),  # so none ends early
    )
    rollout = generate(params, prompts, jax.random.key(0), settings)
    return np.asarray(rollout.tokens)[:, checkpoint_cases.PROMPT :]


def without_path(text: str, directory: Path) -> str:
    """Return an error without the temporary directory."""
    return text.replace(f"{directory}/", "").removeprefix(f"{directory}: ")


def tables(cases: list[Case], outcomes: dict[str, Outcome]) -> str:
    """Return two tables: what agrees, and what is refused and why."""
    topics = checkpoint_cases.by_topic(cases)
    read = ["| what agrees with transformers | checkpoints | largest difference | greedy tokens |"]
    read.append("|---|---|---|---|")
    refused = ["| what is refused | transformers | alignjax says, for example |"]
    refused.append("|---|---|---|")
    for topic, members in topics.items():
        results = [outcomes[case.name] for case in members]
        agreed = [one.difference for one in results if one.difference is not None]
        if agreed:
            read.append(
                f"| {topic} | {len(agreed)} | {max(agreed):.1e} | {greedy_answer(results)} |"
            )
        refusals = [one for one in results if one.ours]
        if refusals:
            refused.append(f"| {topic} | {their_answers(refusals)} | {example(refusals[0].ours)} |")
    return "\n".join([*summary(outcomes), "", *read, "", *refused])


def summary(outcomes: dict[str, Outcome]) -> list[str]:
    """Say how many cases ended in which way."""
    results = outcomes.values()
    agreed = [one.difference for one in results if one.difference is not None]
    both = sum(bool(one.ours and one.theirs) for one in results)
    alone = sum(bool(one.ours and not one.theirs) for one in results)
    largest = max(agreed, default=0.0)
    return [
        f"Of {len(outcomes)} small checkpoints, {len(agreed)} are read by both, with logits that "
        f"differ by at most {largest:.1e} of the largest in float32, {both} are refused by "
        f"both, and {alone} by alignjax alone."
    ]


def greedy_answer(results: list[Outcome]) -> str:
    """Say how many of the tokens that both sides decode are the same, if any are decoded."""
    shares = [one.greedy for one in results if one.greedy is not None]
    if not shares:
        return ""
    return "all equal" if min(shares) == 1 else f"{min(shares):.1%} equal"


def their_answers(refusals: list[Outcome]) -> str:
    """Say what transformers does with checkpoints that we refuse."""
    answers = []
    for one in refusals:
        answer = "draws what is missing at random" if one.made_up else "reads"
        answers.append("refuses" if one.theirs else answer)
    counts = {answer: answers.count(answer) for answer in dict.fromkeys(answers)}
    if len(counts) == 1:
        return answers[0]
    return ", ".join(f"{answer} {count} of {len(answers)}" for answer, count in counts.items())


def example(text: str) -> str:
    """Return an error as a cell of a table."""
    shown = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
    return f"`{shown.replace('|', '/').replace('`', '')}`"


def write_between_markers(page: Path, text: str) -> None:
    """Replace what a page has between the markers."""
    content = page.read_text(encoding="utf-8")
    before, _, rest = content.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
