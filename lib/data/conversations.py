"""Conversations as tokens with the loss on the answers, and rows of them, one after the other or padded.

A conversation is a list of messages, {"role": ..., "content": ...}; what else a message has (calls of tools, reasoning)
is for the chat template, by which the tokenizer makes text of it.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lib.data.batches import IGNORED, Batch, pad
from lib.data.sources import short
from lib.distributed import mesh
from lib.errors import UserError

Message = dict[str, Any]


def messages_of(prompt: str, completion: str | None = None) -> list[Message]:
    """The conversation in a row of load_rows: its column of messages, and of the answer to them if that is another.

    Each is the JSON of a list of messages, or of a text: the prompt's is the user's, the completion's the assistant's.
    """
    messages: list[Message] = []
    for column, role in ((prompt, "user"), (completion, "assistant")):
        found = [] if column is None else json.loads(column)
        if isinstance(found, list) and found and role == "assistant" and found[0]["role"] != role:
            raise UserError(
                f"the answer to a prompt begins with a message of the role {found[0]['role']}, as a whole conversation "
                f"does: {short(found)}; if it has the prompt too, name no column of prompts (--prompt_column null)"
            )
        messages += [{"role": role, "content": found}] if isinstance(found, str) else found
    return messages


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **options: Any) -> str:
    """The text that the chat template makes of messages. Raises UserError where it refuses them."""
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"the tokenizer's chat template refuses this conversation ({why}): {short(messages)}") from None


def answers_in(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """(text, [(begin, end), ...]): a conversation as text, and where in it the answers of the assistant are.

    An answer is what the model has to write: what the template adds for it after the prompt for an answer, up to the
    token that ends the turn, but not the line break behind that token. A conversation is more than one text where the
    template shows earlier turns otherwise than the last one (without their reasoning, for example): in each text, the
    model sees what it would see when it answers.
    """
    text, spans = "", list[tuple[int, int]]()
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or number == 0:  # nobody has asked for the first one
            continue
        whole = render(tokenizer, messages[: number + 1])
        prompt = render(tokenizer, messages[:number], add_generation_prompt=True)
        if not whole.startswith(text):
            yield text, spans
            spans = []
        begin = max(_end_of_prompt(tokenizer, prompt, whole), spans[-1][1] if spans else 0)
        end = len(whole.rstrip())
        spans.append((begin, end if whole[:end].endswith(_tokens_by_name(tokenizer)) else len(whole)))
        text = whole
    if spans:
        yield text, spans


def _end_of_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, whole: str) -> int:
    """Where in the whole text the prompt for an answer ends.

    A prompt may hold more than the template shows in a conversation, such as the beginning of the reasoning. Then it
    ends with the last token that both have: `<think>` and an answer `<b>` begin with one character, not with one token.
    """
    if whole.startswith(prompt):
        return len(prompt)
    asked, shown = (
        tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for text in (prompt, whole)
    )
    ends = [end for _, end in shown["offset_mapping"]]
    pairs = enumerate(zip(asked["input_ids"], shown["input_ids"], strict=False))
    alike = next((place for place, (one, other) in pairs if one != other), min(len(asked["input_ids"]), len(ends)))
    return int(ends[alike - 1]) if alike else 0


def _tokens_by_name(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The special and the added tokens of a tokenizer, as they are written."""
    return (*tokenizer.all_special_tokens, *tokenizer.get_added_vocab())


