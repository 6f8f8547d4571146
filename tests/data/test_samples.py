"""The built-in samples: the rows are as lib/data/samples.py describes them, and no text is in two splits."""

import ast
import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lib.data import docstrings, instruction_materials, instruction_samples
from lib.data.docstrings import words
from lib.data.instruction_materials import UNSAID
from lib.data.samples import QUESTIONS, QUESTIONS_PER_DOCSTRING, SAMPLES, _translations, load_sample
from lib.data.splits import SPLITS, split_of

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
    texts = [{words(row[column]) for row in rows} for rows in rows_of(name).values()]
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
            for name, spans in docstrings.parameters(docstring)
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
        text_words = text.split()
        return [" ".join(text_words[start : start + 8]) for start in range(len(text_words) - 7)]

    rows = load_sample(sample)
    seen = {run for text in rows["train"][column] for run in runs(text)}
    texts = [runs(text) for text in set(rows["test"][column])]
    assert sum(sum(run in seen for run in text) > len(text) / 2 for text in texts) / len(texts) < 0.08


# --- instructions and preferences ------------------------------------------------------------------------------------


def pattern_of(phrase: str) -> re.Pattern[str]:
    parts = {"text": r"[\s\S]+", "question": r"[^\n]+\?", "choices": r"[^\n]+?"}
    pattern = re.escape(phrase)
    for name, value in parts.items():
        pattern = pattern.replace(re.escape("{" + name + "}"), f"(?P<{name}>{value})", 1)
    return re.compile(pattern)


# {(kind, phrase): pattern}; those with the most words of their own first, because "{text} {question}" fits much
PATTERNS = {
    (kind, phrase): pattern_of(phrase)
    for kind, phrase in sorted(
        ((kind, phrase) for kind, phrases in instruction_samples.PHRASES.items() for phrase in phrases),
        key=lambda pair: -len(re.sub(r"{\w+}", "", pair[1])),
    )
}
KINDS = ("to command", "to third person", "numpydoc to google", "google to numpydoc")  # of the task rewrite


@functools.cache
def parts_of(prompt: str) -> tuple[str, str, dict[str, str]]:
    """(kind, phrase, parts) of a prompt; parts: text, which is without the fence of code, and question or choices."""
    for (kind, phrase), pattern in PATTERNS.items():
        match = pattern.fullmatch(prompt)
        if match:
            text = re.sub(r"\A```python\n|\n```\Z", "", match["text"])
            return kind, phrase, match.groupdict() | {"text": text}
    raise AssertionError(prompt)


def asked(task: str) -> list[tuple[dict[str, str], str]]:
    """(parts of the prompt, first answer) of each conversation of a task, or of a kind of it."""
    found = []
    for row in all_rows("instructions"):
        kind, _, parts = parts_of(row["messages"][0]["content"])
        if task in (row["task"], kind):
            found.append((parts, row["messages"][1]["content"]))
    return found


def test_instructions_are_balanced_over_tasks_and_libraries_and_always_the_same() -> None:
    made: dict[str, list[Any]] = {split: [] for split in SPLITS}
    groups = []
    for row in instruction_samples.instruction_rows():
        groups.append((row["task"], row.pop("group")))
        made[split_of(groups[-1][1])].append(row)
    assert made == rows_of("instructions")
    for position, split in enumerate(SPLITS):
        tasks = Counter(row["task"] for row in rows_of("instructions")[split])
        assert tasks == {task: counts[position] for task, counts in instruction_samples.INSTRUCTIONS.items()}
    libraries = Counter(group.split("/")[0] for _, group in groups)
    assert set(libraries) == set(docstrings.DOCUMENTED)
    assert max(libraries.values()) < 0.15 * libraries.total() and min(libraries.values()) > 0.04 * libraries.total()
    assert max(Counter(groups).values()) <= instruction_samples.ROWS_PER_FILE


def test_conversations_take_turns_and_some_have_two() -> None:
    rows = all_rows("instructions")
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and len(roles) in (2, 4)
        assert all(message["content"] == message["content"].strip() != "" for message in row["messages"])
    assert 0.07 < sum(len(row["messages"]) == 4 for row in rows) / len(rows) < 0.13
    lengths = sorted(sum(len(message["content"]) for message in row["messages"]) for row in rows)
    assert lengths[int(0.95 * len(lengths))] < 1200  # characters; about 300 tokens


def test_no_material_is_in_two_splits_nor_comes_twice() -> None:
    texts: dict[str, set[str]] = {split: set() for split in SPLITS}
    for split in SPLITS:
        prompts = [row["messages"][0]["content"] for row in rows_of("instructions")[split]]
        pairs = [row["prompt"] for row in rows_of("preferences")[split]]
        assert len(set(prompts)) == len(prompts) and len(set(pairs)) == len(pairs)
        texts[split] = {words(parts_of(prompt)[2]["text"]) for prompt in prompts + pairs}
    assert len(set.union(*texts.values())) == sum(map(len, texts.values()))
    code = [parts["text"] for parts, _ in asked("summarize_code")]
    assert len({words(text) for text in code}) == len(code)


