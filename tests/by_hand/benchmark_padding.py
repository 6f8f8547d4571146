"""Useful tokens a second, without padding: the recipe and the HF Trainer on the same rows, model and DeepSpeed config.

Run by hand:

    python tests/by_hand/benchmark_padding.py text_classification
    python tests/by_hand/benchmark_padding.py causal_lm, or translation, question_answering
    python tests/by_hand/benchmark_padding.py causal_lm --max_length 128

It starts fresh processes in turn, each with 2 ranks at ZeRO-2: the recipe, the Trainer with its defaults (random order,
each batch padded to its longest row), and the Trainer with its batches grouped by length. The rows of the language
model are lines of the sample; about half of a random batch of them is padding. Only the seconds of training count,
without the first steps.
"""

import argparse
import functools
import importlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from lib.data.batches import IGNORED
from lib.settings.config import load

WARMUP, BATCH, MICRO = 5, 32, 16
SAMPLES = {
    "text_classification": "docstrings",
    "causal_lm": "sotu",
    "translation": "messages_fr",
    "question_answering": "docstring_questions",
}
TRAINER_MODES = {"random": "HF Trainer", "group_by_length": "HF Trainer, grouped by length"}


def prepare(recipe: str, folder: Path, cfg: Any) -> None:
    """Write the rows that all train on. For causal_lm and translation, also write a new model and its tokenizer."""
    from transformers import AutoModelForCausalLM

    from lib.data.samples import load_sample
    from lib.distributed import ranks
    from lib.models.encoder_decoder import build_model, load_tokenizers
    from lib.models.scratch import END_OF_TEXT, new_config, train_tokenizer

    rows = load_sample(SAMPLES[recipe])
    if recipe == "causal_lm":
        lines = [line[:1200] for text in rows["train"]["text"][100:160] for line in text.split("\n") if len(line) > 200]
        for split, part in {"train": lines, "validation": lines[:4], "test": lines[:4]}.items():
            (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in part))
    else:
        for split in ("train", "validation", "test"):
            rows[split].select(range(len(rows[split]) if split == "train" else 16)).to_json(folder / f"{split}.jsonl")
    if recipe in ("causal_lm", "translation"):
        ranks.init(timeout_minutes=10)
        model: Any
        if recipe == "causal_lm":
            tokenizer = train_tokenizer(lines, cfg.vocab_size, END_OF_TEXT | {"pad_token": END_OF_TEXT["eos_token"]})
            sizes = {
                "intermediate_size": cfg.intermediate_size,
                "num_hidden_layers": cfg.num_layers,
                "max_position_embeddings": cfg.max_length,
            }
            model = AutoModelForCausalLM.from_config(
                new_config(
                    "llama", AutoModelForCausalLM, cfg.num_heads, cfg.hidden_size, vocab_size=len(tokenizer), **sizes
                )
            )
        else:
            cfg.model = None  # a small T5Gemma
            tokenizer, _ = load_tokenizers(cfg, rows["train"]["source"], rows["train"]["target"])
            model = build_model(cfg, tokenizer)
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")


def settings(recipe: str, max_length: int | None) -> Any:
    """The recipe's settings, with another max_length if one is given."""
    return load(
        importlib.import_module(f"recipes.{recipe}").Config,
        ROOT / "recipes" / f"{recipe}.yaml",
        {"max_length": str(max_length)} if max_length else {},
    )


def for_trainer(
    recipe: str, folder: Path, cfg: Any
) -> tuple[Any, Any, Callable[[list[dict[str, Any]]], dict[str, Any]]]:
    """(model, tokenized rows, collator) as a user of the Trainer would have them, with the recipe's lengths."""
    from datasets import load_dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForQuestionAnswering,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        DataCollatorForSeq2Seq,
        DataCollatorWithPadding,
    )

    from lib.models.hub import model_folder

    rows = load_dataset("json", data_files=str(folder / "train.jsonl"))["train"]
    name = str(folder / "model") if (folder / "model").exists() else model_folder("minilm")
    tokenizer = AutoTokenizer.from_pretrained(name)
    if recipe == "text_classification":
        names = sorted(set(rows["label"]))
        rows = rows.map(
            lambda row: (
                tokenizer(row["text"], truncation=True, max_length=cfg.max_length)
                | {"label": names.index(row["label"])}
            )
        )
        return (
            AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(names)),
            rows,
            DataCollatorWithPadding(tokenizer),
        )
    if recipe == "causal_lm":
        rows = rows.map(
            lambda row: tokenizer(row["text"], truncation=True, max_length=cfg.max_length), remove_columns=["text"]
        )
        return AutoModelForCausalLM.from_pretrained(name), rows, DataCollatorForLanguageModeling(tokenizer, mlm=False)
    if recipe == "translation":
        lengths = cfg.max_source_length
        rows = rows.map(
            lambda row: tokenizer(row["source"], text_target=row["target"], truncation=True, max_length=lengths),
            remove_columns=["source", "target"],
        )
        rows = rows.map(lambda row: {"length": len(row["input_ids"]) + len(row["labels"])})
        model = AutoModelForSeq2SeqLM.from_pretrained(name)
        return model, rows, DataCollatorForSeq2Seq(tokenizer, model)
    question_answering: Any = importlib.import_module("recipes.question_answering")
    rows = rows.add_column("row", list(range(len(rows))))
    tokenize = functools.partial(
        question_answering.tokenize, tokenizer=tokenizer, max_length=cfg.max_length, stride=cfg.stride
    )
    rows = rows.map(tokenize, batched=True, remove_columns=rows.column_names)
    rows = rows.rename_columns({"start": "start_positions", "end": "end_positions"}).remove_columns(
        ["characters", "row", "first", "last"]
    )
    pad = DataCollatorWithPadding(tokenizer)
    return (
        AutoModelForQuestionAnswering.from_pretrained(name),
        rows,
        lambda features: pad([feature | {"length": 0} for feature in features]),
    )


