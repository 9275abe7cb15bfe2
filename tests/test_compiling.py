"""What the steps run is compiled before the first of them, once, on several threads."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from runs import command, with_parents

from alignjax import config as configs
from alignjax import train
from alignjax.algorithms.greedy import GreedyAnswers
from alignjax.algorithms.stage import Program
from alignjax.machine import sharding
from alignjax.machine.profile import COMPILED
from alignjax.runs.compiling import REPORT_SECONDS, CompileAhead
from alignjax.runs.loop import Loop


class Compiled:
    """The names of the functions that are compiled, before the first step and after."""

    def __init__(self):
        self.before = []
        self.after = []
        self.steps_began = False

    def listen(self, event: str, seconds: float, **details: object) -> None:
        if event == COMPILED:
            names = self.after if self.steps_began else self.before
            names.append(str(details.get("fun_name")))


@pytest.fixture
def compiled(monkeypatch):
    record = Compiled()
    run_step = Loop.run_step

    def begin_and_run(loop, *arguments):
        record.steps_began = True
        return run_step(loop, *arguments)

    monkeypatch.setattr(Loop, "run_step", begin_and_run)
    jax.monitoring.register_event_duration_secs_listener(record.listen)
    yield record
    jax.monitoring.unregister_event_duration_listener(record.listen)


@pytest.mark.parametrize(
    "name, programs",
    [
        ("rm-tiny", ("accumulate", "update_state", "score_pairs")),
        ("ppo-tiny", ("generate", "make_experience", "update_policy")),
    ],
)
def test_the_steps_of_a_run_call_what_was_compiled_before_the_first(
    name, programs, chain, tmp_path, compiled, monkeypatch
):
    # At the end a run compiles another sampler, which is greedy.
    monkeypatch.setattr(GreedyAnswers, "figures", lambda *_: {})
    runs = with_parents(name, chain.runs, tmp_path)
    assert train.main(command(name, runs, "--config.ppo.eval_every=0")) == 0
    for program in programs:
        assert any(program in other for other in compiled.before), compiled.before
        assert not any(program in other for other in compiled.after), compiled.after


def double(x: jax.Array) -> jax.Array:
    return 2 * x


def program_of(function, size: int) -> Program:
    mesh = sharding.make_mesh(configs.Mesh())
    shape = jax.ShapeDtypeStruct((size,), jnp.float32, sharding=sharding.replicated(mesh))
    return Program(name="double", calls=1, function=function, arguments=(shape,))


def ahead_of(programs, lines, clock=lambda: 0.0) -> CompileAhead:
    return CompileAhead("lm", programs, sharding.make_mesh(configs.Mesh()), lines.append, clock)


def test_a_line_counts_the_programs_while_they_are_compiled():
    """The clock goes on by the time of a line whenever it is read."""
    clock = itertools.count(0.0, REPORT_SECONDS).__next__
    lines = []
    function = jax.jit(double)
    programs = [program_of(function, size) for size in (3, 4, 5)]
    with ahead_of(programs, lines, clock) as ahead:
        ahead.wait()
    assert lines[-1].startswith("lm: compiling 3 programs: 3 of 3, ")


def test_quick_compilations_print_nothing():
    lines = []
    with ahead_of([program_of(jax.jit(double), 6)], lines, lambda: 0.0) as ahead:
        ahead.wait()
    assert lines == []


def test_what_a_compiler_raises_is_raised_by_the_wait():
    def fails(x):
        raise ValueError("no such program")

    with ahead_of([program_of(jax.jit(fails), 7)], []) as ahead:
        with pytest.raises(ValueError, match="no such program"):
            ahead.wait()
