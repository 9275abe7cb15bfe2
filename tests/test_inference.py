"""The Python surface: what is loaded generates, streams and scores as training and `rollout` do, and says what it can't."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from runs import rows

from alignjax import convert, inference
from alignjax.config import Mesh, UserError
from alignjax.data import chat, encoding, toy
from alignjax.machine import sharding
from alignjax.sampling import rollout
from alignjax.sampling.types import Prompts, SamplingSettings, StreamOutput

PROMPTS = [
    "copy : cat box",
    "find : bob hat . amy red . bob",
    [{"role": "user", "content": "count : cat box sun"}],
]
SAMPLED = {"temperature": 1.3, "top_p": 0.9, "seed": 3, "max_tokens": 10}
GREEDY = {"temperature": 0.0, "max_tokens": 10}


@pytest.fixture(scope="module")
def policy(chain):
    return inference.load(chain[0] / "ppo-tiny", mesh=sharding.make_mesh(Mesh(), jax.devices()[:1]))


@pytest.fixture(scope="module")
def reward(chain):
    return inference.load(chain[0] / "rm-tiny")


def test_responses_are_those_of_a_rollout(policy):
    found = policy.generate(PROMPTS, samples=2, slots=2, **SAMPLED)
    ids, end = policy.encode(PROMPTS), chat.end_token(policy.tokenizer)
    width = max(map(len, ids))
    tokens = encoding.pad(ids, width, left=True)
    settings = SamplingSettings(
        model=policy.architecture,
        samples_per_prompt=2,
        response_length=10,
        temperature=1.3,
        top_p=0.9,
        end_token=end,
    )
    prompts = Prompts(tokens=tokens, lengths=encoding.lengths_of(ids), index=np.arange(3))
    whole = jax.jit(rollout.generate, static_argnames="settings")
    alone = whole(policy.params, prompts, jax.random.key(3), settings)
    for response, row, count, cut in zip(
        found, alone.tokens, alone.lengths, alone.truncated, strict=True
    ):
        assert response.tokens == row[width:][:count].tolist() and response.truncated == cut
        assert response.text == chat.decode_response(policy.tokenizer, response.tokens)
    assert len({response.text for response in found}) == 6
    for number in (0, 1, 2):
        assert (
            told(policy.stream(PROMPTS[number], number=number, **SAMPLED))[1] == found[2 * number]
        )


def told(pieces):
    """(pieces, the response that the generator ends with)"""
    out = []
    while True:
        try:
            out.append(next(pieces))
        except StopIteration as stop:
            assert "".join(out) == stop.value.text and "" not in out
            return out, stop.value


def test_no_piece_ends_within_a_character(policy, monkeypatch):
    """Tokens of single bytes, as a model might say them: characters of two to four bytes, spaces, and a broken one."""
    texts = ["é 水  🙂 ok", "🙂🙂"]
    vocabulary = policy.tokenizer.get_vocab()
    letters = {i: chr(code) for i, code in byte_letters().items()}
    for text, cut in ((texts[0], 0), (texts[1], 2)):
        ids = [vocabulary[letters[byte]] for byte in text.encode()[: -cut or None]]
        ids += [] if cut else policy.end_tokens
        state = iter(range(1, len(ids) + 2))

        def run(program, *_, ids=ids, state=state, **__):
            if program is inference.BEGIN:
                return None
            count = min(next(state), len(ids))
            return None, StreamOutput(
                tokens=np.array([ids]),
                lengths=np.array([count]),
                live=np.array([count < len(ids)]),
            )

        monkeypatch.setattr(policy, "run", run)
        pieces, response = told(policy.stream("x", max_tokens=len(ids)))
        assert response.text == (text if not cut else "🙂\ufffd") and response.truncated == bool(
            cut
        )
        assert all("\ufffd" not in piece for piece in pieces[: None if not cut else -1])
        assert pieces == list(text) if not cut else ["🙂", "\ufffd"]


def byte_letters():
    """byte -> the code of the letter that stands for it in a byte-level vocabulary: itself if it can be seen."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {byte: byte for byte in seen} | {byte: 256 + i for i, byte in enumerate(hidden)}


def test_streams_of_any_length_share_few_programs(policy, monkeypatch):
    asked = set()

    def run(program, params, *, prompts, settings, **_):
        if program is inference.BEGIN:
            asked.add(("begin", prompts.tokens.shape, settings))
            return None
        asked.add(("proceed", prompts.tokens.shape, settings))
        return None, StreamOutput(
            tokens=np.array([policy.end_tokens]), lengths=np.array([1]), live=np.array([False])
        )

    monkeypatch.setattr(policy, "run", run)
    for n in range(1, 34):
        told(policy.stream(" ".join(["cat"] * n)))
    widths = {12, 16, 24, 32, 48}
    settings = policy.sampling_settings(1.0, 0.9, None)
    assert settings.response_length == 16
    assert asked == {
        (program, (1, width), settings) for program in ("begin", "proceed") for width in widths
    }


