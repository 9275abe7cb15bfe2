"""What `train.py` drives: a stage is data, a loss and a start."""

from collections.abc import Callable
from typing import NamedTuple


class Stage(NamedTuple):
    """State is a dict: role -> TrainState, and whatever else a resume needs. Steps count from 0."""

    steps: int  # of the loop
    shapes: dict  # the state's shapes, types and shardings
    start: Callable  # () -> state, fresh or from the parents
    step: Callable  # (state, step) -> state, metrics (device scalars), late (() -> more metrics, rows of samples)
    finish: Callable  # state -> state, after the last step and before the last save
    evaluate: Callable  # state -> {figure: number} for summary.json
    table: Callable  # figures -> [(words, text)], the run's result at a glance
    shown: tuple[str, ...]  # metrics on the progress bar


def nothing_late():
    return {}, []
