"""`convert --check` says what loading would say, all of it at once, without loading."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from alignjax import config as configs
from alignjax import convert, inference, train
from alignjax.config import UserError
from alignjax.models import families
from alignjax.runs.model_check import check_model

GOLDEN = Path(__file__).parent / "golden"
WEIGHTS = "model.safetensors"
PROPORTIONAL = {"rope_type": "proportional", "factor": 2.0}
NORM = "model.norm.weight"
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def exported(chain, tmp_path_factory):
    """Return the directories of a language model and of a reward model of the tiny chain."""
    base = tmp_path_factory.mktemp("exported")
    for run in ("sft-tiny", "rm-tiny"):
        convert.export(chain.runs / run, base / run, None, "float32")
    return base


@pytest.fixture
def model(exported, tmp_path):
    return Path(shutil.copytree(exported / "sft-tiny", tmp_path / "model"))


def edit(path: Path, **fields) -> None:
    """Change fields of a JSON file; None drops one."""
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_config(directory, **fields):
    edit(directory / "config.json", **fields)


def edit_tensors(directory, **tensors):
    """Change tensors of a checkpoint; None drops one."""
    content = load_file(directory / WEIGHTS) | tensors
    kept = {name: tensor for name, tensor in content.items() if tensor is not None}
    save_file(kept, directory / WEIGHTS, metadata={"format": "pt"})


def remove(directory, name):
    (directory / name).unlink()


def write_template(directory, text):
    (directory / "chat_template.jinja").write_text(text)


def drop_template(directory):
    remove(directory, "chat_template.jinja")


def write_vocabulary(directory):
    """Give the tokenizer more tokens than the model."""
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 5000, "content": "<more>"})
    path.write_text(json.dumps(content))


FAULTS = {
    "missing tensor": lambda d: edit_tensors(d, **{NORM: None}),
    "wrong shape": lambda d: edit_tensors(d, **{UP: np.zeros((3, 5), np.float32)}),
    "extra tensor": lambda d: edit_tensors(d, extra=np.zeros(2, np.float32)),
    "type of a tensor": lambda d: edit_tensors(d, **{NORM: np.zeros(32)}),
    "torn file": lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:-9]),
    "no file of weights": lambda d: remove(d, WEIGHTS),
    "unknown family": lambda d: edit_config(d, model_type="mamba"),
    "unsupported rope": lambda d: edit_config(d, rope_scaling=PROPORTIONAL),
    "unsupported activation": lambda d: edit_config(d, hidden_act="relu"),
    "quantised": lambda d: edit_config(d, quantization_config={"bits": 4}),
    "size of a wrong type": lambda d: edit_config(d, hidden_size="32"),
    "no config": lambda d: remove(d, "config.json"),
    "no tokenizer": lambda d: remove(d, "tokenizer_config.json"),
    "no vocabulary": lambda d: remove(d, "tokenizer.json"),
    "too many tokens": write_vocabulary,
    "end that is no token": lambda d: edit(d / "generation_config.json", eos_token_id=10**6),
    "template that rejects the chat": lambda d: write_template(d, "{{ raise_exception('no') }}"),
    "template that cannot be parsed": lambda d: write_template(d, "{% if %}"),
    "template without an end": lambda d: write_template(
        d, "{% for m in messages %}{{ m.content }}{% endfor %}"
    ),
    "template without replies": lambda d: write_template(d, "{{ messages[0].content }}"),
}


def refusal_of_loading(directory) -> str:
    with pytest.raises(UserError) as raised:
        inference.load(directory)
    return str(raised.value)


def refusal_of_training(directory, workdir) -> str:
    config = configs.load("sft.py:tiny")
    config.parents = {"model": str(directory)}
    with pytest.raises(UserError) as raised:
        train.fit(config, workdir)
    return str(raised.value)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_check_says_what_loading_and_training_say(fault, model, tmp_path, capsys):
    FAULTS[fault](model)
    problems = check_model(str(model)).problems
    assert configs.one_line(refusal_of_loading(model)) in problems
    assert configs.one_line(refusal_of_training(model, tmp_path / "run")) in problems
    assert convert.main(["--check", str(model)]) == 2
    printed = capsys.readouterr().out.splitlines()
    assert [f"refused: {problem}" for problem in problems] == [
        line for line in printed if line.startswith("refused: ")
    ]
    assert printed[-1].startswith(f"{model}: cannot be loaded, for ")


def test_all_problems_show_at_once(model):
    edit_config(model, hidden_act="relu", rope_scaling=PROPORTIONAL, is_causal=False)
    edit_tensors(model, **{NORM: None, UP: np.zeros((3, 5), np.float32)})
    write_template(model, "{% if %}")
    text = "\n".join(check_model(str(model)).problems)
    wanted = ["hidden_act='relu'", "rope_type='proportional'", "is_causal=false", NORM, UP]
    for part in [*wanted, "it cannot be parsed"]:
        assert text.count(part) == 1, part


def test_thousands_of_missing_tensors_take_a_few_lines(model, capsys):
    edit_config(model, num_hidden_layers=200)
    assert convert.main(["--check", str(model)]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 60
    assert " more problems" in lines[-2]


def test_a_model_that_loads_is_described_without_reading_a_number(exported, monkeypatch, capsys):
    def read(self, index):
        raise AssertionError(f"{self.name} was read")

    monkeypatch.setattr("alignjax.weights.safetensors.StoredTensor.read", read)
    assert convert.main(["--check", str(exported / "sft-tiny")]) == 0
    text = capsys.readouterr().out
    for part in (
        "family         qwen2, 51,488 parameters",
        "vocabulary     512 tokens, embeddings not tied",
        "on disk        float32, 27 tensors in 1 file, 0.2 MB",
        "system         accepted, as a turn of its own",
        r"prompt         asks for a reply with '<|im_start|>assistant\n'",
        "a reply ends   at '<|im_end|>' (2)",
        "sft-tiny: loads as a policy",
    ):
        assert part in text
    assert convert.main(["--check", str(exported / "rm-tiny")]) == 0
    text = capsys.readouterr().out
    assert "a score        is read behind '<|im_end|>' (2)" in text
    assert text.endswith("rm-tiny: loads as a reward model\n")


def test_a_classifier_without_its_head_is_refused(exported, tmp_path):
    model = Path(shutil.copytree(exported / "rm-tiny", tmp_path / "model"))
    edit_tensors(model, **{"score.weight": None, "score.bias": None})
    problems = check_model(str(model)).problems
    assert configs.one_line(refusal_of_loading(model)) in problems
    assert len(problems) == 1


def test_runs_are_checked_as_parents_are(chain, tmp_path, capsys):
    for run in ("lm-tiny", "sft-tiny", "rm-tiny", "ppo-tiny"):
        assert convert.main(["--check", str(chain.runs / run)]) == 0
    text = capsys.readouterr().out
    assert "of stage 'ppo'" in text and "loads as a reward model" in text
    run = Path(shutil.copytree(chain.runs / "sft-tiny", tmp_path / "run"))
    (run / "summary.json").unlink()
    [problem] = check_model(str(run)).problems
    assert problem.endswith("this run is not complete")


def test_without_a_template_a_model_loads_for_plain_text(model, capsys):
    drop_template(model)
    assert convert.main(["--check", str(model)]) == 0
    text = capsys.readouterr().out
    assert "none: it loads for plain text only; chat_template=chatml gives it ChatML" in text
    assert "loads as a language model of plain text" in text
    assert convert.main(["--check", str(model), "--chat_template", "chatml"]) == 0
    assert "loads as a policy" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(path.parent.name for path in GOLDEN.glob("*/config.json")))
def test_files_of_all_families_are_described(name):
    findings = check_model(str(GOLDEN / name))
    assert (
        findings.architecture.family
        == families.family_of(
            json.loads((GOLDEN / name / "config.json").read_text())["model_type"], "model_type"
        ).name
    )
    # Their parameters are all that these directories have.
    [problem] = findings.problems
    assert "no tokenizer there" in problem
    assert findings.parameters and set(findings.weights.dtypes) <= {"BF16", "F32"}


# ------------------------------------------------------------------------------------- on the hub


class Hub:
    """A model on the hub whose files are in a directory; its weights give their headers only."""

    def __init__(self, directory):
        self.directory = directory

    def list_repo_files(self, name, revision=None):
        return [path.name for path in self.directory.iterdir()]

    def parse_safetensors_file_metadata(self, name, file, revision=None):
        content = (self.directory / file).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        header.pop("__metadata__", None)
        return SimpleNamespace(
            tensors={tensor: SimpleNamespace(**entry) for tensor, entry in header.items()}
        )


def test_of_a_model_on_the_hub_only_headers_are_read(model, tmp_path, monkeypatch, capsys):
    snapshot = tmp_path / "snapshot"
    shutil.copytree(model, snapshot, ignore=shutil.ignore_patterns("*.safetensors"))

    def download(name, revision, allow_patterns):
        assert not any(pattern.endswith(".safetensors") for pattern in allow_patterns)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Hub(model))
    assert convert.main(["--check", "hf://Org/Tiny"]) == 0
    text = capsys.readouterr().out
    assert "float32, 27 tensors in 1 file, 0.2 MB" in text
    assert "hf://Org/Tiny: loads as a policy" in text
    edit_tensors(model, **{NORM: None})
    assert convert.main(["--check", "hf://Org/Tiny"]) == 2
    assert f"refused: hf://Org/Tiny: there is no tensor {NORM} [32]" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--check", "x", "--out", "y"], "--out: this goes with --to_hf only"),
        (["--check", "x", "--merged"], "--merged: this goes with --to_hf only"),
        (["--to_hf", "x", "--out", "y", "--tokenizer", "z"], "--tokenizer: this goes with --check"),
        (["--to_hf", "x"], "--to_hf needs --out DIR"),
    ],
)
def test_arguments_that_would_be_ignored_are_refused(arguments, message, capsys):
    assert convert.main(arguments) == 2
    assert message in capsys.readouterr().err
