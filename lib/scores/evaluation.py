"""Scores, as the field's own tools define them. `baselines.py` has the baselines to compare them with."""

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

    Macro-F1 is the mean F1 over the labels that occur in `labels`. By scikit-learn's default it would include labels
    that are only predicted, and then a model and its baselines would be scored over different sets of labels.
    """
    from sklearn.metrics import accuracy_score, f1_score  # here, because it takes a second to import

    return {
        "accuracy": float(accuracy_score(labels, predictions)),
        "macro_f1": float(f1_score(labels, predictions, labels=sorted(set(labels)), average="macro", zero_division=0)),
    }


def perplexity(nats: float, tokens: float) -> float:
    """Perplexity from the summed negative log-likelihood (nats) of `tokens`; infinite if too large for a float."""
    return math.inf if nats / tokens > 700 else math.exp(nats / tokens)


def perplexity_and_bits(loss_sum: float, tokens: int, text_bytes: int) -> dict[str, float]:
    """Perplexity per token and bits per byte.

    loss_sum: the summed negative log-likelihood (nats) of `tokens`, which encode `text_bytes` bytes of text.
    """
    return {"perplexity": perplexity(loss_sum, tokens), "bits_per_byte": loss_sum / math.log(2) / text_bytes}


def _bleu(tokenize: str) -> Any:
    """sacrebleu's BLEU with defaults for all but the tokenizer."""
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(tokenize=tokenize, references=[[""]])  # the signature states the number of references: one for each row


def translation_scores(hypotheses: Sequence[str], references: Sequence[str], tokenize: str = "13a") -> dict[str, float]:
    """BLEU (Papineni et al., 2002) and chrF2 (Popovic, 2015) of the whole corpus, 0 to 100, by sacrebleu.

    hypotheses: raw text, one for each row, not tokenized; references: one for each row.
    tokenize: sacrebleu's tokenizer for BLEU (chrF needs none). "13a" suits languages that write spaces between words,
    "zh" Chinese, "char" any language.
    """
    from sacrebleu.metrics.chrf import CHRF

    return {
        "bleu": _bleu(tokenize).corpus_score(hypotheses, [references]).score,
        "chrf": CHRF().corpus_score(hypotheses, [references]).score,
    }


def bleu_signature(tokenize: str = "13a") -> str:
    """sacrebleu's signature of `translation_scores`' BLEU, without which a BLEU cannot be compared (Post, 2018)."""
    return str(_bleu(tokenize).get_signature())


def sentences(text: str) -> list[str]:
    """The sentences of a text, each on one line, by a simple rule.

    A sentence ends at a blank line, after a full stop, question mark or exclamation mark that is followed by white
    space and then no lower-case letter, and after the corresponding marks of Chinese and Japanese.
    """
    parts = re.split(
        r"(?<=[.!?])\s+(?![a-z\s])"
        r"|(?<=[\u3002\uff01\uff1f])(?![\u3002\uff01\uff1f\u300d\u300f\u201d\u2019\uff09])"
        r"|\n\s*\n",
        text,
    )
    return [" ".join(part.split()) for part in parts if part.strip()]


# Letters of scripts that put no spaces between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese.
SPACELESS = (
    r"[\u0e01-\u0e4e\u0e81-\u0edf\u1000-\u109f\u1780-\u17d3\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    r"\U00020000-\U0003ffff]"
)


def spaced(text: str) -> str:
    """The text with spaces around each letter of a script without spaces, so that each such letter counts as a word."""
    return re.sub(SPACELESS, r" \g<0> ", text)


def are_spaceless(texts: Sequence[str]) -> bool:
    """Whether most letters are of scripts that put no spaces between words."""
    letters = spaceless = 0
    for text in texts:
        letters += sum(map(str.isalpha, text))
        spaceless += len(re.findall(SPACELESS, text))
    return 2 * spaceless > letters


def check_bleu_tokenizer(tokenize: str, references: Sequence[str]) -> None:
    """Raise a UserError where BLEU would count whole sentences as words."""
    if tokenize in ("13a", "intl") and are_spaceless(references):
        raise UserError(
            f"the targets have no spaces between words, which bleu_tokenizer {tokenize} needs;"
            " set --bleu_tokenizer zh for Chinese, char for others"
        )


