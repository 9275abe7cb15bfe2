"""Functions as rewards: what they may return, what they are given, and how they may fail."""

import functools
import re
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from runs import command
from test_rewards import ROWS

from alignjax import train
from alignjax.algorithms import estimators, plugins, reward_functions, reward_sources
from alignjax.algorithms.reward_functions import FunctionReward
from alignjax.config import PPO, Config, UserError
from alignjax.data import files, formats
from alignjax.machine import console, failures, processes

RESPONSES = ["4", "y"]


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Return a function that writes a module into the working directory, and its spec."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    names = []

    def write(source: str, function: str = "reward") -> str:
        name = f"user_module_{len(names)}"
        names.append(name)
        (tmp_path / f"{name}.py").write_text(source)
        return f"{name}:{function}"

    yield write
    for name in names:
        sys.modules.pop(name, None)


def reward_of(function, columns=("answer", "level")) -> FunctionReward:
    keywords = reward_functions.choose_keywords(function, list(columns))
    return FunctionReward(field="ppo.reward_fn", spec="m:f", function=function, keywords=keywords)


def returning(result) -> FunctionReward:
    return reward_of(lambda prompts, responses, **columns: result)


# ------------------------------------------------------------------------------ what it may return


class Sequence:
    """A sequence like that of a library of tables: neither a list nor an array."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __iter__(self):
        return iter(self.items)


SCORES = {
    "floats": [1.5, 2.0],
    "integers": [1, 2],
    "booleans": [True, False],
    "tuple": (1.5, 2.0),
    "generator": (x for x in (1.5, 2.0)),
    "map": map(float, [1, 2]),
    "float16": np.array([1.5, 2], np.float16),
    "numpy booleans": np.array([True, False]),
    "unsigned": np.array([1, 2], np.uint8),
    "numpy scalars": [np.float64(1.5), np.int8(2)],
    "numpy bool scalars": [np.bool_(True), np.False_],
    "objects": np.array([1.5, np.float32(2)], object),
    "0-d arrays": [np.array(1.5), np.array(2)],
    "0-d object arrays": [np.array(1.5, object), np.array(2)],
    "jax": jnp.array([1.5, 2.0]),
    "bfloat16": jnp.array([1.5, 2.0], jnp.bfloat16),
    "0-d jax arrays": [jnp.array(1.5), jnp.array(2)],
    "jax scalars": list(jnp.array([1.5, 2.0], jnp.bfloat16)),
    "numpy bfloat16": np.array([1.5, 2.0], jnp.bfloat16),
    "long double": np.array([1.5, 2.0], np.longdouble),
    "decimal": [Decimal("1.5"), Fraction(4, 2)],
    "range": range(1, 3),
    "a sequence of its own": Sequence([1.5, 2]),
    "dict values": {"a": 1.5, "b": 2}.values(),
}


@pytest.mark.parametrize("result", SCORES.values(), ids=SCORES)
def test_any_sequence_or_array_of_numbers_is_scores(result):
    scores = returning(result)(ROWS, RESPONSES)
    assert scores.dtype == np.float32
    assert scores.tolist() in ([1.5, 2.0], [1.0, 2.0], [1.0, 0.0])


def test_numbers_that_are_not_finite_or_too_large_pass_as_such():
    scores = returning([float("nan"), 1e300])(ROWS, RESPONSES)
    assert np.isnan(scores[0]) and scores[1] == np.inf
    scores = returning([10**400, -(10**400)])(ROWS, RESPONSES)
    assert scores.tolist() == [np.inf, -np.inf]


class Loud:
    def __repr__(self):
        raise ValueError("no representation")


WRONG = {
    "too few": ([1.0], "1 scores for 2 responses, the first to the prompt of sums.jsonl:1"),
    "too many": (np.ones(3), "3 scores for 2 responses"),
    "empty": ([], "0 scores for 2 responses"),
    "digits": (
        ["1", 2],
        "score '1' for the response '4' to the prompt of sums.jsonl:1 is not a number",
    ),
    "numpy digits": (np.array(["1", "2"]), "score .*'1'.* for the response '4'"),
    "none": ([1.0, None], "score None for the response 'y' to the prompt of the embedded world"),
    "lists": ([[1], [2]], r"score \[1\] for the response"),
    "column of an array": (
        np.ones((2, 1)),
        r"an array of numbers for 2 responses, .* of shape \[2, 1\]",
    ),
    "0-d": (np.array(1.0), r"found an array of shape \[\]"),
    "0-d jax": (jnp.array(1.0), r"found an array of shape \[\]"),
    "single": (
        1.0,
        "expected a list .* for 2 responses, the first to the prompt of sums.jsonl:1, found float",
    ),
    "nothing": (None, "found NoneType None"),
    "text": ("12", "found str '12'"),
    "dict": ({0: 1.0, 1: 2.0}, "found dict {0: 1.0, 1: 2.0}"),
    "set": ({1.0, 2.0}, "found set"),
    "complex": ([1j, 2], "score 1j for the response"),
    "numpy complex": (np.array([1j, 2]), "is not a number"),
    "times": (np.array([1, 2], "datetime64[ns]"), "is not a number"),
    "masked": (np.ma.array([1.0, 2.0], mask=[False, True]), "score masked for the response 'y'"),
    "arrays of one": ([np.ones(1), np.ones(1)], r"score array\(\[1.\]\) for"),
    "many lines": ([np.eye(2), 1], r"score array\(\[\[1., 0.\], \[0., 1.\]\]\) for"),
    "without representation": ([Loud(), 1], "score of type Loud for the response"),
}


@pytest.mark.parametrize("result, message", WRONG.values(), ids=WRONG)
def test_what_is_not_scores_is_one_line(result, message):
    with pytest.raises(UserError, match=message) as caught:
        returning(result)(ROWS, RESPONSES)
    assert str(caught.value).startswith("ppo.reward_fn=m:f: ")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------- what it is given


def test_a_function_gets_messages_texts_and_all_columns_of_the_run():
    """Also those that no row of a batch has."""
    seen = []

    def reward(prompts, responses, **columns):
        seen.append((prompts, responses, columns))
        return [1, 2.5]

    function = reward_of(reward, ("answer", "level", "hint"))
    assert function(ROWS, RESPONSES).tolist() == [1.0, 2.5]
    columns = {"answer": ["4", "#### 1,000"], "level": [None, 2], "hint": [None, None]}
    assert seen == [([row["prompt"] for row in ROWS], RESPONSES, columns)]


def test_a_function_cannot_change_what_is_logged_or_what_others_get():
    row = {"prompt": [{"role": "user", "content": "a"}], "columns": {"facts": [1]}}
    contents = []

    def reward(prompts, responses, facts):
        for prompt in prompts:
            contents.append(prompt[0]["content"])
            prompt[0]["content"] = "changed"
        prompts.clear()
        responses[:] = ["changed"] * 5
        for fact in facts:
            fact.append(len(fact))
        return [len(fact) for fact in facts]

    responses = ["x", "y"]
    scores = reward_of(reward, ["facts"])([row, row], responses)
    assert contents == ["a", "a"] and scores.tolist() == [2, 2]
    assert row == {"prompt": [{"role": "user", "content": "a"}], "columns": {"facts": [1]}}
    assert responses == ["x", "y"]


class Judge:
    def __call__(self, prompts, responses, **columns):
        return [sorted(columns)] * 0 or [len(columns)] * len(responses)

    def judge(self, prompts, responses, **columns):
        return [len(columns)] * len(responses)


def plain(prompts, responses, **columns):
    return [len(columns)] * len(responses)


def positional(prompts, responses, /, **columns):
    assert columns["responses"] == ["x", None]
    return plain(prompts, responses, **{"prompts_": 0, "a b": 0, "self": 0, "scale": 0})


def scaled(scale, prompts, responses, **columns):
    return [scale] * len(responses)


@functools.wraps(plain)
def decorated(*arguments, **columns):
    return plain(*arguments, **columns)


@pytest.mark.parametrize(
    "function",
    [
        plain,
        positional,
        decorated,
        Judge(),
        Judge().judge,
        functools.partial(scaled, 4),
        functools.partial(plain),
    ],
)
def test_columns_may_have_any_names_even_those_of_parameters(function):
    columns = {"responses": "x", "a b": "y", "self": 1, "scale": 2}
    named = [{"prompt": ROWS[0]["prompt"], "columns": columns}, ROWS[0]]
    reward = reward_of(function, list(columns))
    reward_functions.check_signature(reward, named)
    assert reward(named, RESPONSES).tolist() == [4, 4]


def test_a_column_with_the_name_of_a_parameter_gets_an_underscore():
    assert reward_functions.choose_keywords(plain, ["responses", "responses_", "x"]) == {
        "responses": "responses__",
        "responses_": "responses_",
        "x": "x",
    }
    assert reward_functions.choose_keywords(positional, ["responses"]) == {"responses": "responses"}
    assert reward_functions.choose_keywords(max, ["responses"]) == {"responses": "responses_"}


@pytest.mark.parametrize(
    "source, message",
    [
        ("def reward(prompts, responses): pass", "got an unexpected keyword argument 'answer'"),
        ("def reward(prompts, **columns): pass", "too many positional arguments"),
        ("def reward(prompts, responses, anser, **columns): pass", "a required argument: 'anser'"),
        ("def reward(*, prompts, responses, **columns): pass", "too many positional arguments"),
    ],
)
def test_a_function_that_does_not_accept_its_arguments_is_one_line(module, source, message):
    ppo = PPO(reward_fn=module(source))
    expected = f"ppo.reward_fn={ppo.reward_fn}: .*{message}.*sums.jsonl:1"
    with pytest.raises(UserError, match=expected):
        reward_functions.load("ppo.reward_fn", ppo.reward_fn, ROWS)


# -------------------------------------------------------------------------------- how it may fail


def test_an_exception_names_the_row_and_shows_the_users_own_frames(module):
    spec = module(
        "def helper(response):\n"
        "    return float(response)\n"
        "def reward(prompts, responses, **columns):\n"
        "    return [helper(response) for response in responses]\n"
    )
    function = reward_functions.load("ppo.reward_fn", spec, ROWS)
    with pytest.raises(UserError) as caught:
        function(ROWS[::-1], RESPONSES)
    assert str(caught.value) == (
        f"ppo.reward_fn={spec}: ValueError: could not convert string to float: 'y' "
        "(user_module_0.py:2) for the response 'y' to the prompt of sums.jsonl:1"
    )
    details = caught.value.details
    assert details.count("  File ") == details.count("user_module_0.py") == 3
    assert "in helper\n" in details and "alignjax" not in details
    assert details.startswith("Traceback (most recent call last):\n")


def test_an_exception_of_all_rows_together_names_the_first(module):
    spec = module("def reward(prompts, responses, **columns):\n    return 1 / (len(prompts) - 2)\n")
    function = reward_functions.load("ppo.reward_fn", spec, ROWS)
    with pytest.raises(UserError, match="for 2 responses, the first to the prompt of sums.jsonl:1"):
        function(ROWS, RESPONSES)


@pytest.mark.parametrize(
    "body, message",
    [
        ("sys.exit(0)", "SystemExit: 0"),
        ("exit()", "SystemExit"),
        ("raise SystemExit", "SystemExit"),
        ("raise GeneratorExit", "GeneratorExit"),
        ("yield 1; yield 1 / 0", "ZeroDivisionError: division by zero"),
        ("open('absent.txt')", "FileNotFoundError: .*'absent.txt'"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("raise KeyError from ValueError('cause')", "KeyError"),
        ("raise UserError('my own words')", "my own words for"),
        ("raise Mute", "Mute"),
        ("json.loads('{')", "JSONDecodeError: Expecting property name"),
        ("return later()", "expected a list .*, found a coroutine: write no async function"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_whatever_a_function_raises_is_an_error_of_it(module, body, message):
    spec = module(
        "import json, sys\n"
        "from alignjax.config import UserError\n"
        "class Mute(Exception):\n    def __str__(self): raise self\n"
        "async def later(): pass\n"
        f"def reward(prompts, responses, **columns):\n    {body}\n"
    )
    with pytest.raises(UserError, match=f"{spec}: {message}") as caught:
        reward_functions.load("ppo.reward_fn", spec, ROWS)(ROWS, RESPONSES)
    assert "\n" not in str(caught.value)
    assert "alignjax/" not in caught.value.details and "json/" not in caught.value.details
    assert ("cause" in caught.value.details) == ("cause" in body)


def test_an_interrupt_passes_through():
    def reward(prompts, responses, **columns):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reward_of(reward)(ROWS, RESPONSES)


def test_the_trial_has_a_prompts_number_of_responses_the_empty_one_first(module):
    spec = module(
        "calls = []\n"
        "def reward(prompts, responses, **columns):\n"
        "    calls.append((len(prompts), responses, columns))\n"
        "    return [0.0] * len(responses)\n"
    )
    config = Config(ppo=PPO(reward_fn=spec, samples_per_prompt=3))
    reward_sources.load_and_try(config, ROWS[:1], ROWS[1:])
    calls = sys.modules[spec.partition(":")[0]].calls
    assert calls == [
        (3, ["", "2 + 2", ""], {"answer": ["4"] * 3, "level": [None] * 3}),
        (3, ["", "x", ""], {"answer": ["#### 1,000"] * 3, "level": [2] * 3}),
    ]


# ------------------------------------------------------------------------------------ loading it


@pytest.mark.parametrize("spec", ["configs.arithmetics:reward", "configs.arithmetic:rewards"])
def test_a_function_that_is_not_there_is_named(spec):
    with pytest.raises(UserError, match=f"ppo.reward_fn={spec}: .*arithmetic"):
        plugins.load_function("ppo.reward_fn", spec)
    assert plugins.load_function("ppo.reward_fn", "configs.arithmetic:reward") is not None


@pytest.mark.parametrize(
    "spec", ["m", "m:", ":f", "a:b:c", ".m:f", "m.py:f", "rewards/m:f", "m:f "]
)
def test_a_name_of_another_form_is_refused(spec):
    if spec == "m.py:f":
        expected = "No module named 'm'"
    else:
        expected = "must be module:function"
    with pytest.raises(UserError, match=expected):
        plugins.load_function("ppo.reward_fn", spec)


@pytest.mark.parametrize(
    "source, message",
    [
        ("x = 1 / 0\n", r"ZeroDivisionError: division by zero \(user_module_0.py:1\)"),
        ("import sys\nsys.exit(0)\n", r"SystemExit: 0 \(user_module_0.py:2\)"),
        ("def reward(:\n", r"SyntaxError: .*\(user_module_0.py:1\)"),
        ("import not_installed\n", "ModuleNotFoundError: No module named 'not_installed'"),
        ("from json import lods\n", "ImportError: cannot import name 'lods'"),
    ],
)
def test_a_module_that_cannot_be_imported_shows_the_users_own_traceback(module, source, message):
    spec = module(source)
    with pytest.raises(UserError, match=f"ppo.sampler={spec}: {message}") as caught:
        plugins.load_function("ppo.sampler", spec)
    details = caught.value.details
    assert "user_module_0.py" in details
    assert "alignjax" not in details and "importlib" not in details


@pytest.mark.parametrize(
    "source, message",
    [
        ("class reward: pass\n", "this is a class"),
        ("reward = 3\n", "expected a function, found 3"),
        ("async def reward(prompts, responses, **columns): pass\n", "an async function"),
        ("async def reward(prompts, responses, **columns): yield 1\n", "an async function"),
        (
            "class C:\n    async def __call__(self, *a, **k): pass\nreward = C()\n",
            "an async function",
        ),
        (
            "import functools\nasync def f(x): pass\nreward = functools.partial(f)\n",
            "an async function",
        ),
        ("def rewards(): pass\n", "no attribute 'reward'; did you mean 'rewards'"),
    ],
)
def test_what_is_no_ordinary_function_is_refused(module, source, message):
    with pytest.raises(UserError, match=message):
        plugins.load_function("ppo.reward_fn", module(source))


def test_a_function_may_be_an_attribute_of_an_object(module):
    spec = module("class C:\n    def f(self): return 5\nc = C()\n", "c.f")
    assert plugins.load_function("ppo.reward_fn", spec)() == 5


def test_a_module_whose_name_is_taken_is_named(module, tmp_path):
    module("")
    Path("json.py").write_text("def reward(): pass\n")
    expected = r"the name 'json' is taken by .*json.__init__.py; rename json.py"
    with pytest.raises(UserError, match=expected):
        plugins.load_function("ppo.reward_fn", "json:reward")


def test_an_estimator_is_tried_with_shapes_alone(module):
    source = (
        "from alignjax.algorithms.estimators import Advantages\n"
        "def none(inputs, ppo): return None\n"
        "def flat(inputs, ppo):\n"
        "    return Advantages(advantages=inputs.rewards[0], returns=inputs.rewards)\n"
        "def branch(inputs, ppo):\n    if inputs.rewards.sum() > 0: return None\n"
        "def right(inputs, ppo):\n"
        "    ppo.gamma = 7\n"
        "    return Advantages(advantages=inputs.rewards, returns=inputs.values)\n"
    )
    name = module(source).partition(":")[0]
    config = train.configs.load("ppo.py:tiny")
    for function, message in {
        "none": "expected Advantages, found NoneType",
        "flat": r"advantages is float32\[\d+\], not floating\[\d+, \d+\]",
        "branch": r"TracerBoolConversionError: .*\(user_module_0.py:6\)",
    }.items():
        config.ppo.advantage_estimator = f"{name}:{function}"
        with pytest.raises(UserError, match=f"estimator={name}:{function}: {message}") as caught:
            estimators.check_shapes(config)
        if function == "branch":
            assert caught.value.details.count("  File ") == 1
    config.ppo.advantage_estimator = f"{name}:right"
    estimators.check_shapes(config)
    assert config.ppo.gamma == PPO().gamma


def test_an_exception_of_a_row_format_names_the_row_and_shows_its_own_frames(
    tmp_path, monkeypatch, capsys
):
    """It is no bad row, so it is not skipped either."""
    monkeypatch.setattr(formats, "FORMATS", list(formats.FORMATS))
    formats.row_format("text", "words")(lambda row: {"text": row["words"][0] + 1})
    path = tmp_path / "rows.jsonl"
    path.write_text('{"words": [1, 2]}\n{"words": ["a"]}\n')
    with pytest.raises(UserError) as caught:
        files.read(str(path), "text", skip=True)
    assert re.fullmatch(
        f"{path}:2: a row format of text: TypeError: .* \\(test_reward_functions.py:.*\\)",
        str(caught.value),
    )
    printed = capsys.readouterr().err
    assert printed.count("  File ") == 1 and "alignjax/" not in printed


def test_details_are_printed_once_above_the_line(capsys):
    error = UserError("the line", "the details\n")

    def fail():
        processes.report_error(error)
        raise error

    assert console.run_command(fail) == 2
    failures.print_details(error)
    assert capsys.readouterr().err == "the details\nalignjax: the line\n"


# ----------------------------------------------------------------------------------------- a run


def test_a_run_shows_a_mistake_before_its_parents_and_can_be_repeated(module, tmp_path, capsys):
    """The work directory is not claimed, and no parent is trained."""
    spec = module(
        "def reward(prompts, responses, **columns):\n    return [r[0] for r in responses]\n"
    )
    arguments = command("ppo-tiny", tmp_path / "runs", f"--config.ppo.reward_fn={spec}")
    assert train.main(arguments) == 2
    printed = capsys.readouterr().err.splitlines()
    assert printed[0] == "Traceback (most recent call last):"
    assert printed[-1] == (
        f"alignjax: ppo.reward_fn={spec}: IndexError: string index out of range "
        "(user_module_0.py:2) for the response '' to the prompt of the embedded world"
    )
    assert not [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]


def test_the_bar_of_a_terminal_is_set_aside_while_user_code_prints(monkeypatch):
    cleared = []
    monkeypatch.setattr(console.sys.stderr, "isatty", lambda: True, raising=False)
    with console.progress_bar(3, "x", "step") as bar:
        monkeypatch.setattr(bar, "clear", lambda *a, **k: cleared.append(1))
        bar.fp = sys.stderr
        with console.bar_set_aside():
            print("printed")
    assert cleared
