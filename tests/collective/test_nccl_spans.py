"""Which bytes an all-to-all sends to and receives from whom, on real memory: the copies stand for the network."""

import ctypes

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ray_ep.collective.nccl import spans


def test_one_case_by_hand():
    # Rank 1 of 4, rows of 8 bytes from address 1000: two to rank 0, three stay, none to rank 2, one to rank 3.
    assert spans([2, 3, 0, 1], 8, 1000, 1) == [(0, 1000, 16), (3, 1040, 8)]


def test_rows_of_no_bytes_do_not_travel():
    assert spans([2, 3], 0, 1000, 0) == []


@given(
    st.integers(1, 5).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 4), min_size=n, max_size=n), min_size=n, max_size=n)
    ),
    st.integers(1, 7),
)
def test_every_row_arrives_where_a_rank_major_output_expects_it(table, row):
    """table [R, R]: rows that rank r sends to rank d."""
    size = len(table)
    inputs = [
        np.array([[r, d, i] for d in range(size) for i in range(table[r][d])], np.uint8).reshape(-1, 3).repeat(row, 1)
        for r in range(size)
    ]
    come = [[table[s][d] for s in range(size)] for d in range(size)]
    outputs = [np.full((sum(c), 3 * row), 255, np.uint8) for c in come]
    sent = {
        (r, peer): ctypes.string_at(at, count)
        for r in range(size)
        for peer, at, count in spans(table[r], 3 * row, inputs[r].ctypes.data, r)
    }
    for d in range(size):
        for peer, at, count in spans(come[d], 3 * row, outputs[d].ctypes.data, d):
            data = sent.pop((peer, d))
            assert len(data) == count
            ctypes.memmove(at, data, count)
    assert not sent
    for d in range(size):
        want = [[s, d, i] for s in range(size) for i in range(come[d][s]) if s != d]
        got = outputs[d][:, ::row]
        assert [list(x) for x in got if x[0] != 255] == want
