"""Memory that one process lends to another: found by its name, never taken for another, reused when free."""

from __future__ import annotations

import _thread
import collections
import gc
import operator
import os
import select
import signal
from dataclasses import replace

import numpy as np
import pytest

from cnn2gnn_dist.data.reading.shared_batches import MOST_LENT, Borrower, Lender, Spares


def test_what_a_borrower_writes_is_what_the_lender_reads():
    lender, borrower = Lender(), Borrower()
    buffer = lender.take(1000)
    memory = borrower.memory(lender.loan(buffer))
    memory[:] = np.arange(1000) % 251
    np.testing.assert_array_equal(buffer.memory[:1000], np.arange(1000) % 251)
    assert borrower.memory(lender.loan(buffer)) is memory


def test_a_number_that_belongs_to_another_file_is_refused(tmp_path):
    """As on another host, or when the file has been closed and its number taken."""
    lender, borrower = Lender(), Borrower()
    loan, other = lender.loan(lender.take(10)), lender.take(10)
    (tmp_path / "f").write_bytes(b"0123456789")
    with open(tmp_path / "f", "r+b") as file:
        for handle in (file.fileno(), other.handle, 1 << 20):
            assert borrower.memory(replace(loan, handle=handle)) is None
        assert (tmp_path / "f").read_bytes() == b"0123456789"
    assert borrower.memory(replace(loan, process=1 << 30)) is None


def test_free_memory_is_reused_and_what_is_held_is_not():
    lender = Lender()
    first = lender.take(100)
    images = np.asarray(lender.spares.lease(first))
    second = lender.take(100)
    assert second is not first
    del images
    gc.collect()
    assert lender.take(60) is first
    assert lender.take(60) is not second


def test_a_ctrl_c_while_a_batch_goes_is_not_lost():
    """It was when it came just before, once in some hundred times: Python drops what is raised in a finalizer."""
    lender, buffer = Lender(), Lender().take(100)
    batch = [np.asarray(lender.spares.lease(buffer))]
    # Both in one call of a C function, so that the first bytecode that sees the signal is the finalizer's, if any.
    both = map(operator.call, [_thread.interrupt_main, batch.clear])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            [collections.deque(calls, maxlen=0) for calls in (both, ())]
    finally:
        signal.signal(signal.SIGINT, before)
    assert batch == []
    assert lender.take(100) is buffer


def test_what_is_in_use_is_no_spare_one():
    spares, buffers = Spares(), [Lender().take(10) for _ in range(3)]
    leases = [spares.lease(buffer) for buffer in buffers[:2]]
    spares.add(buffers[2])
    assert (spares.in_use(), len(spares)) == (2, 1)
    del leases[0]
    gc.collect()
    assert (spares.in_use(), len(spares)) == (1, 2)
    assert {spares.pop(), spares.pop()} == {buffers[0], buffers[2]}
    assert spares.pop() is None


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no /proc")
def test_memory_that_is_no_longer_kept_is_unmapped_at_the_next_loan():
    lender, borrower = Lender(), Borrower()
    small = lender.take(100)
    name = small.name
    borrower.memory(lender.loan(small))
    lender.spares.add(small)
    del small
    large = lender.take(5000)  # the small one is discarded
    borrower.memory(lender.loan(large))
    with open("/proc/self/maps") as maps:
        found = maps.read()
    assert name not in found
    assert large.name in found


def test_a_foreign_pipe_is_not_even_opened(tmp_path):
    """Its reader would take the opening and closing for a writer that came and went."""
    lender, borrower = Lender(), Borrower()
    loan = lender.loan(lender.take(10))
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert borrower.memory(replace(loan, handle=pipe)) is None
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        assert poll.poll(0) == []
    finally:
        os.close(pipe)


def test_who_keeps_all_batches_does_not_use_up_the_open_files():
    lender = Lender()
    kept = [lender.take(10) for _ in range(MOST_LENT)]
    assert None not in kept
    assert lender.take(10) is None
    images = np.asarray(lender.spares.lease(kept.pop()))
    del images
    gc.collect()
    assert lender.take(10) is not None
