"""Write the adapters of a run as PEFT has them: their tensors, and adapter_config.json.

A parameter with adapters is one module of the files. Where a family's checkpoint joins several
parameters in one module, such as Qwen's c_attn, the module's adapter has the ranks of all of them:
lora_A stacks theirs, and in lora_B each has its own rows and columns. It computes the same.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alignjax.config import Model
from alignjax.weights.hf import DTYPES, ReadParameter
from alignjax.weights.hf_layout import (
    FileTensor,
    Layout,
    kernel_tensors,
    layout_of,
)
from alignjax.weights.peft_adapter import PREFIX, SCORE, SCORE_BIAS, WEIGHTS
from alignjax.weights.peft_config import CONFIG, config_content
from alignjax.weights.safetensors import TensorSpec, write_tensors


@dataclass(frozen=True, kw_only=True)
class AdaptersToWrite:
    """The adapters of a role, and what their files say of them.

    paths: of the parameters that have adapters, such as layers/attention/q/kernel.
    base: what peft loads the base model from: a name on the hub or a directory.
    """

    model: Model
    head: str  # "lm" or "scalar"
    paths: Sequence[str]
    rank: int
    alpha: float
    base: str
    revision: str = ""  # of the base on the hub


def write_adapter(
    adapters: AdaptersToWrite, read: ReadParameter, directory: Path, dtype: str = "float32"
) -> int:
    """Write the two files of an adapter; return the bytes of its tensors.

    `read` returns a parameter by its path: `lora_a` [layers *inputs rank] and `lora_b` [layers rank
    *outputs] beside each kernel of `adapters.paths`, and head/kernel and head/bias of a scalar
    head. `dtype` is the file's type, "float32" or "bfloat16".
    """
    layout = layout_of(adapters.model, "lm")
    modules = adapted_modules(adapters, layout)
    specs = [
        TensorSpec(name, DTYPES[dtype], shape)
        for module in modules
        for name, shape in module.shapes(layout).items()
    ]
    tensors = module_tensors(modules, layout, read)
    if adapters.head == "scalar":
        width = adapters.model.d_model
        specs += [TensorSpec(PREFIX + SCORE, DTYPES[dtype], (1, width))]
        specs += [TensorSpec(PREFIX + SCORE_BIAS, DTYPES["float32"], (1,))]
        head = iter([read("head/kernel").T, read("head/bias")])
        tensors = itertools.chain(tensors, head)
    size = write_tensors(directory / WEIGHTS, specs, tensors)
    content = adapter_config(adapters, modules)
    (directory / CONFIG).write_text(json.dumps(content, indent=1), encoding="utf-8")
    return size


@dataclass(frozen=True, kw_only=True)
class Module:
    """A module of the files in one layer, and which of its parameters have adapters."""

    tensor: FileTensor  # its weight
    adapted: tuple[str, ...]  # of tensor.paths
    rank: int  # of each parameter

    @property
    def name(self) -> str:
        """Return the name of the module, such as model.layers.0.mlp.up_proj."""
        return self.tensor.module

    def shapes(self, layout: Layout) -> Mapping[str, tuple[int, ...]]:
        """Return tensor name -> shape of the module's factors."""
        outputs, inputs = layout.file_shape(self.tensor)
        rank = self.rank * len(self.adapted)
        return {
            f"{PREFIX}{self.name}.lora_A.weight": (rank, inputs),
            f"{PREFIX}{self.name}.lora_B.weight": (outputs, rank),
        }


def adapted_modules(adapters: AdaptersToWrite, layout: Layout) -> list[Module]:
    """Return the modules that have adapters, from the first layer to the last of each."""
    modules = []
    for tensor in layout.tensors:
        adapted = tuple(path for path in tensor.paths if path in adapters.paths)
        if adapted:
            modules.append(Module(tensor=tensor, adapted=adapted, rank=adapters.rank))
    return modules


def module_tensors(
    modules: Sequence[Module], layout: Layout, read: ReadParameter
) -> Iterator[np.ndarray]:
    """Yield the factors of all modules; those of a module's layers are read together."""
    for _, layers in itertools.groupby(modules, lambda module: module.tensor.paths):
        factors: dict[str, np.ndarray] = {}
        for module in layers:
            for path in module.adapted:
                for name in ("lora_a", "lora_b"):
                    factor = factor_path(path, name)
                    if factor not in factors:
                        factors[factor] = read(factor)
            yield joined_down(module, factors)
            yield joined_up(module, layout, factors)


def factor_path(kernel: str, name: str) -> str:
    """Return the path of a factor beside a kernel."""
    return f"{kernel.removesuffix('kernel')}{name}"


def joined_down(module: Module, factors: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return lora_A [rank inputs] of a module: the factors of its parameters below each other."""
    (layer,) = module.tensor.place
    parts = [
        factors[factor_path(path, "lora_a")][layer].reshape(-1, module.rank).T
        for path in module.adapted
    ]
    return np.concatenate(parts)


def joined_up(module: Module, layout: Layout, factors: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return lora_B [outputs rank] of a module: each parameter has its own rows and columns."""
    outputs, _ = layout.file_shape(module.tensor)
    (layer,) = module.tensor.place
    joined = np.zeros((outputs, module.rank * len(module.adapted)), np.float32)
    row = 0
    column = 0
    for path in module.tensor.paths:
        count = layout.file_rows(path, module.tensor)
        if path in module.adapted:
            factor = factors[factor_path(path, "lora_b")][layer]
            part = factor.reshape(module.rank, count).T
            joined[row : row + count, column : column + module.rank] = part
            column += module.rank
        row += count
    return joined


def adapter_config(adapters: AdaptersToWrite, modules: Sequence[Module]) -> dict:
    """Return the content of adapter_config.json."""
    ends = target_names([module.name for module in modules], adapters.model)
    joined = {
        end: len(module.adapted)
        for module in modules
        for end in ends
        if module.name.endswith(f".{end}") and len(module.adapted) > 1
    }
    content = config_content(
        base=adapters.base,
        rank=adapters.rank,
        alpha=adapters.alpha,
        targets=ends,
        is_classifier=adapters.head == "scalar",
        rank_pattern={end: count * adapters.rank for end, count in joined.items()},
        alpha_pattern={end: count * adapters.alpha for end, count in joined.items()},
    )
    return content | ({"revision": adapters.revision} if adapters.revision else {})


def target_names(modules: Sequence[str], model: Model) -> list[str]:
    """Return ends of names that these modules have and no other module of the layers.

    They are as short as peft's users write them: q_proj, and attn.c_proj where mlp has one too.
    """
    tensors = kernel_tensors(layout_of(model, "lm"))
    others = {tensor.module for tensor in tensors} - set(modules)
    names: dict[str, None] = {}
    for module in modules:
        parts = module.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        names[next(end for end in ends if not any(x.endswith(f".{end}") for x in others))] = None
    return list(names)