def end_of_answer(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token with which the chat template ends an answer. Raises UserError where it ends answers with none.

    A model that is trained on such answers would never end one.
    """
    messages = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}]
    ((text, spans),) = answers_in(tokenizer, messages)
    last = tokenizer(text[: spans[-1][1]], add_special_tokens=False)["input_ids"][-1]
    if tokenizer.convert_ids_to_tokens(last) not in _tokens_by_name(tokenizer):
        raise UserError(
            "the tokenizer's chat template ends an answer with no special token, so that a model could not learn to "
            "end one; set --chat_template to another"
        )
    return int(last)


def tokenize_conversations(
    rows: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, list[Any]]:
    """Columns prompt, and completion if there is one -> input_ids, labels, length, labelled, truncated.

    The label of each token is the token after it, if that is part of an answer, else IGNORED; `labelled` counts them.
    Of more than max_length tokens the end is cut off. A conversation may become more rows than one: see answers_in.
    """
    found: dict[str, list[Any]] = {name: [] for name in ("input_ids", "labels", "length", "labelled", "truncated")}
    completions = rows.get("completion", [None] * len(rows["prompt"]))
    for prompt, completion in zip(rows["prompt"], completions, strict=True):
        for text, spans in list(answers_in(tokenizer, messages_of(prompt, completion))) or [("", [])]:
            input_ids, labels, truncated = tokens_and_labels(tokenizer, text, spans, max_length)
            found["input_ids"].append(input_ids)
            found["labels"].append(labels)
            found["length"].append(len(input_ids))
            found["labelled"].append(sum(label != IGNORED for label in labels))
            found["truncated"].append(truncated)
    return found


def tokens_and_labels(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: list[tuple[int, int]], max_length: int
) -> tuple[list[int], list[int], bool]:
    """(tokens, labels, whether the text was cut off at max_length) of a text with answers at these places."""
    # verbose=False: a conversation may be longer than the model's limit, of which the tokenizer would warn.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, begins = encoded["input_ids"][:max_length], [begin for begin, _ in encoded["offset_mapping"]]
    is_answer = np.zeros(len(ids), dtype=bool)
    for first, last in (np.searchsorted(begins, span) for span in spans):
        is_answer[first:last] = True
    labels = [token if counts else IGNORED for token, counts in zip(ids, is_answer.tolist(), strict=True)]
    return ids[:-1], labels[1:], len(encoded["input_ids"]) > max_length  # nothing comes after the last token


def with_answers(
    splits: Mapping[str, Dataset], tokenized: Mapping[str, Dataset]
) -> tuple[dict[str, Dataset], list[str]]:
    """(the tokenized rows that have a label, what the header says of the training rows).

    tokenized: what was made of the conversations in `splits`, with columns labelled and truncated. Raises UserError
    where no row of a split has a label.
    """
    kept = {split: _labelled(split, rows) for split, rows in tokenized.items()}
    conversations, rows, notes = len(splits["train"]), tokenized["train"], []
    if len(rows) != conversations:
        notes.append(
            f"{conversations:,} training conversations became {len(rows):,}: the chat template changes earlier turns"
        )
    if cut := sum(rows["truncated"]):
        notes.append(f"truncated: {cut:,} of {len(rows):,} training conversations")
    if empty := len(rows) - len(kept["train"]):
        notes.append(f"left out: {empty:,} training conversations without an answer, or cut off before it")
    return kept, notes


def _labelled(split: str, rows: Dataset) -> Dataset:
    labelled = np.flatnonzero(np.asarray(rows["labelled"]))
    if not len(labelled):
        raise UserError(
            f"none of the {len(rows):,} {split} conversations has an answer to a prompt within max_length: give "
            "messages of the role assistant, or a column with the answers (--completion_column), or a greater "
            "--max_length"
        )
    return rows if len(labelled) == len(rows) else rows.select(labelled)


# --- batches ---------------------------------------------------------------------------------------------------------


def lay_out(input_ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], packing: bool) -> Batch:
    """Sequences of tokens and labels as one batch: input_ids, labels, position_ids and `conversation`, [rows, length].

    packing: all sequences one after the other in a row, with no padding between them; the model must keep them apart
    (lib/models/packing.py). Otherwise each is a row, filled up on the right, where no earlier token sees it.
    `conversation` is the number of the sequence that a token belongs to, -1 where a place is filled up.
    """
    columns = {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": [range(len(ids)) for ids in input_ids],
        "conversation": [[number] * len(ids) for number, ids in enumerate(input_ids)],
    }
    batch = {}
    for name, column in columns.items():
        filler = {"labels": IGNORED, "conversation": -1}.get(name, 0)
        rows = torch.tensor(list(itertools.chain(*column)))[None] if packing else pad(column, filler)
        # Each rank of a sequence-parallel group takes an equal part.
        batch[name] = F.pad(rows, (0, -rows.shape[1] % mesh.sequence_size()), value=filler)
    if not packing:
        batch["position_ids"] = torch.arange(batch["labels"].shape[1]).expand_as(batch["labels"])
    return batch


def collate_conversations(rows: dict[str, Any], packing: bool) -> Batch:
    """Rows of tokenize_conversations as a batch: see lay_out."""
    return lay_out(rows["input_ids"], rows["labels"], packing)


def sums_of_conversations(values: torch.Tensor, batch: Batch, count: int) -> torch.Tensor:
    """[count]: the sum of the values [rows, length] of each of the `count` conversations of a batch."""
    numbers = batch["conversation"].flatten().clamp(min=0)  # the values where a place is filled up are 0
    return values.new_zeros(count).index_add(0, numbers, values.flatten())


def count(batch: Batch) -> torch.Tensor:
    """[2]: labels, and tokens."""
    return torch.stack([(batch["labels"] != IGNORED).sum(), (batch["conversation"] >= 0).sum()])
