"""Scores, and the trivial baselines that they are to be read beside."""

import math
from collections.abc import Sequence

import numpy as np


def classification_scores(labels: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
    """Accuracy and macro-F1 (the mean of the labels' F1), by scikit-learn."""
    from sklearn.metrics import accuracy_score, f1_score  # here, because it takes a second to import

    return {
        "accuracy": float(accuracy_score(labels, predictions)),
        "macro_f1": float(f1_score(labels, predictions, average="macro", zero_division=0)),
    }


def majority_class(train_labels: Sequence[int], test_labels: Sequence[int]) -> dict[str, float]:
    """The scores of always answering with the most frequent training label."""
    most_frequent = int(np.bincount(np.asarray(train_labels)).argmax())
    return classification_scores(test_labels, [most_frequent] * len(test_labels))


def tfidf_logistic_regression(
    train_texts: Sequence[str], train_labels: Sequence[int], test_texts: Sequence[str], test_labels: Sequence[int]
) -> dict[str, float]:
    """The scores of scikit-learn's logistic regression on TF-IDF weighted words, fitted on the training rows."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(max_iter=1000))
    model.fit(train_texts, train_labels)
    return classification_scores(test_labels, model.predict(test_texts))


def language_model_scores(loss_sum: float, tokens: int, text_bytes: int) -> dict[str, float]:
    """Perplexity a token and bits a byte, from the summed negative log-likelihood (nats) of `tokens` that encode `text_bytes`."""
    mean = loss_sum / tokens
    return {"perplexity": math.exp(mean) if mean < 700 else math.inf, "bits_per_byte": loss_sum / math.log(2) / text_bytes}


def unigram(train_tokens: np.ndarray, test_tokens: np.ndarray, vocab_size: int, text_bytes: int) -> dict[str, float]:
    """The scores of a model that knows only how often each token occurs in training (with one added to each count).

    It predicts what the language model is asked to: every token of the test stream but the first.
    """
    counts = np.bincount(train_tokens, minlength=vocab_size) + 1
    log_probabilities = np.log(counts / counts.sum())
    predicted = test_tokens[1:]
    return language_model_scores(float(-log_probabilities[predicted].sum()), len(predicted), text_bytes)
