"""DPO: its losses, how it packs and reads responses, and its runs."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import STEPS, command, cut, fails, files_of, rows, with_parents
from test_models import tiny

from alignjax import config as configs
from alignjax import convert, inference, train
from alignjax.algorithms import dpo_programs, greedy, losses
from alignjax.algorithms.comparisons import interleave
from alignjax.algorithms.dpo import DirectPreference
from alignjax.algorithms.responding import make_responder
from alignjax.algorithms.stage import RunInputs
from alignjax.config import DPO, UserError
from alignjax.data import chat, encoding, toy
from alignjax.machine import sharding
from alignjax.machine.profile import Phases
from alignjax.models import scoring
from alignjax.weights import checkpoint, roles

MODEL, PARAMS = tiny(vocab_size=96)
# Two pairs: log p of each token of the chosen and the rejected response, by policy and reference.
TOKENS = {
    "policy": [[[-1.0, -2.0, -0.5], [-1.5, -1.0]], [[-0.7, -1.3], [-2.5, -0.2, -0.9, -0.4]]],
    "reference": [[[-1.2, -2.1, -0.9], [-1.1, -1.2]], [[-0.6, -1.0], [-2.0, -0.3, -1.0, -0.1]]],
}
LENGTHS = jnp.array([[3.0, 2.0], [2.0, 4.0]])
HALVES = jnp.array([0.5, 0.5])


def summed(side: str) -> jax.Array:
    return jnp.array([[sum(response) for response in pair] for pair in TOKENS[side]])


LOG_RATIOS = summed("policy") - summed("reference")  # 0.7, -0.2; -0.4, -0.6


def comparisons(longest: int = 9, count: int = 6) -> dict[str, np.ndarray]:
    """Return comparisons of random tokens, whose responses have one token at least."""
    rng = np.random.default_rng(5)
    prompt_lengths = rng.integers(1, 4, count)
    pairs = {
        "margin": np.zeros(count, np.float32),
        "prompt_length": prompt_lengths.astype(np.int32),
    }
    for side in ("chosen", "rejected"):
        pairs[side] = rng.integers(1, 96, (count, longest)).astype(np.int32)
        lengths = prompt_lengths + rng.integers(1, longest - 3, count)
        pairs[f"{side}_length"] = lengths.astype(np.int32)
    return pairs


@jax.jit
def next_token_logprobs(tokens):
    """Return log p of each token of one sequence that nothing precedes or follows in its row."""
    places = jnp.arange(len(tokens))[None]
    packed = scoring.PackedTokens(
        tokens=tokens[None], positions=places, segments=jnp.ones_like(places)
    )
    return scoring.token_logprobs(MODEL, PARAMS, packed, places)[0][0]


def logprobs_by_hand(pairs: dict[str, np.ndarray]) -> np.ndarray:
    """Return log p of each response, [pairs 2]: no packing, a sum over its tokens."""
    result = np.zeros((len(pairs["margin"]), 2))
    for number, prompt_length in enumerate(pairs["prompt_length"]):
        for place, side in enumerate(("chosen", "rejected")):
            length = pairs[f"{side}_length"][number]
            tokens = next_token_logprobs(pairs[side][number])  # later tokens change nothing
            result[number, place] = tokens[prompt_length:length].sum()
    return result


@pytest.mark.parametrize(
    "dpo, expected",
    [
        # TRL 1.9.2, DPOTrainer._compute_loss on logits with these log-probabilities; it has no
        # label smoothing of this loss.
        (DPO(beta=0.1), 0.6661782264709473),
        (DPO(beta=0.5), 0.5688228011131287),
        (DPO(beta=0.1, loss="ipo"), 23.640140533447266),
        # By hand: log sigmoid(d) - log sigmoid(-d) = d, so smoothing by e adds e times mean d.
        (DPO(beta=0.5, label_smoothing=0.1), 0.5688228011131287 + 0.1 * 0.5 * (0.9 + 0.2) / 2),
    ],
)
def test_the_losses_are_those_of_trl(dpo, expected):
    loss = jnp.sum(HALVES * dpo_programs.pair_losses(dpo, LOG_RATIOS, LENGTHS))
    assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_the_metrics_are_those_of_trl():
    """TRL 1.9.2 gave these figures for the same pairs with beta=0.1."""
    metrics = losses.implicit_reward_metrics(summed("policy"), LOG_RATIOS, HALVES, 0.1)
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        {
            "rewards/chosen": 0.01499999314546585,
            "rewards/rejected": -0.03999999910593033,
            "rewards/accuracies": 1.0,
            "rewards/margins": 0.05499999225139618,
            "logps/chosen": -2.75,
            "logps/rejected": -3.25,
        },
        rel=1e-5,
    )


def test_sigmoid_is_the_ranking_loss_of_the_implicit_rewards():
    rewards = 0.1 * LOG_RATIOS
    expected, _ = losses.ranking_loss(rewards[:, 0], rewards[:, 1], HALVES)
    loss = jnp.sum(HALVES * losses.sigmoid_losses(LOG_RATIOS, 0.1, 0.0))
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    swapped = jnp.sum(HALVES * losses.sigmoid_losses(LOG_RATIOS[:, ::-1], 0.1, 0.4))
    assert float(swapped) == pytest.approx(
        float(jnp.sum(HALVES * losses.sigmoid_losses(LOG_RATIOS, 0.1, 0.6))), rel=1e-6
    )


@pytest.mark.parametrize("budget", [1, 1000])
def test_packed_responses_have_the_log_probability_that_they_have_alone(budget):
    """The prompt's tokens do not count, the end token does; each pair comes once."""
    pairs = comparisons()
    expected = logprobs_by_hand(pairs)
    read = jax.jit(functools.partial(dpo_programs.response_logprobs, MODEL))
    microbatches = dpo_programs.pack_minibatch(pairs, budget, 1)
    seen = []
    for microbatch in microbatches:
        here = microbatch.pair < 6
        pair = microbatch.pair[here]
        seen += pair.tolist()
        logprobs = np.asarray(read(PARAMS, microbatch))
        np.testing.assert_allclose(logprobs[here], expected[pair], atol=1e-5)
        assert not logprobs[~here].any()
        assert np.array_equal(microbatch.lengths[here], dpo_programs.response_lengths(pairs)[pair])
    assert sorted(seen) == list(range(6)) and (len(microbatches) > 1 or budget == 1000)
    totals = [
        sum(float(getattr(microbatch, name).sum()) for microbatch in microbatches)
        for name in ("weights", "token_weights")
    ]
    assert totals == pytest.approx([1, 1], abs=1e-6)


