"""Which tokens of a conversation carry loss, by hand; and how conversations become rows."""

import json
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lib.data import conversations
from lib.data.batches import IGNORED, deal
from lib.data.conversations import messages_of, tokenize_conversations
from lib.data.preferences import collate_pairs, tokenize_pairs
from lib.data.rows import load_rows
from lib.errors import UserError
from lib.models import chat, hub

pytestmark = pytest.mark.usefixtures("one_rank")

LLAMA3 = (
    "{% for message in messages %}{{ '<|begin_of_text|>' if loop.first else '' }}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt else '' }}"
)
GEMMA = (
    "{{ '<bos>' }}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{% if role not in ('user', 'model') %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{{ '<start_of_turn>model\n' if add_generation_prompt else '' }}"
)
# Reasoning is shown in the last turn only, and an empty one is added there; calls of tools are written by the template.
REASONING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\n' + message.get('reasoning_content', '') + '\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] }}"
    "{% for call in message.get('tool_calls', []) %}{{ '<tool_call>' + call['function']['name'] + '</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"
)
# The prompt for an answer begins the reasoning, of which a conversation shows nothing (as DeepSeek-R1 has it).
BEGUN = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n<think>\n' if add_generation_prompt else '' }}"
)
SPECIAL_TOKENS = {
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma": ["<bos>", "<start_of_turn>", "<end_of_turn>"],
    "reasoning": ["<think>", "</think>", "<tool_call>", "</tool_call>"],
    "begun": ["<think>", "</think>"],
}
TEMPLATES = {"chatml": None, "llama3": LLAMA3, "gemma": GEMMA, "reasoning": REASONING, "begun": BEGUN}

SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "What is 2 + 2?"}
FOUR = {"role": "assistant", "content": "It is 4."}
ASK_MORE = {"role": "user", "content": "And 3 + 3?"}
SIX = {"role": "assistant", "content": "It is 6."}


def tokenizer_with(template: str) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(hub.model_folder("smollm2-tiny"))
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS.get(template, [])})
    if TEMPLATES[template] is not None:
        tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


def rows_of(tokenizer: Any, *messages: dict[str, Any], max_length: int = 512) -> list[dict[str, Any]]:
    columns = tokenize_conversations({"prompt": [json.dumps(messages)]}, tokenizer, max_length)
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def labelled(tokenizer: Any, row: dict[str, Any]) -> list[str]:
    """The texts of the runs of labels in a row."""
    runs = groupby(row["labels"], key=lambda label: label != IGNORED)
    return [tokenizer.decode(list(run)) for is_label, run in runs if is_label]


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        ("chatml", (ASK, FOUR), [["It is 4.<|im_end|>"]]),
        ("chatml", (SYSTEM, ASK, FOUR), [["It is 4.<|im_end|>"]]),
        ("chatml", (SYSTEM, ASK, FOUR, ASK_MORE, SIX), [["It is 4.<|im_end|>", "It is 6.<|im_end|>"]]),
        ("chatml", (ASK, FOUR, ASK_MORE), [["It is 4.<|im_end|>"]]),  # nobody has answered that
        ("chatml", (ASK, {"role": "assistant", "content": ""}), [["<|im_end|>"]]),
        ("chatml", (FOUR, ASK_MORE, SIX), [["It is 6.<|im_end|>"]]),  # nobody has asked for the first one
        ("chatml", (ASK, FOUR, SIX), [["It is 4.<|im_end|>", "It is 6.<|im_end|>"]]),
        ("chatml", (SYSTEM, ASK), [[]]),
        ("chatml", (ASK, {"role": "assistant", "content": "One\n\ntwo  "}), [["One\n\ntwo  <|im_end|>"]]),
        ("llama3", (SYSTEM, ASK, FOUR, ASK_MORE, SIX), [["It is 4.<|eot_id|>", "It is 6.<|eot_id|>"]]),
        ("gemma", (ASK, FOUR, ASK_MORE, SIX), [["It is 4.<end_of_turn>", "It is 6.<end_of_turn>"]]),
        ("begun", (ASK, FOUR), [["It is 4.<|im_end|>"]]),
        ("begun", (ASK, {"role": "assistant", "content": "<b>4</b>"}), [["<b>4</b><|im_end|>"]]),
        ("reasoning", (ASK, FOUR), [["<think>\n\n</think>\n\nIt is 4.<|im_end|>"]]),
        (
            "reasoning",  # the first turn is shown otherwise once there is a second one
            (ASK, {**FOUR, "reasoning_content": "Add."}, ASK_MORE, SIX),
            [["<think>\nAdd.\n</think>\n\nIt is 4.<|im_end|>"], ["<think>\n\n</think>\n\nIt is 6.<|im_end|>"]],
        ),
        (
            "reasoning",
            (
                ASK,
                {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]},
                {"role": "tool", "content": "4"},
                FOUR,
            ),
            [
                ["<think>\n\n</think>\n\n<tool_call>add</tool_call><|im_end|>"],
                ["<think>\n\n</think>\n\nIt is 4.<|im_end|>"],
            ],
        ),
    ],
)
def test_the_answers_carry_the_loss(
    template: str, messages: tuple[dict[str, Any], ...], expected: list[list[str]]
) -> None:
    tokenizer = tokenizer_with(template)
    rows = rows_of(tokenizer, *messages)
    assert [labelled(tokenizer, row) for row in rows] == expected
    for row in rows:
        assert row["labelled"] == sum(label != IGNORED for label in row["labels"]) and not row["truncated"]
        for place, label in enumerate(row["labels"][:-1]):  # a label is the next token
            assert label in (IGNORED, row["input_ids"][place + 1])


