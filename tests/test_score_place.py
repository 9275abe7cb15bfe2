"""A reward model is read where it was trained to be read, ours by transformers as well."""

import dataclasses
import functools
import json
import re
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_ppo import MESH, RESPONSE_LENGTH, World, make
from transformers import AutoTokenizer

from alignjax import chat as chat_command
from alignjax import convert, evaluate, inference
from alignjax.algorithms import experience
from alignjax.algorithms.experience import Minibatches
from alignjax.algorithms.rewards import TextRewardModel
from alignjax.data import chat
from alignjax.models import scoring
from alignjax.weights.score_place import ending_of, notice_of_change

PROMPTS = ["copy : cat box", "join : red van"]
REPLIES = ["cat box", "\n red"]


@pytest.fixture(scope="module")
def export(chain, tmp_path_factory):
    """The reward model of the chain, exported."""
    directory = tmp_path_factory.mktemp("hf") / "reward"
    convert.export(chain.runs / "rm-tiny", directory, None, "float32")
    return directory


def foreign(export, directory, **fields):
    """Copy an export as another trainer would have saved it, with fields of config.json."""
    shutil.copytree(export, directory)
    config = json.loads((directory / "config.json").read_text())
    del config["alignjax_score_at"]
    (directory / "config.json").write_text(json.dumps(config | fields))
    tensors = load_file(directory / "model.safetensors")
    del tensors["score.bias"]
    save_file(tensors, directory / "model.safetensors")
    return directory


def lines_of_card(directory, kept):
    """Return the lines of Python in an export's README.md that contain any of some texts."""
    (code,) = re.findall(r"```python\n(.*?)```", (directory / "README.md").read_text(), re.DOTALL)
    return "\n".join(line for line in code.splitlines() if any(text in line for text in kept))


def messages_of(prompt, reply):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]