@pytest.mark.parametrize(
    "dpo", [DPO(beta=0.3, label_smoothing=0.1), DPO(beta=0.3, loss="ipo")], ids=["sigmoid", "ipo"]
)
def test_packed_pairs_have_the_loss_and_gradient_of_a_brute_force_twin(dpo):
    """The numbers pick the pairs' lines in a table of a larger data set."""
    pairs = comparisons()
    numbers = np.array([7, 2, 9, 0, 4, 5])
    table = np.random.default_rng(1).normal(-9, 1, (10, 2)).astype(np.float32)
    lengths = np.stack([pairs[f"{side}_length"] for side in ("chosen", "rejected")], axis=1)

    def twin(params):
        total = 0.0
        for pair in range(6):
            ratios = []
            for place, side in enumerate(("chosen", "rejected")):
                places = jnp.arange(9)[None]
                packed = scoring.PackedTokens(
                    tokens=pairs[side][None, pair], positions=places, segments=places * 0 + 1
                )
                tokens = scoring.token_logprobs(MODEL, params, packed, places)[0][0]
                first = pairs["prompt_length"][pair]
                logprob = tokens[first : lengths[pair, place]].sum()
                ratios.append(logprob - table[numbers[pair], place])
            if dpo.loss == "ipo":
                tokens_of = lengths[pair] - first
                difference = ratios[0] / tokens_of[0] - ratios[1] / tokens_of[1]
                total += (difference - 1 / 0.6) ** 2
            else:
                difference = 0.3 * (ratios[0] - ratios[1])
                total += 0.9 * jnp.log1p(jnp.exp(-difference))
                total += 0.1 * jnp.log1p(jnp.exp(difference))
        return total / 6

    expected, expected_gradient = jax.jit(jax.value_and_grad(twin))(PARAMS)
    loss_fn = functools.partial(dpo_programs.loss_fn, MODEL, dpo)
    differentiate = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    total = 0.0
    gradient = None
    for microbatch in dpo_programs.pack_minibatch(pairs, 18, 1, numbers=numbers):
        (loss, _), part = differentiate(PARAMS, (table, microbatch))
        total += float(loss)
        gradient = part if gradient is None else jax.tree.map(jnp.add, gradient, part)
    assert total == pytest.approx(float(expected), rel=1e-5)
    for leaf, wanted in zip(
        jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True
    ):
        np.testing.assert_allclose(leaf, wanted, atol=2e-5, rtol=1e-4)


