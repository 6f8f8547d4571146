"""What the recipes make of rows before a model sees them: a mistake there would train, in parity, at something else."""

import importlib
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AddedToken, AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

from lib.data import preferences
from lib.data.batches import IGNORED
from lib.models.encoder_decoder import SPECIAL_TOKENS
from lib.models.hub import model_folder
from lib.models.scratch import train_tokenizer

pytestmark = pytest.mark.usefixtures("one_rank")


ENCODER_DECODERS = ("translation",)  # and copies of it, each with its own tokenizing and collating, in plain sight


def recipe(name: str) -> Any:
    return importlib.import_module(f"recipes.{name}")


# --- encoder-decoders -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_the_decoder_reads_what_stands_before_each_label(name: str) -> None:
    tokenizers = SimpleNamespace(pad_token_id=0), SimpleNamespace(pad_token_id=1)
    batch = recipe(name).collate(
        {"input_ids": [[5, 6, 7], [8]], "labels": [[11, 12], [13, 14, 15]]}, tokenizers, decoder_start=2
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]] and batch["attention_mask"].tolist() == [
        [1, 1, 1],
        [1, 0, 0],
    ]
    assert batch["labels"].tolist() == [[11, 12, IGNORED], [13, 14, 15]]
    assert batch["decoder_input_ids"].tolist() == [[2, 11, 1], [2, 13, 14]]


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_only_a_whole_target_ends(name: str) -> None:
    tokenizer = train_tokenizer(["many words " * 9], 270, SPECIAL_TOKENS, "$A </s>")
    made = recipe(name).tokenize(
        {"source": ["many words " * 9, "words"], "target": ["words", "many words " * 9]}, (tokenizer, tokenizer), (7, 7)
    )
    assert (made["source_truncated"], made["target_truncated"]) == ([True, False], [False, True])
    whole, cut = made["labels"]
    assert whole == tokenizer("words")["input_ids"] and whole[-1] == tokenizer.eos_token_id
    assert cut == tokenizer("many words " * 9)["input_ids"][:6] and tokenizer.eos_token_id not in cut
    assert made["length"] == [7 + len(whole), len(made["input_ids"][1]) + 6]
    assert made["target_altered"] == [False, False]


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_targets_that_the_tokenizer_cannot_write_are_counted(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder("minilm"))
    targets = ["many words", "Many words", "été", "a_word", "word " * 9]
    made = recipe(name).tokenize({"source": targets, "target": targets}, (tokenizer, tokenizer), (12, 8))
    assert made["target_altered"] == [False, True, True, True, False]
    assert made["target_truncated"] == [False] * 4 + [True]
    assert recipe(name).notes_on(Dataset.from_dict(made))[1].startswith("3 of 5 training targets cannot be written")


# --- masked_lm ------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole_words", [False, True])
def test_fifteen_percent_are_chosen_and_eighty_of_these_hidden(whole_words: bool) -> None:
    mask = AddedToken("<mask>", lstrip=True, special=True)
    special = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "mask_token": mask}
    text = " ".join(f"{word}{number}" for number in range(900) for word in ("some", "more"))
    tokenizer = train_tokenizer([text], 400, special, "<s> $A </s>")
    masked_lm = recipe("masked_lm")
    blocks = masked_lm.tokenize({"text": [text, text]}, tokenizer, max_length=66)
    assert [token for block in blocks["input_ids"] for token in block[1:-1]] == 2 * tokenizer(
        text, add_special_tokens=False
    )["input_ids"]
    rows = blocks | {"draw": list(range(len(blocks["words"])))}
    made = masked_lm.hide(rows, tokenizer, SimpleNamespace(mask_rate=0.15, whole_words=whole_words))
    before, after, labels, words = (
        np.concatenate(part) for part in (blocks["input_ids"], made["input_ids"], made["labels"], blocks["words"])
    )  # fmt: skip
    chosen = labels != IGNORED
    assert (labels[chosen] == before[chosen]).all() and (after[~chosen] == before[~chosen]).all()
    assert not chosen[words < 0].any(), "the ends of blocks are no text"
    assert chosen.sum() / (words >= 0).sum() == pytest.approx(0.15, abs=0.02)
    kinds = (after[chosen] == tokenizer.mask_token_id).mean(), (after[chosen] == before[chosen]).mean()
    assert kinds == (pytest.approx(0.8, abs=0.03), pytest.approx(0.1, abs=0.03))
    block = np.repeat(np.arange(len(blocks["words"])), [len(part) for part in blocks["words"]])
    of_a_word: dict[tuple[int, int], set[bool]] = {}
    for in_block, word, is_chosen in zip(block.tolist(), words.tolist(), chosen.tolist(), strict=True):
        of_a_word.setdefault((in_block, word), set()).add(is_chosen)
    assert any(len(found) == 2 for found in of_a_word.values()) != whole_words, "a word is chosen in part"


