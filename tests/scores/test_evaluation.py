"""Scores equal the reference tools' to 1e-6; baselines do the obvious on obvious rows."""

import json
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
import torch
from conftest import execute
from gensim.models import KeyedVectors
from gensim.test.utils import datapath
from rouge_score.rouge_scorer import RougeScorer

from lib.scores import baselines, evaluation
from lib.scores.answers import preference_scores

WORDS = sorted(set(re.findall(r"[A-Za-z][a-z]+|[,;:'%-]", np.einsum.__doc__ or "")))  # the words of a real text


def exactly(scores: dict[str, float]) -> object:
    return pytest.approx(scores, rel=1e-6, abs=1e-9)


def drawn(seed: int, rows: int, longest: int) -> tuple[list[str], list[str]]:
    """(rows of random words, the same rows with some words lost, replaced and swapped)."""
    draw = random.Random(seed)
    texts, changed = [], []
    for _ in range(rows):
        words = draw.choices(WORDS, k=draw.randint(1, longest))
        kept = [draw.choice(WORDS) if draw.random() < 0.1 else word for word in words if draw.random() < 0.9]
        if len(kept) > 3:
            kept[1:3] = kept[2:0:-1]
        texts.append(" ".join(words).capitalize() + ".")
        changed.append(" ".join(kept).capitalize() + draw.choice(".!?"))
    return texts, changed


@pytest.mark.parametrize("tokenize", ["13a", "char", "none"])
def test_translation_scores_are_those_of_the_sacrebleu_command(tmp_path: Path, tokenize: str) -> None:
    references, hypotheses = drawn(1, 100, 20)
    (tmp_path / "references").write_text("\n".join(references) + "\n")
    (tmp_path / "hypotheses").write_text("\n".join(hypotheses) + "\n")
    command = [
        sys.executable,
        "-m",
        "sacrebleu",
        "references",
        "-i",
        "hypotheses",
        "-m",
        "bleu",
        "chrf",
        "-tok",
        tokenize,
        "-w",
        "9",
    ]
    bleu, chrf = json.loads(execute(command, cwd=tmp_path).stdout)
    assert evaluation.translation_scores(hypotheses, references, tokenize) == exactly(
        {"bleu": bleu["score"], "chrf": chrf["score"]}
    )
    assert evaluation.bleu_signature(tokenize) == bleu["signature"]
    assert 20 < bleu["score"] < 90 and chrf["name"] == "chrF2"


def test_summarization_scores_are_rouge_scores_of_sentences_on_lines_of_their_own() -> None:
    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    references, summaries = drawn(2, 120, 12)
    # Each row has three sentences, in another order in the summary.
    rows = [(references[i : i + 3], summaries[i + 1 : i + 3] + summaries[i : i + 1]) for i in range(0, 120, 3)]
    scorer = RougeScorer(kinds, use_stemmer=True)
    expected = [scorer.score("\n".join(reference), "\n".join(summary)) for reference, summary in rows]
    scores = evaluation.summarization_scores(
        [" ".join(summary) for _, summary in rows], ["  ".join(reference) for reference, _ in rows]
    )
    assert scores == exactly({kind: 100 * float(np.mean([row[kind].fmeasure for row in expected])) for kind in kinds})
    assert scores["rougeLsum"] > scores["rougeL"] + 10


@pytest.mark.parametrize(
    ("prediction", "answers", "exact_match", "f1"),
    [
        ("The Eiffel Tower.", ["eiffel  tower"], 100, 100),  # case, punctuation, articles, white space
        ("a theatre, an anthem", ["theatre anthem"], 100, 100),  # an article is a whole word
        ("well-known", ["wellknown"], 100, 100),  # punctuation is removed without leaving a space
        ("caf\u00e9\u2019s", ["caf\u00e9s"], 0, 0),  # only ASCII punctuation is removed
        ("in the year 1066", ["1066"], 0, 50),  # precision 1/3, recall 1
        ("New York", ["York City", "new york city", "Boston"], 0, 80),  # the best of several: precision 1, recall 2/3
        ("very very good", ["very good very very"], 0, 100 * 6 / 7),  # a bag of words, not a set
        ("Boston", ["New York", "Boston"], 100, 100),
        ("Paris", ["London"], 0, 0),
        ("\u201c \u201d", ["\u201cthe\u201d"], 100, 100),  # an article leaves a space behind
        ("", [], 100, 100),  # no answer, and none given
        ("the.", [], 100, 100),
        ("something", [], 0, 0),  # no answer, but one given
        ("", ["something"], 0, 0),
        ("", ["something", "The"], 0, 0),  # an answer that normalizes to nothing is left out if there is another
        ("a", ["the"], 100, 100),  # if there is no other, it means that the question has no answer
    ],
)
def test_question_answering_scores_are_squads(
    prediction: str, answers: list[str], exact_match: float, f1: float
) -> None:
    assert evaluation.question_answering_scores([prediction], [answers]) == exactly(
        {"exact_match": exact_match, "f1": f1}
    )


