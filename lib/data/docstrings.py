"""The docstrings in installed Python packages: text, parameters, and the functions that they are of.

Files are read with `ast` and not imported. Several samples are made of the same docstrings, so these are cached:
parsing the files and taking out the markup is most of the work.
"""

import ast
import gc
import importlib.util
import json
import os
import re
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lib.cache import cache_folder, sha256

# The libraries of the sample `docstrings`, and the names that would give each away.
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
# The libraries of the samples that are made of docstrings without markup.
DOCUMENTED = (*LIBRARIES, "matplotlib", "datasets", "huggingface_hub")
# The packages that they are in, which may have other names.
LIBRARY_PACKAGES = ("torch", "transformers", "numpy", "scipy", "pandas", "scikit-learn", "sympy", "networkx")
DOCUMENTED_PACKAGES = (*LIBRARY_PACKAGES, "matplotlib", "datasets", "huggingface_hub")
# The longest function whose code is kept beside its docstring, in lines and in characters, without the docstring.
LINES_OF_CODE = 25
CHARACTERS_OF_CODE = 900


class Documented(NamedTuple):
    """A docstring without markup. group: the file that it is from.

    code: the function that it is of, without the docstring; "" for a class, and for a function that is too long.
    """

    group: str
    docstring: str
    code: str


def python_files(package: str) -> dict[str, Path]:
    """{group: file} of the Python files of an installed package, without its tests, in an arbitrary but fixed order."""
    root = folder(package)
    files = [file for file in root.rglob("*.py") if "tests" not in file.relative_to(root).parts]
    groups = {f"{package}/{file.relative_to(root).as_posix()}": file for file in files}
    return {group: groups[group] for group in sorted(groups, key=sha256)}


def folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def of_file(file: Path) -> Iterator[tuple[str, str]]:
    """(docstring, code) of each class and function in a Python file that has a docstring; code: see Documented."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's files
            gc.disable()  # the collector would walk the growing tree again and again, which doubles the time
            source = file.read_bytes()
            tree = ast.parse(source)
    except (SyntaxError, ValueError, OSError):
        return  # templates and stubs are not all Python
    finally:
        gc.enable()
    lines = source.splitlines()  # those of bytes are the parser's; str has other line ends, such as a form feed
    nodes: list[ast.AST] = [tree]
    for node in nodes:  # in the order of ast.walk, but without the expressions, which are by far the most nodes
        for name in ("body", "handlers", "orelse", "finalbody", "cases"):
            children = getattr(node, name, [])
            nodes.extend(children if isinstance(children, list) else [])
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring, "" if isinstance(node, ast.ClassDef) else _code(node, lines)


def _code(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[bytes]) -> str:
    """The lines of a function without those of its docstring, or "" if there is nothing else in it or too much."""
    docstring = function.body[0]
    assert docstring.end_lineno and function.end_lineno
    start = min(node.lineno for node in (function, *function.decorator_list)) - 1
    kept = lines[start : docstring.lineno - 1] + lines[docstring.end_lineno : function.end_lineno]
    if len(function.body) == 1 or not 3 <= len(kept) <= LINES_OF_CODE:
        return ""
    code = textwrap.dedent(b"\n".join(kept).decode("utf-8", "replace")).strip()
    return code if len(code) <= CHARACTERS_OF_CODE else ""


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


def of_package(package: str) -> Iterator[Documented]:
    """The docstrings of the classes and functions in an installed package, without markup, from the cache."""
    cache = cache_folder("readable_docstrings", DOCUMENTED_PACKAGES, __file__) / f"{package}.json"
    if not cache.is_file():
        found = []
        for group, file in python_files(package).items():
            for docstring, code in of_file(file):
                for pattern, replacement in MARKUP:
                    docstring = pattern.sub(replacement, docstring)
                if not BLANK.search(docstring):
                    found.append(Documented(group, docstring.strip(), code))
        cache.parent.mkdir(parents=True, exist_ok=True)
        part = cache.with_name(f".{package}-{os.getpid()}.json")
        part.write_text(json.dumps(found), encoding="utf-8")
        part.replace(cache)  # whole or not at all
    for entry in json.loads(cache.read_text(encoding="utf-8")):
        yield Documented(*entry)


def masked(text: str, library: str) -> str:
    """`text` with <library> in the place of the names of a library, which would give it away."""
    names = "|".join(name if len(name) > 2 else rf"\b{name}\b" for name in LIBRARIES[library])
    return re.sub(names, "<library>", text, flags=re.IGNORECASE)


def words(text: str) -> str:
    """`text` in lower case and without punctuation, so that texts which differ only in these count as the same."""
    return " ".join(re.findall(r"\w+", text.lower()))


# --- parameters -----------------------------------------------------------------------------------------------------

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


def entries(docstring: str) -> Iterator[tuple[str, re.Match[str], int]]:
    """(style, match, offset) of each parameter that a docstring describes.

    style: "numpydoc" or "google"; the match has the groups name, type and description; offset: where it begins.
    """
    for style, sections, entry in (("numpydoc", NUMPYDOC, NUMPYDOC_ENTRY), ("google", GOOGLE, GOOGLE_ENTRY)):
        for section in sections.finditer(docstring):
            text, start = section["section"], section.start("section")
            indentation = re.match(r"\n*( *)", text)
            assert indentation is not None
            for block in re.finditer(
                rf"^{indentation[1]}(?=\S)(?P<entry>.*\n?(?:\n|{indentation[1]} .*\n?)*)", text, re.MULTILINE
            ):
                match = entry.match(block["entry"])
                if match:
                    yield style, match, start + block.start("entry")


def parameters(docstring: str) -> Iterator[tuple[str, Spans]]:
    """(name, spans) of each parameter that a docstring describes; a span is the answer to one kind of question."""
    for _, match, offset in entries(docstring):
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
