"""Becomes the command that the first line of stdin describes, as {"command", "folder", "environment"} in JSON.

    python lib/launch/far.py < description

lib/launch/hosts.py starts this over ssh. What comes by stdin passes through no shell and is in no table of processes,
so that quotes and secrets stay what and where they are. What follows the first line is left for the command.
"""

import json
import os
import platform
import sys
from pathlib import Path


def main() -> None:
    with open(0, "rb", buffering=0, closefd=False) as stdin:  # a descriptor; unbuffered: no byte more
        what = json.loads(stdin.readline())
    try:
        os.chdir(what["folder"])
        environment = os.environ | what["environment"]
        # As in an environment that is active: launch.sh takes this Python.
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}"
        os.execvpe(what["command"][0], what["command"], environment)
    except OSError as error:
        print(f"error: {platform.node()} has no {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
