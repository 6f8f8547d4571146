"""The built-in samples: the rows are as lib/data/samples.py describes them, and no text is in two splits."""

import functools
import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lib.data.samples import (
    QUESTIONS,
    QUESTIONS_PER_DOCSTRING,
    SAMPLES,
    SPLITS,
    _parameters,
    _translations,
    _words,
    load_sample,
)

MESSAGES = sorted(name for name in SAMPLES if name.startswith("messages_"))
ROWS = {  # the least number of rows in train, validation and test
    "docstring_pairs": (14000, 1700, 1800),
    "docstring_questions": (9500, 1100, 1100),
    "messages_fr": (2500, 300, 320),
    "messages_de": (2400, 300, 300),
    "messages_es": (2600, 320, 330),
    "messages_ja": (2300, 280, 290),
}


@functools.cache
def rows_of(name: str) -> dict[str, list[dict[str, Any]]]:
    return {split: rows.to_list() for split, rows in load_sample(name).items()}


def all_rows(name: str) -> list[dict[str, Any]]:
    return list(itertools.chain.from_iterable(rows_of(name).values()))


@pytest.mark.parametrize("name", ROWS)
def test_there_are_rows_for_training_and_for_scores(name: str) -> None:
    assert [len(rows_of(name)[split]) >= least for split, least in zip(SPLITS, ROWS[name], strict=True)] == [True] * 3
    assert all(value.strip() for row in all_rows(name) for value in row.values() if isinstance(value, str))


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("docstring_pairs", "summary"),
        ("docstring_pairs", "body"),
        ("docstring_questions", "context"),
        *((name, "source") for name in MESSAGES),
    ],
)
def test_no_text_is_in_two_splits_whatever_its_case_and_punctuation(name: str, column: str) -> None:
    texts = [{_words(row[column]) for row in rows} for rows in rows_of(name).values()]
    assert len(set.union(*texts)) == sum(map(len, texts))


def test_pairs_come_once_and_no_body_gives_its_summary_away() -> None:
    rows = all_rows("docstring_pairs")
    for column in ("summary", "body"):
        assert len({row[column] for row in rows}) == len(rows)
    for row in rows:
        assert 3 <= len(row["summary"].split()) <= 30 and "\n" not in row["summary"] and ">>>" not in row["summary"]
        assert len(row["body"].split()) >= 20
        assert row["summary"].rstrip(".") not in " ".join(row["body"].split())


def test_pairs_are_prose_without_markup() -> None:
    rows = all_rows("docstring_pairs")
    for markup in (
        r":(class|func|meth|ref|attr):`",
        r"^ *\.\. (note|warning|versionadded)::",
        r"\[`\w+`\]\(",
        r"%\(\w+\)s$",
        r"<Tip",
    ):
        found = sum(bool(re.search(markup, row["body"], re.MULTILINE)) for row in rows)
        assert found <= len(rows) / 1000, f"{markup}: in {found} bodies"
    assert sum(row["summary"].endswith(".") for row in rows) > 0.9 * len(rows)


def test_code_keeps_its_indentation() -> None:
    assert any(re.search(r"^\.\.\.     \S", row["body"], re.MULTILINE) for row in all_rows("docstring_pairs"))


def test_answers_are_where_they_are_said_to_be() -> None:
    for row in all_rows("docstring_questions"):
        assert len(row["answers"]["text"]) == len(row["answers"]["answer_start"]) <= 1
        for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True):
            assert row["context"][start : start + len(text)] == text == text.strip() != ""


def test_a_question_is_unanswerable_when_nothing_in_its_context_has_that_name() -> None:
    rows = all_rows("docstring_questions")
    for row in rows:
        name = row["question"].split("`")[1]
        assert bool(re.search(rf"\b{name}\b", row["context"], re.IGNORECASE)) == bool(row["answers"]["text"]), row
    assert 0.25 <= sum(not row["answers"]["text"] for row in rows) / len(rows) <= 0.3
    assert all(20 <= len(row["context"].split()) <= 400 for row in rows)


