"""Word vectors as gensim's KeyedVectors: their file, and the nearest neighbours of a word."""

from pathlib import Path
from typing import Any

import numpy as np


def keyed_vectors(words: list[str], vectors: np.ndarray) -> Any:
    """vectors: [words, dimensions]."""
    from gensim.models import KeyedVectors  # here: it takes a second, which the first step need not wait for

    keyed = KeyedVectors(vectors.shape[1])
    keyed.add_vectors(words, vectors)
    return keyed


def save(keyed: Any, file: Path) -> None:
    """Write them in word2vec's text format."""
    keyed.save_word2vec_format(file)


def neighbours(keyed: Any, words: str, count: int = 8) -> dict[str, str]:
    """{word: the nearest ones, with commas} of those of `words`, with spaces between them, that are known."""
    known = [word for word in words.split() if word in keyed]
    return {word: ", ".join(near for near, _ in keyed.similar_by_word(word, count)) for word in known}
