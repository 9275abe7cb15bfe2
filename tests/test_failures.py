"""What a command prints, and how it exits, after any error."""

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from alignjax.config import UserError
from alignjax.machine import console, failures


def raising(error: BaseException) -> Callable[[], None]:
    def body() -> None:
        raise error

    return body


@pytest.mark.parametrize(
    "error, code, text",
    [
        (UserError("a\nb\x1b"), 2, "a b\\x1b"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyboardInterrupt("interrupted; go on"), 130, "interrupted; go on"),
        (OSError(28, "No space left on device", "/x/y"), 2, "/x/y: No space left on device"),
        (MemoryError("Unable to allocate"), 2, "lower microbatch_tokens"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 3 GiB"), 2, "RESOURCE_EXHAUSTED: 3 GiB"),
    ],
)
def test_a_foreseen_error_is_one_line(error, code, text, capsys):
    assert console.run_command(raising(error)) == code
    printed = capsys.readouterr().err
    assert printed.startswith("alignjax: ") and printed.count("\n") == 1 and text in printed


@pytest.mark.parametrize("error", [ValueError("odd\nthing"), SystemExit(0), RecursionError("deep")])
def test_an_unforeseen_error_leaves_its_traceback_in_a_file_and_gives_70(error, capsys):
    assert console.run_command(raising(error)) == failures.UNFORESEEN == 70
    printed = capsys.readouterr().err
    assert printed.startswith(f"alignjax: unforeseen {type(error).__name__}")
    assert printed.count("\n") == 1
    file = Path(printed.rpartition("the traceback is in ")[2].strip())
    text = file.read_text()
    file.unlink()
    assert "Traceback" in text and "command: " in text and f"jax: {jax.__version__}" in text


def test_the_traceback_of_a_run_is_in_its_directory(tmp_path, capsys):
    def body() -> None:
        with failures.tracebacks_in(tmp_path):
            raise ValueError("odd")

    assert console.run_command(body) == 70
    (file,) = tmp_path.glob("error-*.txt")
    assert str(file) in capsys.readouterr().err


def test_output_that_nobody_reads_ends_a_command_without_a_word(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    stream = io.TextIOWrapper(os.fdopen(writer, "wb"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    assert console.run_command(lambda: print("text")) == failures.CLOSED_OUTPUT
    assert capsys.readouterr().err == ""


def test_a_lost_machine_may_be_started_again():
    error = jax.errors.JaxRuntimeError("UNAVAILABLE: connection reset")
    assert failures.failure_of(error, several_processes=True).code == failures.MACHINE_LOST == 1
