"""Useful (not padded) tokens a second beside the HF Trainer's default, on the same rows, model and DeepSpeed config. Run by hand:

    python tests/benchmark_padding.py classification
    python tests/benchmark_padding.py language_model

Fresh processes in turn, the recipe's and the Trainer's, each with 2 ranks at ZeRO-2. The Trainer shuffles and pads each batch to its
longest row; the language model's rows are lines of the sample, of which about half of such a batch is padding. Seconds are those of
training alone, without the first steps.
"""

import argparse
import importlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("DS_ACCELERATOR", "cpu")
WARMUP, BATCH, MICRO = 5, 32, 16
MODEL = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4}


def prepare(task: str, folder: Path) -> None:
    """Write the rows that both train on, and for the language model the tokenizer and the untrained model."""
    from lib.samples import load_sample

    if task == "classification":
        rows = load_sample("docstrings")
        for split in ("train", "validation", "test"):
            rows[split].select(range(len(rows[split]) if split == "train" else 16)).to_json(folder / f"{split}.jsonl")
        return
    from transformers import LlamaConfig, LlamaForCausalLM

    lines = [line for text in load_sample("sotu")["train"]["text"][100:160] for line in text.split("\n") if len(line) > 200]
    for split, part in {"train": lines, "validation": lines[:4], "test": lines[:4]}.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": line[:1200]}) + "\n" for line in part))
    importlib.import_module("recipes.causal_lm").train_tokenizer({"text": lines}, MODEL["vocab_size"]).save_pretrained(folder / "model")
    LlamaForCausalLM(LlamaConfig(**MODEL, tie_word_embeddings=True, max_position_embeddings=512)).save_pretrained(folder / "model")


def hf_trainer(task: str, folder: Path, steps: int) -> None:
    """The Trainer with its default sampler and collator; rank 0 writes hf.json."""
    import deepspeed
    from datasets import load_dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )  # fmt: skip

    from lib.model import model_folder

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    rows = load_dataset("json", data_files=str(folder / "train.jsonl"))["train"]
    name = model_folder("minilm") if task == "classification" else str(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(name)
    limit = 64 if task == "classification" else 256
    model: Any
    collator: Any
    if task == "classification":
        names = sorted(set(rows["label"]))
        model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(names))
        rows = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=limit) | {"label": names.index(row["label"])})
        collator = DataCollatorWithPadding(tokenizer)
    else:
        tokenizer.pad_token = tokenizer.eos_token
        model = AutoModelForCausalLM.from_pretrained(name)
        rows = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=limit), remove_columns=["text"])
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    seen: list[tuple[float, int, int]] = []  # (time, useful tokens, tokens with padding) of each micro-batch

    def counting(features: list[dict[str, Any]]) -> Any:
        batch = collator(features)
        seen.append((time.perf_counter(), int(batch["attention_mask"].sum()), batch["attention_mask"].numel()))
        return batch

    class Clock(TrainerCallback):  # type: ignore[misc]  # transformers is not followed by mypy
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.times.append(time.perf_counter())

    clock = Clock()
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), per_device_train_batch_size=MICRO, max_steps=steps, learning_rate=1e-4, deepspeed=ds_config(),
        report_to=[], save_strategy="no", logging_steps=10, use_cpu=os.environ["DS_ACCELERATOR"] == "cpu", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=counting, callbacks=[clock])
    trainer.train()
    assert type(trainer.model_wrapped).__name__ == "DeepSpeedEngine"
    if trainer.args.process_index == 0:
        counted = seen[WARMUP:steps]
        useful, padded = sum(tokens for _, tokens, _ in counted), sum(total for _, _, total in counted)
        result = {"tokens_per_second": 2 * useful / (clock.times[-1] - clock.times[WARMUP - 1]), "padding": 1 - useful / padded}
        (folder / "ds" / "hf.json").write_text(json.dumps(result))


def ds_config() -> dict[str, Any]:
    return {"train_micro_batch_size_per_gpu": MICRO, "zero_optimization": {"stage": 2}, "gradient_clipping": 1.0}


def launch(script: str, *arguments: object) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).parent / "deepspeed", "--quiet", "--num_accelerators", 2, "--master_port", port, script, *arguments]
    done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=["classification", "language_model"])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--series", type=int, default=3)
    parser.add_argument("--trainer_in", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trainer_in:
        hf_trainer(options.task, options.trainer_in, options.steps)
        return
    folder = Path(tempfile.mkdtemp())
    prepare(options.task, folder)
    (folder / "ds").mkdir()
    (folder / "ds" / "ds.json").write_text(json.dumps(ds_config()))
    common = ["--deepspeed_config", folder / "ds" / "ds.json", "--dataset", folder, "--batch_size", BATCH, "--max_steps", options.steps, "--warmup_steps", 0,
              "--learning_rate", 1e-4, "--log_every", WARMUP, "--eval_every", "null", "--run_dir", folder / "run", "--overwrite", "true"]  # fmt: skip
    if options.task == "classification":
        recipe = ["recipes/text_classification.py", *common]
    else:
        recipe = ["recipes/causal_lm.py", *common, "--model", folder / "model", "--max_length", 256, "--samples", 0]
    ratios = []
    for series in range(options.series):
        launch(*recipe)
        entries = [entry for entry in map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines()) if "loss" in entry][WARMUP:]
        ours = sum(entry["tokens"] for entry in entries) / sum(entry["step_seconds"] for entry in entries)
        launch("tests/benchmark_padding.py", options.task, "--trainer_in", folder, "--steps", options.steps)
        trainer = json.loads((folder / "ds" / "hf.json").read_text())
        ratios.append(ours / trainer["tokens_per_second"])
        print(
            f"series {series + 1}: recipe {ours:,.0f} useful tokens/s, HF Trainer {trainer['tokens_per_second']:,.0f} "
            f"({trainer['padding']:.0%} of its tokens are padding), ratio {ratios[-1]:.2f}",
            flush=True,
        )
    print(f"ratio, median: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
