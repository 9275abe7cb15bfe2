"""A run on CPUs keeps the memory of its arrays."""

import platform
import resource

import jax
import pytest

from alignjax.machine import allocator

BLOCK = 2**26  # bytes, more than the C library ever keeps by itself


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs the C library of Linux")
def test_a_large_block_that_is_freed_is_not_cleared_again():
    """Its pages cause faults when they are first touched, and none after that."""
    assert allocator.keep_memory()

    def faults():
        """Fill a block, free it, and return how many pages the kernel had to give for it."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = bytearray(BLOCK)
        block[:] = b"x" * BLOCK
        del block
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    assert faults() < BLOCK // resource.getpagesize() // 10


def test_accelerators_keep_theirs_by_themselves(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not allocator.keep_memory()
