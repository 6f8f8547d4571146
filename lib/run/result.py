"""The end of a run: its table of scores, and result.json."""

import json
import math

from lib.distributed import ranks
from lib.errors import display_path
from lib.run.folder import RunFolder
from lib.run.metrics import Metrics
from lib.run.output import Output

Scores = dict[str, dict[str, float]]  # {the model or a baseline: {score: value}}


def write_result(scores: Scores, folder: RunFolder, metrics: Metrics, output: Output) -> None:
    """Say the scores and write result.json, by which others see that the run has finished: as the last of its files."""
    seconds, skipped = metrics.seconds(), metrics.skipped_steps
    for line in table_lines(scores):
        output.say(line)
    if skipped:
        why = "their loss or gradient was not finite"
        output.say(f"{skipped} of {metrics.total_steps} steps were skipped: {why}")
    took = f"{int(seconds) // 60} min {int(seconds) % 60} s"
    output.say(f"{display_path(folder.path)}: the model in model/, every step in metrics.jsonl; {took}")
    if ranks.rank() == 0:
        result = {
            "finished": True,
            "steps": metrics.total_steps,
            "skipped_steps": skipped,
            "seconds": round(seconds, 1),
            "scores": {
                row: {name: value if math.isfinite(value) else None for name, value in found.items()}  # JSON has no NaN
                for row, found in scores.items()
            },
        }
        folder.write("result.json", json.dumps(result, indent=2, allow_nan=False) + "\n")


def table_lines(scores: Scores) -> list[str]:
    """Scores as a table, with an empty line before and after it. The first row says which scores there are."""
    names, width = list(next(iter(scores.values()))), max(map(len, scores))
    head = f"{'':<{width}}  " + "  ".join(f"{name:>14}" for name in names)
    rows = [
        f"{row:<{width}}  " + "  ".join(f"{found[name]:>14.4f}" if name in found else f"{'-':>14}" for name in names)
        for row, found in scores.items()
    ]
    return ["", head, *rows, ""]
