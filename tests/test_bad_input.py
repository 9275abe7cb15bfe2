"""No malformed input ends in a traceback, hangs, or costs the user a file.

bad_inputs.py has the inputs. Every command is called in this process, and stopped where it would
compile a program: what comes to that point has been read.
"""

import contextlib
import io
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import bad_inputs
import pytest
from bad_inputs import BadInput, Fixtures

from alignjax import chat, convert, evaluate, inference, plan, report, study, train
from alignjax.algorithms import ranking
from alignjax.data import prepare
from alignjax.evals import requests
from alignjax.machine import failures
from alignjax.planning import plans
from alignjax.reports import study_runs
from alignjax.runs.loop import Loop

MAINS = {
    "train": train.main,
    "plan": plan.main,
    "evaluate": evaluate.main,
    "chat": chat.main,
    "convert": convert.main,
    "report": report.main,
    "study": study.main,
    "data.prepare": prepare.main,
}
LIMIT = 20  # seconds of a command that hangs
AT_LEAST = 300  # inputs


class Reached(BaseException):
    """A command has accepted its input, and would begin to compute."""


class Hangs(BaseException):
    """A command takes too long."""


def stop_here(*_: object, **__: object) -> None:
    raise Reached


def reply(*_: object, **__: object) -> Iterator[str]:
    yield "reply"
    return inference.Response("reply", [0], truncated=False)


@pytest.fixture
def nothing_is_computed(monkeypatch):
    """Stop all commands before they compute; let chats answer without a model."""
    monkeypatch.setattr(Loop, "run", stop_here)
    monkeypatch.setattr(plans, "program_costs", stop_here)
    monkeypatch.setattr(study_runs, "run_trials", stop_here)
    monkeypatch.setattr(ranking, "score_rows", stop_here)
    monkeypatch.setattr(requests.Requests, "answer", stop_here)
    monkeypatch.setattr(inference.LoadedModel, "stream", reply)
    monkeypatch.setattr("huggingface_hub.snapshot_download", no_network)


def no_network(*_: object, **__: object) -> None:
    raise OSError("no network in tests")


@pytest.fixture(scope="module")
def fixtures(chain, tmp_path_factory) -> Fixtures:
    """Export two runs of the chain."""
    directory = tmp_path_factory.mktemp("exports")
    for run, name in (("sft-tiny", "sft"), ("rm-tiny", "rm")):
        arguments = ["--to_hf", str(chain.runs / run), "--out", str(directory / name)]
        assert convert.main(arguments) == 0
    return Fixtures(runs=chain.runs, language_model=directory / "sft", classifier=directory / "rm")


def contents(directory: Path) -> dict[str, object]:
    """Return what a directory holds: bytes of small files, and the type of all else."""
    held = {}
    for path in directory.rglob("*"):
        status = path.lstat()
        is_file = stat.S_ISREG(status.st_mode)
        is_small = status.st_size < 100_000
        name = str(path.relative_to(directory))
        held[name] = path.read_bytes() if is_file and is_small else stat.S_IFMT(status.st_mode)
    return held


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def give_up(*_: object) -> None:
        raise Hangs

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def run(main: Callable, arguments: list[str], stdin: bytes) -> tuple[int, str]:
    """Run a command in this process; return its exit code, 0 once it would compute, and stderr."""
    streams = [io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")]
    streams += [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2)]
    names = ("stdin", "stdout", "stderr")
    with pytest.MonkeyPatch.context() as patch, time_limit(LIMIT):
        for name, stream in zip(names, streams, strict=True):
            patch.setattr(sys, name, stream)
        try:
            code = main(arguments)
        except Reached:
            code = 0
    streams[2].flush()
    return code, streams[2].buffer.getvalue().decode("utf-8", "backslashreplace")


def complaint(case: BadInput, place: Path, fixtures: Fixtures) -> str:
    """Run an input; return what is wrong with how the command takes it, "" if nothing is."""
    place.mkdir()
    arguments = case.arguments(place, fixtures)
    before = contents(place)
    try:
        code, errors = run(MAINS[case.command], arguments, case.stdin)
    except Hangs:
        return "hangs"
    except BaseException as error:
        return f"raises {type(error).__name__}: {error}"
    lines = [line for line in errors.splitlines() if line.strip() and "%|" not in line]
    after = contents(place)
    lost = [name for name, value in before.items() if after.get(name) != value]
    if lost:
        return f"changes or deletes {lost[0]}"
    if code not in (0, failures.USER_ERROR):
        return f"exit code {code}: {errors[:400]}"
    if "Traceback" in errors:
        return f"prints a traceback: {errors[:400]}"
    if code and (len(lines) != 1 or not lines[0].startswith("alignjax: ")):
        return f"prints {len(lines)} lines: {errors[:400]}"
    return ""


INPUTS = bad_inputs.all_inputs()
KINDS = sorted({case.kind for case in INPUTS})


def test_there_are_hundreds_of_bad_inputs_for_all_commands():
    assert len(INPUTS) >= AT_LEAST
    assert {case.command for case in INPUTS} == set(MAINS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_input_is_one_line_and_exit_code_2(
    kind, fixtures, tmp_path, monkeypatch, nothing_is_computed
):
    monkeypatch.chdir(tmp_path)
    complaints = []
    for number, case in enumerate(case for case in INPUTS if case.kind == kind):
        text = complaint(case, tmp_path / str(number), fixtures)
        if text:
            complaints.append(f"{case.command}, {case.name}: {text}")
    assert not complaints, "\n".join(complaints)
