"""What launch.sh asks once before it starts a recipe: are its settings known, and which devices are there?

    python -m lib.launch.preflight recipe.py RANKS settings ...   prints the options for `deepspeed`, after the value for DS_ACCELERATOR
    python -m lib.launch.preflight recipe.py --help               prints the recipe's settings

It imports neither torch nor the recipe: a wrong word is answered at once.
"""

import os
import sys
from pathlib import Path

from lib.errors import UserError
from lib.launch import devices
from lib.settings import config

OF_LAUNCH = (
    "stage",
    "ds_config",
    "ranks",
    "restarts",
    "dry_run",
)  # launch.sh takes them out; a misspelt one arrives here


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
