"""Host data between the processes of one run. Every process must make each of these calls."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

CHUNK = 1 << 24  # bytes of each process that are gathered at a time
SMALLEST_CHUNK = 1 << 10  # bytes


def gather(data: bytes) -> list[bytes]:
    """Return the bytes that each process passes, ordered by process, in every process."""
    if jax.process_count() == 1:
        return [data]
    sizes = gather_sizes(len(data))
    rest = np.frombuffer(data, np.uint8)
    parts: list[list[bytes]] = [[] for _ in sizes]
    for start in range(0, max(sizes), CHUNK):
        chunk = np.zeros(chunk_size(max(sizes) - start), np.uint8)
        local_bytes = rest[start : start + len(chunk)]
        chunk[: len(local_bytes)] = local_bytes
        chunks = multihost_utils.process_allgather(chunk)
        for part, size, gathered in zip(parts, sizes, chunks, strict=True):
            length = max(0, min(size - start, len(chunk)))
            part.append(gathered[:length].tobytes())
    return [b"".join(part) for part in parts]


def gather_sizes(size: int) -> list[int]:
    """Return the size that each process passes, as two int32 because it may exceed one."""
    pairs = multihost_utils.process_allgather(np.array(divmod(size, CHUNK), np.int32))
    return [int(chunks) * CHUNK + int(rest) for chunks, rest in pairs]


def chunk_size(left: int) -> int:
    """Round up to a power of two, so that few shapes are compiled; at most CHUNK."""
    power = 1 << (left - 1).bit_length()
    return min(CHUNK, max(SMALLEST_CHUNK, power))


def largest_of_all(number: int) -> jax.Array:
    """Return the largest number that any process passes.

    The result is an array that may still be computing: no process waits for the others before
    it reads the result.
    """
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("devices",))
    local_numbers = np.full(jax.local_device_count(), number, np.int32)
    by_device = NamedSharding(mesh, P("devices"))
    with jax.set_mesh(mesh):
        numbers = jax.make_array_from_process_local_data(by_device, local_numbers)
        return jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))(numbers)


def true_in_all(condition: bool) -> bool:
    """Return whether a condition holds in every process; all wait for each other."""
    if jax.process_count() == 1:
        return condition
    return bool(multihost_utils.process_allgather(np.array(condition)).all())
