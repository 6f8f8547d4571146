"""What must be the same on all machines of a run, and what differs."""

import hashlib
import importlib.metadata
import itertools
import os
import platform
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lib.errors import ROOT

VERSIONS_OF = ("torch", "deepspeed", "transformers")  # beside Python
CLOCK_SECONDS = 30  # by so much clocks may differ: dates of files and logs are all that depends on them
PATHS = ("dataset", "model", "decoder", "chat_template")  # settings that may be a file or folder of each machine
MISSING = "missing"
FILES = 20_000  # so many files of a folder are compared


def facts(script: Path | None = None, arguments: Sequence[str] = (), paths: Sequence[Any] = ()) -> dict[str, str]:
    """{what must be the same: its value, or a checksum of it}.

    script, arguments: of the recipe, if one is to be run. paths: the values of its settings PATHS.
    """
    found = {"Python": platform.python_version()}
    found |= {name: importlib.metadata.version(name) for name in VERSIONS_OF}
    found["this code"] = _checksum(*sorted((ROOT / "lib").rglob("*.py")), *([script] if script else []))
    if script is None:
        return found
    found["the recipe's YAML"] = _checksum(script.with_suffix(".yaml"))
    for name in ("deepspeed_config", "config"):
        if f"--{name}" in arguments[:-1]:
            found[f"--{name}"] = _checksum(Path(arguments[arguments.index(f"--{name}") + 1]))
    for path in filter(None, paths):
        for one in filter(None, re.split(r"=[0-9.]+(?:,|$)", str(path))):  # of a mixture of data sets
            found[one] = _listing(Path(one.strip()).expanduser())
    return found


def _checksum(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + (file.read_bytes() if file.is_file() else b"missing"))
    return digest.hexdigest()[:12]


def _listing(path: Path) -> str:
    """A checksum of the names and sizes of the files there, which takes no long time however large and many they are.

    Hidden files do not count. MISSING for what is no file or folder, as the name of a built-in sample.
    """
    size = _size(path)
    if size is None or not path.is_dir():
        return MISSING if size is None else str(size)
    digest = hashlib.sha256()
    for file in itertools.islice(_files(path), FILES):
        digest.update(f"{file.relative_to(path)}\0{_size(file)}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:12]


def _files(folder: Path) -> Iterator[Path]:
    for inner, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(inner, name) for name in sorted(names) if not name.startswith("."))


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except (OSError, ValueError):  # it is no path at all, such as a text of many lines
        return None


def differences(nodes: list[dict[str, Any]], names: list[str]) -> list[str]:
    """A line for each thing that a machine has otherwise than the first one, with the remedy.

    nodes: {"facts": see above, "settings": the settings as given, "clock": seconds ahead of the first} of each machine.
    """
    found, (first, first_name) = [], (nodes[0], names[0])
    for node, name in list(zip(nodes, names, strict=True))[1:]:
        for what, value in node["facts"].items():
            expected = first["facts"].get(what, value)
            if value != expected:
                found.append(_difference(what, (name, value), (first_name, expected)))
        if node["settings"] != first["settings"]:
            theirs, ours = " ".join(node["settings"]), " ".join(first["settings"])
            found.append(f"{name} was started with {theirs!r}, {first_name} with {ours!r}: give the same settings")
        if abs(node["clock"]) > CLOCK_SECONDS:
            side = "ahead of" if node["clock"] > 0 else "behind"
            found.append(
                f"the clock of {name} is {abs(node['clock']):.0f} s {side} that of {first_name}: "
                "let both follow a time server (timedatectl set-ntp true)"
            )
    return found


def _difference(what: str, node: tuple[str, str], first: tuple[str, str]) -> str:
    """The line on one of the facts. node, first: (name, value) of two machines."""
    (name, value), (first_name, expected) = node, first
    if what in ("Python", *VERSIONS_OF):
        return f"{name} has {what} {value}, {first_name} has {expected}: install the same on all machines"
    if what == "this code" or what.startswith(("--", "the recipe")):
        return (
            f"{what}: {name} has another content than {first_name}: "
            "bring the checkouts to the same commit and the same changes"
        )
    if what == "accelerator":
        return (
            f"{name} would train on {value}, {first_name} on {expected}: "
            "`nvidia-smi` says there what a GPU lacks; DS_ACCELERATOR chooses for all"
        )
    if MISSING in (value, expected):
        lacks, has = (name, first_name) if value == MISSING else (first_name, name)
        return f"{lacks} has no {what}, which {has} has: copy it to the same path there, or put it on a shared disk"
    return f"{what}: {name} has other files there than {first_name}, or of other sizes: copy it anew, or share one"
