"""Runs a recipe as its command line would, on ranks that are forked. Arguments: the recipe, the recipe's arguments."""

import importlib
import os

from lib.settings import config
from lib.settings.ds_config import load_ds_config


def main(recipe: str, *arguments: str) -> None:
    module = importlib.import_module(f"recipes.{recipe}")
    cfg, path = config.parse(module.Config, str(module.__file__), list(arguments))
    module.main(cfg, load_ds_config(path, cfg, int(os.environ["WORLD_SIZE"])))
