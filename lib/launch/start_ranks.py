"""Start the ranks that a `deepspeed` command starts, on this machine, without its two imports of DeepSpeed, which take seconds.

    python -m lib.launch.start_ranks --log_level critical --master_port 29500 --num_accelerators 2 recipe.py settings ...

It takes the options that launch.sh prints, and gives the ranks the environment and arguments that DeepSpeed 0.19.8 gives them (deepspeed/launcher/launch.py;
tests/launch/test_start.py compares them). When a rank fails, it ends the others and takes its exit code. For accelerators other than CPUs and NVIDIA's and AMD's
GPUs, whose variables DeepSpeed knows, it becomes the `deepspeed` command itself.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lib.errors import EXIT_SECONDS, STOPPED

OWN_WORDS_SECONDS = 1.0  # in which a rank whose neighbour has failed may say so and end by itself
GRACE_SECONDS = 10.0  # from SIGTERM to SIGKILL


def main() -> int:
    if os.environ.get("DS_ACCELERATOR", "cuda") not in ("cpu", "cuda"):
        os.execv(Path(sys.executable).parent / "deepspeed", ["deepspeed", *sys.argv[1:]])
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--log_level")  # DeepSpeed's launcher's; this one says nothing
    parser.add_argument("--hostfile")  # /dev/null: this machine alone
    parser.add_argument("--master_port", required=True)
    parser.add_argument("--num_accelerators", type=int)
    parser.add_argument("--include")
    parser.add_argument("--module", action="store_true")
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    ids = (
        options.include.removeprefix("localhost:").split(",")
        if options.include
        else [str(number) for number in range(options.num_accelerators)]
    )

    ranks: list[subprocess.Popen[bytes]] = []

    def stop(*_: Any) -> None:
        end(ranks)
        sys.exit(1)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": ",".join(ids), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": options.master_port,
        "WORLD_SIZE": str(len(ids)), "LOCAL_SIZE": str(len(ids)), "CROSS_RANK": "0", "CROSS_SIZE": "1",
    }  # fmt: skip
    for rank in map(str, range(len(ids))):
        command = [
            sys.executable,
            "-u",
            *(["-m"] if options.module else []),
            options.script,
            f"--local_rank={rank}",
            *options.arguments,
        ]
        ranks.append(subprocess.Popen(command, env=environment | {"RANK": rank, "LOCAL_RANK": rank}))
    while None in (codes := [rank.poll() for rank in ranks]) and not any(codes):
        time.sleep(0.05)
    failed = next(filter(None, codes), 0)
    if failed:
        wait(
            ranks, EXIT_SECONDS + 10 if failed == STOPPED else OWN_WORDS_SECONDS
        )  # a monitor of rank 0 may still be uploading
        end(ranks)
    return failed


def wait(ranks: list[subprocess.Popen[bytes]], seconds: float) -> None:
    """Until all have ended, but no longer than so many seconds."""
    deadline = time.monotonic() + seconds
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)


def end(ranks: list[subprocess.Popen[bytes]]) -> None:
    """End those that still run."""
    for rank in ranks:
        rank.terminate()  # nothing happens where it has ended
    wait(ranks, GRACE_SECONDS)
    for rank in ranks:
        rank.kill()


if __name__ == "__main__":
    sys.exit(main())
