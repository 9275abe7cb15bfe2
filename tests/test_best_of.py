"""Best of n: which response is taken, what its KL is, and the commands that answer with it."""

import json
import math

import jax
import numpy as np
import pytest

from alignjax import evaluate, inference
from alignjax.config import Mesh, UserError
from alignjax.evals import best_answers as command
from alignjax.evals import best_of
from alignjax.machine import sharding

PROMPTS = ["copy : cat box", [{"role": "user", "content": "count : cat box sun"}]]
SETTINGS = {"temperature": 1.3, "max_tokens": 10, "seed": 3, "slots": 8}
N = 4


@pytest.fixture(scope="module")
def policy(chain):
    one_device = sharding.make_mesh(Mesh(), jax.devices()[:1])
    return inference.load(chain.runs / "sft-tiny", mesh=one_device)


@pytest.fixture(scope="module")
def reward(chain):
    return inference.load(chain.runs / "rm-tiny")


@pytest.fixture(scope="module")
def candidates(policy):
    return policy.generate(PROMPTS, samples=N, **SETTINGS)


@pytest.mark.parametrize("same_tokens", [True, False])
def test_the_answer_is_the_candidate_with_the_highest_score(
    policy, reward, candidates, monkeypatch, same_tokens
):
    if not same_tokens:  # as a reward model with another tokenizer reads it: as text
        monkeypatch.setattr(best_of.rewards, "same_tokens", lambda *_: False)
    answers = best_of.generate(policy, reward, PROMPTS, n=N, **SETTINGS)
    assert answers == best_of.generate(policy, reward, PROMPTS, n=N, **SETTINGS)
    for number, answer in enumerate(answers):
        own = candidates[number * N : (number + 1) * N]
        as_read = [response.tokens if same_tokens else response.text for response in own]
        scores = reward.score([PROMPTS[number]] * N, as_read)
        np.testing.assert_allclose(answer.scores, scores, rtol=1e-5)
        ended = [place for place in range(N) if not own[place].truncated] or range(N)
        best = max(ended, key=scores.__getitem__)
        assert answer.response == own[best]
        assert answer.score == answer.scores[best]


def test_best_of_one_is_sampling(policy, reward):
    answers = best_of.generate(policy, reward, PROMPTS, n=1, **SETTINGS)
    assert [answer.response for answer in answers] == policy.generate(PROMPTS, **SETTINGS)
    assert best_of.generate(policy, reward, [], n=3) == []


def test_a_truncated_response_is_taken_only_if_no_response_ended():
    scores = np.array([[3.0, 1.0, 2.0], [3.0, 1.0, 4.0], [2.0, 2.0, 1.0]])
    truncated = np.array([[True, False, False], [True, True, True], [False, False, False]])
    assert best_of.best_places(scores, truncated).tolist() == [2, 2, 0]


def test_the_bound_is_the_kl_of_the_best_of_n_of_a_continuous_score():
    """The best of n uniform draws has the density n u^(n-1) on (0, 1)."""
    assert best_of.kl_bound(1) == 0
    assert math.isclose(best_of.kl_bound(16), 1.8350887, rel_tol=1e-6)
    u = (np.arange(200_000) + 0.5) / 200_000
    density = 4 * u**3
    assert math.isclose((density * np.log(density)).mean(), best_of.kl_bound(4), rel_tol=1e-4)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"n": 0}, "best of 0: there must be at least 1 response"),
        ({"n": 2, "temperature": 0.0}, "best of 2: temperature=0.0 gives 2 times the same"),
    ],
)
def test_settings_without_a_choice_are_user_errors(policy, reward, settings, message):
    with pytest.raises(UserError, match=message):
        best_of.generate(policy, reward, PROMPTS, **settings)


def test_a_language_model_is_no_reward_model(policy):
    with pytest.raises(UserError, match="this needs a reward model"):
        best_of.generate(policy, policy, PROMPTS, n=2, max_tokens=4)


def test_the_command_writes_answers_and_their_figures(chain, tmp_path, capsys):
    """A second run answers the same; a directory that it did not make is left alone."""
    options = ["--policy", str(chain.runs / "sft-tiny"), "--reward", str(chain.runs / "rm-tiny")]
    options += ["--n", "2", "--examples", "4", "--max_tokens", "10"]
    out = tmp_path / "best"
    assert command.main([*options, "--out", str(out)]) == 0
    answers = [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]
    summary = json.loads((out / "summary.json").read_text())
    assert len(answers) == 4 and summary["name"] == "best-of-2"
    for name in ("score", "true_score", "length"):
        expected = np.mean([answer[name] for answer in answers])
        assert summary[f"{name}/after"] == pytest.approx(expected)
    assert summary["kl/after"] == best_of.kl_bound(2)
    assert summary["score/before"] <= summary["score/after"]
    first = (out / "responses.jsonl").read_bytes()
    assert command.main([*options, "--out", str(out)]) == 0
    assert (out / "responses.jsonl").read_bytes() == first

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("kept")
    assert command.main([*options, "--out", str(tmp_path / "other")]) == 2
    assert "other: this directory holds files" in capsys.readouterr().err


@pytest.fixture
def evaluated(chain):
    """Return the model of an evaluation that answers with the best of four."""
    adapter = pytest.importorskip("alignjax.evals.adapter")
    return adapter.AlignJax(
        chain.runs / "sft-tiny", batch_size=8, best_of=N, reward=str(chain.runs / "rm-tiny")
    )


def test_an_evaluation_answers_with_the_best_of_its_candidates(evaluated, reward):
    """A greedy task is sampled; the reward model reads the messages, not the rendered text."""
    text = evaluated.apply_chat_template([{"role": "user", "content": PROMPTS[0]}])
    tokens = evaluated.tok_encode(text)
    settings = evaluated.response_settings({"until": ["\n"], "max_gen_toks": 10})
    ((_, answer),) = evaluated.answers([text], [tokens], settings)
    sampled = evaluated.best_of.settings(settings)
    assert (sampled.samples, sampled.temperature, sampled.top_p) == (N, 1.0, 0.9)
    ((_, own),) = evaluated.requests.candidates([tokens], sampled)
    assert len({candidate.text for candidate in own}) > 1
    scores = reward.score([PROMPTS[0]] * N, [candidate.text for candidate in own])
    ended = [place for place in range(N) if not own[place].truncated] or range(N)
    assert answer == own[max(ended, key=scores.__getitem__)].text
    info = evaluated.get_model_info()
    assert info["best_of"] == N and info["kl_at_most"] == best_of.kl_bound(N)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tasks", "world", "--best_of", "4"], "--best_of=4 needs a reward model: --reward RUN"),
        (["--tasks", "world", "--reward", "x"], "--reward x needs --best_of N, with N above 1"),
        (["--tasks", "world", "--best_of", "0", "--reward", "x"], "--best_of=0 must be at least 1"),
        (["--sets", "toy/comparisons-clean", "--best_of", "4"], "are for --tasks, not for --sets"),
    ],
)
def test_options_of_an_evaluation_that_make_no_choice_are_user_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        evaluate.parse_arguments(["--run", "x", *arguments])
