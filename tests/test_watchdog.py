"""Signals that the main thread cannot answer: what it waits for is said, or the process ends."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from runs import ROOT, act_in_step, command, rows

from alignjax import train
from alignjax.machine import console, watchdog

# A command that blocks, in C where no signal handler runs, or on the device.
BLOCKED = """
import sys, hashlib, threading, jax, jax.numpy as jnp
from alignjax.machine import console, watchdog
watchdog.FIRST_REPORT = 0.3
watchdog.LAST_WORDS = 0.3

@jax.jit
def compute(count):
    return jax.lax.fori_loop(0, count, lambda _, x: jnp.sin(x) @ x, jnp.ones((64, 64)))

def body():
    if sys.argv[1] == "device":
        array = compute(jnp.int32(2**31 - 1))
        threading.Timer(0.5, print, ["begun"], {"flush": True}).start()
        array.block_until_ready()
    threading.Timer(0.5, print, ["begun"], {"flush": True}).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)

console.leave(console.run_command(body))
"""


def start(where: str) -> subprocess.Popen:
    """Start a command that blocks."""
    return subprocess.Popen(
        [sys.executable, "-c", BLOCKED, where],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_blocked_command_says_so_and_a_second_interrupt_ends_it():
    """While the device computes, the first interrupt already ends it."""
    in_c = start("c")
    on_device = start("device")
    try:
        for process in (in_c, on_device):
            assert process.stdout.readline() == "begun\n"
        on_device.send_signal(signal.SIGINT)
        in_c.send_signal(signal.SIGINT)
        lines = [in_c.stderr.readline(), in_c.stderr.readline()]
        assert lines[0] == "\n" and re.match(r"alignjax: SIGINT came \d+ s ago: ", lines[1])
        assert f"Ctrl-C, or kill -INT {in_c.pid}, ends it at once" in lines[1]
        in_c.send_signal(signal.SIGINT)
        assert in_c.wait(20) == 130 and "ended at once" in in_c.stderr.read()
        assert on_device.wait(20) == 130
        assert on_device.stderr.read().strip() == "alignjax: interrupted"
    finally:
        for process in (in_c, on_device):
            process.kill()
            process.communicate()


def block(seconds: float) -> None:
    """Keep the main thread in C for about so many seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2 * 10**6)


def listening() -> int:
    """Return the descriptor that signals are written to, or -1."""
    descriptor = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(descriptor)
    return descriptor


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(watchdog, "FIRST_REPORT", 0.1)
    monkeypatch.setattr(watchdog, "LAST_WORDS", 0.1)


def test_a_run_that_does_not_answer_sigterm_says_what_it_waits_for(impatient, tmp_path, capfd):
    """It then saves and stops as always."""

    def act() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        block(0.5)

    descriptor = listening()
    with act_in_step(1, act):
        assert train.main(command("lm-tiny", tmp_path)) == 0
    printed = capfd.readouterr().err
    (line,) = [line for line in printed.splitlines() if "SIGTERM came" in line]
    assert "the run saves and stops after its step, but lm-tiny is at step 1 of 4" in line
    assert "in Loop.run_step (alignjax/runs/loop.py:" in line
    assert "saved at step 2 of 4" in printed
    assert listening() == descriptor


def test_a_second_interrupt_ends_a_run_at_once(impatient, tmp_path, monkeypatch, capfd):
    """The checkpoints stay whole: the same command goes on."""
    ended = []
    monkeypatch.setattr(watchdog, "end_process", lambda: ended.append(time.monotonic()))

    def act() -> None:
        for seconds in (0.1, 0.2):
            threading.Timer(seconds, os.kill, [os.getpid(), signal.SIGINT]).start()
        # Longer than the last words; the handler then runs once, for both.
        hashlib.pbkdf2_hmac("sha256", b"", b"", 4 * 10**6)

    arguments = command("lm-tiny", tmp_path, "--config.checkpoint_every=1")
    with act_in_step(2, act):
        assert train.main(arguments) == console.failures.INTERRUPTED
    assert len(ended) == 1
    assert not (tmp_path / "lm-tiny" / "summary.json").exists()
    assert train.main(arguments) == 0
    assert "resuming from step 3" in capfd.readouterr().out
    assert len(rows(tmp_path / "lm-tiny" / "metrics.jsonl")) == 4


def test_an_answered_interrupt_is_not_counted(impatient, capfd):
    """In a chat, the next one comes much later and belongs to the next reply."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with watchdog.watching_interrupts():
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                block(0.1)
            time.sleep(0.3)
    assert "came" not in capfd.readouterr().err
