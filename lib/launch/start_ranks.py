"""Start on this machine the ranks that a `deepspeed` command would start, without the seconds of its two imports.

    python -m lib.launch.start_ranks --log_level critical --master_port 29500 --num_accelerators 2 recipe.py ...

The `deepspeed` command imports DeepSpeed twice before the ranks do; this process does not. It takes the options that
launch.sh prints, and gives each rank the environment and arguments that DeepSpeed 0.19.8 gives it
(deepspeed/launcher/launch.py; tests/launch/test_start.py compares the two). When a rank fails, this process ends the
other ranks and takes the failed rank's exit code. Accelerators other than CPUs and NVIDIA's and AMD's GPUs need
variables that only DeepSpeed knows; for these this process becomes the `deepspeed` command itself.

With --world_info, --node_rank and --master_addr it starts this machine's ranks of a run on several machines, as
`python -m deepspeed.launcher.launch`, which `deepspeed` starts on each machine, does with the same options.
"""

import argparse
import base64
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lib.errors import EXIT_SECONDS, FAULT, STOPPED

OWN_WORDS_SECONDS = 1.0  # after a rank has failed, the other ranks may report it and end by themselves for so long
GRACE_SECONDS = 10.0  # between SIGTERM and SIGKILL
LAST_UPLOAD_SECONDS = EXIT_SECONDS + 10  # after a stop that was asked for: rank 0's monitor may still be uploading


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of a launcher; `ids` are those of this machine's devices."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--log_level")  # for DeepSpeed's launcher; this one logs nothing
    parser.add_argument("--hostfile")  # for DeepSpeed's launcher: /dev/null, which means this machine alone
    parser.add_argument("--master_addr", default="127.0.0.1")
    parser.add_argument("--master_port", required=True)
    parser.add_argument("--node_rank", type=int, default=0)
    parser.add_argument("--world_info")  # the devices of each machine, as DeepSpeed's launcher encodes them
    parser.add_argument("--num_accelerators", type=int)
    parser.add_argument("--include")
    parser.add_argument("--module", action="store_true")
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    if options.world_info:
        options.nodes = list(json.loads(base64.urlsafe_b64decode(options.world_info)).values())
    elif options.include:
        options.nodes = [[int(number) for number in options.include.removeprefix("localhost:").split(",")]]
    else:
        options.nodes = [list(range(options.num_accelerators))]
    options.ids = options.nodes[options.node_rank]
    return options


def main() -> int:
    if os.environ.get("DS_ACCELERATOR", "cuda") not in ("cpu", "cuda"):
        command = launcher_of(sys.argv[1:])
        os.execv(command[0], [*command, *sys.argv[1:]])
    options = parse(sys.argv[1:])
    # A rank that NCCL aborts, after another fell silent, would leave a core file as large as its memory.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    ids, first_rank = options.ids, sum(map(len, options.nodes[: options.node_rank]))

    ranks: list[subprocess.Popen[bytes]] = []

    def stop(*_: Any) -> None:
        """Under lib/launch/supervise.py, whose second signal kills all, ranks may save for as long as it takes."""
        if ranks and "SUPERVISED_BY" in os.environ:
            for rank in ranks:
                rank.terminate()  # Slurm and the supervisor may have told it already: once more changes nothing
        else:
            end(ranks)
            sys.exit(FAULT)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, ids)), "MASTER_ADDR": options.master_addr,
        "MASTER_PORT": options.master_port, "WORLD_SIZE": str(sum(map(len, options.nodes))),
        "LOCAL_SIZE": str(len(ids)), "CROSS_RANK": str(options.node_rank), "CROSS_SIZE": str(len(options.nodes)),
    }  # fmt: skip
    for local_rank in range(len(ids)):
        command = [
            sys.executable,
            "-u",
            *(["-m"] if options.module else []),
            options.script,
            f"--local_rank={local_rank}",
            *options.arguments,
        ]
        numbers = {"RANK": str(first_rank + local_rank), "LOCAL_RANK": str(local_rank)}
        ranks.append(subprocess.Popen(command, env=environment | numbers))
    while None in (codes := [rank.poll() for rank in ranks]) and not any(codes):
        time.sleep(0.05)
    failed = next(filter(None, codes), 0)
    if failed:
        wait(ranks, LAST_UPLOAD_SECONDS if failed == STOPPED else OWN_WORDS_SECONDS)
        end(ranks)
    return failed


def launcher_of(options: list[str]) -> list[str]:
    """The program of DeepSpeed that takes these options."""
    if any(option.startswith("--world_info") for option in options):
        return [sys.executable, "-u", "-m", "deepspeed.launcher.launch"]
    return [str(Path(sys.executable).parent / "deepspeed")]


def wait(ranks: list[subprocess.Popen[bytes]], seconds: float) -> None:
    """Wait until all ranks have ended, but no longer than `seconds`."""
    deadline = time.monotonic() + seconds
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)


def end(ranks: list[subprocess.Popen[bytes]]) -> None:
    """End the ranks that still run."""
    for rank in ranks:
        rank.terminate()  # does nothing to a rank that has ended
    wait(ranks, GRACE_SECONDS)
    for rank in ranks:
        rank.kill()


if __name__ == "__main__":
    sys.exit(main())
