"""How several processes divide reading and tokenising, and all get the whole result.

Process h of P has the items h, h + P, h + 2 P ... A process that is alone has them all, and
nothing is copied.
"""

import itertools
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from alignjax.machine import collectives

Columns = dict[str, list[np.ndarray]]  # named lists, all of one length, of int32 arrays [any]


def local(items: Sequence) -> Sequence:
    """Return this process's share of a sequence."""
    return items[jax.process_index() :: jax.process_count()]


def whole(parts: list[list]) -> list:
    """Return the items in their order, from the shares of all processes."""
    if len(parts) == 1:
        return parts[0]
    missing = object()
    rounds = itertools.zip_longest(*parts, fillvalue=missing)
    return [item for items in rounds for item in items if item is not missing]


def exchange(value: Any) -> list:
    """Return the value of each process, in their order; every process must call this.

    JSON must be able to express the value.
    """
    if jax.process_count() == 1:
        return [value]
    return [json.loads(data) for data in collectives.gather(json.dumps(value).encode())]


def whole_columns(local_columns: Columns) -> Columns:
    """Return the columns of all items, from this process's share; every process must call this."""
    if jax.process_count() == 1:
        return local_columns
    names = list(local_columns)
    gathered = [unpack(data, names) for data in collectives.gather(pack(local_columns))]
    return {name: whole([columns[name] for columns in gathered]) for name in names}


def pack(columns: Columns) -> bytes:
    """Return columns as bytes: how many arrays there are, their lengths, and their numbers."""
    arrays = [ids for column in columns.values() for ids in column]
    header = np.array([len(arrays), *map(len, arrays)], np.int32)
    return np.concatenate([header, *arrays]).tobytes()


def unpack(data: bytes, names: list[str]) -> Columns:
    """Return what `pack` packed; the names are the same in every process."""
    numbers = np.frombuffer(data, np.int32)
    count = int(numbers[0])
    lengths = numbers[1 : 1 + count]
    ends = np.cumsum(lengths, dtype=np.int64)
    arrays = np.split(numbers[1 + count :], ends[:-1])[:count]
    size = count // len(names)
    return {name: arrays[i * size : (i + 1) * size] for i, name in enumerate(names)}
