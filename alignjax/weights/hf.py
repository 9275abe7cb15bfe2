"""Hugging Face checkpoints in and out, as safetensors, never pickle; bit exact both ways in float32 and bfloat16.

Both ways stream: in memory are the parameters that share a tensor of the file, or a device's part of one parameter.
Letters: d model, n heads, h head size, l layers, v words.
"""

import itertools
import json
import re
from pathlib import Path

import jax
import numpy as np

from alignjax.config import Model, UserError
from alignjax.machine.sharding import path_name
from alignjax.models import families, transformer
from alignjax.weights.safetensors import DTYPES, INDEX, open_tensors, write_tensors

HARMLESS = re.compile(r"rotary_emb\.inv_freq$")  # computed, yet stored by old versions


def open_hf(directory, head: str) -> tuple[Model, dict]:
    """(Model, views) from config.json and safetensors in `directory`; nothing is read until `cut` cuts a view.

    A view is a parameter as it lies in the mapped file: an array, or of a stacked parameter one array for each layer.
    head="scalar" takes `score.weight` (and `score.bias`, else 0); a checkpoint without has no views of a head.
    UserError for what we can't run, and for a missing, extra or misshapen tensor.
    """
    directory = Path(directory)
    path = directory / "config.json"
    try:
        model = families.model_from_hf(json.loads(path.read_text(encoding="utf-8")), str(path))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: {error}") from error
    tensors = open_tensors(directory)
    shapes, weights = layout(model, head)
    views = {}
    for name, paths, layer in weights:
        if name.startswith("score.") and name not in tensors:
            continue
        want = hf_shape(paths, layer, shapes)
        if name not in tensors:
            raise UserError(f"{directory}: there is no tensor {name} {list(want)}")
        if tensors[name].shape != want:
            raise UserError(
                f"{directory}: tensor {name} is {list(tensors[name].shape)}, {list(want)} wanted"
            )
        for path, view in split(tensors[name], paths, layer, shapes):
            if layer is None:
                views[path] = view
            else:
                views.setdefault(path, []).append(view)
    check_extra(directory, tensors, {name for name, _, _ in weights}, model, head)
    if "head/kernel" in views and head == "scalar":
        views.setdefault("head/bias", np.zeros(1, np.float32))
    return model, views


def cut(view, index=(slice(None),)) -> np.ndarray:
    """params[index] in float32, from a view of `open_hf`: no other part of the file is read."""
    if isinstance(view, list):
        return np.stack([layer[index[1:]] for layer in view[index[0]]], dtype=np.float32)
    return np.array(view[index], np.float32)


def load_hf(directory, head: str) -> tuple[Model, dict]:
    """(Model, params as nested dicts of float32 numpy arrays) of a whole checkpoint, as `open_hf` finds it."""
    model, views = open_hf(directory, head)
    return model, nest({path: cut(view) for path, view in views.items()})


def save_hf(
    model: Model, params, directory, dtype: str = "float32", max_shard_bytes: int = 5 * 10**9
) -> None:
    """`write_hf` of nested dicts of arrays that this process can read; their head tells which."""
    flat = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    head = "scalar" if "head/bias" in flat else "lm"
    shapes, _ = layout(model, head)
    odd = sorted({*shapes} ^ {*flat})
    if odd:
        raise UserError(
            f"{directory}: parameter {odd[0]} is {'absent' if odd[0] in shapes else 'one too many'}"
        )
    write_hf(model, head, lambda path: np.asarray(flat[path]), directory, dtype, max_shard_bytes)


