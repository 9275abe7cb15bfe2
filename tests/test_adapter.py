"""The harness' model interface: what reaches `Requests`, what comes back, and what an interruption leaves."""

import json

import jax
import lm_eval
import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from test_requests import logits_of

from alignjax import convert
from alignjax.config import UserError
from alignjax.data import chat
from alignjax.evals import adapter

TEXTS = ["copy : cat box = cat box .", "last : sun hat\ncount : one two", "the"]


@pytest.fixture(scope="module")
def model(chain):
    return get_model("alignjax").create_from_arg_string(
        f"run={chain[0] / 'sft-tiny'},tokens=256", {"batch_size": 4}
    )


def instances(kind, *arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def weights(model):
    return model.asked.model.architecture, jax.tree.map(np.asarray, model.asked.model.params)


def test_a_text_without_context_follows_the_begin_token_and_a_long_one_is_read_in_windows(model):
    texts = [*TEXTS, " ".join(TEXTS * 12)]
    found = model.loglikelihood_rolling(
        instances("loglikelihood_rolling", *((text,) for text in texts)), disable_tqdm=True
    )
    assert model.prefix_token_id == model.tokenizer.eos_token_id and model.max_length == 64
    for text, logprob in zip(TEXTS, found, strict=False):
        ids = [model.prefix_token_id, *model.tok_encode(text)]
        expected = logits_of(weights(model), ids[:-1])[np.arange(len(ids) - 1), ids[1:]].sum()
        assert logprob == pytest.approx(expected, abs=1e-3)
    ids = [model.prefix_token_id, *model.tok_encode(texts[-1])]
    assert len(ids) > 129
    expected = 0.0
    for end in range(
        1, len(ids)
    ):  # as many tokens before each as a window of 64 that ends where the harness' end has
        last = min(-(-end // 64) * 64, len(ids) - 1)
        start = max(last - 64, 0)
        expected += logits_of(weights(model), ids[start:end])[-1, ids[end]]
    assert found[-1] == pytest.approx(expected, abs=2e-3)


def test_hugging_face_checkpoint_and_run_answer_alike(model, chain, tmp_path):
    convert.export(chain[0] / "sft-tiny", tmp_path / "hf", None, "float32")
    other = adapter.AlignJax(tmp_path / "hf", batch_size="auto")
    asked = instances("loglikelihood", *((text, " box") for text in TEXTS))
    assert other.loglikelihood(asked, disable_tqdm=True) == model.loglikelihood(
        asked, disable_tqdm=True
    )
    assert other.asked.model.end_tokens == model.asked.model.end_tokens and other.asked.slots == 64


def test_half_precision_is_near(model, chain):
    half = adapter.AlignJax(chain[0] / "sft-tiny", dtype="bfloat16")
    asked = instances("loglikelihood", *((text, " box") for text in TEXTS))
    pairs = zip(
        half.loglikelihood(asked, disable_tqdm=True),
        model.loglikelihood(asked, disable_tqdm=True),
        strict=True,
    )
    assert all(a[0] == pytest.approx(b[0], abs=0.1) and a[0] != b[0] for a, b in pairs)
    assert half.asked.model.params["layers"]["mlp"]["up"]["kernel"].dtype == "bfloat16"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"run": "nowhere"}, "nowhere: no config.json there"),
        ({"dtype": "float16"}, "dtype='float16' must be one of 'float32', 'bfloat16'"),
        ({"run": "pmp-tiny"}, "pmp-tiny: a language model is wanted, this is a reward model"),
    ],
)
def test_what_is_no_model_is_said(chain, arguments, message):
    arguments = {"run": "sft-tiny"} | arguments
    with pytest.raises(UserError, match=message):
        adapter.AlignJax(**arguments | {"run": chain[0] / arguments["run"]})


def test_generation_kwargs(model):
    asked = {
        "until": ["\n"],
        "max_gen_toks": 7,
        "do_sample": True,
        "temperature": 0.5,
        "top_p": 0.9,
    }
    assert model.settings(asked) == dict(
        strings=("\n", "<|im_end|>"), length=7, temperature=0.5, top_p=0.9
    )
    assert (
        model.settings({"temperature": 0.5, "do_sample": False})["temperature"] == 0
        and model.settings({})["length"] == 256
    )
    with pytest.raises(UserError, match="generation_kwargs: num_beams=4 is not supported"):
        model.settings({"num_beams": 4})
    arguments = [
        (text, {"until": [], "max_gen_toks": 4, **more}) for text in TEXTS for more in ({}, asked)
    ]
    first = model.generate_until(instances("generate_until", *arguments), disable_tqdm=True)
    assert first == model.generate_until(instances("generate_until", *arguments), disable_tqdm=True)


TASK = """
task: copies
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
num_fewshot: 1
fewshot_config: {sampler: first_n, split: test}
generation_kwargs: {until: [], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def test_the_harness_own_command_line(chain, tmp_path, monkeypatch, capsys):
    rows = [
        {"question": "copy : cat", "answer": "cat"},
        {"question": "copy : box", "answer": "box"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "copies.yaml").write_text(TASK.replace("FILE", str(tmp_path / "rows.jsonl")))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        "sys.argv",
        [
            "lm_eval",
            "run",
            "--model",
            "alignjax",
            "--model_args",
            f"run={chain[0] / 'ppo-tiny'}",
            "--tasks",
            str(tmp_path / "copies.yaml"),
            "--apply_chat_template",
            "--output_path",
            str(tmp_path / "out"),
            "--log_samples",
        ],
    )
    assert adapter.main() == 0
    assert "|copies|" in capsys.readouterr().out
    results = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())
    assert (
        results["config"]["dtype"] == "float32"
        and "exact_match,none" in results["results"]["copies"]
    )
    sample = json.loads(
        next((tmp_path / "out").rglob("samples_*.jsonl")).read_text().splitlines()[0]
    )
    tokenizer = chat.load_tokenizer(chain[0] / "ppo-tiny" / "tokenizer")
    turns = [("user", "copy : box"), ("assistant", "box"), ("user", "copy : cat")]
    expected = tokenizer.apply_chat_template(
        [dict(zip(("role", "content"), turn, strict=True)) for turn in turns],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert sample["arguments"]["gen_args_0"]["arg_0"] == expected
    monkeypatch.setattr(
        "sys.argv",
        [
            "lm_eval",
            "run",
            "--model",
            "alignjax",
            "--model_args",
            f"run={tmp_path / 'no'}",
            "--tasks",
            str(tmp_path / "copies.yaml"),
        ],
    )
    assert adapter.main() == 2 and "no config.json there" in capsys.readouterr().err


def test_what_was_answered_before_an_interruption_is_not_asked_again(
    chain, model, tmp_path, monkeypatch
):
    asked = instances(
        "generate_until", *((f"copy : {i}", {"until": [], "max_gen_toks": 4}) for i in range(40))
    )
    cached = lambda: lm_eval.api.model.CachingLM(model, str(tmp_path / "answers.db"))
    answer, calls = model.asked.answer, []

    def interrupted(*arguments):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(len(arguments[3]))
        return answer(*arguments)

    monkeypatch.setattr(model.asked, "answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cached().generate_until(asked)
    monkeypatch.setattr(
        model.asked,
        "answer",
        lambda *arguments: calls.append(len(arguments[3])) or answer(*arguments),
    )
    found = cached().generate_until(asked)
    assert 0 < calls[0] < sum(calls) == 40  # of lengths that have halved there are two calls
    monkeypatch.setattr(model.asked, "answer", answer)
    assert found == model.generate_until(asked, disable_tqdm=True)
