"""What instructions on Python code and its documentation are made of: real texts, with right and wrong answers to them.

The tasks are in the docstring of lib/data/instruction_samples.py.
"""

import ast
import itertools
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lib.cache import sha256
from lib.data import docstrings

UNSAID = "The text does not say."  # the answer where a docstring has none
QUESTIONS = {
    "description": ("What is the parameter `{}`?", "What is `{}`?", "What does the parameter `{}` stand for?"),
    "type": (
        "What type does `{}` have?",
        "Which type is expected for `{}`?",
        "What is the type of `{}`?",
    ),
    "default": ("What is the default of `{}`?", "Which value does `{}` have if none is given?"),
    "returns": ("What does it return?", "What is returned?", "What is the return value?"),
}
BASES = (  # verbs with which summaries begin
    "add apply build calculate call check clear collect compute construct convert copy create decode decorate "
    "define delete determine display draw encode estimate evaluate extract fetch fill filter find format generate "
    "get give handle initialize insert iterate join load make map merge move normalize parse perform plot print "
    "process raise read register remove rename replace reset resolve restore retrieve return run save search select "
    "set show simplify sort split store test transform try update validate verify wrap write yield"
)
THIRD_PERSON = {  # add -> adds, apply -> applies, search -> searches
    base: re.sub(r"(?<=[^aeo])y$", "ie", base) + ("es" if re.search(r"(?:s|sh|ch|x)$", base) else "s")
    for base in BASES.split()
}
# What a sentence must not have: markup, formulas, and remarks that are about the docstring and not about the code.
NO_SENTENCE = re.compile(
    r"[\\$<>|{}*]|::|[.!?]\s+[A-Z]|\bdocstring|^(?:See|Same|Overrid|Inherit|Internal|Deprecated)|\b(?:this|the) "
    r"(?:method|function|class) is\b|e\.g|i\.e|:\w+:|\bFIXME|\bXXX",
    re.IGNORECASE,
)
# What a docstring must not have to be asked about.
NO_TEXT = re.compile(r"[\\$]|^ *[|+]-?|^ *\.\. |</?[A-Z]", re.MULTILINE)
# What a summary must begin with for its first word to be a verb without doubt: "Set the name", but not "Set of names".
OBJECT = r"(?:the|an?|all|this|each|every|any|whether|if|how|True|False|its|some|both|only|it|them|that)\b"
VERB_AND_OBJECT = re.compile(rf"(\w+) {OBJECT}")
AFTER = r"(?:\b(?:and|or|then|but)|,) (?:\w+ly )?"  # what a second verb may stand after
OPTIONAL = re.compile(r",? *\(?\*?(?:optional|defaults?)\b.*")  # what may stand after a type
VALUE = r"(?P<value>`[^`]+`|\"[^\"]*\"|'[^']*'|None|True|False|[-+]?\d[\d.]*(?:e-?\d+)?(?!\w))"
DEFAULT = re.compile(rf"\bdefaults?(?: value)?(?: is| to)?\s*[=:]?\s*{VALUE}")
RETURNS = re.compile(  # one value that is returned, with a description
    r"^Returns\n-{3,}\n.*\n +(?P<numpydoc>\S.*(?:\n+ .*)*)(?=\n*\Z|\n+\S.*\n[-=]{3,})"
    r"|^Returns:\n +(?:[^\s:-][^:\n]{0,60}:\s+)?(?P<google>\S[\s\S]*)",
    re.MULTILINE,
)


class Material(NamedTuple):
    """What an instruction is about.

    kind: the rows of a task are balanced over these, and over libraries; group: the file it is from.
    text: as the instruction shows it; others: right answers to something else;
    question: on the text; second: a second question on it and the answer, or None.
    """

    task: str
    kind: str
    library: str
    group: str
    text: str
    answer: str
    others: tuple[str, ...] = ()
    question: str = ""
    second: tuple[str, str] | None = None


def hash_of(*words: str) -> int:
    """A number to draw by."""
    return int(sha256(" ".join(words)), 16)