def write_hf(
    model: Model, head: str, read, directory, dtype="float32", max_shard_bytes=5 * 10**9, tokens=()
) -> int:
    """Write model.safetensors (several with an index above `max_shard_bytes`), then config.json; the bytes of data.

    read(path) gives one parameter as an array; it is asked for those that share a tensor, and they are let go before
    the next are asked for. `dtype` of the file is "float32" or "bfloat16". `tokens` are ids for config.json.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = families.hf_from_model(model, head, dtype) | dict(tokens)
    shapes, weights = layout(model, head)
    kind = {"float32": "F32", "bfloat16": "BF16"}[dtype]
    shards = [[]]
    room = max_shard_bytes
    for name, paths, layer in weights:
        shape = hf_shape(paths, layer, shapes)
        size = int(np.prod(shape)) * DTYPES[kind].itemsize
        if shards[-1] and size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append((name, (kind, shape)))
        room -= size
    tensors = joined(read, weights, shapes, directory)
    index, total = {}, 0
    for i, shard in enumerate(shards):
        file = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        )
        total += write_tensors(directory / file, dict(shard), tensors)
        index |= {name: file for name, _ in shard}
    if len(shards) > 1:
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
        (directory / INDEX).write_text(text, encoding="utf-8")
    (directory / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return total


def layout(model: Model, head: str):
    """({path: shape}, [(tensor name, paths, layer or None)]): all parameters, and the tensors that hold them.

    Tensors of the same parameters, which are those of all layers, follow each other, from the first layer to the last.
    """
    tree = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0), head))
    shapes = {path_name(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    names = families.weight_names(model, head)
    if set(names) != set(shapes):
        raise UserError(
            f"model.family={model.family!r} and the config differ on {sorted(set(names) ^ set(shapes))}: "
            f"model.qkv_bias, model.qk_norm must be {families.SHAPES[model.family]}"
        )
    groups = {}
    for path, name in names.items():
        groups.setdefault(name, []).append(path)
    weights = []
    for name, paths in groups.items():
        layers = range(model.layers) if "{}" in name else (None,)
        weights += [(name.format(layer), tuple(paths), layer) for layer in layers]
    return shapes, weights


def hf_shape(paths, layer, shapes) -> tuple:
    """The shape in the file of the tensor made of `paths`, joined along its first axis."""
    parts = [
        matrix_shape(path, shapes[path] if layer is None else shapes[path][1:]) for path in paths
    ]
    return (sum(part[0] for part in parts), *parts[0][1:])


def matrix_shape(path: str, shape: tuple) -> tuple:
    """The file's shape, [out in] of a kernel, [n*h] of a bias [n h]. Only `out` kernels contract two axes, [n h d]."""
    if path.endswith("kernel"):
        inputs = 2 if "out/" in path else 1
        return int(np.prod(shape[inputs:])), int(np.prod(shape[:inputs]))
    return (int(np.prod(shape)),) if path.endswith("bias") else shape


def split(tensor, paths, layer, shapes):
    """(path, view) of each parameter, or of its layer, that the file's tensor is made of, in the parameter's shape."""
    row = 0
    for path in paths:
        shape = shapes[path] if layer is None else shapes[path][1:]
        rows = matrix_shape(path, shape)[0]
        part = tensor[row : row + rows]
        yield path, (part.T if path.endswith("kernel") else part).reshape(shape)
        row += rows


def joined(read, weights, shapes, directory):
    """The tensors of `weights` as the file wants them, put together from their parts: what `split` undoes."""
    for paths, group in itertools.groupby(weights, lambda weight: weight[1]):
        params = [read(path) for path in paths]
        for path, x in zip(paths, params, strict=True):
            if x.shape != shapes[path]:
                raise UserError(
                    f"{directory}: parameter {path} is {list(x.shape)}, {list(shapes[path])} wanted"
                )
        for _, _, layer in group:
            yield join(paths, params if layer is None else [x[layer] for x in params])
        del params, x  # before the next are read


def join(paths, parts):
    """One tensor of the file, from its parts along the first axis."""
    matrices = []
    for path, x in zip(paths, parts, strict=True):
        shape = matrix_shape(path, x.shape)
        matrices.append(x.reshape(shape[::-1]).T if path.endswith("kernel") else x.reshape(shape))
    return np.concatenate(matrices) if len(matrices) > 1 else matrices[0]


def check_extra(directory, tensors, known, model: Model, head: str) -> None:
    """UserError for a tensor that we would leave unread, or a stored copy of a tied head that isn't one."""
    for name in tensors:
        if (
            name in known
            or HARMLESS.search(name)
            or (name == "lm_head.weight" and head == "scalar")
        ):
            continue
        embedding = families.NAMES[model.family]["embed/embedding"]
        if name != "lm_head.weight" or not model.tied:
            raise UserError(
                f"{directory}: tensor {name} {list(tensors[name].shape)} has no place in {model.family!r}, "
                f"head {head!r}"
            )
        rows = zip(
            tensors[name], tensors[embedding], strict=False
        )  # one by one, for they may be large
        if tensors[name].shape != tensors[embedding].shape or not all(
            itertools.starmap(np.array_equal, rows)
        ):
            raise UserError(
                f"{directory}: lm_head.weight differs from {embedding}, but tie_word_embeddings=True"
            )


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
