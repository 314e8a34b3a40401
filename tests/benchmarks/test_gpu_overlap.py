"""What the benchmark of overlap makes of a profile."""

import pytest

from benchmarks.gpu_overlap import covered, hidden_shares, union


def test_spans_are_joined_and_what_they_have_in_common_is_counted_once():
    assert union([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]
    assert covered([(0, 10)], [(1, 2), (1, 3), (8, 12)]) == 2 + 2
    assert covered([(2, 3), (2.5, 4)], [(0, 10)]) == 2
    assert covered([(0, 1)], []) == covered([], [(0, 1)]) == 0
    assert covered([(0, 1), (4, 6)], [(0.5, 4.5), (5, 5.5), (9, 10)]) == 0.5 + 0.5 + 0.5


def test_what_lies_beside_the_computation_is_told_from_it_and_from_nccl():
    def event(name, stream, ts, dur, cat="kernel"):
        return {"cat": cat, "name": name, "ts": ts, "dur": dur, "args": {"stream": stream}}

    trace = {
        "traceEvents": [
            event("gemm", 7, 0, 4000),
            event("gemm", 7, 5000, 4000),
            event("ncclDevKernel_AllReduce", 20, 1000, 9000),  # longest of all, yet not the computation
            event("move", 24, 3000, 2000),
            event("Memcpy DtoD", 24, 20000, 2000, "gpu_memcpy"),
            event("cudaLaunchKernel", 1, 0, 50, "cuda_runtime"),
        ]
    }
    shares = hidden_shares(trace)
    assert shares["NCCL"] == pytest.approx((9.0, 7 / 9))
    assert shares["packing and arithmetic"] == pytest.approx((4.0, 1 / 4))