def all_materials() -> Iterator[Material]:
    """All that may be asked. No first paragraph, code, docstring or entry of a parameter comes twice."""
    seen: set[str] = set()

    def is_new(text: str) -> bool:
        words, before = docstrings.words(text), len(seen)
        seen.add(words)
        return len(seen) > before

    for library in docstrings.DOCUMENTED:
        summaries: dict[str, dict[str, str]] = {}  # file -> summary -> code
        asked: dict[str, tuple[str, list[tuple[str, str, str]]]] = {}  # docstring -> (file, what it says)
        for group, docstring, code in docstrings.of_package(library):
            paragraph = docstring.partition("\n\n")[0]
            summary = " ".join(paragraph.split())
            if docstrings.NO_SUMMARY.search(paragraph) or not is_new(summary):
                continue
            if _is_sentence(summary):
                yield from _moods(library, group, summary)
                yield from _libraries(library, group, summary)
                if code and _follows(summary, code) and is_new(code):
                    summaries.setdefault(group, {})[summary] = code
            yield from (entry for entry in _entries(library, group, docstring) if is_new(entry.text))
            if len(docstring.split()) >= 15 and len(docstring) <= 1000 and not NO_TEXT.search(docstring):
                asked[docstring] = (group, list(_facts(docstring)))
        for group, codes in summaries.items():
            for summary, code in codes.items():
                others = tuple(other for other in codes if not _are_alike(other, summary))
                yield Material("summarize_code", "", library, group, code, summary, others)
        names = [name for _, facts in asked.values() for kind, name, _ in facts if kind == "description"]
        for docstring, (group, facts) in asked.items():
            yield from _answers(library, group, docstring, facts, names)


def _is_sentence(text: str) -> bool:
    """Whether a text is one sentence of 3 to 20 words without markup."""
    return (
        3 <= len(text.split()) <= 20
        and re.match(r"[A-Z][a-z]+ .*\w[`'\")]?\.$", text) is not None
        and not NO_SENTENCE.search(text[:-1])
        and _is_balanced(text)
    )


def _is_balanced(text: str) -> bool:
    return text.count("`") % 2 == 0 and text.count("(") == text.count(")") and text.count("[") == text.count("]")


def _stems(text: str) -> set[str]:
    """The beginnings of the long words of a text: the same for "normalize" and "normalization"."""
    return {word[:4] for word in re.findall(r"[a-z]{4,}", text.lower())}


def _follows(summary: str, code: str) -> bool:
    """Whether a summary can be told from the code: half of its long words are in there, but the summary is not."""
    stems = _stems(summary)
    found = sum(stem in code.lower() for stem in stems)
    only_raises = "NotImplementedError" in code and code.count("\n") < 5
    quoted = '"""' in code or "'''" in code or docstrings.words(summary) in docstrings.words(code)
    return found >= 2 and 2 * found >= len(stems) and not only_raises and not quoted


def _are_alike(first: str, second: str) -> bool:
    """Whether one of two answers may stand for the other: half of the words are the same, or one is a part."""
    if first in second or second in first:
        return True
    words, others = (set(docstrings.words(text).split()) for text in (first, second))
    return 2 * len(words & others) >= len(words | others)


def _moods(library: str, group: str, summary: str) -> Iterator[Material]:
    """A summary that is to be a command, or the third person. There is no second verb that would change too."""
    match = VERB_AND_OBJECT.match(summary)
    commands = {third_person: base for base, third_person in THIRD_PERSON.items()}
    for kind, forms, verb in (
        ("to command", commands, r"\w+s\b"),
        ("to third person", THIRD_PERSON, rf"(?:(?:{'|'.join(THIRD_PERSON)})\b|\w+ {OBJECT})"),
    ):
        if match and match[1].lower() in forms and not re.search(AFTER + verb, summary):
            answer = forms[match[1].lower()].capitalize() + summary[match.end(1) :]
            yield Material("rewrite", kind, library, group, summary, answer)


def _libraries(library: str, group: str, summary: str) -> Iterator[Material]:
    if library in docstrings.LIBRARIES and len(summary.split()) >= 6:
        names = dict(zip(docstrings.LIBRARIES, docstrings.LIBRARY_PACKAGES, strict=True))
        right = names.pop(library)
        others = sorted(names.values(), key=lambda name: hash_of(name, summary))[:3]
        text = docstrings.masked(summary, library)
        yield Material("classify", "", library, group, text, right, tuple(others))


def _entries(library: str, group: str, docstring: str) -> Iterator[Material]:
    """The entry of a parameter, with its type, as it is written in one style; the answer has it in the other one."""
    for style, match, _ in docstrings.entries(docstring):
        name, kind = match["name"], match["type"]
        lines = match["description"].strip().splitlines()
        description = " ".join(line.strip() for line in lines)
        if (
            kind
            and len(kind.split()) <= 8
            and 3 <= len(description.split()) <= 30
            and not docstrings.NO_TYPE.search(kind)
            and OPTIONAL.sub("", kind)
            and not NO_TEXT.search(match[0])
            and not re.search(r"^ *(?:[-*+]|\d+\.) |>>>|:$|^$", match["description"].strip(), re.MULTILINE)
            and re.match(r"[A-Z`].*\.$", description)
            and _is_balanced(match[0])
        ):
            indented = "\n    ".join(line.strip() for line in lines)
            numpydoc, google = f"{name} : {kind}\n    ", f"{name} ({kind}): "
            if style == "numpydoc":
                yield Material(
                    "rewrite", "numpydoc to google", library, group, numpydoc + indented, google + description
                )
            else:
                yield Material(
                    "rewrite", "google to numpydoc", library, group, google + indented, numpydoc + description
                )