def test_a_phrase_tells_nothing_about_its_answer_and_no_docstring_dominates() -> None:
    rows = all_rows("docstring_questions")
    phrases = Counter(re.sub("`.*`", "", row["question"]) for row in rows)
    unanswerable = Counter(re.sub("`.*`", "", row["question"]) for row in rows if not row["answers"]["text"])
    assert len(phrases) == sum(map(len, QUESTIONS.values()))
    assert all(
        count > len(rows) / 20 and 0.23 < unanswerable[phrase] / count < 0.33 for phrase, count in phrases.items()
    )
    assert max(Counter(row["context"] for row in rows).values()) == QUESTIONS_PER_DOCSTRING


def test_parameters_of_both_styles() -> None:
    numpydoc = """Sum.

Parameters
----------
a, b : array
    Two arrays.
axis : {0, 1}, optional
    The axis to sum
    along. If None, all.
out
    Where to put it, e.g. a buffer.

Returns
-------
total : float
    The sum."""
    google = """Sum.

Args:
    values (`list` of `int`, *optional*, defaults to `(1, 2)`):
        What to sum. Not empty.
    start: the first
        summand.

Returns:
    total: the sum"""

    def found(docstring: str) -> dict[str, dict[str, str]]:
        return {
            name: {kind: docstring[start:end] for kind, (start, end) in spans.items()}
            for name, spans in _parameters(docstring)
        }

    assert found(numpydoc) == {
        "axis": {"description": "The axis to sum\n    along", "type": "{0, 1}, optional"},
        "out": {"description": "Where to put it, e.g. a buffer"},
    }
    assert found(google) == {
        "values": {"description": "What to sum", "type": "`list` of `int`, *optional*, defaults to `(1, 2)`"},
        "start": {"description": "the first\n        summand"},
    }


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_are_translated_and_keep_their_placeholders(name: str) -> None:
    rows = all_rows(name)
    assert len({row["source"] for row in rows}) == len(rows)
    assert sum(row["source"] == row["target"] for row in rows) < 0.03 * len(rows)
    for row in rows:
        source, target = (set(re.findall(r"\$\{.+?\}", row[column])) for column in ("source", "target"))
        assert source == target
        assert not re.search(r"</?[a-z]", row["source"] + row["target"])
        assert not re.fullmatch(r"[a-z]+(_[a-z]+)+", row["source"])  # the name of a message, not its text
    if name == "messages_ja":
        assert sum(bool(re.search(r"[\u3040-\u30ff\u4e00-\u9fff]", row["target"])) for row in rows) > 0.98 * len(rows)


def test_what_is_read_of_a_gettext_file(tmp_path: Path) -> None:
    file = tmp_path / "some.po"
    file.write_text(
        """msgid ""
msgstr "Language: fr\\n"

#. Default: "Add ${name} "
#. "to the \\"folder\\""
#: some/file.py:12
msgid "label_add"
msgstr ""
"Ajouter ${name} "
"au « dossier »"

#, fuzzy
msgid "Remove"
msgstr "Supprimer ?"

msgid "Delete"
msgstr ""

msgid "label_without_text"
msgstr "Sans texte"

#~ msgid "Old"
#~ msgstr "Vieux"

#. Translators: a verb
msgid "Open the file"
msgstr "Ouvrir le fichier"
"""
    )
    assert list(_translations(file)) == [
        ('Add ${name} to the "folder"', "Ajouter ${name} au « dossier »"),
        ("Open the file", "Ouvrir le fichier"),
    ]


@pytest.mark.parametrize(("sample", "column"), [("docstring_pairs", "body"), ("docstring_questions", "context")])
def test_few_test_rows_are_near_copies_of_training_rows(sample: str, column: str) -> None:
    def runs(text: str) -> list[str]:
        words = text.split()
        return [" ".join(words[start : start + 8]) for start in range(len(words) - 7)]

    rows = load_sample(sample)
    seen = {run for text in rows["train"][column] for run in runs(text)}
    texts = [runs(text) for text in set(rows["test"][column])]
    assert sum(sum(run in seen for run in text) > len(text) / 2 for text in texts) / len(texts) < 0.08