# --- question_answering ---------------------------------------------------------------------------


def test_windows_hold_the_answer_where_it_is() -> None:
    question_answering = recipe("question_answering")
    tokenizer = AutoTokenizer.from_pretrained(model_folder("minilm"))
    context = " ".join(f"Item {number} costs {number * 37} dollars." for number in range(40))
    answer = "Item 25 costs 925 dollars"
    rows: dict[str, list[Any]] = {
        "question": ["What of item 25?", "What of item 99?"], "context": [context, context], "row": [0, 1],
        "answers": [{"text": [answer], "answer_start": [context.index(answer)]}, {"text": [], "answer_start": []}],
    }  # fmt: skip
    windows = question_answering.tokenize(rows, tokenizer, max_length=48, stride=12)
    assert len(windows["row"]) > 10 and set(windows["row"]) == {0, 1}
    found = []
    for row, ids, characters, first, last, start, end in zip(
        *(windows[name] for name in ("row", "input_ids", "characters", "first", "last", "start", "end")), strict=True
    ):
        text = context[characters[first][0] : characters[last][1]]
        assert tokenizer.decode(ids[first : last + 1]) == tokenizer.decode(
            tokenizer(text, add_special_tokens=False)["input_ids"]
        )
        whole = row == 0 and answer in text
        assert (start, end) == (0, 0) or whole
        if whole:
            found.append(context[characters[start][0] : characters[end][1]])
    assert found and set(found) == {answer}


@pytest.mark.parametrize(
    ("context", "answer"),
    [
        ("It says \U0001f409 here.", "\U0001f409"),
        (" word.", " word"),
        ("one  two three", " two "),
        ("undoing it", "doing"),
    ],
)
def test_an_answer_is_all_the_tokens_that_share_a_character_with_it(context: str, answer: str) -> None:
    """A character outside the learned words is several tokens of a byte-level BPE; tokens lack spaces around them."""
    special = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>"}
    tokenizer = train_tokenizer(["It says word here. one two three undoing it"] * 9, 300, special, "<s> $A </s>")
    rows = {
        "question": ["it"],
        "context": [context],
        "row": [0],
        "answers": [{"text": [answer], "answer_start": [context.index(answer)]}],
    }
    made = recipe("question_answering").tokenize(rows, tokenizer, max_length=64, stride=8)
    (ids,), (start,), (end,) = made["input_ids"], made["start"], made["end"]
    assert 0 < start <= end
    assert answer.strip() in tokenizer.decode(ids[start : end + 1]) and answer.strip() not in tokenizer.decode(
        ids[start + 1 : end + 1]
    )
    assert answer.strip() not in tokenizer.decode(ids[start:end])


# --- word_embeddings ------------------------------------------------------------------------------

DOCUMENTS = [np.array([0, 1, 0, 2]), np.array([3, 0])]
COUNTS = np.array([3, 1, 1, 1])


def test_words_occur_together_within_a_document_and_less_the_further_apart() -> None:
    rows = recipe("word_embeddings").Cooccurrences(
        DOCUMENTS, COUNTS, SimpleNamespace(window=2, x_max=2.0, span=4, seed=0)
    )
    batch = rows.collate(rows[list(range(len(rows)))])
    columns = [batch[name].flatten().tolist() for name in ("words", "others", "target", "weight", "pairs")]
    found = {
        (word, other): (round(math.exp(target), 6), round(weight, 6))
        for word, other, target, weight, is_pair in zip(*columns, strict=True)
        if is_pair or weight
    }
    half, quarter = round(0.5**0.75, 6), round(0.25**0.75, 6)
    once = {(0, 0): (1, half), (0, 1): (2, 1), (0, 2): (1, half), (0, 3): (1, half), (1, 2): (0.5, quarter)}
    assert found == once | {(other, word): value for (word, other), value in once.items()}
    assert int(batch["pairs"].sum()) == len(found) and batch["words"].shape == (3, 4)  # 9 pairs in rows of 4


