"""Endpoints as rewards: what a call holds, what may pass, and how it ends if it does not."""

import json

import numpy as np
import pytest
from reward_server import lengths, serving
from test_rewards import ROWS

from alignjax.algorithms import reward_endpoints, reward_sources
from alignjax.algorithms.reward_endpoints import EndpointReward
from alignjax.config import PPO, Config, Reward, UserError
from alignjax.data import chat, toy
from alignjax.machine import collectives

RESPONSES = ["4", "abc"]
FIELD = "ppo.rewards.remote.source"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(reward_endpoints, "FIRST_WAIT", 0.01)


def endpoint(url, tokenizer=None, columns=("answer", "level"), **settings) -> EndpointReward:
    source = Reward(source=url, **settings)
    return reward_endpoints.load(FIELD, source, columns, tokenizer)


def fails(reward) -> str:
    with pytest.raises(UserError) as caught:
        reward(ROWS, RESPONSES)
    return str(caught.value)


def test_a_call_holds_the_arguments_of_a_reward_function():
    with serving() as server:
        scores = endpoint(server.url)(ROWS, RESPONSES)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, [0.1, 0.3])
    assert server.calls == [
        {
            "prompts": [row["prompt"] for row in ROWS],
            "responses": RESPONSES,
            "query": ["2 + 2\n4", "3\nok\nx\nabc"],
            "answer": ["4", "#### 1,000"],
            "level": [None, 2],
        }
    ]


def test_the_query_is_the_conversation_as_the_policys_template_writes_it(tmp_path):
    tokenizer = chat.train_tokenizer(toy.tokenizer_texts(0), tmp_path, 300)
    with serving() as server:
        endpoint(server.url, tokenizer)(ROWS[:1], ["4"])
    (call,) = server.calls
    assert call["query"] == ["<|im_start|>user\n2 + 2<|im_end|>\n<|im_start|>assistant\n4"]


def test_responses_come_in_batches_and_columns_keep_out_of_the_way():
    rows = [{"prompt": ROWS[0]["prompt"], "columns": {"query": 1, "responses": 2}}] * 5
    with serving() as server:
        reward = endpoint(server.url, columns=["query", "responses"], batch=2)
        np.testing.assert_allclose(reward(rows, ["a" * n for n in range(5)]), np.arange(5) / 10)
    assert [len(call["responses"]) for call in server.calls] == [2, 2, 1]
    assert server.calls[0]["query_"] == [1, 1] and server.calls[0]["responses_"] == [2, 2]


def test_the_answer_of_an_openrlhf_server_is_read():
    with serving(lambda call: (200, {"rewards": [0.5] * len(call["query"])})) as server:
        assert endpoint(server.url)(ROWS, RESPONSES).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_fails_twice_is_asked_a_third_time(status, capsys):
    def answer(call):
        return lengths(call) if len(server.calls) > 2 else (status, b"overloaded")

    with serving(answer) as server:
        server.headers = {"Retry-After": "0"}
        np.testing.assert_allclose(endpoint(server.url, retries=2)(ROWS, RESPONSES), [0.1, 0.3])
    assert len(server.calls) == 3
    assert server.calls[0] == server.calls[2]
    printed = capsys.readouterr()
    lines = (printed.out + printed.err).splitlines()
    assert [line.rpartition(", in ")[2] for line in lines] == [
        "attempt 1 of 3; again in 0.01 s",
        "attempt 2 of 3; again in 0.02 s",
    ]


def test_the_last_attempt_ends_with_one_line():
    with serving(lambda call: (503, b"busy\nmore")) as server:
        message = fails(endpoint(server.url, retries=1))
    assert len(server.calls) == 2
    assert message == (
        f"{FIELD}={server.url}: status 503 Service Unavailable ('busy'), in attempt 2 of 2; "
        "once it answers, the same command continues"
    )


@pytest.mark.parametrize("status", [301, 400, 404])
def test_what_does_not_pass_is_not_repeated(status):
    with serving(lambda call: (status, b"")) as server:
        server.headers = {"Location": "http://127.0.0.1:9/"}
        message = fails(endpoint(server.url))
    assert len(server.calls) == 1
    assert f"status {status} " in message and "in attempt 1 of 7" in message


def test_a_slow_server_is_not_waited_for():
    with serving() as server:
        server.delay = 0.5
        message = fails(endpoint(server.url, timeout=0.05, retries=1))
    assert "no answer within 0.05 s, in attempt 2 of 2" in message


def test_a_refused_connection_is_one_line():
    with serving() as server:
        pass
    message = fails(endpoint(server.url, retries=1))
    assert f"{FIELD}={server.url}: no connection: " in message
    assert "refused" in message and "attempt 2 of 2" in message


@pytest.mark.parametrize(
    "answer, message",
    [
        (b"<html>", "its answer is not JSON: '<html>'"),
        (b"\xff", "its answer is not JSON"),
        ([1.0, 2.0], 'expected {"scores": [...]} for 2 responses, the first to the prompt of'),
        ({"score": [1.0, 2.0]}, "found {'score': [1.0, 2.0]}"),
        ({"scores": 1.0}, "found {'scores': 1.0}"),
        ({"scores": [1.0]}, "1 scores for 2 responses, the first to the prompt of sums.jsonl:1"),
        ({"scores": [1.0, None]}, "score None for the response 'abc' to the prompt of"),
        ({"scores": ["1.0", 2]}, "score '1.0' for the response '4' to the prompt of sums.jsonl:1"),
    ],
)
def test_an_answer_of_another_form_is_not_repeated(answer, message):
    with serving(lambda call: (200, answer)) as server:
        assert message in fails(endpoint(server.url))
    assert len(server.calls) == 1


def test_numbers_that_are_not_finite_pass_as_those_of_functions_do():
    with serving(lambda call: (200, b'{"scores": [NaN, 1e999]}')) as server:
        scores = endpoint(server.url)(ROWS, RESPONSES)
    assert np.isnan(scores[0]) and np.isinf(scores[1])


def test_of_several_processes_the_first_calls_for_all(monkeypatch):
    """The others pass nothing to the exchange, and get its scores or its error."""
    with serving() as server:
        reward = endpoint(server.url, retries=0)
        passed = []
        monkeypatch.setattr(collectives, "gather", lambda data: passed.append(data) or [data, b""])
        reward(ROWS, RESPONSES)
        first = passed[0]
        monkeypatch.setattr(reward_endpoints.jax, "process_index", lambda: 1)
        monkeypatch.setattr(
            collectives, "gather", lambda data: passed.append(data) or [first, data]
        )
        np.testing.assert_allclose(reward(ROWS, RESPONSES), [0.1, 0.3])
        assert passed[1] == b"" and len(server.calls) == 1
    error = json.dumps({"error": "the line"}).encode()
    monkeypatch.setattr(collectives, "gather", lambda data: [error, data])
    assert fails(reward) == "the line"


def test_an_endpoint_is_tried_with_a_prompts_number_of_responses():
    with serving() as server:
        table = {
            "remote": Reward(source=server.url),
            "function": Reward(source="configs.arithmetic:reward"),
        }
        config = Config(ppo=PPO(rewards=table, samples_per_prompt=3))
        text_rewards = reward_sources.load_and_try(config, ROWS[:1], ROWS[1:])
    assert list(text_rewards) == ["remote", "function"]
    assert [call["responses"] for call in server.calls] == [["", "2 + 2", ""], ["", "x", ""]]
    assert server.calls[0]["level"] == [None] * 3
