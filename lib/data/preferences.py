"""Pairs of answers to one prompt, of which one is preferred, as tokens with labels on the answers."""

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lib.data.batches import Batch
from lib.data.conversations import answers_in, lay_out, messages_of, tokens_and_labels
from lib.data.sources import short
from lib.errors import UserError

KINDS = ("chosen", "rejected")


def tokenize_pairs(
    rows: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, list[Any]]:
    """Columns chosen, rejected, and prompt if there is one -> {kind}_ids, {kind}_labels and {kind}_text of both kinds,
    prompt_text, length, labelled, truncated.

    Without a prompt, chosen and rejected are whole conversations. The last answer of each has labels, as in
    lib.data.conversations.tokenize_conversations; `length` is that of both together, and `labelled` is 0 where one of
    them has no label left. The texts are the two answers, and what stands before them.
    """
    count = len(rows["chosen"])
    found: dict[str, list[Any]] = {f"{kind}_{what}": [] for kind in KINDS for what in ("ids", "labels", "text")}
    found |= {name: [] for name in ("prompt_text", "length", "labelled", "truncated")}
    for number in range(count):
        labelled, length, truncated = [], 0, False
        for kind in KINDS:
            answer = rows[kind][number]
            messages = messages_of(rows["prompt"][number], answer) if "prompt" in rows else messages_of(answer)
            if messages[-1]["role"] != "assistant":
                raise UserError(f"a {kind} conversation does not end with the assistant's answer: {short(messages)}")
            *_, (text, spans) = answers_in(tokenizer, messages)
            ids, labels, cut = tokens_and_labels(tokenizer, text, spans[-1:], max_length)
            found[f"{kind}_ids"].append(ids)
            found[f"{kind}_labels"].append(labels)
            found[f"{kind}_text"].append(messages[-1].get("content", ""))
            labelled.append(sum(label >= 0 for label in labels))
            length, truncated = length + len(ids), truncated or cut
        found["prompt_text"].append("\n".join(message.get("content", "") for message in messages[:-1]))
        found["length"].append(length)
        found["labelled"].append(min(labelled))
        found["truncated"].append(truncated)
    return found


def with_reference(rows: Dataset, reference: torch.Tensor) -> Dataset:
    """The rows with the columns reference_chosen and reference_rejected of [rows, 2] log-probabilities."""
    for number, kind in enumerate(KINDS):
        rows = rows.add_column(f"reference_{kind}", reference[:, number].tolist())
    return rows


def collate_pairs(rows: dict[str, Any], packing: bool) -> Batch:
    """Rows of tokenize_pairs as a batch of conversations, chosen and rejected in turn: see lay_out.

    `reference`, [pairs, 2], has the log-probabilities of both by the model before training, if the rows have them.
    """
    pairs = len(rows["chosen_ids"])
    ids, labels = ([rows[f"{kind}_{what}"][n] for n in range(pairs) for kind in KINDS] for what in ("ids", "labels"))
    batch = lay_out(ids, labels, packing)
    if "reference_chosen" in rows:
        reference = np.stack([rows[f"reference_{kind}"] for kind in KINDS], 1)
        batch["reference"] = torch.tensor(reference, dtype=torch.float32)
    return batch
