"""What a model that converses answers to the rows of a split, and how good that is."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lib.data.batches import IGNORED, Batch, pad
from lib.data.conversations import messages_of, render, sums_of_conversations
from lib.distributed import mesh
from lib.scores import evaluation, inference

# A hub model's own generation config must not decide.
GREEDY: dict[str, Any] = {
    "do_sample": False, "num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False, "min_length": 0,
    "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "temperature": None, "top_p": None, "top_k": None,
}  # fmt: skip

ROWS_AT_ONCE = 4  # rows that are generated together, for each of a micro-batch: no activations are kept for them


def conversation_scores(
    engine: Any, rows: Dataset, collate: Callable[[dict[str, Any]], Batch], batch_size: int, *,
    losses_of: Callable[[Any, Batch], torch.Tensor],
) -> dict[str, float]:  # fmt: skip
    """The perplexity of the answers, per token. All ranks must call it.

    collate: see lib.data.conversations.lay_out. losses_of(engine, batch): the loss of each token, [rows, length].
    """

    def nats_and_tokens(batch: Batch) -> torch.Tensor:
        values = losses_of(engine, batch).double(), (batch["labels"] != IGNORED).double()
        return torch.stack([sums_of_conversations(value, batch, batch_size) for value in values], dim=1)

    found = inference.for_each_row(engine, rows, collate, batch_size, answer=nats_and_tokens, lengths=rows["length"])
    nats, tokens = found.sum(0).tolist()
    return {"perplexity": evaluation.perplexity(nats, tokens)}


def tokenize_prompts(
    rows: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, max_length: int, answer_tokens: int
) -> dict[str, list[Any]]:
    """Columns prompt, and completion if there is one -> prompt_ids, and `expected`, the last answer.

    The prompt is all before the last answer. Its beginning is cut off where it would have more than max_length tokens
    with an answer of answer_tokens. Conversations without an answer are left out.
    """
    found: dict[str, list[Any]] = {"prompt_ids": [], "expected": []}
    completions = rows.get("completion", [None] * len(rows["prompt"]))
    for prompt, completion in zip(rows["prompt"], completions, strict=True):
        messages = messages_of(prompt, completion)
        last = max((n for n, message in enumerate(messages) if n and message["role"] == "assistant"), default=0)
        if last:
            text = render(tokenizer, messages[:last], add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][
                -max(1, max_length - answer_tokens) :
            ]
            found["prompt_ids"].append(ids)
            found["expected"].append(messages[last].get("content", ""))
    return found


def collate_prompts(rows: dict[str, Any]) -> Batch:
    """input_ids and attention_mask, [rows, longest], filled up on the left, so that all rows end in one place."""
    backwards = [list(reversed(ids)) for ids in rows["prompt_ids"]]
    mask = pad([[1] * len(ids) for ids in backwards], 0)
    return {"input_ids": pad(backwards, 0).flip(1), "attention_mask": mask.flip(1)}


def generate_answers(
    engine: Any, prompts: Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int, answer_tokens: int
) -> list[str]:
    """The answer to each prompt (column prompt_ids), generated greedily up to its end or answer_tokens.

    batch_size: of training. All ranks must call it, and every rank gets all.
    """
    # A token costs a pass over all weights, whatever the number of rows; they are shared out evenly, without fillers.
    share = -(-len(prompts) // mesh.gradient_size())
    batches = -(-share // (ROWS_AT_ONCE * batch_size))
    at_once = -(-share // batches)

    def generate(batch: Batch) -> torch.Tensor:
        tokens = engine.module.generate(
            **batch, **GREEDY, max_new_tokens=answer_tokens,
            # At these a rank whose answers are complete goes on until all are: the others need its parameters.
            synced_gpus=engine.zero_optimization_stage() == 3 or mesh.expert_size() > 1,
        )[:, batch["input_ids"].shape[1] :]  # fmt: skip
        return F.pad(tokens, (0, answer_tokens - tokens.shape[1]), value=tokenizer.pad_token_id)

    lengths = [len(ids) for ids in prompts["prompt_ids"]]
    tokens = inference.for_each_row(
        engine, prompts, collate_prompts, at_once, answer=generate, lengths=lengths, what="generating"
    )
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def answer_scores(answers: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """ROUGE-L, and exact match as SQuAD has it (without case, articles and punctuation), 0 to 100."""
    return {
        "rougeL": evaluation.summarization_scores(answers, expected)["rougeL"],
        "exact_match": evaluation.question_answering_scores(answers, [[text] for text in expected])["exact_match"],
    }


def preference_scores(found: torch.Tensor, reference: torch.Tensor, beta: float) -> dict[str, float]:
    """How often a model prefers the chosen answer of a pair, 0 to 1; pairs in which it prefers none count half.

    accuracy: finds it more likely. reward_accuracy: has come to find it more likely, compared with the model before
    training; margin: by how much, times beta, the mean over pairs. found, reference: [pairs, 2] log-probabilities of
    the chosen and the rejected answer, by the model and by the model before training.
    """
    likelier, margin = (values[:, 0] - values[:, 1] for values in (found, found - reference))
    shares = {"accuracy": likelier, "reward_accuracy": margin}
    scores = {name: float(values.sign().double().mean() / 2 + 0.5) for name, values in shares.items()}
    return scores | {"margin": float(beta * margin.double().mean())}
