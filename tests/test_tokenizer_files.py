"""Tokenizers as directories: damaged, incomplete, with code, with several templates, too large."""

import json
import shutil
import sys

import pytest

from alignjax import config as configs
from alignjax import inference
from alignjax.config import UserError
from alignjax.data import chat, tokenizer_files

TEMPLATE = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return the directory of a tokenizer, as transformers saved it."""
    directory = tmp_path_factory.mktemp("made")
    chat.train_tokenizer(["how long does tea steep ?"] * 3, directory, 300)
    return directory


@pytest.fixture
def directory(made, tmp_path):
    """Return a copy of the tokenizer."""
    return shutil.copytree(made, tmp_path / "tokenizer")


def edit(path, **fields):
    """Change fields of a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | fields), encoding="utf-8")


def refusal(directory) -> str:
    """Return the error for a tokenizer, which must be one line that names the directory."""
    with pytest.raises(UserError) as raised:
        chat.load_tokenizer(directory)
    message = str(raised.value)
    assert str(directory) in message
    assert "\n" not in message
    return message


def use_qwen2(directory):
    """Make the directory one of a Qwen2 model, whose class takes missing files as empty."""
    config = {"model_type": "qwen2"}
    (directory / "config.json").write_text(json.dumps(config))
    edit(directory / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")


def split_vocabulary(directory):
    """Replace tokenizer.json by vocab.json and merges.txt."""
    parts = json.loads((directory / "tokenizer.json").read_text())["model"]
    merges = "\n".join(" ".join(pair) for pair in parts["merges"])
    (directory / "vocab.json").write_text(json.dumps(parts["vocab"]))
    (directory / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (directory / "tokenizer.json").unlink()


def test_a_directory_without_a_vocabulary_is_refused(directory):
    use_qwen2(directory)
    (directory / "tokenizer.json").unlink()
    assert "tokenizer.json is missing, and so is vocab.json and merges.txt" in refusal(directory)


def test_a_vocabulary_with_nothing_but_special_tokens_is_refused(directory):
    use_qwen2(directory)
    split_vocabulary(directory)
    (directory / "vocab.json").write_text("{}")
    (directory / "merges.txt").write_text("")
    assert "vocabulary is empty, except for" in refusal(directory)


def test_vocab_json_with_merges_is_a_whole_tokenizer_and_neither_alone(directory):
    whole = chat.load_tokenizer(directory)
    use_qwen2(directory)
    split_vocabulary(directory)
    assert chat.load_tokenizer(directory).get_vocab() == whole.get_vocab()
    (directory / "merges.txt").unlink()
    refusal(directory)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", ""),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", b"\xff"),
        ("tokenizer_config.json", "[" * 100_000),
        ("special_tokens_map.json", "[1]"),
        ("added_tokens.json", "[1]"),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_a_damaged_file_is_one_line(directory, file, content):
    content = content.encode() if isinstance(content, str) else content
    (directory / file).write_bytes(content)
    refusal(directory)


@pytest.mark.parametrize(
    "fields",
    [
        {"tokenizer_class": 5},
        {"tokenizer_class": ["LlamaTokenizer"]},
        {"eos_token": 5},
        {"extra_special_tokens": "abc"},
        {"added_tokens_decoder": [1]},
        {"auto_map": "x.Y"},
    ],
)
def test_a_field_of_the_wrong_type_is_one_line(directory, fields):
    edit(directory / "tokenizer_config.json", **fields)
    refusal(directory)


@pytest.mark.parametrize("template", [5, [5], {"rag": TEMPLATE}])
def test_a_template_that_is_not_a_text_is_refused(directory, template):
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    edit(directory / "tokenizer_config.json", chat_template=template)
    refusal(directory)


def test_of_several_templates_the_default_one_is_taken(directory):
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    templates = [
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": TEMPLATE},
    ]
    edit(directory / "tokenizer_config.json", chat_template=templates)
    assert chat.load_tokenizer(directory).chat_template == TEMPLATE


def test_additional_templates_leave_the_default_one_in_place(directory):
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    edit(directory / "tokenizer_config.json", chat_template="of the config")
    assert chat.load_tokenizer(directory).chat_template == TEMPLATE


def test_code_of_a_tokenizer_is_never_run_nor_asked_about(directory, monkeypatch):
    code = "raise SystemExit('the code of a tokenizer ran')"
    (directory / "mine.py").write_text(code)
    fields = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    edit(directory / "tokenizer_config.json", **fields)
    monkeypatch.setattr(sys, "stdin", None)  # a question would fail
    assert "it has code of its own, which is never run" in refusal(directory)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(directory):
    tokenizer = chat.load_tokenizer(directory)
    count = len(tokenizer)
    tokenizer_files.check_fits(tokenizer, count)
    with pytest.raises(UserError, match=rf"model.vocab_size={count - 1}.* has {count} tokens"):
        tokenizer_files.check_fits(tokenizer, count - 1)


def test_inference_refuses_a_tokenizer_with_more_tokens_than_the_model(directory):
    run = directory.parent
    config = configs.Config(stage="lm", model=configs.Model(vocab_size=16))
    (run / "config.json").write_text(configs.to_json(config))
    (run / "summary.json").write_text("{}")
    with pytest.raises(UserError, match="model.vocab_size=16, but the tokenizer"):
        inference.load(run)
