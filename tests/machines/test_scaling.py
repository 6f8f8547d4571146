"""The arithmetic for 1,024 ranks (tests/by_hand/scaling_table.py) is right for 1, 2 and 4.

tests/compare/test_compare.py does the same for its traffic, tests/distributed/test_agreement.py for the agreement.
"""

import json
from pathlib import Path

import pytest
from conftest import run_ranks
from scaling_table import manifest, pieces, sockets, traffic

from lib.run.checkpoint_files import MANIFEST, folder_of


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_checkpoints_and_sockets_are_as_computed(tmp_path: Path, ranks: int) -> None:
    run_ranks(ranks, "scaling_worker", tmp_path)
    assert json.loads((tmp_path / "sockets.json").read_text()) == sockets(ranks)
    for stage in range(4):
        folder = tmp_path / str(stage) / "checkpoints" / folder_of(1)
        found = json.loads((folder / MANIFEST).read_text())
        assert len(list(folder.iterdir())) == ranks + 1
        written = [sorted(file["pieces"]) for file in found["files"].values()]
        assert written == [sorted(each) for each in pieces(stage, ranks, found["shapes"])], stage
        # But for the digits of the sizes of the files.
        computed = len(json.dumps(manifest(stage, ranks, found["shapes"])))
        assert computed == pytest.approx(len(json.dumps({name: found[name] for name in ("shapes", "files")})), rel=0.02)


def test_more_ranks_send_no_more_and_each_stage_sends_its_passes() -> None:
    """Passes over a model of one matrix and one vector: 2 at stage 0, 3 at 1 and 2, 2 at 3, where vectors are kept."""
    shapes = {"matrix": [1000, 1000], "vector": [1000]}
    for stage, passes in enumerate((2, 3, 3, 2)):
        for ranks in (2, 1024):
            assert traffic(stage, ranks, shapes, 4) == pytest.approx(passes * 4 * 1_001_000 * (ranks - 1) / ranks)
