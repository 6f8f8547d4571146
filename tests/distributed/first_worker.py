"""Four ranks on two machines without a shared cache, for tests/distributed/test_first.py. Argument: folder.

What a rank does where it finds no cache is left in the folder of its machine.
"""

import os
import time
from pathlib import Path

from lib.distributed import ranks


def main(where: str) -> None:
    rank = int(os.environ["RANK"])
    os.environ["LOCAL_RANK"] = str(rank % 2)
    machine = Path(where) / f"machine-{rank // 2}"
    ranks.init(timeout_minutes=2)
    machine.mkdir(exist_ok=True)

    @ranks.rank0_first
    def fill() -> str:
        cache = machine / "cache"
        if not cache.exists():
            (machine / f"filled-by-{rank}").touch()
            time.sleep(0.5)  # in which the other rank of this machine would begin too
            cache.write_text(str(rank))
        return cache.read_text()

    assert fill() == str(rank // 2 * 2)
