"""Hugging Face checkpoints in and out, as safetensors, never pickle; bit exact both ways in float32 and bfloat16.

Letters: d model, n heads, h head size, l layers, v words.
"""

import json
import re
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from alignjax.config import Model, UserError
from alignjax.models import families, transformer
from alignjax.sharding import path_name

# safetensors' names of the types that weights come in. Its own numpy reader and writer hold whole files in memory.
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
HARMLESS = re.compile(r"rotary_emb\.inv_freq$")  # computed, yet stored by old versions


def load_hf(directory, head: str, key=None) -> tuple[Model, dict]:
    """(Model, params as nested dicts of float32 numpy arrays) from config.json and safetensors in `directory`.

    head="scalar" takes `score.weight` (and `score.bias`, else 0) where the checkpoint has it; a checkpoint without gets
    a fresh head from `key`. UserError for what we can't run, and for a missing, extra or misshapen tensor.
    """
    directory = Path(directory)
    path = directory / "config.json"
    try:
        model = families.model_from_hf(json.loads(path.read_text()), str(path))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: {error}") from error
    tensors = open_tensors(directory)
    shapes, weights = layout(model, head)
    params = {path: np.empty(shape, np.float32) for path, shape in shapes.items()}
    absent = [name for name, _, _ in weights if name not in tensors]
    if head == "scalar" and "score.weight" in absent:
        if key is None:
            raise UserError(
                f"{directory}: there is no tensor score.weight, and no key to make a fresh scalar head from"
            )
        fresh = jax.jit(lambda key: transformer.init(model, key, "scalar")["head"])(key)
        params |= {f"head/{name}": np.asarray(x) for name, x in fresh.items()}
    elif "score.bias" in absent:
        params["head/bias"][:] = 0
    for name, paths, layer in weights:
        if head == "scalar" and name in absent and name.startswith("score."):
            continue
        want = hf_shape(name, paths, layer, shapes)
        if name in absent:
            raise UserError(f"{directory}: there is no tensor {name} {list(want)}")
        if tensors[name].shape != want:
            raise UserError(f"{directory}: tensor {name} is {list(tensors[name].shape)}, {list(want)} wanted")
        fill(params, tensors[name], paths, layer)
    check_extra(directory, tensors, {name for name, _, _ in weights}, model, head)
    return model, nest(params)


def save_hf(model: Model, params, directory, dtype: str = "float32", max_shard_bytes: int = 5 * 10**9) -> None:
    """Write config.json and model.safetensors (several with an index above `max_shard_bytes`), tensor by tensor.

    `params`, nested dicts of arrays that this process can read, tells by its head whether it is a language model or a
    scalar one. `dtype` of the file is "float32" or "bfloat16".
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    flat = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    head = "scalar" if "head/bias" in flat else "lm"
    config = families.hf_from_model(model, head, dtype)
    shapes, weights = layout(model, head)
    for path in sorted({*shapes, *flat}):
        given, wanted = (list(x[path]) if path in x else "absent" for x in (jax.tree.map(np.shape, flat), shapes))
        if given != wanted:
            raise UserError(f"{directory}: parameter {path} is {given}, {wanted} wanted")
    kind = {"float32": "F32", "bfloat16": "BF16"}[dtype]
    shards = [[]]
    room = max_shard_bytes
    for weight in weights:
        size = int(np.prod(hf_shape(*weight, shapes))) * DTYPES[kind].itemsize
        if shards[-1] and size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(weight)
        room -= size
    index, total = {}, 0
    for i, shard in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        header = {name: (kind, hf_shape(name, paths, layer, shapes)) for name, paths, layer in shard}
        total += write_tensors(directory / file, header, (gather(flat, *weight) for weight in shard))
        index |= dict.fromkeys(header, file)
    if len(shards) > 1:
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
        (directory / "model.safetensors.index.json").write_text(text)
    (directory / "config.json").write_text(json.dumps(config, indent=1))


def layout(model: Model, head: str):
    """({path: shape}, [(tensor name, paths, layer or None)]): all parameters, and the tensors that hold them."""
    tree = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0), head))
    shapes = {path_name(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    names = families.weight_names(model, head)
    if set(names) != set(shapes):
        raise UserError(f"model.family={model.family!r} and the config differ on {sorted(set(names) ^ set(shapes))}: "
                        f"model.qkv_bias, model.qk_norm must be {families.SHAPES[model.family]}")  # fmt: skip
    groups = {}
    for path, name in names.items():
        groups.setdefault(name, []).append(path)
    weights = [(name, tuple(paths), None) for name, paths in groups.items() if "{}" not in name]
    weights += [(name.format(i), tuple(paths), i)
                for i in range(model.layers) for name, paths in groups.items() if "{}" in name]  # fmt: skip
    return shapes, weights


def hf_shape(name: str, paths, layer, shapes) -> tuple:
    """The shape in the file of the tensor made of `paths`."""
    return sum_rows([matrix_shape(path, shapes[path] if layer is None else shapes[path][1:]) for path in paths])


def sum_rows(shapes) -> tuple:
    return (sum(s[0] for s in shapes), *shapes[0][1:])


def matrix_shape(path: str, shape: tuple) -> tuple:
    """The file's shape, [out in] of a kernel, [n*h] of a bias [n h]. Only `out` kernels contract two axes, [n h d]."""
    if path.endswith("kernel"):
        inputs = 2 if "out/" in path else 1
        return int(np.prod(shape[inputs:])), int(np.prod(shape[:inputs]))
    return (int(np.prod(shape)),) if path.endswith("bias") else shape