def test_the_self_check_stops_at_a_reading_that_depends_on_neighbours():
    config = configs.Config(stage="dpo", model=MODEL, microbatch_tokens=1000)
    read = jax.jit(functools.partial(dpo_programs.response_logprobs, MODEL))
    mesh = sharding.make_mesh(configs.Mesh(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        dpo_programs.check_packing(config, read, PARAMS, comparisons(), mesh)
        with pytest.raises(UserError, match="self-check at step 0: .* response's log-probability"):
            dpo_programs.check_packing(
                config, lambda *given: read(*given) + 2, PARAMS, comparisons(), mesh
            )


# ------------------------------------------------------------------ runs


def restored_table(run: Path) -> dict[str, np.ndarray]:
    """Return what the last checkpoint of a run holds of the reference."""
    with checkpoint.ocp.PyTreeCheckpointer() as reader:
        return reader.restore(run / "checkpoints" / str(STEPS) / "reference")


def test_the_reference_is_read_once_and_kept(chain):
    """The table of the last checkpoint has what the SFT run says of each response alone."""
    table = restored_table(chain.runs / "dpo-tiny")
    assert (table["train"].shape, table["heldout"].shape) == ((64, 2), (128, 2))
    first = rows(chain.runs / "dpo-tiny" / "metrics.jsonl")[0]
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)

    sft = chain.runs / "sft-tiny"
    config = configs.load("dpo.py:tiny")
    mesh = sharding.make_mesh(config.mesh)
    inputs = RunInputs(
        parents={"policy": sft},
        tokenizer=chat.load_tokenizer(sft / "tokenizer"),
        say=lambda line: None,
        phases=Phases(),
    )
    with jax.set_mesh(mesh):
        data = DirectPreference.load(config, mesh, inputs).data
        params = roles.load(config.model, "lm", mesh, jax.random.key(0), sft)
        first_rows = {name: array[:8] for name, array in data.batches.rows.items()}
        alone = dpo_programs.logprobs_alone(
            config.model,
            params,
            *map(jnp.asarray, interleave(first_rows)),
            jnp.repeat(first_rows["prompt_length"], 2),
        )
    np.testing.assert_allclose(table["train"][:8], alone.reshape(8, 2), atol=1e-4)


def test_a_run_resumes_to_the_bit_and_reads_no_reference(chain, tmp_path, monkeypatch):
    whole = chain.runs / "dpo-tiny"
    runs = with_parents("dpo-tiny", chain.runs, tmp_path)
    cut(whole, runs / "dpo-tiny")
    monkeypatch.setattr(DirectPreference, "read_reference", None)  # its figures are kept
    assert train.main(command("dpo-tiny", runs)) == 0
    assert files_of(runs / "dpo-tiny") == files_of(whole)


def test_another_reference_is_told_from_the_policy(chain, tmp_path):
    """With the pretrained model as reference, the SFT policy does not begin at 0."""
    shutil.copytree(chain.runs / "sft-tiny", tmp_path / "sft-tiny")
    options = [f"--config.parents.reference={chain.runs / 'lm-tiny'}", "--config.steps=1"]
    assert train.main(command("dpo-tiny", tmp_path, *options)) == 0
    (row,) = rows(tmp_path / "dpo-tiny" / "metrics.jsonl")
    assert abs(row["rewards/chosen"]) > 1e-3


def test_reference_and_policy_answer_held_out_prompts(chain):
    """The reference is at no distance from itself, and the rows show what both said."""
    run = chain.runs / "dpo-tiny"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["kl/before"] == 0 and summary["kl/after"] != 0
    for name in ("true_score", "right_words", "true_score_greedy", "length", "entropy"):
        assert {f"{name}/before", f"{name}/after"} <= set(summary)
    answers = rows(run / "responses.jsonl")
    assert len(answers) == configs.PPO().eval_prompts
    for answer in answers:
        for side in ("before", "after"):
            assert len(answer[side]["responses"]) == len(answer[side]["true_score"]) == 2
    assert not any(any(answer["before"]["kl"]) for answer in answers)


def test_the_policy_can_be_exported_and_loaded(chain, tmp_path):
    run = chain.runs / "dpo-tiny"
    convert.export(run, tmp_path / "exported", None, "float32")
    assert "A language model, trained by DPO," in (tmp_path / "exported/README.md").read_text()
    own, exported = (inference.load(path) for path in (run, tmp_path / "exported"))
    jax.tree.map(np.testing.assert_array_equal, own.params, exported.params)


def test_greedy_answers_are_those_of_inference(chain, monkeypatch):
    """They are compared by the length of their texts: the tiny policy says nothing true."""
    monkeypatch.setattr(toy, "true_score", lambda prompt, answer: len(prompt + answer))
    sft = chain.runs / "sft-tiny"
    config = configs.load("dpo.py:tiny")
    config.data.batch = 4
    tokenizer = chat.load_tokenizer(sft / "tokenizer")
    prompts = toy.examples("prompts", "heldout", 0)[:6]
    arrays = encoding.encode(prompts, "prompts", config.data.max_length, tokenizer, print)
    model = inference.load(sft)
    responder = make_responder(config, model.mesh, model.params, model.ends)
    answers = greedy.GreedyAnswers(config, responder, tokenizer)
    texts = [row["prompt"][-1]["content"] for row in prompts]
    responses = model.generate(texts, temperature=0.0, max_tokens=config.ppo.response_length)
    expected = [len(text + response.text) for text, response in zip(texts, responses, strict=True)]
    with jax.default_matmul_precision("highest"):
        figures = answers.figures(model.params, arrays, prompts)
    assert figures["true_score_greedy"] == np.mean(expected)
    half = 1.96 * np.std(expected, ddof=1) / np.sqrt(len(expected))
    assert figures["true_score_greedy_interval"] == pytest.approx(half)


def test_adapters_begin_at_the_reference_and_are_all_that_is_trained(chain, tmp_path):
    shutil.copytree(chain.runs / "sft-tiny", tmp_path / "sft-tiny")
    options = ["--config.lora.rank=2", "--config.steps=2", "--config.dpo.prompts="]
    assert train.main(command("dpo-tiny", tmp_path, *options)) == 0
    first, _ = rows(tmp_path / "dpo-tiny" / "metrics.jsonl")
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    with checkpoint.ocp.PyTreeCheckpointer() as reader:
        trained = reader.restore(tmp_path / "dpo-tiny" / "checkpoints" / "2" / "policy")
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(trained)}
    assert names == {"lora_a", "lora_b"}


@pytest.mark.parametrize(
    "option, message",
    [
        ("dpo.beta=0", "dpo.beta=0.0 must be above 0"),
        ("dpo.label_smoothing=0.5", "dpo.label_smoothing=0.5 must be below 0.5"),
        ("dpo.loss=hinge", "dpo.loss='hinge' must be one of 'sigmoid', 'ipo'"),
    ],
)
def test_a_value_that_makes_no_loss_is_a_user_error(option, message, capsys):
    assert message in fails(capsys, "--config", "dpo.py:tiny", f"--config.{option}")


def test_smoothing_of_ipo_and_a_run_without_policy_are_refused():
    config = configs.load("dpo.py:tiny")
    config.dpo = DPO(loss="ipo", label_smoothing=0.1)
    with pytest.raises(UserError, match="label_smoothing=0.1 has no meaning for dpo.loss='ipo'"):
        configs.check(config)
    config.dpo = DPO()
    config.parents = {"reference": "sft.py:tiny"}
    with pytest.raises(UserError, match=r"parents=\['reference'\] must have policy for dpo"):
        configs.check(config)
    assert dataclasses.replace(config, parents={"policy": "sft.py:tiny"})