def test_question_answering_scores_are_means_over_questions() -> None:
    scores = evaluation.question_answering_scores(["yes", "in 1066", "", "no"], [["Yes!"], ["1066"], [], ["yes"]])
    assert scores == exactly({"exact_match": 50, "f1": 100 * (1 + 2 / 3 + 1 + 0) / 4})


@pytest.mark.parametrize("depth", [1, 7, 10, 130])
def test_retrieval_scores_are_trec_evals(depth: int) -> None:
    random_numbers = np.random.default_rng(depth)
    ranking = np.array([random_numbers.permutation(200)[:depth] for _ in range(150)])
    relevant = [
        set(random_numbers.choice(200, size=random_numbers.integers(1, 25), replace=False).tolist()) for _ in ranking
    ]
    for query in range(0, 150, 3):
        ranking[query, random_numbers.integers(0, depth + 1) :] = -1  # short rankings, some of them empty
    for query in range(0, 150, 10):
        relevant[query] -= set(ranking[query].tolist())  # nothing relevant is found, or nothing is relevant
    for query in range(1, 150, 2):
        if ranking[query, 0] >= 0:
            relevant[query].add(int(ranking[query, 0]))  # a relevant document at the top
    relevant[0] = set()

    judged = {
        str(query): {"none": 0} | {str(document): 1 for document in documents}
        for query, documents in enumerate(relevant)
    }

    def mean(measure: str, depth: int = depth) -> float:
        found = {
            str(query): {str(document): -float(rank) for rank, document in enumerate(row[:depth]) if document >= 0}
            for query, row in enumerate(ranking)
        }
        results = pytrec_eval.RelevanceEvaluator(judged, {measure}).evaluate(found)
        return sum(score for result in results.values() for score in result.values()) / len(ranking)

    assert evaluation.retrieval_scores(ranking, relevant) == exactly(
        {
            "ndcg_at_10": mean("ndcg_cut.10"),
            "mrr_at_10": mean("recip_rank", depth=10),
            "recall_at_1": mean("recall.1"),
            "recall_at_10": mean("recall.10"),
            "recall_at_100": mean("recall.100"),
        }
    )


def word_vectors() -> KeyedVectors:
    """Random vectors, not of length 1, for half of the rated words. Some are there in two cases, lower case first."""
    rated = {
        word
        for file in ("wordsim353.tsv", "simlex999.txt")
        for line in Path(datapath(file)).read_text().splitlines()
        for word in line.split("\t")[:2]
    }
    words = sorted(word for word in rated if "#" not in word)[::2]
    words += [word.capitalize() for word in words[::5] if word.capitalize() not in words]
    known = KeyedVectors(20, dtype=np.float64)
    known.add_vectors(words, np.random.default_rng(0).normal(0.3, 2, (len(words), 20)))
    return known


def test_similarity_scores_are_gensims() -> None:
    known = word_vectors()
    scores = evaluation.similarity_scores(known.index_to_key, known.vectors)
    for name, file, total in (("wordsim353", "wordsim353.tsv", 353), ("simlex999", "simlex999.txt", 999)):
        _, spearman, unknown_percent = known.evaluate_word_pairs(datapath(file))
        assert scores[name] == pytest.approx(spearman[0], abs=1e-6)
        assert scores[f"{name}_pairs"] == round(total * (1 - unknown_percent / 100)) > 50


def test_similarity_scores_of_too_few_pairs() -> None:
    scores = evaluation.similarity_scores(["tiger", "cat"], np.eye(2))
    assert scores["wordsim353_pairs"] == 2 and scores["simlex999_pairs"] == 0  # tiger and cat, tiger and tiger
    assert scores["wordsim353"] == pytest.approx(1) and np.isnan(scores["simlex999"])


def test_classification_scores_of_the_majority_class() -> None:
    assert baselines.majority_class([0, 1, 1], [0, 1, 1, 1]) == exactly({"accuracy": 0.75, "macro_f1": (0 + 6 / 7) / 2})


def test_tfidf_and_logistic_regression_tell_words_apart() -> None:
    scores = baselines.tfidf_logistic_regression(
        ["good film", "good play", "bad film", "bad play"], [1, 1, 0, 0], ["good book", "bad book"], [1, 0]
    )
    # Texts of single letters, such as proteins.
    letter_scores = baselines.tfidf_logistic_regression(
        ["M K V", "M K L", "G P G", "G P A"], [1, 1, 0, 0], ["M K A", "G P V"], [1, 0]
    )
    assert letter_scores["accuracy"] == 1.0
    assert scores == {"accuracy": 1, "macro_f1": 1}


def test_the_unigram_baseline_is_the_cross_entropy_of_the_counts() -> None:
    scores = baselines.unigram(np.array([0, 0, 1]), np.array([3, 0, 1]), vocab_size=4, test_texts=["\u00e9"])
    assert scores == exactly({"perplexity": (7 / 3 * 7 / 2) ** 0.5, "bits_per_byte": np.log2(7 / 3 * 7 / 2) / 2})


def test_the_unigram_baseline_of_hidden_tokens() -> None:
    scores = baselines.unigram_masked(np.array([0, 0, 1]), [3, 0, 1], vocab_size=4)
    assert scores == exactly({"pseudo_perplexity": (7 / 1 * 7 / 3 * 7 / 2) ** (1 / 3), "masked_accuracy": 1 / 3})


