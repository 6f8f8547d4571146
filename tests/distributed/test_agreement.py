"""The agreement of all ranks after each step: right for any number of them, and a silent one is noticed in time."""

import json
from pathlib import Path

import pytest
from agreement_worker import SILENCE, TIMEOUT
from conftest import run_ranks


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 5])
def test_all_ranks_agree_or_notice_who_is_silent(tmp_path: Path, world_size: int) -> None:
    run_ranks(world_size, "agreement_worker", tmp_path)
    found = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    assert len(found) == world_size - 1
    for noticed in found:
        assert noticed["lost"] and TIMEOUT - 0.1 < noticed["seconds"] < SILENCE - 1
