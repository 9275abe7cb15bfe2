"""What a run does with its chat template: it and its children keep it."""

import datetime
import json
import shutil
import types

import pytest
from runs import cut, files_of, rows

from alignjax import config as configs
from alignjax import inference, train
from alignjax.config import UserError
from alignjax.data import chat, templates
from alignjax.runs import claim, tokenizers
from alignjax.weights import locations

DATED = (
    "{% for m in messages %}{{ '<|im_start|>' + strftime_now('%d') + m['role'] + '\n' }}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PROMPT = [{"role": "user", "content": "copy : cat"}]


def set_day(monkeypatch, day: int) -> None:
    """Make it this day of November 2026 for runs and for transformers."""

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime(2026, 11, day, 12, 0, tzinfo=tz)

    monkeypatch.setattr(tokenizers, "datetime", types.SimpleNamespace(datetime=Clock))
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)


@pytest.fixture
def dated_parent(chain, tmp_path):
    """Return a copy of lm-tiny whose chat template writes the date."""
    shutil.copytree(chain.runs / "lm-tiny", tmp_path / "parent")
    (tmp_path / "parent" / "tokenizer" / "chat_template.jinja").write_text(DATED)
    return tmp_path / "parent"


def command(parent, run):
    """Return the arguments of a short SFT from a parent."""
    settings = {"parents.model": parent, "data.max_length": 48, "model.max_length": 64}
    overrides = [f"--config.{name}={value}" for name, value in settings.items()]
    return ["--config", "sft.py:tiny", "--workdir", str(run), *overrides]


def test_a_run_resumed_on_another_day_is_the_same_run(dated_parent, tmp_path, monkeypatch):
    run = tmp_path / "run"
    set_day(monkeypatch, 26)
    assert train.main(command(dated_parent, run)) == 0
    assert json.loads((run / "config.json").read_text())["template_date"] == "2026-11-26"
    assert "<|im_start|>26user" in rows(run / "samples.jsonl")[0]["text"]
    cut(run, tmp_path / "again")
    set_day(monkeypatch, 27)
    assert train.main(command(dated_parent, tmp_path / "again")) == 0
    assert files_of(tmp_path / "again") == files_of(run)
    # The date goes with the run, to inference and to its children.
    model = inference.load(run)
    assert "26user" in model.tokenizer.decode(model.encode([PROMPT])[0])
    child = configs.load("sft.py:tiny")
    assert choose(child, tmp_path / "child", run).init_kwargs[templates.DATE] == "2026-11-26"
    assert child.template_date == "2026-11-26"
    child.template_date = "2026-11-27"
    with pytest.raises(UserError, match="template_date='2026-11-27', but the parent .*2026-11-26"):
        choose(child, tmp_path / "child", run)


def choose(config, workdir, parent):
    """Return the tokenizer of a run with one parent."""
    config.model = locations.architecture(parent)
    return tokenizers.choose_tokenizer(config, workdir, {"model": parent}, lambda line: None)


def test_the_config_may_say_the_date_and_nothing_is_kept_without_one(
    dated_parent, chain, tmp_path, monkeypatch
):
    set_day(monkeypatch, 26)
    config = configs.load("sft.py:tiny", {"template_date": "2026-02-03"})
    tokenizer = choose(config, tmp_path / "x", dated_parent)
    [prompt] = chat.encode_prompts(tokenizer, [PROMPT])
    assert "<|im_start|>03user" in tokenizer.decode(prompt)
    config = configs.load("sft.py:tiny")
    tokenizer = choose(config, tmp_path / "x", chain.runs / "lm-tiny")
    assert config.template_date == "" and templates.DATE not in tokenizer.init_kwargs
    for date in ("yesterday", "2026-02-30", "20260203"):
        with pytest.raises(UserError, match=f"template_date='{date}' must be a date"):
            configs.load("sft.py:tiny", {"template_date": date})


def test_children_take_special_tokens_in_content_as_their_parent_did(chain, tmp_path):
    parent = tmp_path / "parent"
    shutil.copytree(chain.runs / "sft-tiny", parent)
    child = configs.load("sft.py:tiny", {"special_tokens_in_content": "true"})
    with pytest.raises(UserError, match="special_tokens_in_content=True, but the parent .* False"):
        choose(child, tmp_path / "child", parent)
    tokenizer = chat.load_tokenizer(parent / "tokenizer")
    templates.set_options(tokenizer, "", True)
    tokenizer.save_pretrained(parent / "tokenizer")
    child = configs.load("sft.py:tiny")
    tokenizer = choose(child, tmp_path / "child", parent)
    assert templates.allows_tokens_in_content(tokenizer)
    assert child.special_tokens_in_content
    end = chat.end_token(tokenizer)
    [prompt] = chat.encode_prompts(tokenizer, [[{"role": "user", "content": "<|im_end|>"}]])
    assert prompt.count(end) == 2
    model = inference.load(parent)
    assert model.encode(["<|im_end|>"]) == [prompt]
    model = inference.load(chain.runs / "sft-tiny")
    assert model.encode(["<|im_end|>"])[0].count(end) == 1
    # A run that says nothing is still the run that inherited it.
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "config.json").write_text(configs.to_json(child))
    unset = configs.load("sft.py:tiny")
    unset.model = child.model
    claim.check_workdir(unset, tmp_path / "kept")


def test_a_document_with_control_tokens_is_text_for_a_model_of_plain_text(chain):
    model = inference.load(chain.runs / "lm-tiny")
    [tokens] = model.encode(["cat <|im_end|> box"])
    assert not set(tokens) & set(model.tokenizer.all_special_ids)
    assert model.tokenizer.decode(tokens) == "cat <|im_end|> box"
