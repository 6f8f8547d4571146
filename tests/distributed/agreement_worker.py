"""What ranks agree on, for tests/distributed/test_agreement.py. Argument: folder.

Then the last rank falls silent: what each other rank notices of it, and after how long, is left in <rank>.json.
"""

import json
import random
import time
from pathlib import Path

from lib.distributed import ranks

TIMEOUT, SILENCE = 1.5, 5  # seconds


def main(where: str) -> None:
    ranks.init(timeout_minutes=1)
    rank, size = ranks.rank(), ranks.world_size()
    draw = random.Random(rank)
    for turn in range(60):  # ranks come in any order, and may be a turn apart
        time.sleep(draw.random() * 2e-3)
        values = [float((rank + turn) % size), float(turn * (rank == turn % size)), -float(rank) - turn]
        assert ranks.largest(values) == [size - 1, turn, -turn]
    ranks.set_timeout(TIMEOUT / 60)
    if rank == size - 1:
        time.sleep(SILENCE)
        return
    started = time.monotonic()
    try:
        ranks.largest([0.0])
    except RuntimeError as error:
        found = {"seconds": time.monotonic() - started, "lost": ranks.lost_contact(error)}
        (Path(where) / f"{rank}.json").write_text(json.dumps(found))
    time.sleep(SILENCE - TIMEOUT)  # a rank that ends would be noticed at once
