"""Texts as numbers of words."""

from collections import Counter

import numpy as np


def number_words(texts: list[list[str]], min_count: int) -> tuple[list[str], np.ndarray, list[np.ndarray]]:
    """Number the words that occur min_count times or more, the most frequent first; the others are left out.

    Returns (the words, how often each occurs [words], the numbers of each text [its words] int64).
    """
    counted = Counter(word for text in texts for word in text).most_common()
    frequent = [(word, count) for word, count in counted if count >= min_count]
    number = {word: place for place, (word, _) in enumerate(frequent)}
    documents = [np.array([number[word] for word in text if word in number], dtype=np.int64) for text in texts]
    return list(number), np.array([count for _, count in frequent]), documents
