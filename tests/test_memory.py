"""Running out of memory: what is taken for it, and that the attempt leaves nothing behind."""

import weakref

import pytest
import torch

from illava.memory import first_that_fits, is_memory, unless_out_of_memory

RAN_OUT = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", RAN_OUT, ids=repr)
def test_nothing_of_the_attempt_is_held(error):
    held = []

    def attempt():
        large = torch.zeros(8)
        held.append(weakref.ref(large))
        raise error

    assert is_memory(error)
    assert unless_out_of_memory(attempt) is None
    assert held[0]() is None


def test_other_errors_are_raised():
    def attempt():
        raise RuntimeError("no such layer")

    with pytest.raises(RuntimeError, match="no such layer"):
        unless_out_of_memory(attempt)
    assert unless_out_of_memory(lambda: 7) == 7


def test_the_first_that_fits():
    tried = []

    def attempt(needs):
        tried.append(needs)
        if needs > 2:
            raise MemoryError
        return needs

    attempts = [(str(needs), lambda needs=needs: attempt(needs)) for needs in (4, 3, 2, 1)]
    assert first_that_fits(attempts) == "2"
    assert tried == [4, 3, 2]
    assert first_that_fits(attempts[:2]) is None
