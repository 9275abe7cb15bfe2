"""Build the checkpoints of checkpoint_cases.py, and let transformers compute what they mean.

usage: python checkpoints_judge.py DIRECTORY [TEXT]

Writes DIRECTORY/NAME, a checkpoint, for every case with TEXT in its name. DIRECTORY/judged has
NAME.json, what transformers says, or "" if it loads the checkpoint; NAME.npy, the logits or scores
of the tokens in tokens.npy; and NAME.greedy.npy, the tokens that are decoded. transformers runs no
code of a checkpoint, in float32.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import checkpoint_cases  # noqa: E402
from checkpoint_cases import Case  # noqa: E402

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = "model-{:05}-of-{:05}.safetensors"
Tensors = dict[str, torch.Tensor]
CLASSES = {
    "lm": transformers.AutoModelForCausalLM,
    "scalar": transformers.AutoModelForSequenceClassification,
}


def main() -> None:
    """Write everything to the directory that is the first argument."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    directory = Path(sys.argv[1])
    judged = directory / "judged"
    judged.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 64, (2, checkpoint_cases.LENGTH), generator=generator)
    np.save(judged / "tokens.npy", tokens.numpy())
    for seed, case in enumerate(checkpoint_cases.all_cases(*sys.argv[2:])):
        torch.manual_seed(seed)
        build(case, directory / case.name)
        verdict = judge(case, directory / case.name, tokens, judged / f"{case.name}.npy")
        (judged / f"{case.name}.json").write_text(json.dumps(verdict))


def build(case: Case, directory: Path) -> None:
    """Write a case's checkpoint."""
    built = {"num_labels": 1} | checkpoint_cases.SIZES | dict(case.built)
    config = transformers.AutoConfig.for_model(case.family, **built)
    model = CLASSES[case.head].from_config(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, float("norm" in name), 0.2)
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    if case.files:
        CHANGES[case.files](directory)
    path = directory / "config.json"
    content = json.loads(path.read_text()) | dict(case.fields)
    path.write_text(json.dumps({k: v for k, v in content.items() if k not in case.dropped}))


def judge(case: Case, directory: Path, tokens: torch.Tensor, out: Path) -> dict[str, str]:
    """Save what transformers computes; return its error, and the tensors that it made up."""
    try:
        model, report = CLASSES[case.head].from_pretrained(
            directory,
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
            attn_implementation="eager",  # others leave out soft caps
        )
        with torch.no_grad():
            rows = [model.eval()(row[None]).logits[0].float().numpy() for row in tokens]
            if case.greedy:
                np.save(out.with_suffix(".greedy.npy"), greedy(model, tokens))
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return {"error": f"{type(error).__name__}: {lines[0]}", "made_up": ""}
    np.save(out, np.stack(rows))
    return {"error": "", "made_up": ", ".join(sorted(report["missing_keys"]))}


def greedy(model: torch.nn.Module, tokens: torch.Tensor) -> np.ndarray:
    """Return what transformers decodes greedily after the first tokens of each row."""
    prompts = tokens[:, : checkpoint_cases.PROMPT]
    decoded = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=checkpoint_cases.NEW_TOKENS,
        min_new_tokens=checkpoint_cases.NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
    )
    return decoded[:, prompts.shape[1] :].numpy()


def tensors_of(directory: Path) -> Tensors:
    """Return the tensors of a whole file."""
    return load_file(directory / SINGLE)


def rewrite(directory: Path, tensors: Tensors, file: str = SINGLE) -> None:
    """Write tensors to a file as transformers does."""
    save_file(
        {name: x.contiguous() for name, x in tensors.items()}, directory / file, {"format": "pt"}
    )


def write_index(directory: Path, file_of: object) -> None:
    """Write an index with this map of names to files."""
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": file_of}))


def sharded(directory: Path) -> None:
    """Cut the file in two, with an index."""
    tensors = tensors_of(directory)
    names = sorted(tensors)
    halves = {SHARD.format(1, 2): names[::2], SHARD.format(2, 2): names[1::2]}
    for file, half in halves.items():
        rewrite(directory, {name: tensors[name] for name in half}, file)
    write_index(directory, {name: file for file, half in halves.items() for name in half})
    (directory / SINGLE).unlink()


def stale_index(directory: Path) -> None:
    """Leave the index of shards that are gone beside the file."""
    write_index(directory, dict.fromkeys(tensors_of(directory), SHARD.format(1, 1)))


def stray_file(directory: Path) -> None:
    """Have whole shards, and a file of another model."""
    tensors = tensors_of(directory)
    sharded(directory)
    rewrite(directory, {name: 0.5 * x for name, x in tensors.items()})


