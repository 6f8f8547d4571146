"""./launch.sh gpu_check on a CPU, where its cases are tiny: that they run, and that nothing is left out in silence."""

import csv
import importlib
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SCRIPTS, execute

gpu_check: Any = importlib.import_module("gpu_check")


def check(folder: Path, *arguments: Any) -> tuple[int, str, list[dict[str, str]], Path]:
    """(exit code, what was printed, the checks, its folder) of a gpu_check that writes below `folder`."""
    command = [ROOT / "launch.sh", "gpu_check", *arguments]
    done = execute(command, cwd=folder, PATH=f"{SCRIPTS}:{os.environ['PATH']}")
    (made,) = (folder / "runs").iterdir()
    with (made / "checks.csv").open(encoding="utf-8") as file:
        return done.returncode, done.stdout + done.stderr, list(csv.DictReader(file)), made


@pytest.mark.slow
def test_it_runs_on_a_cpu(tmp_path: Path) -> None:
    code, said, rows, folder = check(tmp_path, "--only", "contract,memory", "--recipes", "recurrent_lm")
    assert code == 0, said
    assert [row["what"] for row in rows if row["part"] == "contract"] == [
        f"recurrent_lm: {config}_bf16 beside plain PyTorch"
        for config in ("zero2", "zero3", "zero0", "zero1", "zero2_offload", "zero3_offload")
    ]
    judged = [row for row in rows if row["target"]]
    assert len(judged) == 6 + 6 and {row["verdict"] for row in judged} == {"holds"}
    for row in rows:
        assert row["what"] in said and row["what"] in (folder / "report.md").read_text()
    found = json.loads((folder / "results.json").read_text())["cases"].values()
    assert not any("failed" in case or "not_run" in case for case in found)


def test_what_has_no_time_is_reported_as_not_run(tmp_path: Path) -> None:
    code, said, rows, _ = check(tmp_path, "--only", "speed,offload", "--minutes", "0.1")
    assert code == 75, said
    assert [row["verdict"] for row in rows] == ["not run"] * 4
    assert {row["measured"] for row in rows} == {"no time was left"}


@pytest.mark.parametrize(("arguments", "words"), [
    (["--only", "fast"], "--only has 'fast'; there are: speed"),
    (["--recipes", "causal"], "--recipes has 'causal'; there are: causal_lm"),
    (["--minutes", "0"], "--minutes is 0"),
])  # fmt: skip
def test_a_mistake_is_one_line(arguments: list[str], words: str) -> None:
    with pytest.raises(gpu_check.UserError, match=words):
        gpu_check.parse(arguments)


def test_a_loss_that_differs_does_not_hold(tmp_path: Path) -> None:
    parts = [gpu_check.Part("contract", ["contract:x:plain_bf16", "contract:x:zero3_bf16", "contract:x:zero1_bf16"], 1)]
    session = gpu_check.Session(tmp_path, True, 1, 0.0, 60.0, parts, ["causal_lm"])
    for name, loss in (("plain_bf16", 2.0), ("zero3_bf16", 2.01), ("zero1_bf16", float("nan"))):
        run = tmp_path / "contract" / "x" / f"{name}-1"
        run.mkdir(parents=True)
        line = {"loss": loss if math.isfinite(loss) else None, "grad_norm": 1.0}
        (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        session.found[f"contract:x:{name}"] = {}
    assert [found.held for found in gpu_check.checks_of(session)] == [False, False]
    session.found["contract:x:zero3_bf16"] = {"failed": "RuntimeError: here"}
    assert gpu_check.checks_of(session)[0].verdict == "failed"
