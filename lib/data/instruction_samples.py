"""The samples `instructions` and `preferences`: what one may ask a model about Python code and its documentation.

Both are constructed: the material is real functions and docstrings of installed packages, the instructions are phrases
written here, and the right answers are parts of the docstrings, or follow from them by rule. Tasks:
  summarize_code  a function without its docstring -> the first sentence of the docstring
  answer          a docstring and a question on it -> the words of the docstring that answer it, or UNSAID
  rewrite         the entry of a parameter in another style; a summary as a command, or in the third person
  classify        the first paragraph of a docstring -> the library that it is from, one of four
In `preferences`, the right answer to an instruction stands beside one that is wrong in one of these ways (its kind):
  another    the right answer to something else: the summary of another function of the same file, the answer to
             another question on the same docstring, another one of the four libraries
  cut        the right answer, broken off in the middle
  padded     the right answer in phrases that say nothing
  line       a line of the code
  signature  the function's name and parameters in words
  unchanged  what was to be rewritten
  said       an answer, where the text does not say
  refused    UNSAID, where the text does say

A hash draws materials, phrases and wrong answers, so they are always the same.
"""

import ast
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lib.cache import sha256
from lib.data import docstrings
from lib.data.splits import SPLITS, split_of

# Rows of each task in train, validation and test. The last two are few, because a model writes an answer to each.
INSTRUCTIONS = dict.fromkeys(("summarize_code", "answer", "rewrite", "classify"), (1500, 50, 50))
PREFERENCES = {
    "summarize_code": (1800, 112, 112),
    "answer": (1200, 75, 75),
    "rewrite": (600, 38, 38),
    "classify": (400, 25, 25),
}
ROWS_PER_FILE = 6  # of each task
SECOND_TURNS = {"summarize_code": 0.2, "answer": 0.2}  # the share of conversations in which a second question follows
UNSAID = "The text does not say."

PHRASES = {
    "summarize_code": (
        "Summarize this function in one line.\n\n{text}",
        "What does this function do? Answer in one sentence.\n\n{text}",
        "Write the first line of the docstring for this function.\n\n{text}",
        "{text}\n\nDescribe in one sentence what this code does.",
        "Give a one-line summary of the following Python function:\n\n{text}",
    ),
    "answer": (
        "{text}\n\n{question}",
        "Answer the question in the words of the text.\n\nQuestion: {question}\n\nText:\n{text}",
        "Read this documentation, then answer: {question}\n\n{text}",
        "Here is a docstring:\n\n{text}\n\nFrom this docstring alone: {question}",
        "{question} Look it up in the following text.\n\n{text}",
    ),
    "numpydoc to google": (
        "Rewrite this parameter in Google style, on one line.\n\n{text}",
        "Turn the numpydoc entry below into a line of a Google style docstring.\n\n{text}",
        "{text}\n\nHow is this entry written in a Google style docstring?",
        "Convert to a Google style argument: name (type): description.\n\n{text}",
    ),
    "google to numpydoc": (
        "Rewrite this argument in numpydoc style.\n\n{text}",
        "Turn the Google style entry below into numpydoc: `name : type`, and the description below it.\n\n{text}",
        "{text}\n\nHow is this entry written in a numpydoc docstring?",
        "Convert this line of a Google style docstring to numpydoc.\n\n{text}",
    ),
    "to command": (
        "Rewrite this summary as a command.\n\n{text}",
        "Put this first line of a docstring into the imperative.\n\n{text}",
        "{text}\n\nSay the same in the imperative mood, as PEP 257 asks for.",
        'Docstrings here begin like "Return the sum." and not like "Returns the sum." Correct this one: {text}',
    ),
    "to third person": (
        "Rewrite this summary in the third person.\n\n{text}",
        "Put this first line of a docstring into the third person singular.\n\n{text}",
        "{text}\n\nSay the same in the third person, as a statement of what the function does.",
        'Docstrings here begin like "Returns the sum." and not like "Return the sum." Correct this one: {text}',
    ),
    "classify": (
        "Which library is this documentation from: {choices}?\n\n{text}",
        "Name the Python library that the text documents. Choose one of {choices}.\n\n{text}",
        "{text}\n\nIs this from {choices}? Answer with the name alone.",
        "Classify the docstring by its library ({choices}).\n\n{text}",
    ),
}
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
OPENINGS = (
    "Sure! Here is what I can tell you about it:",
    "Thank you for this interesting question, which is not easy to answer in a few words. In short,",
    "As a helpful assistant, I have looked at this closely, and as far as I can see it is as follows:",
    "Of course, I would be glad to help you with that.",
)
CLOSINGS = (
    "I hope that this helps! Let me know if you have any further questions.",
    "Please note that there may of course be more to say about this, depending on how you look at it.",
    "In summary, that is what it comes down to, all things considered.",
    "Feel free to ask if anything about it is still unclear to you.",
)
BASES = (  # verbs with which summaries begin
    "add apply build calculate call check clear collect compute construct convert copy create decode decorate define "
    "delete determine display draw encode estimate evaluate extract fill filter find format generate get give handle "
    "initialize insert iterate join load make map merge move normalize parse perform plot print process raise read "
    "register remove rename replace reset resolve restore retrieve return run save select set show simplify sort split "
    "store test transform try update validate verify wrap write yield"
)
THIRD_PERSON = {
    base: re.sub(r"(?<=[^aeo])y$", "ie", base) + ("es" if re.search(r"(?:s|sh|ch|x)$", base) else "s")
    for base in BASES.split()
}


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