def test_a_row_is_what_the_template_gives() -> None:
    tokenizer = tokenizer_with("chatml")
    (row,) = rows_of(tokenizer, SYSTEM, ASK, FOUR, ASK_MORE, SIX)
    whole = tokenizer.apply_chat_template([SYSTEM, ASK, FOUR, ASK_MORE, SIX], return_dict=True)["input_ids"]
    assert row["input_ids"] == whole[:-1] and row["length"] == len(whole) - 1
    prompt = tokenizer.apply_chat_template([SYSTEM, ASK], add_generation_prompt=True, return_dict=True)["input_ids"]
    first = next(place for place, label in enumerate(row["labels"]) if label != IGNORED)
    assert row["input_ids"][: first + 1] == prompt  # what the model has read when it begins to answer


def test_a_truncated_answer_has_no_end() -> None:
    tokenizer = tokenizer_with("chatml")
    (whole,) = rows_of(tokenizer, SYSTEM, ASK, FOUR)
    last = max(place for place, label in enumerate(whole["labels"]) if label != IGNORED)
    (cut,) = rows_of(tokenizer, SYSTEM, ASK, FOUR, max_length=last + 1)
    assert cut["truncated"] and labelled(tokenizer, cut) == ["It is 4."]
    assert cut["labelled"] == whole["labelled"] - 1


def test_a_row_without_an_answer_is_counted_and_left_out() -> None:
    tokenizer = tokenizer_with("chatml")
    prompts = [json.dumps(messages) for messages in ([ASK, FOUR], [{**ASK, "content": "word " * 60}, FOUR])]
    splits = {"train": Dataset.from_dict({"prompt": prompts})}
    tokenized = {"train": Dataset.from_dict(tokenize_conversations({"prompt": prompts}, tokenizer, 50))}
    kept, notes = conversations.with_answers(splits, tokenized)
    assert len(tokenized["train"]) == 2 and len(kept["train"]) == 1
    assert notes == [
        "truncated: 1 of 2 training conversations",
        "left out: 1 training conversations without an answer, or cut off before it",
    ]
    with pytest.raises(UserError, match="none of the 1 train conversations has an answer to a prompt"):
        conversations.with_answers(splits, {"train": tokenized["train"].select([1])})


def test_a_prompt_and_its_answer_may_be_two_columns() -> None:
    tokenizer = tokenizer_with("chatml")
    apart = {"prompt": [json.dumps("What is 2 + 2?")], "completion": [json.dumps("It is 4.")]}
    assert tokenize_conversations(apart, tokenizer, 512)["labels"] == [rows_of(tokenizer, ASK, FOUR)[0]["labels"]]
    assert messages_of(json.dumps([SYSTEM, ASK]), json.dumps("It is 4.")) == [SYSTEM, ASK, FOUR]
    with pytest.raises(UserError, match="begins with a message of the role user, as a whole conversation"):
        messages_of(json.dumps("What is 2 + 2?"), json.dumps([ASK, FOUR]))


def test_messages_are_read_from_a_file(tmp_path: Any) -> None:
    rows = [
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"conversations": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, FOUR]},
        {"conversations": "Hi"},
    ]
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = load_rows(str(tmp_path), None, messages={"prompt": "conversations"})["train"]["prompt"]
    assert [messages_of(prompt) for prompt in read] == [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
        [{"role": "user", "content": "Hi"}, FOUR],
        [{"role": "user", "content": "Hi"}],
    ]


@pytest.mark.parametrize("faulty", [[], [{"content": "Hi"}], [{"role": "user", "content": 3}], 3, [["user", "Hi"]]])
def test_faulty_messages_are_refused(tmp_path: Any, faulty: Any) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": [ASK, FOUR]}) + "\n" + json.dumps({"messages": faulty}) + "\n")
    with pytest.raises(UserError, match=r"line 2: 'messages' is .* expected text, or a list of"):
        load_rows(str(file), None, messages={"prompt": "messages"})


def test_a_template_that_refuses_is_named() -> None:
    with pytest.raises(UserError, match=r"chat template refuses this conversation \(System role not supported\)"):
        rows_of(tokenizer_with("gemma"), SYSTEM, ASK, FOUR)


