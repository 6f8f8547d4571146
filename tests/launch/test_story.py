"""docs/story.sh, with tiny models: from pre-training to a file for llama.cpp."""

from pathlib import Path

import pytest
from conftest import ALL, ROOT, SCRIPTS, execute


@pytest.mark.slow
@pytest.mark.skipif(not ALL, reason="three minutes, of what other tests check one by one")
def test_the_story_runs(tmp_path: Path) -> None:
    done = execute([ROOT / "docs" / "story.sh", "--quick"], STORY_FOLDER=str(tmp_path), PATH=f"{SCRIPTS}:/usr/bin:/bin")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("this model, ") == 3  # three recipes have shown their scores
    assert (tmp_path / "model.gguf").stat().st_size > 1e6
