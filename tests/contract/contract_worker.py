"""Runs the main() of recipes under many configs in one launch, for tests/contract/test_recipes.py. Arguments: folder,
case ...

A case is RECIPE:NAME:JSON:setting=value,... or, to go on from the checkpoint that another case wrote after half of its
steps, RECIPE:NAME:JSON:setting=value,...:RUN. It leaves its run in folder/RECIPE/NAME-WORLD_SIZE, the scores that
main() returned in scores.json, and in probe.pt the last training inputs of the engine and what it answers to them after
training. A recipe that starts from MiniLM or SmolLM2 starts from a smaller model here, and trains on some rows of its
sample, the case `learn` on a few.
"""

import dataclasses
import functools
import importlib
import itertools
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import plain_torch
import pytest
import torch
from contract_cases import STEPS
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel, set_seed

from lib.data.samples import SAMPLES, load_sample
from lib.data.splits import SPLITS
from lib.distributed import ranks
from lib.errors import ROOT
from lib.models import chat, output_layer, scratch
from lib.models.hub import model_folder
from lib.run.checkpoint_files import folder_of
from lib.settings import config
from lib.settings.ds_config import load_ds_config


def tensors_of(output: Any) -> list[torch.Tensor]:
    """What a model answered: logits, hidden states."""
    if isinstance(output, torch.Tensor):
        return [output]
    parts = output if isinstance(output, tuple) else output.to_tuple()
    return [part for part in parts if isinstance(part, torch.Tensor)]