def test_ours_is_read_at_the_end_token_and_others_behind_the_template(chain, export, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(str(export))
    end = chat.end_token(tokenizer)
    (newline,) = chat.closing_tokens(tokenizer)
    assert ending_of(chain.runs / "rm-tiny", tokenizer) == ending_of(export, tokenizer) == (end,)
    assert ending_of(foreign(export, tmp_path / "other"), tokenizer) == (end, newline)
    notice = notice_of_change(tmp_path / "other", tokenizer)  # of a ranking run that begins there
    assert (
        "were read behind '<|im_end|>\\n'; this run reads and trains them at '<|im_end|>'" in notice
    )
    assert notice_of_change(export, tokenizer) == ""
    old = tmp_path / "old"  # an export from before the field was written
    shutil.copytree(export, old)
    config = json.loads((old / "config.json").read_text())
    del config["alignjax_score_at"]
    (old / "config.json").write_text(json.dumps(config))
    assert ending_of(old, tokenizer) == (end,)


@pytest.mark.parametrize(
    "pad, ending",
    [(None, "end newline"), (0, "end newline"), ("newline", "end"), (["newline", "end"], "")],
)
def test_transformers_does_not_read_pads_so_neither_do_we(export, tmp_path, pad, ending):
    tokenizer = AutoTokenizer.from_pretrained(str(export))
    ids = {"end": chat.end_token(tokenizer), "newline": chat.closing_tokens(tokenizer)[0]}
    value = [ids[name] for name in pad] if isinstance(pad, list) else ids.get(pad, pad)
    directory = foreign(export, tmp_path / "other", pad_token_id=value)
    assert ending_of(directory, tokenizer) == tuple(ids[name] for name in ending.split())


def test_text_and_tokens_of_a_reply_score_at_its_place(export, tmp_path):
    """At the last token of the rendered conversation; whichever end token a policy sampled."""
    model = inference.load(foreign(export, tmp_path / "other"))
    tokenizer = model.tokenizer
    expected = []
    responses = []
    for prompt, reply in zip(PROMPTS, REPLIES, strict=True):
        messages = messages_of(prompt, reply)
        (prompt_tokens,) = chat.encode_prompts(tokenizer, [messages[:1]])
        (response,) = chat.encode_responses(tokenizer, [messages[:1]], [reply])
        responses.append(response)
        whole = prompt_tokens + response + chat.closing_tokens(tokenizer)
        expected.append(score_alone(model, whole))
    whole = tokenizer.apply_chat_template(messages_of(PROMPTS[0], REPLIES[0]), return_dict=False)
    assert score_alone(model, whole) == expected[0]
    np.testing.assert_allclose(model.score(PROMPTS, REPLIES), expected, atol=2e-5)
    np.testing.assert_allclose(model.score(PROMPTS, responses), expected, atol=2e-5)
    tokenizer.eos_token = chat.PAD
    others = [[*response[:-1], tokenizer.eos_token_id] for response in responses]
    np.testing.assert_allclose(model.score(PROMPTS, others), expected, atol=2e-5)
    ours = inference.load(export)
    assert np.abs(np.array(ours.score(PROMPTS, REPLIES)) - expected).max() > 1e-3
    assert ours.score(PROMPTS, others) != ours.score(PROMPTS, responses)  # it has another eos


@functools.cache
def compiled_score_alone(architecture):
    return jax.jit(functools.partial(scoring.score_alone, architecture))


def score_alone(model, tokens):
    """Score a sequence at its last token, in a row of its own."""
    row = np.zeros((1, 48), np.int32)
    row[0, : len(tokens)] = tokens
    score = compiled_score_alone(model.architecture)
    return float(score(model.params, row, np.array([len(tokens)]))[0])


def test_chat_scores_what_a_reply_says_whichever_end_it_has(export):
    tokenizer = AutoTokenizer.from_pretrained(str(export))
    end = chat.end_token(tokenizer)
    scored = []

    def score(prompts, responses):
        scored.extend(responses)
        return [0.5]

    model = types.SimpleNamespace(tokenizer=tokenizer, uses_chat_template=True)
    reward = types.SimpleNamespace(tokenizer=tokenizer, score=score)
    for tokens, is_truncated in (([7, 9], False), ([7, end], False), ([7, 9], True)):
        reply = inference.Response(text="a", tokens=tokens, truncated=is_truncated)
        description = chat_command.describe_score(model, reward, messages_of("a", "")[:1], reply)
        assert description == "score 0.50"
    assert scored == [[7, end], [7, end], [7, 9]]


def test_a_reward_model_with_another_tokenizer_reads_its_own_ending():
    read = []

    def score(packed, ends):
        read.append(np.asarray(packed.tokens).reshape(-1)[: int(ends[0]) + 1].tolist())
        return jnp.zeros(1)

    tokenizer = types.SimpleNamespace()
    model = TextRewardModel(
        score=score,
        tokenizer=tokenizer,
        ending=(8, 9),
        max_tokens=16,
        microbatch_tokens=16,
        mesh=MESH,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "encode_prompts", lambda tokenizer, messages: [[5, 6]])
        patch.setattr(chat, "encode_responses", lambda tokenizer, messages, texts: [[7, 2]])
        model([{"prompt": messages_of("a", "")[:1]}], ["b"])
    assert read == [[5, 6, 7, 8, 9]]


@pytest.fixture(scope="module")
def world():
    return World(make(budget=64))


@pytest.mark.parametrize("ending", [(3, 9), (9,), ()])
def test_in_ppo_the_reward_model_reads_its_own_ending_and_no_other_role_does(world, ending):
    """Packed with others it scores as alone; what the other roles read is as without it."""
    rollout = world.rollout
    lengths = np.asarray(rollout.lengths)
    (usual_reader,) = world.stage.readers
    reader = dataclasses.replace(usual_reader, ending=ending)
    behind = experience.tokens_behind((reader,))
    minibatches = Minibatches(world.config, MESH, world.prompt_lengths, lengths, behind)
    read = jax.jit(functools.partial(experience.read_roles, world.config, (reader,)))
    reading = experience.empty_reading(rollout, {}, ["reward"], MESH)
    for microbatch in sum(minibatches.first_epoch, []):
        reading = read(world.params, rollout, reading, microbatch)
    usual = world.scored.experience
    mask = np.asarray(rollout.mask)
    for new, old in ((reading.logprobs, usual.old_logprobs), (reading.values, usual.old_values)):
        np.testing.assert_allclose(np.asarray(new)[mask], np.asarray(old)[mask], atol=2e-5)
    alone = []
    for tokens, length, is_truncated in zip(
        rollout.tokens, lengths, rollout.truncated, strict=True
    ):
        width = len(tokens) - RESPONSE_LENGTH
        prompt = np.asarray(tokens[:width])[width - world.prompt_lengths[len(alone)] :]
        response = np.asarray(tokens[width:][:length])
        rest = ending[1:] if is_truncated else ending
        content = response if is_truncated and ending else response[:-1]
        alone.append([*prompt, *content, *rest])
    model = types.SimpleNamespace(architecture=world.config.model, params=world.params["reward"])
    expected = [score_alone(model, tokens) for tokens in alone]
    np.testing.assert_allclose(reading.scores["reward"], expected, atol=2e-5)
    assert not np.asarray(rollout.truncated).all() and len(minibatches.first_epoch[0]) > 1


def test_the_lines_in_the_model_card_give_our_tokens(export):
    """Those that make tokens need no torch."""
    tokenizer = AutoTokenizer.from_pretrained(str(export))
    code = lines_of_card(export, ("end =", "chat =", "prompt =", "parts =", "ids ="))
    for prompt, reply in zip(PROMPTS, REPLIES, strict=True):
        messages = messages_of(prompt, reply)
        names = {"tokenizer": tokenizer, "messages": messages}
        exec(code, names)
        row = {"prompt": messages[:1], "chosen": reply, "rejected": reply}
        assert names["ids"] == chat.encode_comparisons(tokenizer, [row])[0].chosen


def test_the_lines_in_the_model_card_give_our_scores(export, monkeypatch):
    """Live, with torch: at the end token, with the shift that transformers does not read."""
    pytest.importorskip("torch")
    monkeypatch.chdir(export)
    code = lines_of_card(export, ("",)).replace("messages = [", "unused = [")
    ours = inference.load(export).score(PROMPTS, REPLIES)
    theirs = []
    for prompt, reply in zip(PROMPTS, REPLIES, strict=True):
        names = {"messages": messages_of(prompt, reply)}
        exec(code, names)
        theirs.append(names["score"])
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_cards_say_what_an_export_is(chain, tmp_path):
    for role, phrase in (("policy", "AutoModelForCausalLM"), ("value", "the expected return")):
        convert.export(chain.runs / "ppo-tiny", tmp_path / role, role, "bfloat16")
        card = (tmp_path / role / "README.md").read_text()
        assert phrase in card
        assert f"`{role}` of the run `ppo-tiny` (stage `ppo`) after step 4, in bfloat16" in card
    convert.export(chain.runs / "lm-tiny", tmp_path / "lm", None, "float32")
    card = (tmp_path / "lm" / "README.md").read_text()
    assert 'text = "..."' in card and "apply_chat_template" not in card


def test_table_4_takes_reward_models_of_hugging_face(chain, export, tmp_path, monkeypatch, capsys):
    """Its directory is not ours, so the results go to the working directory."""
    monkeypatch.chdir(tmp_path)
    other = foreign(export, tmp_path / "other")
    before = sorted(path.name for path in (*export.iterdir(), *other.iterdir()))
    arguments = ["--sets", "toy/comparisons-clean", "--examples", "8"]
    assert evaluate.main(["--run", str(export), *arguments]) == 0
    assert sorted(path.name for path in (*export.iterdir(), *other.iterdir())) == before
    figures = json.loads((tmp_path / "reward.evaluation.json").read_text())["figures"]
    assert (tmp_path / "reward.calibration.png").exists()
    runs = [str(export), str(chain.runs / "rm-tiny"), str(other)]
    assert evaluate.main(["--run", *runs, *arguments, "--out", "all.json"]) == 0
    everything = json.loads((tmp_path / "all.json").read_text())["figures"]
    losses = [everything[run]["toy/comparisons-clean"]["loss"] for run in runs]
    assert losses[0] == losses[1] != losses[2]
    assert figures[str(export)] == everything[str(export)]
    capsys.readouterr()
    language_model = tmp_path / "lm"
    convert.export(chain.runs / "sft-tiny", language_model, None, "float32")
    assert evaluate.main(["--run", str(language_model), *arguments]) == 2
    assert "this is a language model" in capsys.readouterr().err