def fill(params, tensor, paths, layer) -> None:
    """Copy the file's tensor to where its parts belong."""
    row = 0
    for path in paths:
        target = params[path] if layer is None else params[path][layer]
        rows = matrix_shape(path, target.shape)[0]
        part = tensor[row : row + rows]
        target[...] = (part.T if path.endswith("kernel") else part).reshape(target.shape)
        row += rows


def gather(flat, name, paths, layer):
    """The tensor `name` as the file wants it, put together from its parts: what `fill` undoes."""
    parts = []
    for path in paths:
        x = np.asarray(flat[path] if layer is None else flat[path][layer])
        shape = matrix_shape(path, x.shape)
        parts.append(x.reshape(shape[::-1]).T if path.endswith("kernel") else x.reshape(shape))
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def check_extra(directory, tensors, known, model: Model, head: str) -> None:
    """UserError for a tensor that we would leave unread, or a stored copy of a tied head that isn't one."""
    for name in tensors:
        if name in known or HARMLESS.search(name) or (name == "lm_head.weight" and head == "scalar"):
            continue
        embedding = families.NAMES[model.family]["embed/embedding"]
        if name != "lm_head.weight" or not model.tied:
            raise UserError(f"{directory}: tensor {name} {list(tensors[name].shape)} has no place in {model.family!r}, "
                            f"head {head!r}")  # fmt: skip
        if not np.array_equal(tensors[name], tensors[embedding]):
            raise UserError(f"{directory}: lm_head.weight differs from {embedding}, but tie_word_embeddings=True")


def open_tensors(directory: Path) -> dict:
    """Name -> array, mapped from the file and not yet read, of all safetensors of a checkpoint."""
    index = directory / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    tensors = {}
    for file in files:
        # An index is a stranger's text: no name of its may lead out of the directory.
        if Path(file).name != file or not (directory / file).is_file():
            raise UserError(f"{directory}: there is no file {file} (pickled .bin files are not read)")
        tensors |= read_tensors(directory / file)
    return tensors


def read_tensors(path: Path) -> dict:
    """One safetensors file: eight bytes with the header's length, a JSON header, then the bytes of the tensors."""
    data = np.memmap(path, np.uint8, "r")
    try:
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8:start].tobytes())
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            low, high = entry["data_offsets"]
            if entry["dtype"] not in DTYPES:
                raise UserError(f"{path}: tensor {name} is of type {entry['dtype']}, one of {sorted(DTYPES)} wanted")
            tensors[name] = data[start + low : start + high].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from error
    return tensors


def write_tensors(path: Path, header: dict, tensors) -> int:
    """Write `tensors`, an iterable in the order of header {name: (type, shape)}, one at a time; the bytes of data."""
    offset, entries = 0, {"__metadata__": {"format": "pt"}}  # transformers refuses files without a format
    for name, (kind, shape) in header.items():
        end = offset + int(np.prod(shape)) * DTYPES[kind].itemsize
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor, (kind, _) in zip(tensors, header.values(), strict=True):
            file.write(np.ascontiguousarray(tensor, DTYPES[kind]).view(np.uint8).data)
    return offset


def nest(flat: dict) -> dict:
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree = {}
    for path, x in flat.items():
        *parents, last = path.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = x
    return tree
