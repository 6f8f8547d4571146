"""Trivial baselines. A score is compared with them to see whether anything was learned."""

import re
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from lib.progress import progress
from lib.scores.evaluation import (
    are_spaceless,
    classification_scores,
    perplexity,
    perplexity_and_bits,
    sentences,
    spaced,
)

MEMORY_ROWS = 50_000  # training rows that a translation memory uses; with more, it might take longer than the training


def majority_class(train_labels: Sequence[int], test_labels: Sequence[int]) -> dict[str, float]:
    """The scores of a model that always predicts the most frequent training label."""
    most_frequent = int(np.bincount(np.asarray(train_labels)).argmax())
    return classification_scores(test_labels, [most_frequent] * len(test_labels))


@progress("TF-IDF + logistic regression")
def tfidf_logistic_regression(
    train_texts: Sequence[str], train_labels: Sequence[int], test_texts: Sequence[str], test_labels: Sequence[int]
) -> dict[str, float]:
    """The scores of scikit-learn's logistic regression on TF-IDF weighted words, fitted on the training rows.

    Where the texts have no words, characters take the place of words.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    if len(set(train_labels)) < 2:  # a few rows may all have one label, which cannot be fitted
        return majority_class(train_labels, test_labels)
    # scikit-learn's words have two letters or more. Texts of single letters or signs, or without spaces, have no words.
    has_words = any(re.search(r"\b\w\w+\b", text) for text in train_texts) and not are_spaceless(train_texts)
    model = make_pipeline(
        TfidfVectorizer(analyzer="word" if has_words else "char", sublinear_tf=True), LogisticRegression(max_iter=1000)
    )
    model.fit(train_texts, train_labels)
    return classification_scores(test_labels, model.predict(test_texts))


def unigram(
    train_tokens: np.ndarray, test_tokens: np.ndarray, vocab_size: int, test_texts: Sequence[str]
) -> dict[str, float]:
    """The scores of a model that knows only how often each token occurs in training (with one added to each count).

    It predicts the same tokens as the language model: every token of the test stream but the first.
    """
    counts = np.bincount(train_tokens, minlength=vocab_size) + 1
    log_probabilities = np.log(counts / counts.sum())
    predicted = test_tokens[1:]
    return perplexity_and_bits(
        float(-log_probabilities[predicted].sum()), len(predicted), sum(len(text.encode()) for text in test_texts)
    )


def unigram_masked(train_tokens: np.ndarray, hidden_tokens: Sequence[int], vocab_size: int) -> dict[str, float]:
    """The scores of the same model as in `unigram` at the hidden tokens of a masked language model."""
    counts = np.bincount(train_tokens, minlength=vocab_size) + 1
    hidden = np.asarray(hidden_tokens)
    nats = -np.log(counts / counts.sum())[hidden].sum()
    return {
        "pseudo_perplexity": perplexity(float(nats), len(hidden)),
        "masked_accuracy": float((hidden == counts.argmax()).mean()),
    }


@progress("looking for the nearest training texts")
def nearest_training_target(
    train_sources: Sequence[str], train_targets: Sequence[str], test_sources: Sequence[str]
) -> list[str]:
    """For each test source, the target of the most similar training source: a translation memory.

    The similarity is the cosine of TF-IDF weights of pieces of words, 2 to 4 letters long, by scikit-learn. On short
    messages pieces find better neighbours than words do (1,256 French messages of Plone: chrF 35 against 32). For
    15,000 training and 2,000 test messages of 8 words it takes 2 s on a core. Of more than MEMORY_ROWS training rows,
    only MEMORY_ROWS are used, spread evenly over all.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.neighbors import NearestNeighbors

    kept = np.linspace(0, len(train_sources) - 1, min(len(train_sources), MEMORY_ROWS)).astype(int).tolist()
    sources = list(train_sources)
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4))
    index = NearestNeighbors(n_neighbors=1, metric="cosine").fit(
        vectorizer.fit_transform([sources[number] for number in kept])
    )
    nearest = index.kneighbors(vectorizer.transform(test_sources), return_distance=False)
    return [train_targets[kept[number]] for number in nearest[:, 0]]


def first_sentence(context: str) -> str:
    """The first sentence of a text ("" if it has none), as an answer that does not depend on the question."""
    return next(iter(sentences(context)), "")


