"""Loaded models generate, stream and score as in training, and report what they cannot do."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from runs import rows
from test_models import LONGROPE, tiny

from alignjax import convert, inference
from alignjax.config import Mesh, UserError
from alignjax.data import chat, encoding, toy
from alignjax.machine import sharding
from alignjax.sampling import rollout
from alignjax.sampling.types import Prompts, SamplingSettings, StreamOutput
from alignjax.weights import hf

PROMPTS = [
    "copy : cat box",
    "find : bob hat . amy red . bob",
    [{"role": "user", "content": "count : cat box sun"}],
]
SAMPLED = {"temperature": 1.3, "top_p": 0.9, "seed": 3, "max_tokens": 10}
GREEDY = {"temperature": 0.0, "max_tokens": 10}


@pytest.fixture(scope="module")
def policy(chain):
    one_device = sharding.make_mesh(Mesh(), jax.devices()[:1])
    return inference.load(chain.runs / "ppo-tiny", mesh=one_device)


@pytest.fixture(scope="module")
def reward(chain):
    return inference.load(chain.runs / "rm-tiny")


def consume(stream):
    """Return the pieces of a stream, and the response that it ends with."""
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as stop:
            response = stop.value
            assert "".join(pieces) == response.text and "" not in pieces
            return pieces, response


def streamed_response(model, prompt, **settings):
    _, response = consume(model.stream(prompt, **settings))
    return response


def test_responses_are_those_of_a_rollout(policy):
    responses = policy.generate(PROMPTS, samples=2, slots=2, **SAMPLED)
    encoded = policy.encode(PROMPTS)
    width = max(map(len, encoded))
    prompts = Prompts(
        tokens=encoding.pad(encoded, width, left=True),
        lengths=encoding.lengths_of(encoded),
        index=np.arange(3),
    )
    settings = SamplingSettings(
        model=policy.architecture,
        samples_per_prompt=2,
        response_length=10,
        temperature=1.3,
        top_p=0.9,
        end_tokens=(chat.end_token(policy.tokenizer),),
    )
    generate = jax.jit(rollout.generate, static_argnames="settings")
    sampled = generate(policy.params, prompts, jax.random.key(3), settings)
    for row, response in enumerate(responses):
        length = sampled.lengths[row]
        tokens = sampled.tokens[row, width:][:length]
        assert response.tokens == tokens.tolist()
        assert response.truncated == sampled.truncated[row]
        assert response.text == chat.decode_response(policy.tokenizer, response.tokens)
    assert len(responses) == len(sampled.tokens)
    assert len({response.text for response in responses}) == 6
    for number, prompt in enumerate(PROMPTS):
        streamed = streamed_response(policy, prompt, number=number, **SAMPLED)
        assert streamed == responses[2 * number]


def test_no_piece_ends_within_a_character(policy, monkeypatch):
    """Stream tokens of single bytes: characters of two to four bytes, spaces, a broken one."""
    texts = ["é 水  🙂 ok", "🙂🙂"]
    vocabulary = policy.tokenizer.get_vocab()
    letters = {byte: chr(code) for byte, code in byte_letters().items()}
    for text, missing_bytes in ((texts[0], 0), (texts[1], 2)):
        tokens = [vocabulary[letters[byte]] for byte in text.encode()[: -missing_bytes or None]]
        if not missing_bytes:
            tokens += policy.ends
        lengths = iter(range(1, len(tokens) + 2))

        def run(program, *_, tokens=tokens, lengths=lengths, **__):
            if program is inference.BEGIN:
                return None
            length = min(next(lengths), len(tokens))
            output = StreamOutput(
                tokens=np.array([tokens]),
                lengths=np.array([length]),
                live=np.array([length < len(tokens)]),
                logprobs=np.zeros((1, len(tokens)), np.float32),
            )
            return None, output

        monkeypatch.setattr(policy, "run", run)
        pieces, response = consume(policy.stream("x", max_tokens=len(tokens)))
        if missing_bytes:
            assert response.text == "🙂\ufffd" and response.truncated
            assert pieces == ["🙂", "\ufffd"]
        else:
            assert response.text == text and not response.truncated
            assert all("\ufffd" not in piece for piece in pieces)
            assert pieces == list(text)


def byte_letters():
    """Return the code of the letter that stands for each byte in a byte-level vocabulary.

    A byte that is a visible character stands for itself.
    """
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    codes = {byte: byte for byte in visible}
    return codes | {byte: 256 + place for place, byte in enumerate(hidden)}


def test_streams_of_any_length_share_few_programs(policy, monkeypatch):
    programs = set()

    def run(program, params, *, prompts, settings, **_):
        if program is inference.BEGIN:
            programs.add(("begin", prompts.tokens.shape, settings))
            return None
        programs.add(("proceed", prompts.tokens.shape, settings))
        output = StreamOutput(
            tokens=np.array([policy.ends]),
            lengths=np.array([1]),
            live=np.array([False]),
            logprobs=np.zeros((1, 1), np.float32),
        )
        return None, output

    monkeypatch.setattr(policy, "run", run)
    for num_words in range(1, 34):
        consume(policy.stream(" ".join(["cat"] * num_words)))
    settings = policy.sampling_settings(1.0, 0.9, None)
    assert settings.response_length == 16
    assert programs == {
        (name, (1, width), settings)
        for name in ("begin", "proceed")
        for width in (12, 16, 24, 32, 48)
    }


def test_what_ppo_sampled_and_its_scores_are_reproduced(chain, reward):
    """In step 0, the SFT run gives the same responses, and the reward model the same scores."""
    policy = inference.load(chain.runs / "sft-tiny")
    prompts = [row["prompt"][0]["content"] for row in toy.examples("prompts", "train", 0, 64)]
    samples = rows(chain.runs / "ppo-tiny" / "samples.jsonl")
    first = [row for row in samples if row["step"] == 0 and prompts.count(row["prompt"]) == 1]
    sampled_prompts = [row["prompt"] for row in first]
    texts = [text for row in first for text in row["responses"]]
    scores = [score for row in first for score in row["score"]]
    settings = policy.sampling_settings(1.0, 0.9, 14, samples=2)
    responses = policy.generate_tokens(
        policy.encode(sampled_prompts),
        [prompts.index(prompt) for prompt in sampled_prompts],
        len(sampled_prompts),
        key=jax.random.fold_in(jax.random.key(0), 0),
        settings=dataclasses.replace(settings, slots=8),
    )
    assert [policy.make_response(tokens).text for tokens in responses] == texts
    assert len(texts) >= 6
    prompt_of_each = [prompt for prompt in sampled_prompts for _ in range(2)]
    scored = reward.score(prompt_of_each, [tokens.tolist() for tokens in responses])
    np.testing.assert_allclose(scored, scores, atol=2e-5)
    messages = [[{"role": "user", "content": prompt}] for prompt in prompt_of_each]
    encoded_texts = chat.encode_responses(reward.tokenizer, messages, texts)
    assert reward.score(prompt_of_each, texts) == reward.score(prompt_of_each, encoded_texts)
    assert len(set(reward.score(["a"] * 3, ["cat", "box", "cat"]))) == 2


def test_greedy_responses_are_the_same_on_any_mesh_and_from_hugging_face(chain, policy, tmp_path):
    responses = policy.generate(PROMPTS, **GREEDY)
    for number, prompt in enumerate(PROMPTS):
        assert streamed_response(policy, prompt, **GREEDY) == responses[number]
    other = inference.load(chain.runs / "ppo-tiny", mesh=sharding.make_mesh(Mesh(tensor=2)))
    assert other.generate(PROMPTS, **GREEDY) == responses
    assert streamed_response(other, PROMPTS[1], **GREEDY) == responses[1]
    convert.export(chain.runs / "ppo-tiny", tmp_path / "hf", None, "float32")
    other = inference.load(tmp_path / "hf", mesh=policy.mesh)
    assert other.generate(PROMPTS, **GREEDY) == responses


def test_a_reward_model_in_half_precision_and_from_hugging_face(chain, reward, tmp_path):
    pairs = (PROMPTS, ["cat", "bob hat", "three"])
    half = inference.load(chain.runs / "rm-tiny", dtype="bfloat16")
    assert half.score(*pairs) != reward.score(*pairs)
    np.testing.assert_allclose(half.score(*pairs), reward.score(*pairs), atol=0.05)
    convert.export(chain.runs / "rm-tiny", tmp_path / "hf", None, "float32")
    assert inference.load(tmp_path / "hf").score(*pairs) == reward.score(*pairs)


def test_a_model_of_plain_text_continues_it(chain):
    model = inference.load(chain.runs / "lm-tiny")
    assert not model.uses_chat_template
    assert model.encode(["cat box"]) == [model.tokenizer("cat box")["input_ids"]]
    assert model.ends == (model.tokenizer.eos_token_id, model.tokenizer.pad_token_id)
    with pytest.raises(UserError, match="messages need a chat template"):
        model.generate(PROMPTS)


USER_ERRORS = {
    "a policy has no score": (
        lambda policy, _: policy.score(["a"], ["b"]),
        "score: this needs a reward model, .* but this is a language model",
    ),
    "a reward model does not generate": (
        lambda _, reward: reward.generate(["a"]),
        "generate: this needs a language model, but this is a reward model",
    ),
    "a reward model does not stream": (
        lambda _, reward: list(reward.stream("a")),
        "generate: this needs a language model",
    ),
    "prompts are a list": (
        lambda policy, _: policy.generate("copy : cat"),
        "prompts must be a list, not the text 'copy : cat'",
    ),
    "a prompt is too long": (
        lambda policy, _: policy.generate(["a", "cat " * 60]),
        "prompt 1 has 6. tokens and its response may have 16: .* max_length=64",
    ),
    "top_p is 0": (
        lambda policy, _: policy.generate(["a"], top_p=0.0),
        r"top_p=0.0 in \(0, 1\]",
    ),
    "no samples": (
        lambda policy, _: policy.generate(["a"], samples=0),
        "samples=0, slots=64: both must be at least 1",
    ),
    "fewer prompts than responses": (
        lambda _, reward: reward.score(["a"], ["b", "c"]),
        "score: 1 prompts for 2 responses",
    ),
    "a response is too long": (
        lambda _, reward: reward.score(["a"], ["cat " * 60]),
        "score: prompt and response have 7. tokens, over the model's max_length=64",
    ),
}


@pytest.mark.parametrize("case", USER_ERRORS)
def test_calls_that_cannot_be_answered_are_user_errors(policy, reward, case):
    call, message = USER_ERRORS[case]
    with pytest.raises(UserError, match=message):
        call(policy, reward)


def test_what_cannot_be_loaded_is_a_user_error(chain, tmp_path):
    with pytest.raises(UserError, match="nowhere: no config.json there"):
        inference.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="dtype='float16' must be one of"):
        inference.load(chain.runs / "lm-tiny", dtype="float16")
    shutil.copytree(chain.runs / "sft-tiny", tmp_path / "sft")
    (tmp_path / "sft" / "summary.json").unlink()
    with pytest.raises(UserError, match="sft: this run is not complete"):
        inference.load(tmp_path / "sft")
    assert inference.load(tmp_path / "sft", unfinished=True).ends
    convert.export(chain.runs / "sft-tiny", tmp_path / "hf", None, "float32")
    config_file = tmp_path / "hf" / "config.json"
    stored = json.loads(config_file.read_text())
    stored["architectures"] = ["Qwen2ForSequenceClassification"]
    config_file.write_text(json.dumps(stored))
    with pytest.raises(UserError, match="hf: a reward model is wanted, but"):
        inference.load(tmp_path / "hf")


def test_a_model_whose_rope_depends_on_the_length_is_loaded_to_sample_below_it(tmp_path):
    """Its 64 tokens can be had all the same, but not one by one."""
    scaling = {"rope_scaling": "longrope", "rope_factor": 4.0, "rope_original_length": 16}
    sizes = {"vocab_size": 512, "max_length": 64}
    model, params = tiny(family="llama", qkv_bias=False, **sizes, **scaling, **LONGROPE)
    hf.save_hf(model, params, tmp_path)
    chat.train_tokenizer(["some words to learn from"], tmp_path, 300)
    assert inference.load(tmp_path).max_length == 16
    longer = inference.load(tmp_path, max_length=64)
    with pytest.raises(UserError, match="max_length=64: .* set max_length to at most 16"):
        longer.generate(["some words"], max_tokens=4)
