"""The recipes sft and dpo beside TRL's SFTTrainer and DPOTrainer: the same losses, tokens a second, and memory.

Run by hand, with TRL 1.16.0, which is no requirement of this repository (pip install trl==1.16.0):

    python tests/by_hand/benchmark_trl.py equal
    python tests/by_hand/benchmark_trl.py speed
    python tests/by_hand/benchmark_trl.py speed --precision fp32
    python tests/by_hand/benchmark_trl.py memory

Each measurement is a launch of fresh ranks by DeepSpeed, with one thread a rank, all weights, and the recipe's JSON
ds_configs/*/zero2.json, filled in, for both sides. TRL gets the tokens and labels of the recipe. TRL's activation
checkpointing, which it turns on by default, is off, as the recipe's JSON has none.

equal   fp32, 1 rank. The data set is as large as the batch, so that the order of the rows does not matter. Of DPO, the
        first loss is log 2 whatever the data, so that the later steps are those that compare something.
speed   2 ranks, SmolLM2 cut to its first 6 layers, conversations of the sample `instructions`, 8 a rank and step. With
        packing, a rank of TRL gets 2 blocks of 512 tokens a step, which is nearest to that.
memory  1 rank, 1 step of 8 rows of 1,024 tokens, with labels on their second halves, over 49,152 tokens of vocabulary.

Useful tokens are those of conversations, without padding. Peak memory is the ru_maxrss of the largest rank, from its
start to its end; the recipe's also holds the generation before and after training, and the export.

On a CPU, TRL computes the logits of all tokens, as it does wherever there is no Triton; on a GPU only those of the
labelled ones. "labelled only" is TRL with the GPU's choice made on the CPU (one function of it replaced).

`equal` was seen in two parts, not in one run (of smollm2, dpo was run by itself).
Seen on 2026-11-27, 2 CPU cores (EPYC, avx512_bf16), TRL 1.16.0, transformers 5.23.0, torch 2.13.0, deepspeed 0.19.8:

equal                     step 0, recipe           TRL  difference  later steps
smollm2-tiny, TRL padded      10.7958946    10.7958946     0.0e+00      8.9e-08
smollm2-tiny, TRL packing     10.7958946    10.7958946     0.0e+00      1.8e-07
smollm2-tiny, dpo              0.6931472     0.6931472     0.0e+00      2.4e-06
smollm2-tiny, ipo             25.0000000    25.0000000     0.0e+00      5.1e-01   another formula in TRL
smollm2, TRL padded            1.4379581     1.4379668     6.1e-06      1.2e-05
smollm2, TRL packing           1.4379581     1.4379666     5.9e-06      1.3e-05
smollm2, dpo                   0.6931472     0.6931472     0.0e+00      4.1e-07

speed --steps 9 (bf16)          tokens/s of the 3 series   recipe is, median   peak of a rank
recipe                          1,000   1,035   606*                               2,153 MB
TRL, packing                      262*    298   239*                   3.47x       2,673 MB
TRL, packing, labelled only       414*    783   767                    1.32x       1,902 MB
TRL, padded                        99*    125   131                    8.30x       5,502 MB
TRL, padded, labelled only        521     485*  529                    1.92x       2,271 MB
* As far as a log of the load tells, other processes had a part of the cores meanwhile; so only series 2 is clean, but
for its last figure. To be measured again. Of TRL's padded tokens, 56 % were padding. fp32 was not measured.

memory (bf16)                       loss  peak of the rank
recipe                           10.9203          1,689 MB
recipe, packing false            10.9203          1,723 MB
TRL, packing                     10.9203          5,524 MB
TRL, padded                      10.9203          5,219 MB
TRL, padded, labelled only       10.9203          5,116 MB
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from lib.data.batches import IGNORED

TOLERANCE = 1e-4  # relative difference of two losses
LAYERS, BATCH, BLOCK = 6, 16, 512  # of the measurement of speed; BATCH: conversations a step, over both ranks
WARMUP = 3  # steps that are left out
LONG_ROWS, LONG_ROW = 8, 1024  # of the measurement of memory
BETA = 0.1


@dataclasses.dataclass(kw_only=True)
class Job:
    """One training with TRL, as its ranks get it in a JSON file."""

    trainer: str  # "sft" or "dpo"
    model: str
    rows: str  # a parquet file
    result: str  # the JSON file that rank 0 writes
    ds_config: dict[str, Any]  # filled in
    steps: int
    micro_batch: int
    learning_rate: float
    packing: bool = False
    loss_type: str = "sigmoid"  # of DPO
    labelled_only: bool = False


def launch(ranks: int, script: str, *arguments: object) -> int:
    """Run a script in ranks. Returns the peak resident memory of the largest of its processes, in bytes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [Path(sys.executable).parent / "deepspeed", "--quiet", "--num_accelerators", ranks]
    command = [str(part) for part in (*launcher, "--master_port", port, script, *arguments)]
    # Without CI, TRL sends telemetry.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CI": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)  # its descendants' peak too, as each waits for its own
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{' '.join(command)}\n{log.read()[-5000:]}")
    return int(usage.ru_maxrss) * 1024


