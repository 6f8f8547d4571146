"""Generates by a made-up encoder-decoder at every stage, greedily and by beam search, for tests/test_generation.py. Arguments: file, config ..."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import deepspeed
from datasets import Dataset
from transformers import BartConfig, BartForConditionalGeneration

from lib import config, ranks
from lib.model import load_model, make_adamw, train_tokenizer
from lib.sequence_to_sequence import SPECIAL_TOKENS, collator, generate_texts

ROWS = {"many": 13, "one": 1}  # odd, and fewer than ranks, so that fillers are needed
MAX_LENGTH = 12


def main(file: Path, configs: list[str]) -> None:
    ranks.init(timeout_minutes=3)
    tokenizer = train_tokenizer(["a few words, and more of them"] * 9, 280, SPECIAL_TOKENS, "$A </s>")
    random = torch.Generator().manual_seed(0)
    data: dict[str, Dataset] = {}
    for name, count in ROWS.items():
        lengths = torch.randint(1, 30, (count,), generator=random).tolist()
        sources = [torch.randint(3, len(tokenizer), (length,), generator=random).tolist() for length in lengths]
        data[name] = Dataset.from_dict({"input_ids": sources, "labels": [[5]] * count, "length": lengths})
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    bart = BartConfig(
        vocab_size=len(tokenizer), d_model=32, max_position_embeddings=64, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=64, decoder_layers=1,
        decoder_attention_heads=2, decoder_ffn_dim=64, dropout=0.0, init_std=0.4, **special, decoder_start_token_id=special["bos_token_id"],
        forced_eos_token_id=None,
    )  # fmt: skip

    found: dict[str, Any] = {}
    for name in configs:
        ds_config = json.loads((ROOT / "ds_configs" / "translation" / f"{name}.json").read_text())
        ds_config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
        if name.startswith("zero3"):
            knobs = ["stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size"]
            ds_config["zero_optimization"] |= dict.fromkeys(knobs, 0)
        model = load_model(lambda: BartForConditionalGeneration(bart), ds_config, seed=0)
        engine, *_ = deepspeed.initialize(model=model, optimizer=make_adamw(model, ds_config, 1e-3, 0.0), config=ds_config)
        for beams in (1, 3):
            texts = [generate_texts(engine, rows, collator(engine.module, tokenizer, tokenizer), 2, tokenizer, MAX_LENGTH, beams) for rows in data.values()]
            found[f"{name} {beams}"] = [*texts[0], *texts[1]]
        engine.destroy()
    if ranks.rank() == 0:
        file.write_text(json.dumps(found))


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    main(Path(arguments[0]), arguments[1:])
    config.leave(0)
