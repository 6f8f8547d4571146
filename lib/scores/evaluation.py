"""Scores, as the field's own tools define them; `baselines.py` has what they are to be read beside."""

import math
import re
import string
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lib.errors import UserError


def classification_scores(labels: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
    """Accuracy and macro-F1, by scikit-learn.

    Macro-F1 is the mean of the F1 of the labels that the rows have. scikit-learn's default takes in labels that are only predicted, too; then
    a model and its baselines are each scored over a set of their own.
    """
    from sklearn.metrics import accuracy_score, f1_score  # here, because it takes a second to import

    return {
        "accuracy": float(accuracy_score(labels, predictions)),
        "macro_f1": float(f1_score(labels, predictions, labels=sorted(set(labels)), average="macro", zero_division=0)),
    }


def perplexity(nats: float, tokens: float) -> float:
    """From the summed negative log-likelihood of so many tokens; infinite where it is too large for a number."""
    return math.inf if nats / tokens > 700 else math.exp(nats / tokens)


def perplexity_and_bits(loss_sum: float, tokens: int, text_bytes: int) -> dict[str, float]:
    """Perplexity a token and bits a byte, from the summed negative log-likelihood (nats) of `tokens` that encode `text_bytes`."""
    return {"perplexity": perplexity(loss_sum, tokens), "bits_per_byte": loss_sum / math.log(2) / text_bytes}


def _bleu(tokenize: str) -> Any:
    """sacrebleu's BLEU, all but the tokenizer at its defaults. A signature counts references, so it is told that there is one a row."""
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(tokenize=tokenize, references=[[""]])


def translation_scores(hypotheses: Sequence[str], references: Sequence[str], tokenize: str = "13a") -> dict[str, float]:
    """BLEU (Papineni et al., 2002) and chrF2 (Popovic, 2015) of the whole corpus, 0 to 100, by sacrebleu.

    hypotheses: raw text, one a row, not tokenized; references: one a row.
    tokenize: sacrebleu's tokenizer for BLEU (chrF needs none). "13a" suits languages that write spaces, "zh" Chinese, "char" any.
    """
    from sacrebleu.metrics.chrf import CHRF

    return {
        "bleu": _bleu(tokenize).corpus_score(hypotheses, [references]).score,
        "chrf": CHRF().corpus_score(hypotheses, [references]).score,
    }


def bleu_signature(tokenize: str = "13a") -> str:
    """sacrebleu's signature of the BLEU that `translation_scores` computes: to be quoted with it, or it cannot be compared (Post, 2018)."""
    return str(_bleu(tokenize).get_signature())


def sentences(text: str) -> list[str]:
    """The sentences of a text, each on one line. A simple rule, not a trained one: a sentence ends

    at a blank line, after a full stop, question or exclamation mark where white space and no lower-case letter follows, and after those of
    Chinese and Japanese.
    """
    parts = re.split(
        r"(?<=[.!?])\s+(?![a-z\s])|(?<=[\u3002\uff01\uff1f])(?![\u3002\uff01\uff1f\u300d\u300f\u201d\u2019\uff09])|\n\s*\n",
        text,
    )
    return [" ".join(part.split()) for part in parts if part.strip()]


# Letters of scripts that put no spaces between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese.
SPACELESS = r"[\u0e01-\u0e4e\u0e81-\u0edf\u1000-\u109f\u1780-\u17d3\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"


def spaced(text: str) -> str:
    """A text with spaces around each letter of a script without spaces, so that each counts as a word."""
    return re.sub(SPACELESS, r" \g<0> ", text)


def are_spaceless(texts: Sequence[str]) -> bool:
    """Whether most letters are of scripts that put no spaces between words."""
    letters = spaceless = 0
    for text in texts:
        letters += sum(map(str.isalpha, text))
        spaceless += len(re.findall(SPACELESS, text))
    return 2 * spaceless > letters


def check_bleu_tokenizer(tokenize: str, references: Sequence[str]) -> None:
    """Raise a UserError where BLEU would take whole sentences for words."""
    if tokenize in ("13a", "intl") and are_spaceless(references):
        raise UserError(
            f"the targets have no spaces between words, which bleu_tokenizer {tokenize} needs; set --bleu_tokenizer zh for Chinese, char for others"
        )


class _EveryScript:
    """A tokenizer for rouge-score, whose own drops all but a to z and digits."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", spaced(text.lower()))


def rouge_tokens(references: Sequence[str]) -> str:
    """What ROUGE of these counts: to be said with it."""
    if _is_english_alphabet(references):
        return "rouge-score's tokens, stemmed: a to z and digits"
    return "letters" if are_spaceless(references) else "words as they are written, not stemmed"


def _is_english_alphabet(texts: Sequence[str]) -> bool:
    """Whether most letters are a to z."""
    letters = sum(sum(map(str.isalpha, text)) for text in texts)
    return 2 * sum(len(re.findall("[a-z]", text, re.IGNORECASE | re.ASCII)) for text in texts) >= letters


def summarization_scores(summaries: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, -2, -L and -Lsum (Lin, 2004): the mean over rows of the F-measure, 0 to 100, by rouge-score with Porter's stemmer.

    ROUGE-Lsum compares sentence by sentence and takes a newline for the end of one, so both sides are split by `sentences`, which
    ROUGE-L and the n-grams do not see. rouge-score drops all but the letters a to z and digits; where most letters of the references are
    others, words are taken as they are written, not stemmed, and single letters in scripts without spaces.
    """
    from rouge_score.rouge_scorer import RougeScorer

    names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = (
        RougeScorer(names, use_stemmer=True)
        if _is_english_alphabet(references)
        else RougeScorer(names, tokenizer=_EveryScript())
    )
    rows = [
        scorer.score("\n".join(sentences(reference)), "\n".join(sentences(summary)))
        for summary, reference in zip(summaries, references, strict=True)
    ]
    return {name: 100 * sum(row[name].fmeasure for row in rows) / len(rows) for name in names}


def _normalized(answer: str) -> str:
    """An answer as SQuAD compares it: lower case, without punctuation (ASCII), English articles and superfluous white space."""
    letters = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", letters).split())


def _word_f1(prediction: str, answer: str) -> float:
    """F1 of the bags of words (letters, in scripts without spaces) of two normalized answers. If either is empty: 1 if both are, else 0."""
    predicted, expected = spaced(prediction).split(), spaced(answer).split()
    if not predicted or not expected:
        return float(predicted == expected)
    return 2 * (Counter(predicted) & Counter(expected)).total() / (len(predicted) + len(expected))


def question_answering_scores(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Exact match and F1 over words, the mean over questions, 0 to 100, as SQuAD 2.0's evaluation script defines them (Rajpurkar et al., 2018).

    answers: the acceptable answers of each question, of which the best counts. Where there is none (or all normalize to nothing), the
    question has no answer, and the right prediction is one that normalizes to nothing.
    """
    exact_match = f1 = 0.0
    for text, accepted in zip(predictions, answers, strict=True):
        prediction = _normalized(text)
        golds = [gold for gold in map(_normalized, accepted) if gold] or [""]
        exact_match += prediction in golds
        f1 += max(_word_f1(prediction, gold) for gold in golds)
    return {"exact_match": 100 * exact_match / len(predictions), "f1": 100 * f1 / len(predictions)}


def retrieval_scores(ranking: np.ndarray, relevant: Sequence[Collection[int]]) -> dict[str, float]:
    """nDCG@10, MRR@10 and recall@1, @10, @100, the mean over all queries, 0 to 1, equal to trec_eval's (`-c`) with binary relevance.

    ranking: [queries, depth] document numbers, best first, each once a query; -1 fills up a row that is shorter.
    relevant: the numbers of each query's relevant documents; a query without any scores 0.
    """
    found = np.array([np.isin(row, list(numbers)) for row, numbers in zip(ranking, relevant, strict=True)])
    totals = np.array([len(set(numbers)) for numbers in relevant])

    def recall(depth: int) -> float:
        return float((found[:, :depth].sum(1) / np.maximum(totals, 1)).mean())

    gains = 1 / np.log2(np.arange(2, 12))  # of a relevant document at ranks 1 to 10
    best = np.concatenate([[0], gains.cumsum()])[np.minimum(totals, 10)]  # as if the relevant documents came first
    top = found[:, :10]
    return {
        "ndcg_at_10": float((top @ gains[: top.shape[1]] / np.where(best, best, 1)).mean()),
        "mrr_at_10": float((top.any(1) / (top.argmax(1) + 1)).mean()),
        "recall_at_1": recall(1),
        "recall_at_10": recall(10),
        "recall_at_100": recall(100),
    }


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors scaled to length 1, so that their products are cosines; a zero vector stays one."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(lengths, lengths, 1)


def _rated_pairs(words: Sequence[str]) -> dict[str, list[tuple[int, int, float]]]:
    """For each list of ratings, (one word's number, the other's, rating) of the pairs of which both words are there."""
    from gensim.test.utils import datapath

    number = {word.lower(): i for i, word in reversed(list(enumerate(words)))}
    known = {}
    for name, file in (("wordsim353", "wordsim353.tsv"), ("simlex999", "simlex999.txt")):
        lines = Path(datapath(file)).read_text(encoding="utf-8").lower().splitlines()
        pairs = [line.split("\t") for line in lines if not line.startswith("#")]
        known[name] = [(number[a], number[b], float(rating)) for a, b, rating in pairs if a in number and b in number]
    return known


def ratings_notes(words: Sequence[str]) -> list[str]:
    """What is to be said where the ratings have hardly a pair of these words."""
    few = {name: len(pairs) for name, pairs in _rated_pairs(words).items() if len(pairs) < 20}
    return [
        f"{name} rates English words, and the text has both words of only {count} of its pairs: its score says nothing"
        for name, count in few.items()
    ]


def similarity_scores(words: Sequence[str], vectors: np.ndarray) -> dict[str, float]:
    """Spearman's correlation, -1 to 1, of the cosines of word vectors with human ratings, and how many pairs it was taken over.

    The ratings are WordSim-353 (Finkelstein et al., 2002: relatedness) and SimLex-999 (Hill et al., 2015: similarity proper), from
    gensim's test data. Pairs of which a word is unknown are left out; case is ignored, the first of words that differ only in case
    counts. NaN where fewer than two pairs are left.
    words: of vectors [words, dims].
    """
    from scipy.stats import spearmanr

    unit = _unit(vectors)
    scores: dict[str, float] = {}
    for name, known in _rated_pairs(words).items():
        cosines = [unit[a] @ unit[b] for a, b, _ in known]
        scores[name] = float(spearmanr(cosines, [rating for *_, rating in known]).statistic)
        scores[f"{name}_pairs"] = len(known)
    return scores
