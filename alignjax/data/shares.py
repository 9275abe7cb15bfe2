"""What each of several processes reads and tokenises of a source, and how all of them come to have the whole of it.

Process h of P has the items h, h + P, h + 2 P ... In a process that is alone its share is the whole, and nothing is copied.
"""

import itertools
import json

import jax
import numpy as np

from alignjax.machine import collectives


def mine(items):
    """This process's share of a sequence."""
    return items[jax.process_index() :: jax.process_count()]


def whole(parts: list[list]) -> list:
    """The items in their order, from the shares of all processes."""
    if len(parts) == 1:
        return parts[0]
    missing = object()
    rounds = itertools.zip_longest(*parts, fillvalue=missing)
    return [item for items in rounds for item in items if item is not missing]


def exchange(value) -> list:
    """Each process's value, which JSON can hold, in their order; every process calls this."""
    if jax.process_count() == 1:
        return [value]
    return [json.loads(data) for data in collectives.gather(json.dumps(value).encode())]


def exchange_ids(items: list[tuple]) -> list[list[tuple]]:
    """As `exchange`, of tuples of int32 arrays [any length], all tuples of one length."""
    if jax.process_count() == 1:
        return [items]
    flat = [ids for item in items for ids in item]
    header = [len(flat), len(flat) // max(len(items), 1), *map(len, flat)]
    found = collectives.gather(np.concatenate([np.array(header, np.int32), *flat]).tobytes())
    return [unpacked(np.frombuffer(data, np.int32)) for data in found]


def unpacked(numbers: np.ndarray) -> list[tuple]:
    count, width = numbers[:2]
    lengths, ids = numbers[2 : 2 + count], numbers[2 + count :]
    flat = np.split(ids, np.cumsum(lengths, dtype=np.int64)[:-1])
    return [tuple(flat[i : i + width]) for i in range(0, count, max(width, 1))]
