"""Where the time goes: phases, traces that open elsewhere, and programs counted and kept."""

import gzip
import json
import os
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from alignjax import train
from alignjax.machine.profile import Compilations, Phases


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self):
        return self.now


class SlowArray:
    """Stands for an array; waiting for it takes `seconds` of the clock."""

    def __init__(self, clock=None, seconds=0.0):
        self.clock = clock
        self.seconds = seconds
        self.waits = 0

    def block_until_ready(self):
        self.waits += 1
        if self.clock:
            self.clock.now += self.seconds


def test_phases_of_a_step_add_up_and_are_said_in_one_line():
    clock = Clock()
    lines = []
    phases = Phases("ppo", True, None, lines.append, clock)
    clock.now = 7.0  # building and restoring belong to no step
    phases.begin(3, 9)
    for name, seconds in (("data", 0.25), ("rollout", 1.0), ("update", 0.5), ("rollout", 2.0)):
        clock.now += seconds
        phases.mark(name)
    clock.now += 0.125
    phases.mark("other")
    clock.now += 0.5
    phases.mark("save")
    clock.now += 0.125
    assert list(phases.end_step(3).items()) == [
        ("data", 0.25),
        ("rollout", 3.0),
        ("update", 0.5),
        ("save", 0.5),
        ("other", 0.25),
    ]
    assert lines == [
        "ppo step 3: 4.50 s = data 0.25 + rollout 3.00 + update 0.50 + save 0.50 + other 0.25"
    ]
    clock.now += 0.03125
    phases.mark("data")
    assert phases.end_step(4) == {"data": 0.03125, "other": 0.0}
    assert lines[1:] == ["ppo step 4: 0.0312 s = data 0.0312 + other 0.0000"]


def test_a_phase_lasts_until_its_arrays_are_there():
    clock = Clock()
    array = SlowArray(clock, 2.0)
    phases = Phases("lm", True, None, lambda text: None, clock)
    phases.begin(0, 1)
    clock.now += 1.0
    phases.mark("update", {"params": [array]}, None, 3)
    assert array.waits == 1 and phases.end_step(0) == {"update": 3.0, "other": 0.0}


def test_without_profiling_nothing_is_waited_for_timed_said_or_written(tmp_path):
    clock = Clock()
    lines = []
    array = SlowArray()
    phases = Phases("lm", False, tmp_path / "profile", lines.append, clock)
    phases.begin(0, 3)
    for step in range(3):
        clock.now += 1.0
        phases.mark("update", array)
        assert phases.end_step(step) == {}
    phases.close()
    assert array.waits == 0 and not lines and not (tmp_path / "profile").exists()


class Traced(NamedTuple):
    """The named events of a Perfetto trace, and the lines that were printed."""

    events: list[dict]
    lines: list[str]


def trace_a_loop(directory, first, end, stopped_at) -> Traced:
    """Trace a loop over the steps from `first` to `end` that stops before `stopped_at`."""
    lines = []
    double = jax.jit(lambda x: x @ x)
    phases = Phases("ppo", True, directory, lines.append)
    phases.begin(first, end)
    for step in range(first, stopped_at):
        phases.mark("update", double(jnp.ones((8, 8))))
        phases.end_step(step)
    phases.close()
    (folder,) = (directory / "plugins" / "profile").iterdir()  # where TensorBoard's plugin looks
    assert len(list(folder.glob("*.xplane.pb"))) == 1
    trace = json.loads(gzip.decompress((folder / "perfetto_trace.json.gz").read_bytes()))
    return Traced([event for event in trace["traceEvents"] if event.get("name")], lines)


@pytest.mark.parametrize(
    "first, end, stopped_at, steps",
    [
        (4, 20, 20, [6, 7, 8]),  # the steps after the first two
        (0, 5, 5, [2, 3, 4]),
        (0, 3, 3, [0, 1, 2]),  # all steps of a short run
        (2, 3, 3, [2]),
        (0, 20, 3, [2, 3]),  # stopped in step 3
    ],
)
def test_a_trace_holds_a_few_steps_after_the_first_or_all(first, end, stopped_at, steps, tmp_path):
    traced = trace_a_loop(tmp_path / "profile", first, end, stopped_at)
    names = [event["name"] for event in traced.events]
    step_events = [event for event in traced.events if event["name"] == "ppo"]
    assert [int(event["args"]["step_num"]) for event in step_events] == steps
    assert names.count("wait for update") == len([step for step in steps if step < stopped_at])
    assert [line for line in traced.lines if "trace" in line] == [
        f"ppo: a trace from step {steps[0]} on is in {tmp_path / 'profile'}"
    ]


