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

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from lib.data.instruction_materials import (
    UNSAID,
    Material,
    all_materials,
    function_in,
    hash_of,
    listed,
    parameters_of,
    second_on_code,
)
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
SECOND_TURNS = {"summarize_code": 0.25, "answer": 0.25}  # the share of conversations in which a second question follows

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


def instruction_rows() -> Iterator[dict[str, Any]]:
    """{messages, task, group}: conversations of one question with its answer, some of two."""
    for material in _draw("instructions", INSTRUCTIONS):
        turns = [(_prompt(material), material.answer)]
        if hash_of("turns", material.text) % 100 < 100 * SECOND_TURNS.get(material.task, 0):
            second = second_on_code(material.text) if material.task == "summarize_code" else material.second
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
        kind = min(wrong, key=lambda kind: counts[split, kind] / SHARES[kind])
        counts[split, kind] += 1
        yield {
            "prompt": _prompt(material),
            "chosen": material.answer,
            "rejected": wrong[kind],
            "kind": kind,
            "group": material.group,
        }


def _draw(sample: str, sizes: dict[str, tuple[int, int, int]]) -> list[Material]:
    """Materials for each split and task, as many of each kind and library as there are, or as are needed."""

    def number(material: Material) -> int:
        return hash_of(sample, material.text, material.question)

    drawn: list[Material] = []
    materials = sorted(all_materials(), key=number)
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
    phrase = phrases[hash_of("phrase", material.text, material.question) % len(phrases)]
    text = f"```python\n{material.text}\n```" if material.task == "summarize_code" else material.text
    choices = sorted((material.answer, *material.others), key=lambda choice: hash_of("order", choice, material.text))
    return phrase.format(text=text, question=material.question, choices=listed(choices, "or"))


# --- wrong answers ---------------------------------------------------------------------------------------------------

SHARES = {  # of the rows, by kind, so that neither the shorter answer is right nor that with more words of the prompt
    "another": 0.24,
    "padded": 0.22,
    "cut": 0.16,
    "signature": 0.12,
    "said": 0.07,
    "line": 0.07,
    "refused": 0.06,
    "unchanged": 0.06,
}
# An answer that breaks off after one of these is not whole.
CUT = re.compile(r"\b(?:the|an?|of|for|in|to|and|or|with|by|if|from|on|at|is|that|as)\Z")


def _wrong_answers(material: Material) -> dict[str, str]:
    """{kind: wrong answer} of all kinds that there are for a material."""
    number = hash_of("wrong", material.text, material.question)
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
        function = function_in(material.text)
        parameters = parameters_of(function)
        name = function.name.strip("_").replace("_", " ").capitalize()
        wrong["signature"] = name + (f" with {listed(parameters)}." if parameters else ".")
    if material.task == "rewrite":
        wrong["unchanged"] = material.text
    if material.kind == "unsaid":
        wrong = {"said": material.others[0]}
    elif material.task == "answer":
        wrong["refused"] = UNSAID
    return wrong