def test_the_nearest_training_target(monkeypatch: pytest.MonkeyPatch) -> None:
    sources, targets = (
        ["Delete this folder", "Save changes", "Search results"],
        ["Supprimer ce dossier", "Enregistrer", "Chercher"],
    )
    assert baselines.nearest_training_target(sources, targets, ["changes saved", "searching", "Folder deleted"]) == [
        targets[1],
        targets[2],
        targets[0],
    ]
    monkeypatch.setattr(baselines, "MEMORY_ROWS", 2)  # the first and the last row
    assert baselines.nearest_training_target(sources, targets, ["searching", "changes saved"])[0] == targets[2]
    assert targets[1] not in baselines.nearest_training_target(sources, targets, ["changes saved", "Save changes"])


def test_sentences() -> None:
    text = " It is 3.5 m, e.g.  long.  Is it?\nYes!\n\nA heading\n \nand a line\nthat goes on. "
    assert evaluation.sentences(text) == [
        "It is 3.5 m, e.g. long.",
        "Is it?",
        "Yes!",
        "A heading",
        "and a line that goes on.",
    ]
    assert evaluation.sentences(" \n\n ") == []


def test_sentences_as_answers_and_summaries() -> None:
    context = "Whales are mammals. The blue whale eats krill, which is small. Krill is small."
    assert baselines.first_sentence(context) == "Whales are mammals."
    assert (
        baselines.longest_overlap("What does the Blue Whale eat?", context)
        == "The blue whale eats krill, which is small."
    )
    assert baselines.longest_overlap("Why?", context) == "Whales are mammals."
    assert baselines.first_sentence("") == baselines.longest_overlap("Why?", "") == ""


def test_bm25_ranks_in_silence_and_fills_up(capfd: pytest.CaptureFixture[str]) -> None:
    documents = ["red apples and green apples", "green trees", "a red car on a green road under a red sky"]
    ranking = baselines.bm25(["Apples", "green", "red cars", "zebra", ""], documents, depth=5)
    assert ranking.tolist() == [[0, -1, -1, -1, -1], [1, 0, 2, -1, -1], [2, 0, -1, -1, -1], [-1] * 5, [-1] * 5]
    assert baselines.bm25(["green"], documents, depth=2).tolist() == [[1, 0]]
    assert baselines.bm25(["a", "b"], ["a b", "the of"], depth=1).tolist() == [[-1], [-1]]  # no text has a word
    assert capfd.readouterr() == ("", "")


def test_gensims_word_vectors_know_the_company_that_words_keep() -> None:
    draw = random.Random(0)
    warm, cold = [f"warm{i}" for i in range(9)], [f"cold{i}" for i in range(9)]
    # By itself, gensim would not read beyond the first 10,000 words.
    document = draw.choices(warm, k=12_000) + draw.choices(cold, k=6_000) + ["once"]

    def train(sample: float = 0) -> tuple[list[str], np.ndarray, float]:
        return baselines.gensim_word2vec(
            [document], dims=16, window=3, negatives=5, min_count=2, epochs=3, sample=sample, seed=1
        )

    words, vectors, words_per_second = train()
    assert set(words[:9]) == set(warm) and set(words[9:]) == set(cold)  # by frequency, without the rare word
    assert vectors.shape == (18, 16) and words_per_second > 0
    known = KeyedVectors(16)
    known.add_vectors(words, vectors)
    assert {word for word, _ in known.most_similar("cold0", topn=8)} < set(cold)
    assert (train()[1] == vectors).all()
    assert (train(sample=2)[1] == vectors).all()  # 2 is a frequency that no word exceeds, not a number of occurrences
    assert (train(sample=0.01)[1] != vectors).any()


def test_scores_of_preference() -> None:
    found, reference = torch.tensor([[-1.0, -2.0], [-5.0, -3.0], [-2.0, -2.0]]), torch.tensor([[-1.0, -2.0]] * 3)
    assert preference_scores(found, reference, 0.5) == exactly(
        {"accuracy": 0.5, "reward_accuracy": 0.5 / 3, "margin": 0.5 * (0 - 3 - 1) / 3}
    )


def test_rules_of_preference() -> None:
    rows = {
        "prompt_text": ["the old river", "the old river", "the old river"],
        "chosen_text": ["old river", "a b c d e f", "same"],
        "rejected_text": ["some lake there", "the river", "same"],
    }
    rules = baselines.preference_rules(rows, [(-1, -2), (-3, -2), (-2, -2)])
    assert {rule: found["accuracy"] for rule, found in rules.items()} == {
        "model before training": 0.5,  # right, wrong, and neither
        "the shorter answer": 0.5,
        "more words of the prompt": 0.5,
    }
    rows["chosen_text"][1] = "the old river"
    assert baselines.preference_rules(rows, [(-1, -2)] * 3) == {
        "model before training": {"accuracy": 1},
        "the shorter answer": {"accuracy": 0.5},
        "more words of the prompt": {"accuracy": pytest.approx(2.5 / 3)},
    }