def test_no_steps_left_no_trace(tmp_path):
    phases = Phases("ppo", True, tmp_path / "profile")
    phases.begin(4, 4)
    phases.close()
    assert not (tmp_path / "profile").exists()


@pytest.fixture
def cache(tmp_path):
    """Use an empty persistent cache that keeps every program."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path / "cache"), 0.0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_a_new_function_counts_as_one_program_and_a_known_one_as_none(cache):
    x = jnp.ones(3)
    of_another_shape = jnp.ones(2)

    @jax.jit
    def triple(x):
        return 3 * x

    with Compilations() as compilations:
        triple(x)
        assert compilations.end_step(7) == 1
        triple(x)
        assert compilations.end_step(8) == 1
        text = "1 program compiled, 0 of them from the cache, the last one (jit(triple)) at step 7"
        assert str(compilations) == text
        triple(of_another_shape)
        assert compilations.end_step(9) == 2
        assert str(compilations).endswith("(jit(triple)) at step 9")
    jax.jit(lambda x: x - 2)(x)
    assert len(compilations.programs) == compilations.seen  # counts no longer


def test_programs_from_the_cache_are_counted_apart(cache):
    x = jnp.ones(5)
    compute = jax.jit(lambda x: 5 * x - 1)
    with Compilations() as compilations:
        compute(x)
        assert (len(compilations.programs), len(compilations.fetched)) == (1, 0)
        compute.clear_cache()
        compute(x)
        assert (len(compilations.programs), len(compilations.fetched)) == (2, 1)
    assert str(compilations) == "2 programs compiled, 1 of them from the cache"  # no step ended


PRINT_CACHE_SETTINGS = """
import jax
from alignjax.machine import compilation_cache
compilation_cache.keep_programs()
print(jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs)
"""


def cache_settings(**variables) -> list[str]:
    """Return what a process with these environment variables prints.

    The last line has its cache directory and the least compile time of what it keeps.
    """
    environment = {"JAX_PLATFORMS": "cpu"}
    for name, value in os.environ.items():
        if not name.startswith(("JAX_", "XDG_")):
            environment[name] = value
    for name, value in variables.items():
        environment[name] = str(value)
    process = subprocess.run(
        [sys.executable, "-c", PRINT_CACHE_SETTINGS],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


def test_programs_are_kept_under_home_by_default(tmp_path):
    assert cache_settings(HOME=tmp_path) == [f"{tmp_path / '.cache' / 'alignjax'} 0.5"]
    assert (tmp_path / ".cache" / "alignjax").stat().st_mode & 0o077 == 0
    assert cache_settings(HOME=tmp_path, XDG_CACHE_HOME=tmp_path / "xdg") == [
        f"{tmp_path / 'xdg' / 'alignjax'} 0.5"
    ]


@pytest.mark.parametrize("directory", ["/somewhere/else", ""])
def test_a_users_own_cache_or_none_stays(directory, tmp_path):
    seconds = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1.0"}
    variables = {"JAX_COMPILATION_CACHE_DIR": directory, **seconds}
    assert cache_settings(HOME=tmp_path, **variables) == [f"{directory} 1.0"]
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written_is_a_line_and_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    line, settings = cache_settings(HOME=tmp_path, XDG_CACHE_HOME=tmp_path / "file")
    assert line.startswith("compiled programs are not kept: ") and str(tmp_path / "file") in line
    assert settings == "None 0.5"


def test_profile_is_an_argument_of_its_own():
    assert train.parse_arguments(["--config", "lm.py"])[0].profile is False
    arguments, overrides = train.parse_arguments(
        ["--profile", "--config", "lm.py", "--config.steps=3"]
    )
    assert arguments.profile is True and overrides == {"steps": "3"}
