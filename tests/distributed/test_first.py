"""What ranks compute once for all is computed once on each machine."""

from pathlib import Path

from conftest import run_ranks


def test_one_rank_of_each_machine_fills_its_cache(tmp_path: Path) -> None:
    run_ranks(4, "first_worker", tmp_path)
    filled = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("filled-by-*"))
    assert filled == ["machine-0/filled-by-0", "machine-1/filled-by-2"]
