"""Where what is made once from installed packages is kept."""

import hashlib
import importlib.metadata
import os
from collections.abc import Sequence
from pathlib import Path


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def cache_folder(name: str, packages: Sequence[str], *code: str) -> Path:
    """The folder in the cache for what the files `code` make of these packages in their installed versions.

    Raises importlib.metadata.PackageNotFoundError where one is not installed.
    """
    versions = " ".join(f"{package}={importlib.metadata.version(package)}" for package in packages)
    key = sha256(versions + "".join(Path(file).read_text(encoding="utf-8") for file in code))[:16]
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "zero_recipes" / f"{name}-{key}"
