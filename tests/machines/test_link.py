"""What ranks on two hosts send each other: the bytes of theory, and a slow link takes their time."""

from pathlib import Path

import pytest
from benchmark_machines import bytes_a_step, measure, seconds_a_step, seconds_on_the_link, sent_by_gloo
from machine_runs import Hosts


@pytest.mark.slow
def test_the_link_carries_what_theory_says(hosts: Hosts, shared: Path) -> None:
    found = measure(hosts, shared, ["3-none", "0-100mbit"])
    for case, of_case in found.items():
        # Headers, label counts and the agreement come on top, and never less than theory.
        assert 1 < bytes_a_step(of_case) / sent_by_gloo(of_case) < 1.05, case
    slow = found["0-100mbit"]
    assert seconds_a_step(slow) > seconds_on_the_link(0.95 * sent_by_gloo(slow), "100mbit")