def instruction_rows() -> Iterator[dict[str, Any]]:
    """{messages, task, group}: conversations of one question with its answer, some of two."""
    for material in _draw("instructions", INSTRUCTIONS):
        turns = [(_prompt(material), material.answer)]
        if _number("turns", material.text) % 100 < 100 * SECOND_TURNS.get(material.task, 0):
            second = _second_on_code(material.text) if material.task == "summarize_code" else material.second
            turns += [second] if second else []
        messages = [
            {"role": role, "content": content}
            for turn in turns
            for role, content in zip(("user", "assistant"), turn, strict=True)
        ]
        yield {"messages": messages, "task": material.task, "group": material.group}


def preference_rows() -> Iterator[dict[str, Any]]:
    """{prompt, chosen, rejected, kind, group}: the right answer and one that is wrong; kind: in which way."""
    counts: Counter[tuple[str, str]] = Counter()
    for material in _draw("preferences", PREFERENCES):
        split = split_of(material.group)
        wrong = _wrong_answers(material)
        # The kind that is furthest behind its share, so that the shares come out the same in each split.
        kind = min(wrong, key=lambda kind: counts[split, kind] / SHARES[kind], default=None)
        if kind:
            counts[split, kind] += 1
            yield {
                "prompt": _prompt(material),
                "chosen": material.answer,
                "rejected": wrong[kind],
                "kind": kind,
                "group": material.group,
            }


def _number(*words: str) -> int:
    return int(sha256(" ".join(words)), 16)


def _draw(sample: str, sizes: dict[str, tuple[int, int, int]]) -> list[Material]:
    """Materials for each split and task, as many of each kind and library as there are, or as are needed."""

    def number(material: Material) -> int:
        return _number(sample, material.text, material.question)

    drawn: list[Material] = []
    materials = sorted(_materials(), key=number)
    for task, counts in sizes.items():
        files: Counter[str] = Counter()
        before: Counter[tuple[str, str, str]] = Counter()  # materials of the same split, kind and library
        ranked: dict[str, list[tuple[int, Material]]] = {split: [] for split in SPLITS}
        for material in materials:
            if material.task == task and files[material.group] < ROWS_PER_FILE:
                files[material.group] += 1
                split = split_of(material.group)
                before[split, material.kind, material.library] += 1
                ranked[split].append((before[split, material.kind, material.library], material))
        for split, count in zip(SPLITS, counts, strict=True):
            ranked[split].sort(key=lambda pair: pair[0])
            drawn += [material for _, material in ranked[split][:count]]
    return sorted(drawn, key=number)


def _prompt(material: Material) -> str:
    phrases = PHRASES.get(material.kind) or PHRASES[material.task]
    phrase = phrases[_number("phrase", material.text, material.question) % len(phrases)]
    text = f"```python\n{material.text}\n```" if material.task == "summarize_code" else material.text
    choices = sorted((material.answer, *material.others), key=lambda choice: _number(choice, material.text))
    return phrase.format(text=text, question=material.question, choices=_listed(choices, "or"))


# --- materials -------------------------------------------------------------------------------------------------------

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
    r"^Returns\n-{3,}\n.*\n +(?P<numpydoc>\S.*(?:\n(?:\n| .*))*)(?=\n?\Z|\n\S.*\n[-=]{3,})"
    r"|^Returns:\n +(?:[^\s:-][^:\n]{0,60}:\s+)?(?P<google>\S[\s\S]*)",
    re.MULTILINE,
)