def test_a_word_predicts_its_neighbours_within_a_document() -> None:
    # Which leaves no word out, and cuts the first document after its third word.
    cfg = SimpleNamespace(seed=0, subsample=100.0, window=3, span=3, negatives=4)
    rows = recipe("word_embeddings").SkipGrams(DOCUMENTS, COUNTS, cfg)
    words = [word for document in DOCUMENTS for word in [*document.tolist(), -1, -1, -1]]
    for draw in range(50):
        drawn = {"draw": np.full(len(rows), draw, np.uint64)}
        batch = {name: value.numpy() for name, value in rows.collate(rows[list(range(len(rows)))] | drawn).items()}
        assert batch["words"].flatten()[: len(words)].tolist() == [max(word, 0) for word in words]
        for place, (row, column) in enumerate(np.ndindex(batch["words"].shape)):
            around = batch["others"][row, column : column + 7]
            learned = around[batch["beside"][row, column] > 0].tolist()
            inside = [words[at] if 0 <= at < len(words) else -1 for at in range(place - 3, place + 4)]
            allowed = [
                [word for word in [*inside[3 - reach : 3], *inside[4 : 4 + reach]] if word >= 0] for reach in (1, 2, 3)
            ]
            assert learned in (allowed if inside[3] >= 0 else [[]])
            assert batch["pairs"][row, column] == [len(learned)]
        assert set(batch["noise"].flatten()) <= {0, 1, 2, 3} and batch["noise"].shape == batch["words"].shape


@pytest.mark.parametrize("method", ["skip_gram", "glove"])
def test_the_loss_of_words_is_the_papers(method: str) -> None:
    """Pair by pair."""
    module = recipe("word_embeddings")
    cfg = SimpleNamespace(seed=0, subsample=100.0, window=2, span=4, negatives=6, x_max=2.0)
    rows: Any = module.training_rows(DOCUMENTS, COUNTS, SimpleNamespace(**vars(cfg), method=method))
    set_seed(0)
    model = module.WordVectors({"words": 4, "dimensions": 5, "biases": int(method == "glove")})
    for weight in model.parameters():
        torch.nn.init.normal_(weight)
    batch = rows.collate(rows[list(range(len(rows)))] | {"draw": np.arange(len(rows), dtype=np.uint64)})
    v, u, expected = model.vectors.weight, model.contexts.weight, torch.zeros(())
    for row, column in np.ndindex(batch["words"].shape):
        word = batch["words"][row, column]
        if method == "glove":
            other = batch["others"][row, column]
            score = v[word] @ u[other] + model.biases.weight[word, 0] + model.context_biases.weight[other, 0]
            expected = expected + batch["weight"][row, column] * (score - batch["target"][row, column]) ** 2
            continue
        for shift in range(5):
            if batch["beside"][row, column, shift]:
                other = batch["others"][row, column + shift]
                expected = expected - F.logsigmoid(v[word] @ u[other])
                for random in batch["noise"][row]:
                    expected = expected - 6 / 4 * F.logsigmoid(-v[word] @ u[random])
    torch.testing.assert_close(rows.loss(model, batch), expected)


# --- preferences ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dpo", "ipo"])
@pytest.mark.parametrize("packing", [True, False])
def test_the_loss_of_pairs_is_the_papers(method: str, packing: bool) -> None:
    """Beside log-probabilities of one answer at a time, from plain logits."""
    dpo, beta = recipe("dpo"), 0.3
    set_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, pad_token_id=None))
    chosen, rejected = [[3, 4, 5, 6], [7, 8]], [[3, 4, 9], [7, 10, 11, 12, 13]]
    rows = {
        f"{kind}_{what}": [[IGNORED, *ids[2:], 1] if what == "labels" else ids for ids in sequences]
        for kind, sequences in (("chosen", chosen), ("rejected", rejected))
        for what in ("ids", "labels")
    }
    reference = torch.tensor([[-5.0, -6.0], [-8.0, -7.5]])
    rows |= {f"reference_{kind}": reference[:, number].tolist() for number, kind in enumerate(("chosen", "rejected"))}

    def log_probability(ids: list[int], labels: list[int]) -> torch.Tensor:
        found = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        return torch.stack([found[n, label] for n, label in enumerate(labels) if label != IGNORED]).sum()

    losses = []
    for number in range(2):
        ratios = [
            log_probability(rows[f"{kind}_ids"][number], rows[f"{kind}_labels"][number]) - reference[number, place]
            for place, kind in enumerate(("chosen", "rejected"))
        ]
        margin = ratios[0] - ratios[1]
        losses.append((margin - 1 / (2 * beta)) ** 2 if method == "ipo" else -torch.log(torch.sigmoid(beta * margin)))
    expected = torch.stack(losses)
    torch.autograd.backward(expected.mean())
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    model.zero_grad()
    engine: Any = lambda **inputs: model(**inputs)  # noqa: E731  # as DeepSpeed's, it has the model as its module
    engine.module = model
    batch = preferences.collate_pairs(rows, packing)
    margins = dpo.margins(dpo.log_probabilities(engine, batch, 2), batch["reference"])
    found = dpo.preference_losses(SimpleNamespace(method=method, beta=beta), margins)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.autograd.backward(found.mean())
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-6)
