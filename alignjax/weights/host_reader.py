"""Parameters of a model one at a time, as whole host arrays, with its adapters added.

An export reads them so: no more than one parameter and its adapters are in memory.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alignjax.config import Lora, Model
from alignjax.models import lora
from alignjax.weights import bases, checkpoint, locations, peft_adapter, peft_parameters, roles
from alignjax.weights.hf import ReadParameter
from alignjax.weights.hf_layout import layout_of
from alignjax.weights.hf_views import ParameterView
from alignjax.weights.peft_adapter import PeftAdapter


def read_item(run: Path, head: str) -> ReadParameter:
    """Return a reader of what a run has saved of a role: all parameters, or its adapters."""
    item = checkpoint.newest(run) / bases.item_of(run, head)
    return functools.partial(checkpoint.restore_array, item)


def read_whole(directory: Path, head: str) -> ReadParameter:
    """Return a reader of all parameters of a role, "lm" or "scalar", of a run or a checkpoint."""
    if not locations.is_run(directory):
        return checkpoint_reader(directory, head)
    settings = bases.adapters_of(directory)
    if settings is None:
        return read_item(directory, head)
    base = bases.base_of(directory, head)
    return AdaptedRun(
        read_base=read_whole(bases.directory_of(directory, base.place), head),
        read_trained=read_item(directory, head),
        head=head,
        paths=adapted_paths(settings, locations.architecture(directory)),
        scale=settings.alpha / settings.rank,
    )


def checkpoint_reader(directory: Path, head: str) -> ReadParameter:
    """Return a reader of a Hugging Face checkpoint, which may have a PEFT adapter."""
    views = roles.open_views(directory, head)
    adapted = locations.adapted_model(directory)
    adapter = None
    if adapted is not None:
        model = locations.architecture(adapted.base)
        adapter = peft_adapter.open_adapter(adapted.adapter, model)
    return CheckpointReader(views=views, adapter=adapter)


def adapted_paths(settings: Lora, model: Model) -> list[str]:
    """Return the paths of the kernels that adapters of some settings change, in a fixed order."""
    targets = lora.targets_of(settings)
    kernels = [path for path in layout_of(model, "lm").shapes if path.endswith("/kernel")]
    return [path for path in kernels if path.split("/")[-2] in targets]


@dataclass(frozen=True, kw_only=True)
class AdaptedRun:
    """Reads the parameters of a role of a run with adapters."""

    read_base: ReadParameter
    read_trained: ReadParameter  # adapters, and a scalar head
    head: str
    paths: Sequence[str]  # of the kernels with adapters
    scale: float

    def __call__(self, path: str) -> np.ndarray:
        """Return a parameter by its path, in float32."""
        if path.startswith("head/") and self.head == "scalar":
            return self.read_trained(path)
        parameter = self.read_base(path)
        if path not in self.paths:
            return parameter
        lora_a = self.read_trained(path.replace("kernel", "lora_a"))
        lora_b = self.read_trained(path.replace("kernel", "lora_b"))
        return add_adapters(parameter, lora_a, lora_b, np.full(len(parameter), self.scale))


@dataclass(frozen=True, kw_only=True)
class CheckpointReader:
    """Reads the parameters of a Hugging Face checkpoint with a PEFT adapter, or without."""

    views: Mapping[str, ParameterView]
    adapter: PeftAdapter | None

    def __call__(self, path: str) -> np.ndarray:
        """Return a parameter by its path, in float32."""
        parameter = self.views[path].read()
        adapter = self.adapter.parameters.get(path) if self.adapter is not None else None
        if adapter is None:
            return parameter
        factors = adapter.read()
        scales = peft_parameters.layer_scales(adapter)
        return add_adapters(parameter, factors.lora_a, factors.lora_b, scales)


def add_adapters(
    kernel: np.ndarray, lora_a: np.ndarray, lora_b: np.ndarray, scales: np.ndarray
) -> np.ndarray:
    """Return a stacked kernel with its adapters added, layer by layer, in float32.

    Shapes: kernel [layers *inputs *outputs], lora_a [layers *inputs rank], lora_b [layers rank
    *outputs], scales [layers].
    """
    rank = lora_a.shape[-1]
    summed = np.empty(kernel.shape, np.float32)
    for layer, scale in enumerate(scales):
        change = lora_a[layer].reshape(-1, rank) @ lora_b[layer].reshape(rank, -1)
        summed[layer] = kernel[layer] + np.float32(scale) * change.reshape(kernel.shape[1:])
    return summed