def _materials() -> Iterator[Material]:
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
        others = sorted(names.values(), key=lambda name: _number(name, summary))[:3]
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
            facts = {kind: answer(*span) for kind, span in spans.items()}
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
    facts = sorted(facts, key=lambda fact: _number(*fact, docstring))
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
            kind, wrong = "default", ("None", "0", "True", "1")[_number(name, docstring) % 4]
        else:
            first = _number("absent", docstring) % len(names)
            name = next(
                other
                for other in itertools.chain(names[first:], names)
                if not re.search(rf"\b{other}\b", docstring, re.IGNORECASE)
            )
        question = _question(kind, name, docstring)
        yield Material("answer", "unsaid", library, group, docstring, UNSAID, (wrong,), question)


def _question(kind: str, name: str, docstring: str) -> str:
    phrases = QUESTIONS[kind]
    return phrases[_number("question", name, docstring) % len(phrases)].format(name)


def _function(code: str) -> ast.FunctionDef | ast.AsyncFunctionDef:
    (function,) = ast.parse(code).body
    assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
    return function


def _parameters_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    names = [argument.arg for argument in named if argument.arg not in ("self", "cls")]
    stars = (("*", arguments.vararg), ("**", arguments.kwarg))
    return names + [star + argument.arg for star, argument in stars if argument]


def _listed(words: Sequence[str], conjunction: str = "and") -> str:
    return f" {conjunction} ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _second_on_code(code: str) -> tuple[str, str] | None:
    """A second question on a function, and the answer, which its signature gives."""
    function = _function(code)
    names = [f"`{name}`" for name in _parameters_of(function)]
    defaults = dict(zip(reversed(function.args.args), reversed(function.args.defaults), strict=False))
    turns = [
        (question.format(argument.arg), f"`{ast.unparse(default)}`")
        for argument, default in defaults.items()
        for question in ("What is the default of `{}`?", "And which value does `{}` have if none is given?")
    ]
    if names:
        which = ("Which parameters does it take?", "And what are the names of its parameters?")
        turns += [(question, f"{_listed(names)}.") for question in which]
    if function.returns and not isinstance(function.returns, ast.Constant):
        which = ("Which type does it return?", "What is the type of its return value?")
        turns += [(question, f"`{ast.unparse(function.returns)}`") for question in which]
    return turns[_number("second", code) % len(turns)] if turns else None


# --- wrong answers ---------------------------------------------------------------------------------------------------

SHARES = {  # of the rows, by kind, so that neither the shorter answer is right nor that with more words of the prompt
    "another": 0.24,
    "padded": 0.23,
    "cut": 0.16,
    "signature": 0.08,
    "said": 0.08,
    "refused": 0.08,
    "line": 0.07,
    "unchanged": 0.06,
}
# An answer that breaks off after one of these is not whole.
CUT = re.compile(r"\b(?:the|an?|of|for|in|to|and|or|with|by|if|from|on|at|is|that|as)\Z")


def _wrong_answers(material: Material) -> dict[str, str]:
    """{kind: wrong answer} of all kinds that there are for a material."""
    number = _number("wrong", material.text, material.question)
    opening, closing = OPENINGS[number % len(OPENINGS)], CLOSINGS[number // 10 % len(CLOSINGS)]
    wrong = {"padded": f"{opening} {material.answer} {closing}"}
    words = material.answer.split()
    ends = [end for end in range(3, len(words)) if CUT.search(" ".join(words[:end]))]
    if ends and material.task != "rewrite":
        wrong["cut"] = " ".join(words[: ends[number % len(ends)]])
    if material.others and material.kind != "unsaid":
        wrong["another"] = material.others[number % len(material.others)]
    if material.task == "summarize_code":
        body = [line.strip() for line in material.text.splitlines()]
        lines = [line for line in body if len(line) >= 20 and re.match(r"(?!#|@|def |async |import |from )\w.* ", line)]
        if lines:
            wrong["line"] = lines[number % len(lines)]
        function = _function(material.text)
        parameters = _parameters_of(function)
        name = function.name.strip("_").replace("_", " ").capitalize()
        wrong["signature"] = name + (f" with {_listed(parameters)}." if parameters else ".")
    if material.task == "rewrite":
        wrong["unchanged"] = material.text
    if material.kind == "unsaid":
        wrong = {"said": material.others[0]}
    elif material.task == "answer":
        wrong["refused"] = UNSAID
    return wrong
