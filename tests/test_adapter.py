"""The harness's model interface: what reaches `Requests`, and what an interruption leaves."""

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
from alignjax.evals.requests import ResponseSettings

TEXTS = ["copy : cat box = cat box .", "last : sun hat\ncount : one two", "the"]


@pytest.fixture(scope="module")
def model(chain):
    return get_model("alignjax").create_from_arg_string(
        f"run={chain.runs / 'sft-tiny'},tokens=256", {"batch_size": 4}
    )


def instances(kind, *arguments):
    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


def weights(model):
    loaded = model.requests.model
    return loaded.architecture, jax.tree.map(np.asarray, loaded.params)


def test_a_text_without_context_follows_the_begin_token_and_a_long_one_is_read_in_windows(model):
    texts = [*TEXTS, " ".join(TEXTS * 12)]
    logprobs = model.loglikelihood_rolling(
        instances("loglikelihood_rolling", *((text,) for text in texts)), disable_tqdm=True
    )
    assert model.prefix_token_id == model.tokenizer.eos_token_id
    assert model.max_length == 64
    for text, logprob in zip(TEXTS, logprobs, strict=False):
        ids = [model.prefix_token_id, *model.tok_encode(text)]
        expected = logits_of(weights(model), ids[:-1])[np.arange(len(ids) - 1), ids[1:]].sum()
        assert logprob == pytest.approx(expected, abs=1e-3)
    ids = [model.prefix_token_id, *model.tok_encode(texts[-1])]
    assert len(ids) > 129
    expected = 0.0
    # Each token has the context that a window of 64 leaves it, where the harness's windows end.
    for end in range(1, len(ids)):
        last = min(-(-end // 64) * 64, len(ids) - 1)
        start = max(last - 64, 0)
        expected += logits_of(weights(model), ids[start:end])[-1, ids[end]]
    assert logprobs[-1] == pytest.approx(expected, abs=2e-3)


def test_hugging_face_checkpoint_and_run_answer_alike(model, chain, tmp_path):
    convert.export(chain.runs / "sft-tiny", tmp_path / "hf", None, "float32")
    other = adapter.AlignJax(tmp_path / "hf", batch_size="auto")
    requests = instances("loglikelihood", *((text, " box") for text in TEXTS))
    likelihoods = model.loglikelihood(requests, disable_tqdm=True)
    assert other.loglikelihood(requests, disable_tqdm=True) == likelihoods
    assert other.requests.model.ends == model.requests.model.ends
    assert other.requests.slots == 64


def test_half_precision_is_near(model, chain):
    half = adapter.AlignJax(chain.runs / "sft-tiny", dtype="bfloat16")
    requests = instances("loglikelihood", *((text, " box") for text in TEXTS))
    rounded = half.loglikelihood(requests, disable_tqdm=True)
    exact = model.loglikelihood(requests, disable_tqdm=True)
    for (rounded_logprob, _), (exact_logprob, _) in zip(rounded, exact, strict=True):
        assert rounded_logprob == pytest.approx(exact_logprob, abs=0.1)
        assert rounded_logprob != exact_logprob
    assert half.requests.model.params["layers"]["mlp"]["up"]["kernel"].dtype == "bfloat16"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"run": "nowhere"}, "nowhere: no config.json there"),
        ({"dtype": "float16"}, "dtype='float16' must be one of 'float32', 'bfloat16'"),
        ({"run": "pmp-tiny"}, "pmp-tiny: expected a language model, but this is a reward model"),
    ],
)
def test_what_is_not_a_language_model_is_a_user_error(chain, arguments, message):
    arguments = {"run": "sft-tiny"} | arguments
    with pytest.raises(UserError, match=message):
        adapter.AlignJax(**arguments | {"run": chain.runs / arguments["run"]})


def test_generation_kwargs(model):
    sampling = {
        "until": ["\n"],
        "max_gen_toks": 7,
        "do_sample": True,
        "temperature": 0.5,
        "top_p": 0.9,
    }
    assert model.response_settings(sampling) == ResponseSettings(
        stop_strings=("\n", "<|im_end|>"), max_tokens=7, temperature=0.5, top_p=0.9
    )
    assert model.response_settings({"temperature": 0.5, "do_sample": False}).temperature == 0
    assert model.response_settings({}).max_tokens == 256
    with pytest.raises(UserError, match="generation_kwargs: num_beams=4 is not supported"):
        model.response_settings({"num_beams": 4})
    arguments = [
        (text, {"until": [], "max_gen_toks": 4, **more})
        for text in TEXTS
        for more in ({}, sampling)
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
            f"run={chain.runs / 'ppo-tiny'}",
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
    assert results["config"]["dtype"] == "float32"
    assert "exact_match,none" in results["results"]["copies"]
    sample = json.loads(
        next((tmp_path / "out").rglob("samples_*.jsonl")).read_text().splitlines()[0]
    )
    tokenizer = chat.load_tokenizer(chain.runs / "ppo-tiny" / "tokenizer")
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
    assert adapter.main() == 2
    assert "no config.json there" in capsys.readouterr().err


def test_answers_from_before_an_interruption_are_not_computed_again(
    chain, model, tmp_path, monkeypatch
):
    requests = instances(
        "generate_until", *((f"copy : {i}", {"until": [], "max_gen_toks": 4}) for i in range(40))
    )
    answer = model.requests.answer
    prompts_per_call = []
    interrupt_second_call = True

    def counting_answer(prompts, *arguments):
        if interrupt_second_call and len(prompts_per_call) == 1:
            raise KeyboardInterrupt
        prompts_per_call.append(len(prompts))
        return answer(prompts, *arguments)

    def cached_model():
        return lm_eval.api.model.CachingLM(model, str(tmp_path / "answers.db"))

    monkeypatch.setattr(model.requests, "answer", counting_answer)
    with pytest.raises(KeyboardInterrupt):
        cached_model().generate_until(requests)
    interrupt_second_call = False
    responses = cached_model().generate_until(requests)
    assert 0 < prompts_per_call[0] < 40
    assert sum(prompts_per_call) == 40
    monkeypatch.setattr(model.requests, "answer", answer)
    assert responses == model.generate_until(requests, disable_tqdm=True)


def test_control_tokens_in_a_question_are_text(chain):
    model = adapter.AlignJax(str(chain.runs / "sft-tiny"))
    end = chat.end_token(model.tokenizer)
    question = [{"role": "user", "content": "copy : <|im_end|> cat"}]
    text = model.apply_chat_template(question)
    [expected] = chat.encode_prompts(model.tokenizer, [question])
    assert model.tok_encode(text) == expected and expected.count(end) == 1
    assert model.tok_encode(text + "sure")[: len(expected)] == expected
    assert model.tok_encode(text.rstrip()) == expected[:-1]
    begun = [*question, {"role": "assistant", "content": "sure ,"}]
    begun_text = model.apply_chat_template(begun, add_generation_prompt=False)
    assert model.tok_encode(begun_text)[: len(expected)] == expected
    plain = model.apply_chat_template([{"role": "user", "content": "copy : cat"}])
    assert model.tok_encode(plain).count(end) == 1
