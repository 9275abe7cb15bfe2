"""The adapters in a PEFT directory: which parameters they change, and their two factors.

An adapter of a kernel [*inputs *outputs] adds scale x lora_a @ lora_b, with lora_a [*inputs rank]
and lora_b [rank *outputs]. In a file the factors are lora_A [rank inputs] and lora_B [outputs
rank]. Where a family's file joins kernels into one module, they share its lora_A, and each has its
own rows of its lora_B.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alignjax.config import Model, UserError
from alignjax.models import families
from alignjax.weights.hf_layout import (
    Layout,
    Shape,
    axis_groups,
    kernel_tensors,
    layout_of,
)
from alignjax.weights.peft_config import CONFIG, AdapterConfig, read_adapter_config
from alignjax.weights.safetensors import StoredTensor, open_file

WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"
PREFIX = "base_model.model."  # peft's own, before the name that the base gives a module
SCORE = "score.weight"
SCORE_BIAS = "score.bias"  # ours: peft and transformers know no bias of this head


@dataclass(frozen=True, kw_only=True)
class Factors:
    """The factors of the adapters of one parameter in all layers.

    lora_a: [layers *inputs rank], lora_b: [layers rank *outputs], both float32 and on the host.
    A layer without an adapter has zeros, and one of a lower rank has zeros beyond it.
    """

    lora_a: np.ndarray
    lora_b: np.ndarray


@dataclass(frozen=True, kw_only=True)
class ModuleAdapter:
    """The adapter of a parameter in one layer, as it is in the file."""

    down: StoredTensor  # lora_A [rank inputs]
    up: StoredTensor  # lora_B [outputs rank]
    first_row: int  # of `up`
    rank: int
    scale: float


@dataclass(frozen=True, kw_only=True)
class ParameterAdapter:
    """The adapters of one stacked kernel; `layers` has None where there is none."""

    inputs: Shape
    outputs: Shape
    layers: tuple[ModuleAdapter | None, ...]

    @property
    def rank(self) -> int:
        """Return the highest rank of a layer."""
        return max(part.rank for part in self.layers if part is not None)

    def read(self) -> Factors:
        """Read the factors, without their scales."""
        count = len(self.layers)
        lora_a = np.zeros((count, *self.inputs, self.rank), np.float32)
        lora_b = np.zeros((count, self.rank, *self.outputs), np.float32)
        rows = math.prod(self.outputs)
        for number, part in enumerate(self.layers):
            if part is None:
                continue
            down = part.down.read((slice(None), slice(None)))
            up = part.up.read((slice(part.first_row, part.first_row + rows), slice(None)))
            lora_a[number, ..., : part.rank] = down.T.reshape(*self.inputs, part.rank)
            lora_b[number, : part.rank] = up.T.reshape(part.rank, *self.outputs)
        return Factors(lora_a=lora_a, lora_b=lora_b)


@dataclass(frozen=True, kw_only=True)
class PeftAdapter:
    """A PEFT directory, mapped: nothing is read until a parameter is."""

    directory: Path
    config: AdapterConfig
    parameters: Mapping[str, ParameterAdapter]  # path of the kernel -> its adapters
    score: StoredTensor | None  # [1 d_model], of a sequence classifier
    score_bias: StoredTensor | None  # [1], in an export of ours

    def read_head(self) -> dict[str, np.ndarray] | None:
        """Return the parameters of the scalar head, or None if the adapter has none."""
        if self.score is None:
            return None
        bias = np.zeros(1, np.float32)
        if self.score_bias is not None:
            bias = self.score_bias.read((slice(None),)).astype(np.float32)
        kernel = self.score.read((slice(None), slice(None))).astype(np.float32)
        return {"kernel": kernel.T, "bias": bias}


def open_adapter(directory: Path, model: Model) -> PeftAdapter:
    """Map the adapter of a model's parameters in a directory.

    Raises:
      UserError: for a missing or damaged file, for a setting that we do not compute, and for a
        tensor that is missing, has another shape, or has no place in the model.
    """
    config = read_adapter_config(directory)
    tensors = open_weights(directory)
    layout = layout_of(model, "lm")
    check_other_modules(config, model)
    remaining = dict(tensors)
    parts: dict[str, list[ModuleAdapter | None]] = {}
    for part in adapted_parts(config, layout, AdapterTensors(directory, tensors), remaining):
        parts.setdefault(part.path, []).append(part.adapter)
    score = take_score(config, model, directory, remaining)
    bias = remaining.pop(PREFIX + SCORE_BIAS, None) if score is not None else None
    if remaining:
        name = sorted(remaining)[0]
        raise UserError(
            f"{directory / WEIGHTS}: tensor {name} {list(remaining[name].shape)} has no place in "
            f"an adapter of {model.family!r} by {CONFIG}"
        )
    parameters = {
        path: parameter_adapter(path, layout, layers)
        for path, layers in parts.items()
        if any(layers)
    }
    if not parameters:
        raise UserError(
            f"{directory / CONFIG}: target_modules={config.fields.get('target_modules')!r} names "
            f"no module of {model.family!r}"
        )
    return PeftAdapter(
        directory=directory, config=config, parameters=parameters, score=score, score_bias=bias
    )


@dataclass(frozen=True, kw_only=True)
class AdaptedPart:
    """A parameter in one layer, with its adapter or None."""

    path: str
    adapter: ModuleAdapter | None


@dataclass(frozen=True)
class AdapterTensors:
    """The mapped tensors of an adapter, and the directory that errors name."""

    directory: Path
    tensors: Mapping[str, StoredTensor]

    def get(self, name: str, shape: Shape) -> StoredTensor:
        """Return a tensor; UserError if it is missing or has another shape."""
        path = self.directory / WEIGHTS
        if name not in self.tensors:
            raise UserError(f"{path}: there is no tensor {name} {list(shape)}")
        tensor = self.tensors[name]
        if tensor.shape != shape:
            raise UserError(f"{path}: tensor {name} is {list(tensor.shape)}, {list(shape)} wanted")
        return tensor


def open_weights(directory: Path) -> dict[str, StoredTensor]:
    """Map the tensors of an adapter; UserError if their file is missing or pickled."""
    if (directory / WEIGHTS).is_file():
        return open_file(directory / WEIGHTS)
    note = ""
    if (directory / PICKLED_WEIGHTS).exists():
        note = (
            f" (pickled files are not read, and there is {PICKLED_WEIGHTS}: load it with peft and "
            "save it with save_pretrained, which writes safetensors)"
        )
    raise UserError(f"{directory}: there is no file {WEIGHTS}{note}")


def adapted_parts(
    config: AdapterConfig,
    layout: Layout,
    tensors: AdapterTensors,
    remaining: dict[str, StoredTensor],
) -> Iterator[AdaptedPart]:
    """Yield all kernels of all layers in order; tensors that they have leave `remaining`."""
    for tensor in kernel_tensors(layout):
        module = tensor.module
        if not config.targets(module):
            yield from (AdaptedPart(path=path, adapter=None) for path in tensor.paths)
            continue
        rank = config.rank(module)
        outputs, *inputs = layout.file_shape(tensor)
        down_name = f"{PREFIX}{module}.lora_A.weight"
        up_name = f"{PREFIX}{module}.lora_B.weight"
        down = tensors.get(down_name, (rank, *inputs))
        up = tensors.get(up_name, (outputs, rank))
        remaining.pop(down_name)
        remaining.pop(up_name)
        row = 0
        for path in tensor.paths:
            adapter = ModuleAdapter(
                down=down, up=up, first_row=row, rank=rank, scale=config.scale(module)
            )
            yield AdaptedPart(path=path, adapter=adapter)
            row += layout.file_rows(path, tensor)


def parameter_adapter(
    path: str, layout: Layout, layers: list[ModuleAdapter | None]
) -> ParameterAdapter:
    """Return the adapters of a kernel with the shapes of its factors."""
    shape = layout.shapes[path][1:]
    output_axes, input_axes = axis_groups(path, len(shape))
    return ParameterAdapter(
        inputs=tuple(shape[axis] for axis in input_axes),
        outputs=tuple(shape[axis] for axis in output_axes),
        layers=tuple(layers),
    )


def check_other_modules(config: AdapterConfig, model: Model) -> None:
    """Raise UserError if a module beside the layers' products has an adapter."""
    if config.targets_all_linear:
        return  # peft leaves out heads and embeddings
    targets = config.fields.get("target_modules")
    names = families.weight_names(model, "lm") | {"head/kernel": "lm_head.weight"}
    for path, name in names.items():
        if path.startswith("layers/") and path.endswith("kernel"):
            continue
        module = name.format(0).rpartition(".")[0]
        # A bias is in the same module as its kernel.
        if not path.endswith("bias") and config.targets(module):
            raise UserError(
                f"{config.fields.where}: target_modules={targets!r} has {module}, but only "
                "products within layers can have adapters"
            )


def take_score(
    config: AdapterConfig, model: Model, directory: Path, remaining: dict[str, StoredTensor]
) -> StoredTensor | None:
    """Take the head of a sequence classifier from the remaining tensors, if there is one."""
    name = PREFIX + SCORE
    if not config.is_classifier:
        return None
    tensor = AdapterTensors(directory, remaining).get(name, (1, model.d_model))
    del remaining[name]
    return tensor