def test_each_phrase_is_used_and_none_gives_the_answer_away() -> None:
    rows = all_rows("instructions")
    used = Counter(parts_of(row["messages"][0]["content"])[:2] for row in rows)
    kinds = Counter(kind for kind, _ in used.elements())
    assert set(kinds) == set(instruction_samples.PHRASES)
    for (kind, phrase), _ in PATTERNS.items():
        assert len(instruction_samples.PHRASES[kind]) >= 4
        assert used[kind, phrase] > 0.7 * kinds[kind] / len(instruction_samples.PHRASES[kind]), phrase
    unsaid = Counter(
        parts_of(row["messages"][0]["content"])[1] for row in rows if row["messages"][1]["content"] == UNSAID
    )
    for phrase in instruction_samples.PHRASES["answer"]:
        assert 0.2 < unsaid[phrase] / used["answer", phrase] < 0.4


def test_a_summary_is_not_in_the_code_that_it_is_of() -> None:
    for parts, answer in asked("summarize_code"):
        (function,) = ast.parse(parts["text"]).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(function) is None
        assert 3 <= len(parts["text"].splitlines()) <= 25 and len(parts["text"]) <= 900
        assert 3 <= len(answer.split()) <= 20 and answer.endswith(".") and "\n" not in answer
        assert words(answer) not in words(parts["text"])


def test_an_answer_stands_in_its_docstring_or_the_text_does_not_say() -> None:
    for parts, answer in asked("answer"):
        name = re.search("`(.+)`", parts["question"])
        in_text = bool(name and re.search(rf"\b{name[1]}\b", parts["text"], re.IGNORECASE))
        if answer == UNSAID:
            asks_default = parts["question"] in [
                phrase.format(name and name[1]) for phrase in instruction_materials.QUESTIONS["default"]
            ]
            assert in_text == asks_default
            assert not asks_default or not re.search("default|optional", parts["text"])
        else:
            assert (in_text or not name) and answer in " ".join(parts["text"].split())
            assert not re.search(r"\boptional$|\A\(", answer) or " " in answer
    assert 0.2 < sum(answer == UNSAID for _, answer in asked("answer")) / len(asked("answer")) < 0.4


def test_what_is_rewritten_says_the_same() -> None:
    for kind in KINDS:
        rows = asked(kind)
        assert len(rows) > 150
        for parts, answer in rows:
            if kind.startswith("to "):
                (verb, rest), (other, same) = parts["text"].split(" ", 1), answer.split(" ", 1)
                assert rest == same and verb != other and verb[:2] == other[:2]
                assert (len(verb) > len(other)) == (kind == "to command")
            else:
                assert words(answer) == words(parts["text"]) and answer != parts["text"]
                assert ("\n" in answer) == (kind == "google to numpydoc")


def test_a_library_is_one_of_four_and_not_named_in_the_text() -> None:
    names = dict(zip(docstrings.LIBRARY_PACKAGES, docstrings.LIBRARIES, strict=True))
    rows = asked("classify")
    for parts, answer in rows:
        choices = re.split(", | or ", parts["choices"])
        assert len(set(choices)) == 4 and set(choices) <= set(names) and answer in choices
        assert docstrings.masked(parts["text"], names[answer]) == parts["text"]
    places = Counter(re.split(", | or ", parts["choices"]).index(answer) for parts, answer in rows)
    assert min(places.values()) > 0.2 * len(rows)
    assert max(Counter(answer for _, answer in rows).values()) < 0.15 * len(rows)


def test_a_second_answer_stands_in_the_same_material() -> None:
    for row in all_rows("instructions"):
        if len(row["messages"]) == 4:
            text = " ".join(parts_of(row["messages"][0]["content"])[2]["text"].split())
            second = row["messages"][3]["content"]
            if row["task"] == "summarize_code":
                tree = ast.unparse(ast.parse(parts_of(row["messages"][0]["content"])[2]["text"]))
                assert all(part in tree for part in re.findall("`(.+?)`", second)), row
            else:
                assert second in text


def shared(answer: str, prompt: str) -> set[str]:
    return set(words(answer).split()) & set(words(prompt).split())


TRIVIAL_RULES: dict[str, Callable[[str, str], float]] = {  # each says what wins: the higher number
    "fewer characters": lambda answer, _: -len(answer),
    "fewer words": lambda answer, _: -len(answer.split()),
    "more words of the prompt": lambda answer, prompt: len(shared(answer, prompt)),
    "a larger share of words of the prompt": lambda answer, prompt: (
        len(shared(answer, prompt)) / max(1, len(set(words(answer).split())))
    ),
}