def hf_trainer(recipe: str, folder: Path, cfg: Any, *, steps: int, order: str) -> None:
    """The Trainer with its own sampler; rank 0 writes hf.json."""
    import deepspeed
    from transformers import Trainer, TrainerCallback, TrainingArguments

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model, rows, collator = for_trainer(recipe, folder, cfg)
    seen: list[tuple[int, int]] = []  # (useful tokens, tokens with padding) of each micro-batch

    def counting(features: list[dict[str, Any]]) -> Any:
        batch = collator(features)
        batch.pop("length", None)
        counted = [batch["attention_mask"] > 0, *([batch["labels"] != IGNORED] if recipe == "translation" else [])]
        seen.append((sum(int(real.sum()) for real in counted), sum(real.numel() for real in counted)))
        return batch

    class Clock(TrainerCallback):  # type: ignore[misc]  # transformers is not followed by mypy
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.times.append(time.perf_counter())

    clock = Clock()
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=MICRO,
        max_steps=steps,
        learning_rate=1e-4,
        deepspeed=ds_config(),
        report_to=[],
        save_strategy="no",
        logging_steps=10,
        use_cpu=os.environ["DS_ACCELERATOR"] == "cpu",
        disable_tqdm=True,
        train_sampling_strategy=order,
        remove_unused_columns=recipe != "question_answering",
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=counting, callbacks=[clock])
    trainer.train()
    assert type(trainer.model_wrapped).__name__ == "DeepSpeedEngine"
    if trainer.args.process_index == 0:
        counts = seen[WARMUP:steps]
        useful, padded = sum(tokens for tokens, _ in counts), sum(total for _, total in counts)
        result = {
            "tokens_per_second": 2 * useful / (clock.times[-1] - clock.times[WARMUP - 1]),
            "padding": 1 - useful / padded,
        }
        (folder / "ds" / "hf.json").write_text(json.dumps(result))


def ds_config() -> dict[str, Any]:
    return {"train_micro_batch_size_per_gpu": MICRO, "zero_optimization": {"stage": 2}, "gradient_clipping": 1.0}


def launch(script: str, *arguments: object) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        Path(sys.executable).parent / "deepspeed",
        "--quiet",
        "--num_accelerators",
        2,
        "--master_port",
        port,
        script,
        *arguments,
    ]
    done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", choices=list(SAMPLES))
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--series", type=int, default=3)
    parser.add_argument(
        "--max_length",
        type=int,
        help="tokens of a row or block (default: the recipe's); translation has no such setting",
    )
    parser.add_argument("--trainer_in", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--order", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    cfg = settings(options.recipe, options.max_length)
    length = ["--max_length", options.max_length] if options.max_length else []
    if options.trainer_in:
        hf_trainer(options.recipe, options.trainer_in, cfg, steps=options.steps, order=options.order)
        return
    folder = Path(tempfile.mkdtemp())
    (folder / "ds").mkdir()
    (folder / "ds" / "ds.json").write_text(json.dumps(ds_config()))
    prepare(options.recipe, folder, cfg)
    recipe_settings = {
        "deepspeed_config": folder / "ds" / "ds.json",
        "dataset": folder,
        "batch_size": BATCH,
        "max_steps": options.steps,
        "epochs": "null",
        "warmup_steps": 0,
        "learning_rate": 1e-4,
        "log_every": WARMUP,
        "eval_every": "null",
        "save_minutes": "null",
        "run_dir": folder / "run",
        "overwrite": "true",
    }
    arguments = [word for key, value in recipe_settings.items() for word in (f"--{key}", value)] + length
    if (folder / "model").exists():
        arguments += ["--model", folder / "model"]
    if options.recipe == "causal_lm":
        arguments += ["--samples", 0]
    if options.recipe == "translation":
        # The folder has a whole model, so this is the rate of all parameters.
        arguments += ["--pretrained_learning_rate", 1e-4]
    ratios: dict[str, list[float]] = {order: [] for order in TRAINER_MODES}
    for series in range(options.series):
        launch(f"recipes/{options.recipe}.py", *arguments)
        entries = [
            entry
            for entry in map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
            if "loss" in entry
        ][WARMUP:]
        ours = sum(entry["tokens"] for entry in entries) / sum(entry["step_seconds"] for entry in entries)
        print(f"series {series + 1}: recipe {ours:,.0f} useful tokens/s", flush=True)
        for order, name in TRAINER_MODES.items():
            launch(
                "tests/by_hand/benchmark_padding.py",
                options.recipe,
                "--trainer_in",
                folder,
                "--steps",
                options.steps,
                "--order",
                order,
                *length,
            )
            trainer = json.loads((folder / "ds" / "hf.json").read_text())
            ratios[order].append(ours / trainer["tokens_per_second"])
            print(
                f"  {name} {trainer['tokens_per_second']:,.0f} ({trainer['padding']:.0%} of its tokens are padding), "
                f"ratio {ratios[order][-1]:.2f}",
                flush=True,
            )
    for order, name in TRAINER_MODES.items():
        print(f"ratio to {name}, median: {statistics.median(ratios[order]):.2f}")


if __name__ == "__main__":
    main()
