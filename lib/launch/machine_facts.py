"""Prints what lib/launch/hosts.py wants to know of a machine, as JSON.

python -m lib.launch.machine_facts
"""

import json
import os
import platform
import sys
import time
from pathlib import Path

import psutil

from lib.distributed import network
from lib.distributed.compilation import check_compilation
from lib.errors import UserError
from lib.launch import devices
from lib.launch.facts import facts


def main() -> None:
    try:
        found, fault = devices.find(), None
        count = len(found.ids)
    except UserError as error:
        found, fault, count = devices.Devices("unknown"), " ".join(str(error).split()), 0
    try:
        check_compilation("cpu_adam")
        lock = None
    except UserError as error:
        lock = str(error)
    connection = os.environ.get("SSH_CONNECTION", "").split()  # the other end's address and port, and this one's
    what = {
        "name": platform.node(),
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text() if sys.platform == "linux" else None,
        "facts": facts() | ({} if fault else {"accelerator": found.accelerator}),
        "time": time.time(),
        "address": connection[2] if connection else None,
        "other_end": connection[0] if connection else None,
        "port": network.free_port(),
        "accelerator": found.accelerator,
        "devices": count,
        "cores": len(os.sched_getaffinity(0)),
        "memory": psutil.virtual_memory().total,
        "fault": fault,
        "lock": lock,
    }
    print(json.dumps(what))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