def test_what_ppo_sampled_and_its_scores_come_again(chain, reward):
    """Of step 0: the responses of its policy, which was the SFT run, and their scores by the reward model, to rounding."""
    policy = inference.load(chain[0] / "sft-tiny")
    prompts = [row["prompt"][0]["content"] for row in toy.examples("prompts", "train", 0, 64)]
    first = [row for row in rows(chain[0] / "ppo-tiny" / "samples.jsonl") if row["step"] == 0]
    first = [row for row in first if prompts.count(row["prompt"]) == 1]
    asked, numbers = (
        [row["prompt"] for row in first],
        [prompts.index(row["prompt"]) for row in first],
    )
    settings = policy.sampling_settings(1.0, 0.9, 14, samples=2)
    found = policy.generate_tokens(
        policy.encode(asked),
        numbers,
        len(asked),
        key=jax.random.fold_in(jax.random.key(0), 0),
        settings=dataclasses.replace(settings, slots=8),
        stops=policy.end_stops(),
    )
    said, scores = ([x for row in first for x in row[name]] for name in ("responses", "score"))
    assert [policy.make_response(ids).text for ids in found] == said and len(said) >= 6
    twice = [prompt for prompt in asked for _ in "ab"]
    np.testing.assert_allclose(
        reward.score(twice, [ids.tolist() for ids in found]), scores, atol=2e-5
    )
    assert reward.score(twice, said) == reward.score(
        twice, chat.encode_responses(reward.tokenizer, said)
    )
    assert len(set(reward.score(["a"] * 3, ["cat", "box", "cat"]))) == 2


def test_greedily_any_mesh_and_a_hugging_face_checkpoint_say_the_same(chain, policy, tmp_path):
    found = policy.generate(PROMPTS, **GREEDY)
    for number in (0, 1, 2):
        assert told(policy.stream(PROMPTS[number], **GREEDY))[1] == found[number]
    other = inference.load(chain[0] / "ppo-tiny", mesh=sharding.make_mesh(Mesh(tensor=2)))
    assert (
        other.generate(PROMPTS, **GREEDY) == found
        and told(other.stream(PROMPTS[1], **GREEDY))[1] == found[1]
    )
    convert.export(chain[0] / "ppo-tiny", tmp_path / "hf", None, "float32")
    other = inference.load(tmp_path / "hf", mesh=policy.mesh)
    assert other.generate(PROMPTS, **GREEDY) == found


def test_a_reward_model_in_half_precision_and_of_a_hugging_face_checkpoint(chain, reward, tmp_path):
    asked = PROMPTS, ["cat", "bob hat", "three"]
    half = inference.load(chain[0] / "rm-tiny", dtype="bfloat16")
    assert half.score(*asked) != reward.score(*asked)
    np.testing.assert_allclose(half.score(*asked), reward.score(*asked), atol=0.05)
    convert.export(chain[0] / "rm-tiny", tmp_path / "hf", None, "float32")
    assert inference.load(tmp_path / "hf").score(*asked) == reward.score(*asked)


def test_a_model_of_plain_text_goes_on_with_it(chain):
    model = inference.load(chain[0] / "lm-tiny")
    assert not model.uses_chat_template and model.encode(["cat box"]) == [
        model.tokenizer("cat box")["input_ids"]
    ]
    assert model.end_tokens == [model.tokenizer.eos_token_id, model.tokenizer.pad_token_id]
    with pytest.raises(UserError, match="messages need a chat template"):
        model.generate(PROMPTS)


@pytest.mark.parametrize(
    "ask, message",
    [
        (
            lambda policy, _: policy.score(["a"], ["b"]),
            "score: this needs a reward model, .* but this is a language model",
        ),
        (
            lambda _, reward: reward.generate(["a"]),
            "generate: this needs a language model, but this is a reward model",
        ),
        (lambda _, reward: list(reward.stream("a")), "generate: this needs a language model"),
        (
            lambda policy, _: policy.generate("copy : cat"),
            "prompts must be a list, not the text 'copy : cat'",
        ),
        (
            lambda policy, _: policy.generate(["a", "cat " * 60]),
            "prompt 1 has 6. tokens and its response may have 16: .* max_length=64",
        ),
        (lambda policy, _: policy.generate(["a"], top_p=0.0), r"top_p=0.0 in \(0, 1\]"),
        (
            lambda policy, _: policy.generate(["a"], samples=0),
            "samples=0, slots=64: both must be at least 1",
        ),
        (lambda _, reward: reward.score(["a"], ["b", "c"]), "score: 1 prompts for 2 responses"),
        (
            lambda _, reward: reward.score(["a"], ["cat " * 60]),
            "score: prompt and response have 7. tokens, over the model's max_length=64",
        ),
    ],
)
def test_what_cannot_be_asked_is_said(policy, reward, ask, message):
    with pytest.raises(UserError, match=message):
        ask(policy, reward)


def test_what_cannot_be_loaded_is_said(chain, tmp_path):
    with pytest.raises(UserError, match="nowhere: no config.json there"):
        inference.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="dtype='float16' must be one of"):
        inference.load(chain[0] / "lm-tiny", dtype="float16")
    shutil.copytree(chain[0] / "sft-tiny", tmp_path / "sft")
    (tmp_path / "sft" / "summary.json").unlink()
    with pytest.raises(UserError, match="sft: this run is not complete"):
        inference.load(tmp_path / "sft")
    assert inference.load(tmp_path / "sft", unfinished=True).end_tokens
    convert.export(chain[0] / "sft-tiny", tmp_path / "hf", None, "float32")
    stored = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(
        json.dumps(stored | {"architectures": ["Qwen2ForSequenceClassification"]})
    )
    with pytest.raises(UserError, match="hf: this sequence classifier has no score.weight"):
        inference.load(tmp_path / "hf")
