"""The mutations of tests/by_hand/mutations.py can still be made, and CONTRIBUTING.md lists them."""

import pytest
from conftest import ROOT
from mutations import MUTATIONS, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_a_mutation_breaks_what_is_there_now(mutation: Mutation) -> None:
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1
    assert mutation.what in " ".join((ROOT / "CONTRIBUTING.md").read_text().split())


def test_there_are_twenty() -> None:
    assert len({mutation.what for mutation in MUTATIONS}) >= 20