class _EveryScript:
    """A tokenizer for rouge-score that keeps words of every script; rouge-score's own keeps only a to z and digits."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", spaced(text.lower()))


def rouge_tokens(references: Sequence[str]) -> str:
    """The units that ROUGE counts in these references, as a text to be shown with the score."""
    if _is_english_alphabet(references):
        return "rouge-score's tokens, stemmed: a to z and digits"
    return "letters" if are_spaceless(references) else "words as they are written, not stemmed"


def _is_english_alphabet(texts: Sequence[str]) -> bool:
    """Whether most letters are a to z."""
    letters = sum(sum(map(str.isalpha, text)) for text in texts)
    return 2 * sum(len(re.findall("[a-z]", text, re.IGNORECASE | re.ASCII)) for text in texts) >= letters


def summarization_scores(summaries: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, -2, -L and -Lsum (Lin, 2004): F-measure, 0 to 100, means over rows, by rouge-score with Porter stemming.

    ROUGE-Lsum compares sentence by sentence and reads a newline as the end of a sentence, so summaries and references
    are split by `sentences`; this changes neither ROUGE-L nor the n-grams. rouge-score drops all but the letters a to z
    and digits. Where most letters of the references are others, words are compared as they are written, not stemmed,
    and in scripts without spaces single letters are compared.
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
    """An answer as SQuAD compares it: lower case, without ASCII punctuation, English articles and extra white space."""
    letters = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", letters).split())


def _word_f1(prediction: str, answer: str) -> float:
    """F1 of the bags of words of two normalized answers. In scripts without spaces, letters count as words.

    If one of the two is empty, it is 0; if both are, 1.
    """
    predicted, expected = spaced(prediction).split(), spaced(answer).split()
    if not predicted or not expected:
        return float(predicted == expected)
    return 2 * (Counter(predicted) & Counter(expected)).total() / (len(predicted) + len(expected))


def question_answering_scores(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Exact match and F1 over words, 0 to 100, means over questions, by SQuAD 2.0's script (Rajpurkar et al., 2018).

    answers: the acceptable answers of each question. The one that gives the best score counts. A question without
    answers, or whose answers all normalize to nothing, has no answer; then a prediction that normalizes to nothing is
    right.
    """
    exact_match = f1 = 0.0
    for text, accepted in zip(predictions, answers, strict=True):
        prediction = _normalized(text)
        golds = [gold for gold in map(_normalized, accepted) if gold] or [""]
        exact_match += prediction in golds
        f1 += max(_word_f1(prediction, gold) for gold in golds)
    return {"exact_match": 100 * exact_match / len(predictions), "f1": 100 * f1 / len(predictions)}


def retrieval_scores(ranking: np.ndarray, relevant: Sequence[Collection[int]]) -> dict[str, float]:
    """nDCG@10, MRR@10 and recall@1, @10, @100, 0 to 1, means over all queries.

    They equal those of `trec_eval -c` with binary relevance.
    ranking: [queries, depth] document numbers, best first, each at most once in a row; a shorter row ends in -1.
    relevant: the numbers of each query's relevant documents; a query that has none scores 0.
    """
    found = np.array([np.isin(row, list(numbers)) for row, numbers in zip(ranking, relevant, strict=True)])
    totals = np.array([len(set(numbers)) for numbers in relevant])

    def recall(depth: int) -> float:
        return float((found[:, :depth].sum(1) / np.maximum(totals, 1)).mean())

    gains = 1 / np.log2(np.arange(2, 12))  # the gain of a relevant document at ranks 1 to 10
    best = np.concatenate([[0], gains.cumsum()])[np.minimum(totals, 10)]  # if the relevant documents came first
    top = found[:, :10]
    return {
        "ndcg_at_10": float((top @ gains[: top.shape[1]] / np.where(best, best, 1)).mean()),
        "mrr_at_10": float((top.any(1) / (top.argmax(1) + 1)).mean()),
        "recall_at_1": recall(1),
        "recall_at_10": recall(10),
        "recall_at_100": recall(100),
    }


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors scaled to length 1, so that their products are cosines; a zero vector stays zero."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(lengths, lengths, 1)


def _rated_pairs(words: Sequence[str]) -> dict[str, list[tuple[int, int, float]]]:
    """{list of ratings: [(number of a word, number of another, rating)]} of the pairs whose words are both known."""
    from gensim.test.utils import datapath

    number = {word.lower(): i for i, word in reversed(list(enumerate(words)))}
    known = {}
    for name, file in (("wordsim353", "wordsim353.tsv"), ("simlex999", "simlex999.txt")):
        lines = Path(datapath(file)).read_text(encoding="utf-8").lower().splitlines()
        pairs = [line.split("\t") for line in lines if not line.startswith("#")]
        known[name] = [(number[a], number[b], float(rating)) for a, b, rating in pairs if a in number and b in number]
    return known


def ratings_notes(words: Sequence[str]) -> list[str]:
    """A note for each list of ratings that has fewer than 20 pairs of these words."""
    few = {name: len(pairs) for name, pairs in _rated_pairs(words).items() if len(pairs) < 20}
    return [
        f"{name} rates English words, and the text has both words of only {count} of its pairs: its score says nothing"
        for name, count in few.items()
    ]


def similarity_scores(words: Sequence[str], vectors: np.ndarray) -> dict[str, float]:
    """Spearman's correlation, -1 to 1, of word vectors' cosines with human ratings, and the number of pairs used.

    The ratings are WordSim-353 (Finkelstein et al., 2002: relatedness) and SimLex-999 (Hill et al., 2015: similarity
    proper), from gensim's test data. Pairs with an unknown word are left out. Case is ignored: of words that differ
    only in case, the first counts. The correlation is NaN where fewer than two pairs are left.
    words: the words of vectors [words, dims], in this order.
    """
    from scipy.stats import spearmanr

    unit = _unit(vectors)
    scores: dict[str, float] = {}
    for name, known in _rated_pairs(words).items():
        cosines = [unit[a] @ unit[b] for a, b, _ in known]
        scores[name] = float(spearmanr(cosines, [rating for *_, rating in known]).statistic)
        scores[f"{name}_pairs"] = len(known)
    return scores
