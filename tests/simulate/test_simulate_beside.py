"""Text beside a tower on one device, in virtual time."""

from __future__ import annotations

import pytest

from aiodisagg.bench.workload import ImageSpec, WorkloadRequest
from aiodisagg.simulate.cluster import Cluster
from aiodisagg.simulate.systems import flexible
from aiodisagg.simulate.times import Costs, read_times


@pytest.mark.parametrize("after_ms", range(10, 150, 10))
def test_text_waits_for_one_batch_at_most_before_a_step_of_decodes(after_ms: int) -> None:
    """The step waited for the tower, and the prompt for the step: 41 ms where one batch takes 12."""
    times = read_times("h200-vllm")
    pictures = tuple(ImageSpec(i, 1280, 720) for i in range(8))
    workload = [
        WorkloadRequest(0.0, (), 64, 400),
        WorkloadRequest(0.5, pictures, 64, 1),
        WorkloadRequest(0.5 + after_ms / 1e3, (), 64, 1),
    ]
    cluster = Cluster(flexible(1), times)
    cluster.run(workload)
    costs, text = Costs(times), cluster.requests[2]
    least_s = costs.decode_s(1, 300) + costs.mixed_s([(0, text.prompt)], 1, 300)
    assert text.first_s - text.source.arrival_s < costs.tower_s([3520]) + 1.05 * least_s
