"""What launch.sh asks once before it starts a recipe: are its settings known, and which devices are there?

    preflight.py recipe.py RANKS settings ...     prints the options for `deepspeed`, after the value for DS_ACCELERATOR
    preflight.py recipe.py --help                 prints the recipe's settings

It imports neither torch nor the recipe: a wrong word is answered at once.
"""

import os
import sys
from pathlib import Path

if not __package__:  # started as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # instead of lib/

from lib import config, devices
from lib.config import UserError

OF_LAUNCH = ("stage", "ds_config", "ranks", "restarts", "dry_run")  # launch.sh takes them out; a misspelt one arrives here


def main(recipe: str, ranks: str, *settings: str) -> None:
    parser = config.parser_from_source(Path(recipe))
    if ranks == "--help":
        if parser is None:
            os.execv(sys.executable, [sys.executable, recipe, "--help"])
        parser.print_help()
        return
    if parser is not None:
        config.known_arguments(parser, list(settings), also=OF_LAUNCH)
    found = devices.find()
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
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