@pytest.mark.parametrize("rule", TRIVIAL_RULES)
@pytest.mark.parametrize("split", SPLITS)
def test_no_trivial_rule_finds_the_preferred_answer(rule: str, split: str) -> None:
    """Nor does its opposite. A tie counts half."""
    rows = rows_of("preferences")[split]
    right = 0.0
    for row in rows:
        chosen, rejected = (TRIVIAL_RULES[rule](row[name], row["prompt"]) for name in ("chosen", "rejected"))
        right += 0.5 if chosen == rejected else float(chosen > rejected)
    margin = 0.09 if split == "train" else 0.12  # 250 rows
    assert abs(right / len(rows) - 0.5) < margin, right / len(rows)


def test_preferences_are_of_all_kinds_in_each_split() -> None:
    for position, split in enumerate(SPLITS):
        rows = rows_of("preferences")[split]
        assert len(rows) == sum(counts[position] for counts in instruction_samples.PREFERENCES.values())
        kinds = Counter(row["kind"] for row in rows)
        for kind, share in instruction_samples.SHARES.items():
            assert 0.6 * share < kinds[kind] / len(rows) < 1.4 * share, kind


def test_a_rejected_answer_is_wrong_in_the_way_of_its_kind() -> None:
    for row in all_rows("preferences"):
        chosen, rejected, text = row["chosen"], row["rejected"], parts_of(row["prompt"])[2]["text"]
        assert (rejected.strip() and words(rejected) != words(chosen)) or row["kind"] == "unchanged"
        is_wrong = {
            "another": rejected != UNSAID and rejected not in chosen,
            "cut": len(rejected) < len(chosen) and " ".join(chosen.split()).startswith(f"{rejected} "),
            "padded": chosen in rejected and len(rejected) > len(chosen) + 50,
            "line": rejected in [line.strip() for line in text.splitlines()],
            "signature": set(words(rejected).split()) - {"with", "and"}
            <= set(re.findall("[a-z0-9]+", text.lower())) | set(words(text).split()),
            "unchanged": rejected == text != chosen,
            "said": chosen == UNSAID,
            "refused": rejected == UNSAID,
        }
        assert is_wrong[row["kind"]], row
        assert (chosen == UNSAID) == (row["kind"] == "said")
        assert (rejected == UNSAID) == (row["kind"] == "refused")


def test_what_is_asked_of_a_docstring() -> None:
    docstring = """Sum.

Parameters
----------
values : array_like, default: None
    What to sum. Not empty.
start : int, optional
    The first
    summand.

Returns
-------
total : float
    The sum of the
    values.

Notes
-----
None."""
    assert set(instruction_materials._facts(docstring)) == {
        ("description", "values", "What to sum."),
        ("type", "values", "array_like"),
        ("default", "values", "None"),
        ("description", "start", "The first summand."),
        ("type", "start", "int"),
        ("returns", "", "The sum of the values."),
    }
    two_values = docstring.replace("    values.\n", "    values.\ncount : int\n    How many.\n")
    assert "returns" not in {kind for kind, _, _ in instruction_materials._facts(two_values)}


@pytest.mark.parametrize(
    ("summary", "rewritten"),
    [
        ("Returns the sum.", "Return the sum."),
        ("Applies a function to each row.", "Apply a function to each row."),
        ("Search the path for files.", "Searches the path for files."),
        ("Set of integers.", None),  # no verb
        ("Returns the mask, and updates the cache.", None),  # a second verb
        ("Read the file and close it.", None),
    ],
)
def test_a_summary_is_rewritten_if_its_first_word_alone_changes(summary: str, rewritten: str | None) -> None:
    found = [material.answer for material in instruction_materials._moods("numpy", "numpy/a.py", summary)]
    assert found == ([rewritten] if rewritten else [])


@pytest.mark.parametrize(
    ("code", "follows"),
    [
        ("def sort_rows(rows):\n    return sorted(rows, key=column)", True),
        ("def sort_rows(rows):\n    # Sort the rows by a column.\n    return sorted(rows, key=column)", False),
        ("def f(a):\n    return g(a)", False),
    ],
)
def test_a_summary_follows_from_code_that_has_its_words_but_not_itself(code: str, follows: bool) -> None:
    assert instruction_materials._follows("Sort the rows by a column.", code) == follows


def test_what_is_read_of_a_python_file(tmp_path: Path) -> None:
    file = tmp_path / "some.py"
    file.write_text(
        '''class Some:
    """A class."""

    @property
    def size(self):
        """The size.

        In bytes."""
        # a form feed: \f
        return 1

    def nothing(self):
        """Do nothing."""

    def long(self):
        """Too long."""
'''
        + "        pass\n" * 30
    )
    assert dict(docstrings.of_file(file)) == {
        "A class.": "",
        "The size.\n\nIn bytes.": "@property\ndef size(self):\n    # a form feed: \f\n    return 1",
        "Do nothing.": "",
        "Too long.": "",
    }
