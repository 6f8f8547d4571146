"""Which rows are for training, for validation and for the test: by a hash, so that it is always the same."""

from lib.cache import sha256

SPLITS = ("train", "validation", "test")


def split_of(group: str) -> str:
    """The split of all rows that came from `group`: 80 % train, 10 % validation, 10 % test, by a hash of its name."""
    tenth = int(sha256(group), 16) % 10
    return "train" if tenth < 8 else SPLITS[tenth - 7]