def test_the_end_of_an_answer_is_a_token() -> None:
    names = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "reasoning": "<|im_end|>"}
    for template, name in names.items():
        tokenizer = tokenizer_with(template)
        assert tokenizer.convert_ids_to_tokens(conversations.end_of_answer(tokenizer)) == name
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"
    with pytest.raises(UserError, match="ends an answer with no special token"):
        conversations.end_of_answer(tokenizer)


@pytest.mark.parametrize("template", chat.TEMPLATES)
def test_the_templates_of_this_repository(template: str) -> None:
    settings = {"model": "smollm2-tiny", "trust_remote_code": False, "lora_rank": None, "chat_template": template}
    tokenizer = chat.load_tokenizer(SimpleNamespace(**settings), 512)
    (row,) = rows_of(tokenizer, SYSTEM, ASK, FOUR, ASK_MORE, SIX)
    assert labelled(tokenizer, row) == ["It is 4.<|im_end|>", "It is 6.<|im_end|>"]


def test_rows_that_are_packed_and_rows_that_are_padded() -> None:
    input_ids, labels = [[5, 6, 7], [8, 9]], [[IGNORED, 7, 1], [9, 2]]
    packed = conversations.lay_out(input_ids, labels, packing=True)
    assert {name: tensor.tolist() for name, tensor in packed.items()} == {
        "input_ids": [[5, 6, 7, 8, 9]],
        "labels": [[IGNORED, 7, 1, 9, 2]],
        "position_ids": [[0, 1, 2, 0, 1]],
        "conversation": [[0, 0, 0, 1, 1]],
    }
    padded = conversations.lay_out(input_ids, labels, packing=False)
    assert padded["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert padded["labels"].tolist() == [[IGNORED, 7, 1], [9, 2, IGNORED]]
    assert padded["position_ids"].tolist() == [[0, 1, 2], [0, 1, 2]]
    for batch, values in (
        (packed, [[0.0, 1, 2, 3, 4]]),
        (padded, [[0.0, 1, 2], [3, 4, 0]]),
    ):
        assert conversations.count(batch).tolist() == [4, 5]
        assert conversations.sums_of_conversations(torch.tensor(values), batch, 2).tolist() == [3, 7]


def test_micro_batches_have_nearly_as_many_tokens_or_rows_of_nearly_one_length() -> None:
    lengths = np.random.default_rng(0).integers(10, 500, 64)
    packed, padded = (deal(lengths, 8, alike_sums) for alike_sums in (True, False))
    assert sorted(packed.flatten()) == sorted(padded.flatten()) == list(range(64))
    assert packed.shape == padded.shape == (8, 8)
    sums, in_order = lengths[packed].sum(1), lengths.reshape(8, 8).sum(1)
    assert np.ptp(sums) < 0.05 * sums.mean() < np.ptp(in_order)
    assert (8 * lengths[padded].max(1)).sum() < 1.15 * lengths.sum() < (8 * lengths.reshape(8, 8).max(1)).sum()


def test_pairs_of_answers() -> None:
    """The last answer of each has labels; earlier ones, which both have, none."""
    tokenizer = tokenizer_with("chatml")
    rows = {
        "prompt": [json.dumps([ASK, FOUR, ASK_MORE])] * 2,
        "chosen": [json.dumps("It is 6."), json.dumps("It is 6.")],
        "rejected": [json.dumps("Seven."), json.dumps("word " * 80)],
    }
    made = tokenize_pairs(rows, tokenizer, 90)
    for kind, text in (("chosen", "It is 6."), ("rejected", "Seven.")):
        row = {"labels": made[f"{kind}_labels"][0]}
        assert labelled(tokenizer, row) == [f"{text}<|im_end|>"] and made[f"{kind}_text"][0] == text
    assert made["prompt_text"][0] == "What is 2 + 2?\nIt is 4.\nAnd 3 + 3?"
    assert made["truncated"] == [False, True] and made["length"][0] == sum(
        len(made[f"{kind}_ids"][0]) for kind in ("chosen", "rejected")
    )
    batch = collate_pairs({name: column[:1] for name, column in made.items()}, packing=True)
    assert batch["conversation"].max() == 1 and (batch["position_ids"] == 0).sum() == 2
    whole = {"chosen": [json.dumps([ASK, FOUR])], "rejected": [json.dumps([ASK, SIX])]}
    assert labelled(tokenizer, {"labels": tokenize_pairs(whole, tokenizer, 90)["chosen_labels"][0]}) == [
        "It is 4.<|im_end|>"
    ]
    assert tokenize_pairs(whole, tokenizer, 20)["labelled"] == [0]  # no answer is left
    with pytest.raises(UserError, match="a chosen conversation does not end with the assistant's answer"):
        tokenize_pairs({"chosen": [json.dumps([ASK])], "rejected": [json.dumps([ASK])]}, tokenizer, 90)
