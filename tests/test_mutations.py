"""The mutations of tests/by_hand/mutations.py can still be made, and CONTRIBUTING.md lists them."""

import subprocess

import pytest
from conftest import ROOT, SCRIPTS
from mutations import MUTATIONS, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_a_mutation_breaks_what_is_there_now(mutation: Mutation) -> None:
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1
    broken = (ROOT / mutation.file).read_text().replace(mutation.old, mutation.new)
    command = [str(SCRIPTS / "ruff"), "check", "-q", "--select", "F821,E9", "--stdin-filename", mutation.file, "-"]
    found = subprocess.run(command, input=broken, text=True, capture_output=True, check=False)
    assert not found.returncode, f"it breaks the file, not what the tests guard: {found.stdout}"
    assert mutation.what in " ".join((ROOT / "CONTRIBUTING.md").read_text().split())


def test_there_are_twenty() -> None:
    assert len({mutation.what for mutation in MUTATIONS}) >= 20
