"""Tensors in a heap of their own never overlap, and a freed room takes again what it held."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from luthier.engine import heap, memory, native

MEGABYTE = 2**20
pytestmark = pytest.mark.skipif(not native.can_compile(), reason="no C++ compiler")


@pytest.fixture(autouse=True)
def held() -> None:
    assert heap.hold(), "torch's headers are beside it, so the heap must be ours"


def room(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.uint8)


def test_a_freed_room_takes_a_tensor_of_its_own_size_again() -> None:
    kept = [room(5 * MEGABYTE) for _ in range(3)]
    place = kept[1].data_ptr()
    del kept[1]
    assert room(5 * MEGABYTE).data_ptr() == place


def test_neighbours_that_are_free_are_one_room() -> None:
    size = 37 * MEGABYTE  # larger than what other tests may have left
    kept = [room(size) for _ in range(4)]
    low, high = sorted(tensor.data_ptr() for tensor in kept)[1:3]
    assert high - low == size
    kept = [tensor for tensor in kept if tensor.data_ptr() not in (low, high)]
    assert room(2 * size).data_ptr() == low


@given(
    st.lists(
        st.tuples(st.sampled_from([1, 100, 16_383, 16_384, 16_385, 70_000, 3_000_001]), st.integers(0, 9)),
        max_size=60,
    )
)
def test_tensors_never_overlap(asked: list[tuple[int, int]]) -> None:
    """Each new tensor takes the place of one of ten; what was written to the others stays."""
    alive: dict[int, tuple[int, Tensor]] = {}
    for number, (size, place) in enumerate(asked):
        alive.pop(place, None)
        alive[place] = number, torch.full((size,), number, dtype=torch.uint8)
    for number, tensor in alive.values():
        assert tensor.data_ptr() % 64 == 0 and bool((tensor == number).all())


def test_threads_may_share_it() -> None:
    def work(seed: int) -> bool:
        right = True
        for turn in range(200):
            tensors = [torch.full((20_000 + 1000 * ((seed + turn + at) % 7),), seed) for at in range(5)]
            right &= all(bool((tensor == seed).all()) for tensor in tensors)
        return right

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_what_is_free_goes_back_to_the_kernel_when_asked() -> None:
    heap.release()
    before = memory.rss_bytes()
    block = torch.ones(200 * MEGABYTE, dtype=torch.uint8)
    last = torch.ones(MEGABYTE, dtype=torch.uint8)  # nothing but pages inside a room may go
    del block
    assert memory.rss_bytes() - before > 190 * MEGABYTE
    heap.trim()
    assert memory.rss_bytes() - before < 20 * MEGABYTE
    assert bool((last == 1).all())


FULL = """
import ctypes
import torch
from luthier.engine import heap
assert heap._library().hold(ctypes.c_long(2**20))
tensors = [torch.full((400_000,), number, dtype=torch.uint8) for number in range(9)]
assert all(bool((tensor == number).all()) for number, tensor in enumerate(tensors))
del tensors
print(torch.ones(4 * 2**20).sum().item())
"""


def test_what_does_not_fit_lies_where_torch_puts_it() -> None:
    done = subprocess.run([sys.executable, "-c", FULL], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == 4 * 2**20


FORKED = """
import os, signal, threading
import torch
from luthier.engine import heap
assert heap.hold()
done = threading.Event()

def work():
    while not done.is_set():
        torch.zeros(30_000)

threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads:
    thread.start()
for _ in range(200):
    child = os.fork()
    if not child:
        signal.alarm(20)  # a lock that is held for ever ends it
        os._exit(int(torch.ones(30_000).sum()) != 30_000)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
done.set()
"""


def test_a_fork_while_others_work_leaves_the_child_a_heap_that_works() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKED], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
