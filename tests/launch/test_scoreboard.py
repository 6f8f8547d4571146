"""The table of results: each row says where and when its run was made, and rows that are not measured again stay."""

import json
import os
import time
from pathlib import Path

import pytest
import yaml

from lib.errors import ROOT, UserError
from lib.launch import scoreboard

DAY = 24 * 3600


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished run of causal_lm, three days old."""
    scores = {"this model, 9 test tokens": {"perplexity": 214.06}, "unigram": {"perplexity": 781.9}}
    (tmp_path / "result.json").write_text(json.dumps({"finished": True, "seconds": 222.0, "scores": scores}))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"dataset": "sotu"}))
    (tmp_path / "versions.json").write_text(json.dumps({"deepspeed": "0.19.8", "torch": "2.13.0+cpu"}))
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    os.utime(tmp_path / "metrics.jsonl", times=(time.time() - 3 * DAY,) * 2)
    return tmp_path


def test_a_row_says_where_and_when_it_was_measured(run: Path) -> None:
    assert scoreboard.row("causal_lm", run)[-3:] == ["not recorded", scoreboard.date_of(run), "0.19.8, 2.13.0+cpu"]
    scoreboard.write_made_on(run, "2 CPU cores")
    date = scoreboard.date_of(run)
    (run / "result.json").touch()  # as a start does that finds the run finished
    cells = scoreboard.row("causal_lm", run)
    assert cells[2:] == [
        "sotu", "perplexity", "214", "unigram 782", "3.7", "2 CPU cores", date, "0.19.8, 2.13.0+cpu"
    ]  # fmt: skip
    assert date < time.strftime("%Y-%m-%d") and len(cells) == len(scoreboard.COLUMNS)
    assert cells[1] == "pre-train a decoder that predicts the next token"


def test_a_run_that_went_on_elsewhere_names_both_devices(run: Path) -> None:
    for device in ("2 CPU cores", "2 CPU cores", "1 x H100", "1 x H100"):
        scoreboard.write_made_on(run, device)
    assert scoreboard.row("causal_lm", run)[-3] == "2 CPU cores, then 1 x H100"


def test_rows_that_are_not_measured_again_stay(run: Path) -> None:
    kept = scoreboard.table_line(["[`masked_lm`](recipes/masked_lm.py)", *["old"] * (len(scoreboard.COLUMNS) - 1)])
    gone = scoreboard.table_line(["[`gone`](recipes/gone.py)", *["old"] * (len(scoreboard.COLUMNS) - 1)])
    readme = f"before\n{scoreboard.BEGIN}\n{scoreboard.table([gone, kept])}\n{scoreboard.END}\nafter\n"
    line = scoreboard.table_line(scoreboard.row("causal_lm", run))
    now = scoreboard.with_table(readme, {"causal_lm": line})
    assert now == f"before\n{scoreboard.BEGIN}\n{scoreboard.table([line, kept])}\n{scoreboard.END}\nafter\n"
    with pytest.raises(UserError, match="other columns"):
        scoreboard.with_table(readme.replace("| date ", "| day "), {"causal_lm": line})
    with pytest.raises(UserError, match="no place for the table"):
        scoreboard.with_table("before\nafter\n", {"causal_lm": line})


def test_the_readme_has_a_place_for_the_table_and_its_columns() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = {name: f"| [`{name}`] |" for name in scoreboard.all_recipes()[:1]}
    assert scoreboard.with_table(readme, lines).count(scoreboard.END) == 1
