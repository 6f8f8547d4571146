"""Texts as numbers of words."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import scipy.sparse


def number_words(texts: list[list[str]], min_count: int) -> tuple[list[str], np.ndarray, list[np.ndarray]]:
    """Number the words that occur min_count times or more, the most frequent first; the others are left out.

    Returns (the words, how often each occurs [words], the numbers of each text [its words] int64).
    """
    counted = Counter(word for text in texts for word in text).most_common()
    frequent = [(word, count) for word, count in counted if count >= min_count]
    number = {word: place for place, (word, _) in enumerate(frequent)}
    documents = [np.array([number[word] for word in text if word in number], dtype=np.int64) for text in texts]
    return list(number), np.array([count for _, count in frequent]), documents


def joined(documents: Sequence[np.ndarray], gap: int) -> np.ndarray:
    """The documents one after the other, `gap` times -1 behind each, so that no window reaches into the next one."""
    return np.concatenate([part for document in documents for part in (document, np.full(gap, -1))])


def subsampled(documents: Sequence[np.ndarray], counts: np.ndarray, share: float, seed: int) -> list[np.ndarray]:
    """The documents without some occurrences of frequent words: each is kept with the probability sqrt(share / that of
    the word) (Mikolov et al. 2013, equation 5)."""
    random, keep = np.random.default_rng(seed), np.sqrt(share * counts.sum() / counts)
    return [document[random.random(len(document)) < keep[document]] for document in documents]


def cooccurrences(stream: np.ndarray, words: int, window: int) -> scipy.sparse.coo_array:
    """[words, words]: how often two words are at most `window` places apart, d places counting 1 / d (Pennington et al.
    2014, section 4.2); places with -1 count nothing."""
    found = scipy.sparse.csr_array((words, words))
    for distance in range(1, window + 1):
        both = (stream[:-distance] >= 0) & (stream[distance:] >= 0)
        first, second = stream[:-distance][both], stream[distance:][both]
        found += scipy.sparse.csr_array((np.full(len(first), 1 / distance), (first, second)), shape=found.shape)
    return (found + found.T).tocoo()
