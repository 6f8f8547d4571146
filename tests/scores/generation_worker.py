"""Generates texts by made-up encoder-decoders of each kind under each config, greedily and by beam search.

Used by tests/scores/test_generation.py. Arguments: the JSON file to write, config ...
"""

import functools
import importlib
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
from contract_cases import AS_LARGE
from contract_worker import small_encoder
from datasets import Dataset
from transformers import BertConfig, BertModel, set_seed

from lib.distributed import ranks
from lib.distributed.loading import load_model
from lib.distributed.optimizer import make_adamw
from lib.errors import ROOT
from lib.models.encoder_decoder import SPECIAL_TOKENS, build_model, decoder_start
from lib.models.scratch import train_tokenizer
from lib.scores.generation import generate_texts

translation: Any = importlib.import_module("recipes.translation")
ROWS = {"many": 13, "one": 1}  # an odd number of rows, and fewer rows than ranks, so that batches need fillers
MAX_LENGTH = 12
SEARCHES = [(1, 1, 0), (3, 1, 0), (3, 4, 0), (3, 4, 2)]  # (beams, length penalty, length of n-grams that never repeat)


def small_decoder(folder: Path, tokens: int) -> Path:
    """Save a small encoder from which a decoder can be made. Returns its folder."""
    set_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=tokens, **sizes, initializer_range=0.2)).save_pretrained(folder)
    return folder


def main(where: str, *configs: str) -> None:
    file = Path(where)
    ranks.init(timeout_minutes=3)
    tokenizer = train_tokenizer(["a few words, and more of them"] * 9, 280, SPECIAL_TOKENS, "$A </s>")
    random = torch.Generator().manual_seed(0)
    data: dict[str, Dataset] = {}
    for name, count in ROWS.items():
        lengths = torch.randint(1, 30, (count,), generator=random).tolist()
        sources = [torch.randint(3, len(tokenizer), (length,), generator=random).tolist() for length in lengths]
        data[name] = Dataset.from_dict({"input_ids": sources, "labels": [[5]] * count, "length": lengths})
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_layers": 1,
        "num_heads": 2,
        "max_source_length": 64,
        "max_target_length": MAX_LENGTH,
    }
    encoder = str(ranks.on_rank0(lambda: small_encoder(file.with_suffix(""))))
    decoder = str(ranks.on_rank0(lambda: small_decoder(file.with_suffix(".decoder"), len(tokenizer))))
    # (the recipes' --model and --decoder, a factor for the end-of-text embedding by which some texts end early)
    models = {"scratch": (None, None, 3.0), "encoder": (encoder, None, 3.0), "warm": (encoder, decoder, 4.0)}

    def build(source: str | None, decoder: str | None, end_factor: float) -> Any:
        """The recipes' model, changed so that texts differ and end early or late. Unchanged, it repeats a token."""
        model = build_model(SimpleNamespace(model=source, decoder=decoder, trust_remote_code=False, **sizes), tokenizer)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() == 1 and name.endswith("weight"):  # the weight of a norm
                    weight.normal_(0, 2)
            model.get_output_embeddings().weight[tokenizer.eos_token_id] *= end_factor
        model.generation_config.min_length = MAX_LENGTH  # some models from the hub have a min_length, to be ignored
        return model

    cfg = SimpleNamespace(learning_rate=1e-3, weight_decay=0.0, adam_betas=[0.9, 0.999], adam_eps=1e-8)
    found: dict[str, Any] = {}
    for kind, name in itertools.product(models, configs):
        ds_config = json.loads((ROOT / "ds_configs" / "translation" / f"{name}.json").read_text())
        ds_config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
        if name.startswith("zero3"):
            ds_config["zero_optimization"] |= AS_LARGE
        model = load_model(functools.partial(build, *models[kind]), ds_config, seed=0)
        engine, *_ = deepspeed.initialize(model=model, optimizer=make_adamw(cfg, model, ds_config), config=ds_config)
        for search in SEARCHES:
            texts = [
                generate_texts(
                    engine,
                    rows,
                    functools.partial(
                        translation.collate,
                        tokenizers=(tokenizer, tokenizer),
                        decoder_start=decoder_start(engine.module),
                    ),
                    2,
                    tokenizer=tokenizer,
                    max_length=MAX_LENGTH,
                    **dict(zip(("beams", "length_penalty", "no_repeat_ngram"), search, strict=True)),
                )
                for rows in data.values()
            ]
            found[" ".join(map(str, (kind, name, *search)))] = [*texts[0], *texts[1]]
        engine.destroy()
    if ranks.rank() == 0:
        file.write_text(json.dumps(found))