# --- the recipe ------------------------------------------------------------------------------------------------------


def settings_of(recipe: str, precision: str, **changes: Any) -> dict[str, Any]:
    """Settings for a run of a recipe with all weights and a constant learning rate, without checkpoints."""
    settings = {"lora_rank": "null", "precision": precision, "lr_schedule": "constant", "warmup_steps": 0}
    settings |= {"save_minutes": "null", "epochs": "null", "overwrite": "true"}
    settings |= {"answer_tokens": 1} if recipe == "sft" else {"max_rows": "null", "beta": BETA}
    return settings | changes


def filled_in(recipe: str, settings: dict[str, Any], ranks: int) -> dict[str, Any]:
    """The recipe's zero2.json with each "auto" filled in."""
    from lib.settings import config
    from lib.settings.ds_config import load_ds_config

    module: Any = importlib.import_module(f"recipes.{recipe}")
    cfg = config.load(module.Config, ROOT / "recipes" / f"{recipe}.yaml", {k: str(v) for k, v in settings.items()})
    return load_ds_config(ROOT / "ds_configs" / recipe / "zero2.json", cfg, ranks)


def run_recipe(recipe: str, settings: dict[str, Any], ranks: int) -> tuple[list[dict[str, Any]], int]:
    """(the record of each step, peak memory in bytes)."""
    arguments = [word for name, value in settings.items() for word in (f"--{name}", value)]
    json_file = ROOT / "ds_configs" / recipe / "zero2.json"
    peak = launch(ranks, f"recipes/{recipe}.py", "--deepspeed_config", json_file, *arguments)
    lines = Path(settings["run_dir"], "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if "loss" in entry], peak


# --- rows and models -------------------------------------------------------------------------------------------------


def write_data(folder: Path, train: list[dict[str, Any]]) -> Path:
    """A data set for a recipe, with as few rows to score as there can be."""
    folder.mkdir()
    for split, rows in {"train": train, "validation": train[:1], "test": train[:1]}.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tokens_for_trl(input_ids: list[int], labels: list[int]) -> dict[str, list[int]]:
    """Tokens and labels of the recipe as TRL wants them: with each label at its own token, not at the one before.

    The recipe leaves out a row's last token, after which nothing comes. Here it is needed if it is a label.
    """
    ids = input_ids if labels[-1] == IGNORED else [*input_ids, labels[-1]]
    return {"input_ids": ids, "labels": [IGNORED, *labels][: len(ids)]}


def tokenized(data: Path, recipe: str, model: str, max_length: int) -> Any:
    """The training rows of a data set, as the recipe tokenizes them."""
    from lib.data import conversations, preferences
    from lib.data.rows import load_rows, map_rows
    from lib.models import chat

    columns = {"sft": {"prompt": "messages"}, "dpo": {name: name for name in ("prompt", "chosen", "rejected")}}[recipe]
    tokenize = {"sft": conversations.tokenize_conversations, "dpo": preferences.tokenize_pairs}[recipe]
    settings = {"model": model, "chat_template": None, "lora_rank": None, "trust_remote_code": False}
    tokenizer = chat.load_tokenizer(SimpleNamespace(**settings), max_length)
    train = {"train": load_rows(str(data), None, messages=columns)["train"]}
    return map_rows(train, tokenize, tokenizer=tokenizer, max_length=max_length)["train"]


def write_rows_for_trl(rows: Any, recipe: str, file: Path) -> str:
    """Rows of tokenized() for TRL's trainer, as a parquet file.

    Those for DPO are text, which TRL tokenizes itself, and the tokens that it must find. The chat template is applied
    already, and an answer ends with the token that ends its turn, without the line break that the template adds.
    """
    from datasets import Dataset

    if recipe == "sft":
        found = [tokens_for_trl(row["input_ids"], row["labels"]) for row in rows]
    else:
        found = [
            {"prompt": row["prompt_text"]}
            | {kind: row[f"{kind}_text"] + "<|im_end|>" for kind in ("chosen", "rejected")}
            | {
                f"expected_{kind}": tokens_for_trl(row[f"{kind}_ids"], row[f"{kind}_labels"])
                for kind in ("chosen", "rejected")
            }
            for row in rows
        ]
    Dataset.from_list(found).to_parquet(file)
    return str(file)


def cut_smollm2(folder: Path) -> Path:
    """SmolLM2 with its first LAYERS layers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lib.models.hub import model_folder

    source = model_folder("smollm2")
    AutoModelForCausalLM.from_pretrained(source, num_hidden_layers=LAYERS).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def narrow_model(folder: Path) -> Path:
    """A Llama of 2 narrow layers and random weights, with SmolLM2's tokens: its logits need the most memory."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from lib.models.hub import model_folder

    source = model_folder("smollm2")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig.from_pretrained(source, **sizes, num_key_value_heads=4, head_dim=64)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def long_conversation(model: Path, number: int) -> dict[str, Any]:
    """A conversation whose row has LONG_ROW tokens, with labels on the second half."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    words = [" first", " second", " third", " other", " last", " next"]  # each is one token

    def messages(question: int, answer: int) -> list[dict[str, str]]:
        texts = {"user": question, "assistant": answer}
        return [
            {"role": role, "content": "Text" + "".join(words[(number + place) % 6] for place in range(count))}
            for role, count in texts.items()
        ]

    def tokens(part: list[dict[str, str]], **options: Any) -> int:
        return len(tokenizer(tokenizer.apply_chat_template(part, tokenize=False, **options))["input_ids"])

    question = LONG_ROW // 2 - tokens(messages(0, 0)[:1], add_generation_prompt=True)
    answer = LONG_ROW + 1 - tokens(messages(question, 0))  # 1: the line break after the turn
    return {"messages": messages(question, answer)}


# --- TRL -------------------------------------------------------------------------------------------------------------


def run_trl(job: Job, ranks: int) -> tuple[dict[str, Any], int]:
    """(what rank 0 writes, peak memory in bytes)."""
    file = Path(job.result).with_suffix(".job.json")
    file.write_text(json.dumps(dataclasses.asdict(job)))
    peak = launch(ranks, "tests/by_hand/benchmark_trl.py", "--job", file)
    return json.loads(Path(job.result).read_text()), peak


def trl_rank(job: Job) -> None:
    """One of the ranks of run_trl."""
    import deepspeed
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl.trainer import utils

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as in the recipes
    if job.labelled_only:
        utils._use_triton = lambda device: True  # by which the output layer, but not the kernel, goes
    trainer_class: Any = {"sft": trl.SFTTrainer, "dpo": trl.DPOTrainer}[job.trainer]
    config_class: Any = {"sft": trl.SFTConfig, "dpo": trl.DPOConfig}[job.trainer]
    seen: list[tuple[int, int, float]] = []  # (useful tokens, tokens with padding, loss) of each step of this rank

    class Counting(trainer_class):  # type: ignore[misc]  # TRL is not followed by mypy
        def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
            size = inputs["input_ids"].numel()
            useful = int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else size
            loss = super().compute_loss(model, inputs, *arguments, **options)
            seen.append((useful, size, loss.item()))
            return loss

    class Clock(TrainerCallback):  # type: ignore[misc]  # nor is transformers
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.times.append(time.perf_counter())

    options: dict[str, Any] = {"packing": job.packing, "max_length": BLOCK if job.packing else None}
    if job.trainer == "sft" and job.packing:
        options["max_length"] = max(BLOCK, *map(len, Dataset.from_parquet(job.rows)["input_ids"]))
    if job.trainer == "dpo":
        options = {"max_length": None, "loss_type": [job.loss_type], "beta": BETA}
    ranks = int(os.environ["WORLD_SIZE"])
    batch_keys = {
        "train_micro_batch_size_per_gpu": job.micro_batch,
        "train_batch_size": job.micro_batch * ranks,
        "gradient_accumulation_steps": 1,
    }
    arguments = config_class(
        output_dir=str(Path(job.result).with_suffix("")),
        per_device_train_batch_size=job.micro_batch,
        max_steps=job.steps,
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=job.ds_config["gradient_clipping"],
        bf16="bf16" in job.ds_config,
        deepspeed=job.ds_config | batch_keys,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        use_cpu=os.environ["DS_ACCELERATOR"] == "cpu",
        disable_tqdm=True,
        **options,
    )
    clock = Clock()
    trainer = Counting(
        model=job.model,
        args=arguments,
        train_dataset=Dataset.from_parquet(job.rows),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        callbacks=[clock],
    )
    if job.trainer == "dpo":
        for row in trainer.train_dataset:
            for kind in ("chosen", "rejected"):
                expected = row[f"expected_{kind}"]
                assert row["prompt_ids"] + row[f"{kind}_ids"] == expected["input_ids"]
                labelled = [label for label in expected["labels"] if label != IGNORED]
                assert row[f"{kind}_ids"] == labelled
    trainer.train()
    assert type(trainer.model_wrapped).__name__ == "DeepSpeedEngine"
    assert len(seen) == job.steps
    counts = torch.tensor([[useful, size] for useful, size, _ in seen])
    torch.distributed.all_reduce(counts)
    if trainer.args.process_index == 0:
        useful, size = counts[WARMUP:].sum(0).tolist()
        result = {"losses": [loss for _, _, loss in seen]}
        if job.steps > WARMUP:
            seconds = clock.times[-1] - clock.times[WARMUP - 1]
            result |= {"tokens_per_second": useful / seconds, "padding": 1 - useful / size}
        Path(job.result).write_text(json.dumps(result))


# --- what is measured ------------------------------------------------------------------------------------------------


def equal(folder: Path, options: argparse.Namespace) -> None:
    from lib.data.samples import load_sample
    from lib.models.hub import model_folder

    table = []
    for model, count, steps, rate in (("smollm2-tiny", 16, 4, 1e-3), ("smollm2", 4, 3, 1e-5)):
        for recipe, sample in (("sft", "instructions"), ("dpo", "preferences")):
            rows = list(load_sample(sample)["train"].select(range(count)))
            data = write_data(folder / f"{recipe}-{model}", rows)
            file = folder / f"{recipe}-{model}.parquet"
            write_rows_for_trl(tokenized(data, recipe, model, BLOCK), recipe, file)
            kinds: dict[str, dict[str, Any]] = {"padded": {}, "packing": {"packing": True}}
            if recipe == "dpo":
                kinds = {"dpo": {}} | ({"ipo": {"loss_type": "ipo"}} if model == "smollm2-tiny" else {})
            for kind, changes in kinds.items():
                settings = settings_of(
                    recipe, "fp32", dataset=data, model=model, max_length=BLOCK, batch_size=count, max_steps=steps,
                    learning_rate=rate, run_dir=folder / "run", **({} if recipe == "sft" else {"method": kind}),
                )  # fmt: skip
                if kind != "packing":  # of TRL; the recipe always packs
                    entries, _ = run_recipe(recipe, settings, 1)
                job = Job(
                    trainer=recipe, model=model_folder(model), rows=str(file), result=str(folder / "result.json"),
                    ds_config=filled_in(recipe, settings, 1), steps=steps, micro_batch=count, learning_rate=rate,
                    **changes,
                )  # fmt: skip
                result, _ = run_trl(job, 1)
                ours, theirs = [entry["loss"] for entry in entries], result["losses"]
                differences = [abs(one - other) / abs(other) for one, other in zip(ours, theirs, strict=True)]
                name = f"{model}, {'TRL ' if recipe == 'sft' else ''}{kind}"
                table.append((name, ours, theirs, differences))
                print(f"{name}: recipe {ours}, TRL {theirs}", flush=True)
    print(f"\n{'':30}{'step 0, recipe':>16}{'TRL':>14}{'difference':>12}{'later steps':>13}")
    for name, ours, theirs, differences in table:
        later = max(differences[1:])
        print(f"{name:30}{ours[0]:>16.7f}{theirs[0]:>14.7f}{differences[0]:>12.1e}{later:>13.1e}")
    print("TRL's ipo is another formula: the mean over an answer's tokens in the place of the sum.")
    wrong = [name for name, _, _, differences in table if not differences[0] <= TOLERANCE]
    if wrong:
        raise SystemExit(f"not equal at step 0: {', '.join(wrong)}")


def speed(folder: Path, options: argparse.Namespace) -> None:
    from lib.data.samples import load_sample

    rows = list(load_sample("instructions")["train"].select(range(BATCH * options.steps)))
    data, model = write_data(folder / "data", rows), cut_smollm2(folder / "model")
    file = write_rows_for_trl(tokenized(data, "sft", str(model), BLOCK), "sft", folder / "rows.parquet")
    settings = settings_of(
        "sft", options.precision, dataset=data, model=model, max_length=BLOCK, batch_size=BATCH,
        max_steps=options.steps, learning_rate=1e-5, log_every=WARMUP, run_dir=folder / "run",
    )  # fmt: skip
    job = Job(
        trainer="sft", model=str(model), rows=file, result=str(folder / "result.json"),
        ds_config=filled_in("sft", settings, 2), steps=options.steps, micro_batch=BATCH // 2, learning_rate=1e-5,
    )  # fmt: skip
    packed = dataclasses.replace(job, packing=True, micro_batch=2)
    jobs = {
        "TRL, packing": packed,
        "TRL, packing, labelled only": dataclasses.replace(packed, labelled_only=True),
        "TRL, padded": job,
        "TRL, padded, labelled only": dataclasses.replace(job, labelled_only=True),
    }
    rates: dict[str, list[float]] = {name: [] for name in ("recipe", *jobs)}
    peaks: dict[str, list[int]] = {name: [] for name in rates}
    padding: dict[str, float] = {"recipe": 0.0}
    for series in range(options.series):
        entries, peak = run_recipe("sft", settings, 2)
        timed = entries[WARMUP:]
        rates["recipe"].append(sum(entry["tokens"] for entry in timed) / sum(entry["step_seconds"] for entry in timed))
        peaks["recipe"].append(peak)
        for name, one in jobs.items():
            result, peak = run_trl(one, 2)
            rates[name].append(result["tokens_per_second"])
            peaks[name].append(peak)
            padding[name] = result["padding"]
        print(
            f"series {series + 1}: " + ", ".join(f"{name} {values[-1]:,.0f}" for name, values in rates.items()),
            flush=True,
        )
    print(f"\n{options.precision:28}{'tokens/s':>10}{'recipe is':>12}{'padding':>9}{'peak of a rank':>16}")
    for name, values in rates.items():
        ratio = statistics.median(ours / other for ours, other in zip(rates["recipe"], values, strict=True))
        print(
            f"{name:28}{statistics.median(values):>10,.0f}{ratio:>11.2f}x{padding[name]:>9.0%}"
            f"{max(peaks[name]) / 1e6:>13,.0f} MB"
        )


def memory(folder: Path, options: argparse.Namespace) -> None:
    model = narrow_model(folder / "model")
    data = write_data(folder / "data", [long_conversation(model, number) for number in range(LONG_ROWS)])
    rows = tokenized(data, "sft", str(model), LONG_ROW + 1)
    assert set(rows["length"]) == {LONG_ROW}
    assert set(rows["labelled"]) == {LONG_ROW // 2}
    file = write_rows_for_trl(rows, "sft", folder / "rows.parquet")
    settings = settings_of(
        "sft", options.precision, dataset=data, model=model, max_length=LONG_ROW + 1, batch_size=LONG_ROWS,
        max_steps=1, learning_rate=1e-5, run_dir=folder / "run",
    )  # fmt: skip
    job = Job(
        trainer="sft", model=str(model), rows=file, result=str(folder / "result.json"),
        ds_config=filled_in("sft", settings, 1), steps=1, micro_batch=LONG_ROWS, learning_rate=1e-5,
    )  # fmt: skip
    jobs = {
        "TRL, packing": dataclasses.replace(job, packing=True),
        "TRL, padded": job,
        "TRL, padded, labelled only": dataclasses.replace(job, labelled_only=True),
    }
    entries, peak = run_recipe("sft", settings, 1)
    found = {"recipe": (entries[0]["loss"], peak)}
    entries, peak = run_recipe("sft", settings | {"packing": "false"}, 1)
    found["recipe, packing false"] = (entries[0]["loss"], peak)
    for name, one in jobs.items():
        result, peak = run_trl(one, 1)
        found[name] = (result["losses"][0], peak)
    print(f"\n{options.precision:28}{'loss':>10}{'peak of the rank':>18}")
    for name, (loss, peak) in found.items():
        print(f"{name:28}{loss:>10.4f}{peak / 1e6:>15,.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["equal", "speed", "memory"], nargs="?")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="of speed and memory")
    parser.add_argument("--steps", type=int, default=18, help=f"of each run of speed; the first {WARMUP} do not count")
    parser.add_argument("--series", type=int, default=3, help="how often speed runs each")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        trl_rank(Job(**json.loads(options.job.read_text())))
        return
    if options.what is None:
        parser.error("say what: equal, speed or memory")
    if importlib.util.find_spec("trl") is None:
        parser.error("TRL is not installed: pip install trl==1.16.0")
    from lib.distributed import ranks

    ranks.init(timeout_minutes=60)  # of this process, which prepares the rows with the recipe's functions
    with tempfile.TemporaryDirectory() as folder:
        {"equal": equal, "speed": speed, "memory": memory}[options.what](Path(folder), options)


if __name__ == "__main__":
    main()