def twice(directory: Path) -> None:
    """Have an older copy of a tensor in the second shard."""
    sharded(directory)
    second = load_file(directory / SHARD.format(2, 2))
    first = load_file(directory / SHARD.format(1, 2))
    name = min(first)
    rewrite(directory, second | {name: 0 * first[name]}, SHARD.format(2, 2))


def shard_gone(directory: Path) -> None:
    """Have an index whose second file is gone."""
    sharded(directory)
    (directory / SHARD.format(2, 2)).unlink()


def index_list(directory: Path) -> None:
    """Have an index with a list instead of a map."""
    sharded(directory)
    write_index(directory, [SHARD.format(1, 2), SHARD.format(2, 2)])


def index_numbers(directory: Path) -> None:
    """Have an index with numbers instead of files."""
    sharded(directory)
    index = json.loads((directory / INDEX).read_text())
    write_index(directory, dict.fromkeys(index["weight_map"], 1))


def index_outside(directory: Path) -> None:
    """Have an index that names a file which is not there, outside the directory."""
    sharded(directory)
    index = json.loads((directory / INDEX).read_text())
    write_index(directory, dict.fromkeys(index["weight_map"], "../absent.safetensors"))


def retype(choose: Callable[[str], torch.dtype]) -> Callable[[Path], None]:
    """Return a change that gives each tensor the type that `choose` has for its name."""

    def change(directory: Path) -> None:
        tensors = tensors_of(directory)
        rewrite(directory, {name: x.to(choose(name)) for name, x in tensors.items()})

    return change


def edit(change_tensors: Callable[[Tensors], object]) -> Callable[[Path], None]:
    """Return a change of files that changes the tensors in place."""

    def change(directory: Path) -> None:
        tensors = tensors_of(directory)
        change_tensors(tensors)
        rewrite(directory, tensors)

    return change


def no_prefix(directory: Path) -> None:
    """Name the tensors as a model without a head does."""
    tensors = tensors_of(directory)
    rewrite(directory, {name.removeprefix("model."): x for name, x in tensors.items()})


def put(name: str, value: float) -> Callable[[Tensors], object]:
    """Return a change that puts a value in a tensor."""

    def change(tensors: Tensors) -> None:
        tensors[name].view(-1)[3] = value

    return change


def copy_embedding(tensors: Tensors) -> None:
    """Store a copy of a tied head."""
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def pickle(directory: Path) -> None:
    """Have the weights as torch pickles them."""
    torch.save(tensors_of(directory), directory / "pytorch_model.bin")
    (directory / SINGLE).unlink()


def truncated(directory: Path) -> None:
    """Cut off the end of the file."""
    path = directory / SINGLE
    path.write_bytes(path.read_bytes()[:-100])


def negative_offset(directory: Path) -> None:
    """Have a tensor begin before the data."""
    header = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}
    text = json.dumps(header).encode()
    (directory / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))


def not_json(directory: Path) -> None:
    """Have a file with a header of something else."""
    (directory / SINGLE).write_bytes((16).to_bytes(8, "little") + b"x" * 16)


NORM = "model.norm.weight"
EXTRA = "model.layers.0.self_attn.rotary_emb.inv_freq"
CHANGES: dict[str, Callable[[Path], object]] = {
    "sharded": sharded,
    "stale_index": stale_index,
    "stray_file": stray_file,
    "twice": twice,
    "shard_gone": shard_gone,
    "index_list": index_list,
    "index_numbers": index_numbers,
    "index_outside": index_outside,
    "bfloat16": retype(lambda name: torch.bfloat16),
    "float16": retype(lambda name: torch.float16),
    "float64": retype(lambda name: torch.float64),
    "float8": retype(lambda name: torch.float8_e4m3fn),
    "mixed_types": retype(lambda name: torch.bfloat16 if "proj" in name else torch.float32),
    "no_prefix": no_prefix,
    "tied_copy": edit(copy_embedding),
    "inv_freq": edit(lambda tensors: tensors.update({EXTRA: torch.zeros(4)})),
    "lm_head_left": edit(lambda tensors: tensors.update({"lm_head.weight": torch.zeros(64, 32)})),
    "nan": edit(put(NORM, float("nan"))),
    "infinite": edit(put("model.layers.1.mlp.up_proj.weight", float("inf"))),
    "missing": edit(lambda tensors: tensors.pop(NORM)),
    "untied": edit(lambda tensors: tensors.pop("lm_head.weight")),
    "extra": edit(lambda tensors: tensors.update({"v_head.weight": torch.zeros(1, 32)})),
    "pickle": pickle,
    "truncated": truncated,
    "negative_offset": negative_offset,
    "not_json": not_json,
}

if __name__ == "__main__":
    main()