def small_encoder(folder: Path) -> Path:
    """An encoder of one narrow layer with MiniLM's tokenizer: its 30,522 embeddings are what the cases would spend
    their time on.
    """
    if not (folder / "tokenizer.json").exists():
        set_seed(0)
        config = BertConfig(
            hidden_size=48, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, initializer_range=0.1
        )
        BertModel(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(model_folder("minilm")).save_pretrained(folder)
    return folder


def small_decoder(folder: Path, chats: bool) -> Path:
    """A decoder of two narrow layers and 600 tokens, for the 49,152 of SmolLM2 are what the cases would spend their
    time on.

    One that does not chat has neither a chat template nor a token for padding. Every rank must call it.
    """
    if (folder / "tokenizer.json").exists():
        return folder
    conversations = load_sample("instructions")["test"]["messages"]
    texts = [message["content"] for messages in conversations for message in messages]
    tokenizer = scratch.train_tokenizer(texts, 600, scratch.END_OF_TEXT)
    if chats:
        tokenizer.add_special_tokens({"additional_special_tokens": chat.CHATML_TOKENS})
        tokenizer.eos_token = tokenizer.pad_token = chat.CHATML_TOKENS[1]
        tokenizer.chat_template, tokenizer.split_special_tokens = chat.TEMPLATES["chatml"], False

    def write() -> None:
        set_seed(0)
        sizes: Any = {"intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
        ends: Any = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        config = scratch.new_config("llama", AutoModelForCausalLM, 4, 32, bos_token_id=None, **sizes, **ends)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    ranks.on_rank0(write)
    return folder


def small_data(folder: Path, sample: str, max_rows: int, learn: bool) -> Path:
    """Rows of a built-in sample as files: those that --quick trains on, and few others, for a case is not to spend its
    time on scoring them.

    learn: 8 short rows, the same in all splits: the test scores show whether they were learned by heart. Addresses are
    cut.
    """

    def cut(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "text": row["text"][:300]} if sample == "sotu" else row

    def is_short(row: dict[str, Any]) -> bool:
        return max(len(str(value)) for value in row.values()) <= (300 if "messages" not in row else 500)

    if not folder.exists():
        folder.mkdir(parents=True)
        mixed = {split: rows.shuffle(seed=0) for split, rows in load_sample(sample).items()}
        if learn:
            rows = list(itertools.islice(filter(is_short, map(cut, mixed["train"])), 8))
            splits = dict.fromkeys(SPLITS, rows)
        else:  # odd numbers of rows, so that fillers are needed
            few = {
                split: [cut(row) for row in mixed[split].select(range(count))]
                for split, count in {"validation": 3, "test": 13}.items()
            }
            splits = {"train": list(mixed["train"].select(range(max_rows))), **few}
        for split, part in splits.items():
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def main(where: str, *cases: str) -> None:
    output_layer.LOGITS_AT_ONCE = 32 * 600  # so that the loss of a micro-batch is computed in pieces
    ranks.init(timeout_minutes=10)
    for case in cases:
        run_case(Path(where), case)


def run_case(folder: Path, case: str) -> None:
    recipe_name, name, json_path, settings, *source = case.split(":")
    recipe: Any = importlib.import_module(f"recipes.{recipe_name}")
    run_dir = folder / recipe_name / f"{name}-{os.environ['WORLD_SIZE']}"
    if source and ranks.rank() == 0:
        shutil.copytree(
            folder / recipe_name / source[0],
            run_dir,
            ignore=shutil.ignore_patterns(folder_of(STEPS), "result.json", "model", ".lock"),
        )
    given = {"run_dir": str(run_dir), "log_every": "7", "max_steps": str(STEPS)} | dict(
        setting.split("=") for setting in settings.split(",")
    )
    cfg = config.load(recipe.Config, ROOT / "recipes" / f"{recipe_name}.yaml", given, quick=True)
    if getattr(cfg, "vocab_size", None) is not None:
        cfg.vocab_size += 1  # an odd number, so that ranks that share the vocabulary have unequal parts
    for setting in ("model", "decoder"):
        if getattr(cfg, setting, None) == "minilm":
            setattr(cfg, setting, str(ranks.on_rank0(lambda: small_encoder(folder / "inputs" / "encoder"))))
    if getattr(cfg, "model", None) in ("smollm2-tiny", "base"):
        cfg.model = str(small_decoder(folder / "inputs" / cfg.model, chats=cfg.model != "base"))
    whole = recipe_name == "word_embeddings" or name.startswith("long")  # whose scores, or rows, need many words
    if cfg.dataset in SAMPLES and not whole:
        learn = name == "learn"
        folder_of_rows = folder / "inputs" / f"{cfg.dataset}{'-learn' if learn else ''}"
        cfg.dataset, cfg.max_rows = (
            str(ranks.on_rank0(functools.partial(small_data, folder_of_rows, cfg.dataset, cfg.max_rows, learn))),
            None,
        )
    ds_config = load_ds_config(Path(json_path), cfg, int(os.environ["WORLD_SIZE"]))
    real_initialize = plain_torch.initialize if name.startswith("plain") else deepspeed.initialize
    inputs: dict[str, Any] = {}

    def initialize_and_watch(real: Any = real_initialize, inputs: dict[str, Any] = inputs, **options: Any) -> Any:
        everything = real(**options)

        def note_inputs(module: Any, _: Any, named: dict[str, Any]) -> None:
            if module.training:
                inputs.update(named)

        everything[0].module.register_forward_pre_hook(note_inputs, with_kwargs=True)
        return everything

    def export_and_probe(
        engine: Any,
        *rest: Any,
        real_export: Any = recipe.export,
        run_dir: Path = run_dir,
        inputs: dict[str, Any] = inputs,
    ) -> None:
        real_export(engine, *rest)
        engine.eval()
        probe = {name: value for name, value in inputs.items() if name != "packed_lengths"}  # of whole rows
        with torch.no_grad():
            answered = tensors_of(engine(**probe))
        if ranks.rank() == 0:
            torch.save((probe, answered), run_dir / "probe.pt")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "deepspeed", SimpleNamespace(initialize=initialize_and_watch))
        patch.setattr(recipe, "export", export_and_probe)
        scores = recipe.main(cfg, ds_config)
    if ranks.rank() == 0:
        (run_dir / "scores.json").write_text(json.dumps({"scores": scores, "settings": dataclasses.asdict(cfg)}))