def longest_overlap(question: str, context: str) -> str:
    """The sentence of a text that shares most words with the question, the first of equals ("" if there is none)."""
    question_words = _words(question)
    return max(sentences(context), key=lambda sentence: len(question_words & _words(sentence)), default="")


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", spaced(text.lower())))


def preference_rules(rows: Any, reference: Any) -> dict[str, dict[str, float]]:
    """{rule: {"accuracy": how often it prefers the chosen answer}}, 0 to 1; where it prefers none of the two, 0.5.

    rows: columns prompt_text, chosen_text, rejected_text. reference: [rows, 2] log-probabilities of both answers by the
    model before training, whose preference is the more likely one.
    """

    def shared(answer: str, prompt: str) -> int:
        return len(_words(answer) & _words(prompt))

    prompts, chosen, rejected = (rows[f"{name}_text"] for name in ("prompt", "chosen", "rejected"))
    differences: dict[str, list[float]] = {
        "model before training": [float(first - second) for first, second in reference],
        "the shorter answer": [len(second) - len(first) for first, second in zip(chosen, rejected, strict=True)],
        "more words of the prompt": [
            shared(first, prompt) - shared(second, prompt)
            for prompt, first, second in zip(prompts, chosen, rejected, strict=True)
        ],
    }
    return {rule: {"accuracy": float(np.mean(np.sign(found)) / 2 + 0.5)} for rule, found in differences.items()}


@progress("BM25")
def bm25(queries: Sequence[str], documents: Sequence[str], depth: int) -> np.ndarray:
    """[queries, depth] numbers of the documents with the highest BM25 score, best first, by bm25s with its defaults.

    The defaults are Lucene's variant with k1 = 1.5 and b = 0.75 over lower-cased words of two characters or more,
    without English stop words, not stemmed. Texts without spaces are cut into single letters. A document that shares no
    word with the query is not found. A row with fewer documents ends in -1, as `retrieval_scores` expects.
    """
    import bm25s

    letters: dict[str, Any] = {"token_pattern": r"\w"} if are_spaceless(documents) else {}
    document_tokens, query_tokens = (
        bm25s.tokenize(list(texts), show_progress=False, **letters) for texts in (documents, queries)
    )
    ranking = np.full((len(queries), depth), -1)
    if not document_tokens.vocab or not query_tokens.vocab:  # no text has a word: all words may be single letters
        return ranking
    index = bm25s.BM25()
    index.index(document_tokens, show_progress=False)
    found, scores = index.retrieve(query_tokens, k=min(depth, len(documents)), show_progress=False)
    ranking[:, : found.shape[1]] = np.where(scores > 0, found, -1)
    return ranking


@progress("gensim's word2vec")
def gensim_word2vec(
    documents: list[list[str]],
    *,
    dims: int,
    window: int,
    negatives: int,
    min_count: int,
    epochs: int,
    sample: float,
    seed: int,
    workers: int = 1,
) -> tuple[list[str], np.ndarray, float]:
    """(words, vectors, words_per_second) of gensim's skip-gram with negative sampling (Mikolov et al., 2013), in C.

    words: those that occur at least min_count times, the most frequent first; vectors: [words, dims] float32.
    words_per_second: all words of the documents, rare and subsampled ones too, times epochs, over the seconds of
    training; building the vocabulary is not timed.
    sample: the frequency above which words are subsampled. workers: threads; more than one give other vectors every
    time. All else is gensim's default: a learning rate from 0.025 down to 0.0001, a random part of the window, noise by
    counts to the power of 0.75.
    """
    from gensim.models import Word2Vec
    from gensim.models.word2vec import MAX_WORDS_IN_BATCH

    # gensim reads a sample of 1 or more as a number of occurrences. As a frequency it subsamples no word, as 0 does.
    share = sample if sample < 1 else 0
    # gensim would ignore the rest of a longer document in silence.
    pieces = [
        words[start : start + MAX_WORDS_IN_BATCH]
        for words in documents
        for start in range(0, len(words), MAX_WORDS_IN_BATCH)
    ]
    model = Word2Vec(
        sg=1,
        hs=0,
        vector_size=dims,
        window=window,
        negative=negatives,
        min_count=min_count,
        epochs=epochs,
        sample=share,
        seed=seed,
        workers=workers,
    )
    model.build_vocab(pieces)
    start = time.perf_counter()
    model.train(pieces, total_examples=len(pieces), epochs=epochs)
    seconds = time.perf_counter() - start
    return list(model.wv.index_to_key), model.wv.vectors, epochs * sum(map(len, pieces)) / seconds
