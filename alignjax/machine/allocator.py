"""Memory that this process keeps, instead of giving it back and asking for it again."""

import ctypes

import jax

# Of `mallopt`, in the C library of Linux: the names of its settings.
TRIM_THRESHOLD = -1
TOP_PAD = -2
MMAP_THRESHOLD = -3
MOST = 2**31 - 1  # bytes: its largest number
PAD = 2**28  # bytes that the heap grows by at least


def keep_memory() -> bool:
    """Let a run on CPUs keep the memory of its arrays; return whether this works here.

    XLA allocates the temporaries of each program when it runs, and frees them when it ends. By
    default the C library gives such large blocks back at once, so each run of a program begins
    with the kernel clearing every page again: attention on packed rows then takes more than twice
    its time. The process will stay as large as it has been.
    """
    if jax.default_backend() != "cpu":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library than that of Linux
        return False
    settings = {MMAP_THRESHOLD: MOST, TRIM_THRESHOLD: MOST, TOP_PAD: PAD}
    return all([mallopt(name, value) == 1 for name, value in settings.items()])
