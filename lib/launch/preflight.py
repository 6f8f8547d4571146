"""What launch.sh asks once before it starts a recipe: are the settings known, and which devices does the machine have?

    python -m lib.launch.preflight recipe.py RANKS MACHINES settings ...
        prints DS_ACCELERATOR, then options for `deepspeed`; where MACHINES is not empty, a mistake is a second line of
        what is printed
    python -m lib.launch.preflight recipe.py --help
        prints the recipe's settings

It imports neither torch nor the recipe, so that a misspelt setting is reported at once.
"""

import os
import sys
from pathlib import Path

from lib.errors import MISTAKE, UserError
from lib.launch import devices
from lib.settings import config

# launch.sh takes its own options out before it calls this, but a misspelt one arrives here.
LAUNCH_OPTIONS = ("stage", "ds_config", "ranks", "restarts", "dry_run", "nodes", "node_rank", "master", "min_nodes")


def main(recipe: str, ranks: str, machines: str = "", *settings: str) -> None:
    parser = config.parser_from_source(Path(recipe))
    if ranks == "--help":
        if parser is None:
            os.execv(sys.executable, [sys.executable, recipe, "--help"])
        parser.print_help()
        return
    if parser is not None:
        config.known_arguments(parser, list(settings), also=LAUNCH_OPTIONS)
    found = devices.find()
    if not machines:
        devices.note_hostfile()
    try:
        count = int(ranks) if ranks else found.default_ranks
    except ValueError:
        count = 0
    if count < 1:
        raise UserError(f"--ranks is {ranks}; it must be a whole number from 1 up")
    print(found.accelerator, *found.launcher_options(count))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except UserError as error:
        fault = " ".join(str(error).split())
        if sys.argv[3:4] in ([], [""]):
            print(f"error: {fault}", file=sys.stderr)
            sys.exit(MISTAKE)
        print("cpu --num_accelerators 1", fault, sep="\n")  # launch.sh goes on, to let the other machines know
