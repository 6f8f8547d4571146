"""Texts that an encoder-decoder generates from all rows of a split."""

from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lib.data.batches import Batch
from lib.models.encoder_decoder import ONE_TEXT
from lib.scores import inference


def generate_texts(
    engine: Any, rows: Dataset, collate: Any, batch_size: int, *, tokenizer: PreTrainedTokenizerBase, max_length: int,
    beams: int, length_penalty: float, no_repeat_ngram: int = 0,
) -> list[str]:  # fmt: skip
    """The text that the model generates from each row's source, by beam search (1 beam: greedily).

    All ranks must call it, and every rank gets all texts.
    max_length: the most tokens of a text.
    length_penalty: the search looks for the text whose log probability / length^length_penalty is the highest.
    no_repeat_ngram: no sequence of so many tokens occurs twice in a text; 0 means that it may.
    """
    search = ONE_TEXT | {"num_beams": beams, "no_repeat_ngram_size": no_repeat_ngram}
    if beams > 1:
        search |= {"length_penalty": length_penalty, "early_stopping": False}

    def generate(batch: Batch) -> torch.Tensor:
        tokens = engine.module.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=max_length, **search,
            # At stage 3 a rank whose texts are complete goes on until all are, because the others need its parameters.
            synced_gpus=engine.zero_optimization_stage() == 3,
        )  # fmt: skip
        return F.pad(tokens, (0, 1 + max_length - tokens.shape[1]), value=tokenizer.pad_token_id)

    tokens = inference.for_each_row(
        engine, rows, collate, batch_size, answer=generate, lengths=rows["length"], what="generating"
    )
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
