"""Breaks one thing at a time in a copy of the tree, and says whether the tests that guard it saw it. Run by hand, half an hour on 2 cores:

    python tests/by_hand/mutations.py            all, and a table
    python tests/by_hand/mutations.py 3 7        these
    python tests/by_hand/mutations.py --list     what they are

A mutation is a text that stands once in a file, what takes its place, and the tests that must turn red: each belongs to the default suite. Before the
first mutation the same tests must be green. CONTRIBUTING.md has the list.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Mutation(NamedTuple):
    what: str
    file: str
    old: str  # stands once in the file
    new: str
    tests: str  # pytest's arguments


CONTRACT = "tests/test_recipes.py -k"
MUTATIONS = [
    Mutation(
        "drop the all-reduce of the label count",
        "recipes/causal_lm.py",
        'labels = ranks.all_sum(torch.stack([(batch["labels"] != IGNORED).sum() for batch in micro_batches]).sum())',
        'labels = torch.stack([(batch["labels"] != IGNORED).sum() for batch in micro_batches]).sum()',
        f"{CONTRACT} 'causal_lm and plain'",
    ),
]


def run(tests: str, tree: Path) -> tuple[bool, str, float]:
    """(whether all tests passed, pytest's last line, seconds)"""
    started = time.monotonic()
    command = f"{sys.executable} -m pytest -x -q -o addopts= {tests}"
    done = subprocess.run(command, shell=True, cwd=tree, capture_output=True, text=True, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"})
    return done.returncode == 0, done.stdout.strip().splitlines()[-1], time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", type=int, help="which (default: all)")
    parser.add_argument("--list", action="store_true", help="print what they are")
    options = parser.parse_args()
    chosen = [(number, mutation) for number, mutation in enumerate(MUTATIONS, 1) if number in (options.numbers or range(1, len(MUTATIONS) + 1))]
    if options.list:
        for number, mutation in chosen:
            print(f"{number:>3}  {mutation.what}: {mutation.file}")
        return
    rows, survived = [], 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", "runs", ".venv", "__pycache__", ".*_cache"))
        for tests in dict.fromkeys(mutation.tests for _, mutation in chosen):
            passed, said, seconds = run(tests, tree)
            print(f"unbroken: {tests}: {said} ({seconds:.0f} s)", flush=True)
            if not passed:
                sys.exit("the tests must pass before anything is broken")
        for number, mutation in chosen:
            file = tree / mutation.file
            text = file.read_text(encoding="utf-8")
            if text.count(mutation.old) != 1:
                sys.exit(f"{number}, {mutation.what}: its text stands {text.count(mutation.old)} times in {mutation.file}, not once; bring it up to date")
            file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
            passed, said, seconds = run(mutation.tests, tree)
            file.write_text(text, encoding="utf-8")
            survived += passed
            rows.append(f"| {number} | {mutation.what} | `{mutation.file}` | {'NOT SEEN' if passed else 'red'} | {seconds:.0f} |")
            print(f"{rows[-1]} {said}", flush=True)
    print("\n| | what is broken | in | the tests | seconds |\n| --- | --- | --- | --- | --- |\n" + "\n".join(rows))
    sys.exit(survived > 0)


if __name__ == "__main__":
    main()