def _facts(docstring: str) -> Iterator[tuple[str, str, str]]:
    """(kind of question, name of the parameter or "", answer) of all that may be asked of a docstring."""

    def answer(start: int, end: int) -> str:
        text = docstring[start : end + (docstring[end : end + 1] == ".")]
        return " ".join(text.split())

    parameters = list(docstrings.parameters(docstring))
    names = Counter(name for name, _ in parameters)
    for name, spans in parameters:
        if names[name] == 1:
            facts = {kind: answer(*span) for kind, span in spans.items() if docstring[span[0]] != "("}
            default = DEFAULT.search(facts.get("type", ""))
            if default:
                facts["default"] = default["value"].rstrip(".")
            if "type" in facts:
                facts["type"] = OPTIONAL.sub("", facts["type"])
            yield from ((kind, name, text) for kind, text in facts.items() if text and _is_balanced(text))
    returned = RETURNS.search(docstring)
    if returned:
        group = returned.lastgroup or ""
        sentence = docstrings.SENTENCE.match(returned[group])
        if sentence and 3 <= len(sentence[0].split()) <= 30 and not re.search(r":|\n *[-*+] |>>>", sentence[0]):
            text = answer(returned.start(group), returned.start(group) + sentence.end())
            if _is_balanced(text):
                yield "returns", "", text


def _answers(
    library: str, group: str, docstring: str, facts: Sequence[tuple[str, str, str]], names: Sequence[str]
) -> Iterator[Material]:
    """One question on a docstring that it answers, and one that it does not."""
    rare_first = hash_of("rare", docstring) % 2  # else few questions would be on a default
    facts = sorted(facts, key=lambda fact: (rare_first and fact[0] != "default", hash_of(*fact, docstring)))
    questions = [_question(kind, name, docstring) for kind, name, _ in facts]
    if facts:
        kind, _, right = facts[0]
        others = tuple(other for same, _, other in facts[1:] if same == kind and not _are_alike(other, right))
        second = (questions[1], facts[1][2]) if len(facts) > 1 else None
        yield Material("answer", kind, library, group, docstring, right, others, questions[0], second)
    described = [fact for fact in facts if fact[0] in ("description", "type")]
    if described:
        kind, name, wrong = described[0]
        if kind == "type" and not re.search("default|optional", docstring, re.IGNORECASE):
            kind, wrong = "default", ("None", "0", "True", "1")[hash_of(name, docstring) % 4]
        else:
            first = hash_of("absent", docstring) % len(names)
            name = next(
                other
                for other in itertools.chain(names[first:], names)
                if not re.search(rf"\b{other}\b", docstring, re.IGNORECASE)
            )
        question = _question(kind, name, docstring)
        yield Material("answer", "unsaid", library, group, docstring, UNSAID, (wrong,), question)


def _question(kind: str, name: str, docstring: str) -> str:
    phrases = QUESTIONS[kind]
    return phrases[hash_of("question", name, docstring) % len(phrases)].format(name)


# --- code -------------------------------------------------------------------------------------------------------------


def function_in(code: str) -> ast.FunctionDef | ast.AsyncFunctionDef:
    """The function that is all of the code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's code
        (function,) = ast.parse(code).body
    assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
    return function


def parameters_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """The names of the parameters, without self and cls."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    names = [argument.arg for argument in named if argument.arg not in ("self", "cls")]
    stars = (("*", arguments.vararg), ("**", arguments.kwarg))
    return names + [star + argument.arg for star, argument in stars if argument]


def listed(words: Sequence[str], conjunction: str = "and") -> str:
    """a, b and c"""
    return f" {conjunction} ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def second_on_code(code: str) -> tuple[str, str] | None:
    """A second question on a function, and the answer, which its signature gives."""
    function = function_in(code)
    names = [f"`{name}`" for name in parameters_of(function)]
    defaults = dict(zip(reversed(function.args.args), reversed(function.args.defaults), strict=False))
    turns = [
        (question.format(argument.arg), f"`{ast.unparse(default)}`")
        for argument, default in defaults.items()
        for question in ("What is the default of `{}`?", "And which value does `{}` have if none is given?")
    ]
    if names:
        which = ("Which parameters does it take?", "And what are the names of its parameters?")
        turns += [(question, f"{listed(names)}.") for question in which]
    if function.returns and not isinstance(function.returns, ast.Constant):
        which = ("Which type does it return?", "What is the type of its return value?")
        turns += [(question, f"`{ast.unparse(function.returns)}`") for question in which]
    return turns[hash_of("second", code) % len(turns)] if turns else None
