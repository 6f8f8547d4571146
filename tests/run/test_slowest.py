"""A rank that the others wait for is named."""

import json
import re
import socket
from pathlib import Path

import pytest
from conftest import run_ranks


@pytest.mark.slow
def test_the_slow_rank_is_named_at_any_stage(tmp_path: Path) -> None:
    printed = run_ranks(2, "slow_worker", tmp_path, "2-1", "3-0")
    found = re.findall(r"^slowest  rank (\d) \((.*)\): others wait (\d+) % of a step for it", printed, re.MULTILINE)
    assert [(int(rank), host) for rank, host, _ in found] == [(1, socket.gethostname()), (0, socket.gethostname())]
    assert all(int(share) > 20 for _, _, share in found)
    entry = json.loads((tmp_path / "2-1" / "metrics.jsonl").read_text().splitlines()[0])
    assert entry["tokens_per_second"] == pytest.approx(entry["tokens"] / entry["step_seconds"], abs=0.1)
    assert entry["tokens_per_second_per_device"] == pytest.approx(entry["tokens_per_second"] / 2, abs=0.1)
