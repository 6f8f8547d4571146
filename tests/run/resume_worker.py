"""Resumes every checkpoint under every config in one launch, for tests/run/test_checkpoints.py. Arguments: what,
folder, precision, configs.

A small model with tied weights, odd sizes (nothing divides evenly) and a buffer is trained on made-up batches that
depend on the step alone. `write` trains STEPS steps under each config and saves after half of them; `read` goes on from
each checkpoint in the folder under each config, also those that another number of ranks wrote; `poison` gives one rank
an infinite loss with finite gradients at one step; `resume` goes on with the run in the folder, with name=value
changes. What they found is left in <what>-<world size>.json.
"""

import functools
import importlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from contract_cases import AS_LARGE
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from lib.distributed import ranks
from lib.distributed.loading import load_model
from lib.distributed.optimizer import make_adamw, make_schedule
from lib.errors import ROOT, UserError
from lib.run import checkpoint_files
from lib.run.run import Run
from lib.settings import config as settings
from lib.settings.ds_config import load_ds_config

causal_lm: Any = importlib.import_module("recipes.causal_lm")
STEPS, BATCH = 8, 4


class Model(LlamaForCausalLM):  # type: ignore[misc]  # transformers is not followed by mypy
    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.register_buffer("seen", torch.zeros(()))  # a buffer that training changes, and a checkpoint must hold

    def forward(self, **inputs: Any) -> Any:
        self.seen += 1
        return super().forward(**inputs)


def build(hidden_size: int) -> Model:
    sizes = {
        "vocab_size": 67,
        "hidden_size": hidden_size,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return Model(LlamaConfig(**sizes, tie_word_embeddings=True, max_position_embeddings=16))


def train(
    config: str, folder: Path, precision: str, resume: bool, poisoned_step: int = 0, not_finite: str = "stop",
    hidden_size: int = 24,
    rows: int = 100, max_steps: int = STEPS,
) -> list[float]:  # fmt: skip
    """The losses of the steps after the checkpoint in the folder, or of all."""
    own = {
        "vocab_size": "257",
        "learning_rate": "1e-2",
        "gradient_clipping": "0.5",
        "warmup_steps": "2",
        "batch_size": str(BATCH),
        "max_steps": str(max_steps),
    }
    saving = {
        "save_every": str(STEPS // 2),
        "save_minutes": "null",
        "keep_checkpoints": "9",
        "rank_timeout": "2",
        "log_every": "1",
    }
    given = {
        "run_dir": str(folder),
        "resume": str(resume),
        "precision": precision,
        "not_finite": not_finite,
        **own,
        **saving,
    }
    cfg: Any = settings.load(causal_lm.Config, ROOT / "recipes" / "causal_lm.yaml", given)
    name, _, variant = config.partition("+")
    section = json.loads((ROOT / "ds_configs" / "causal_lm" / f"{name}.json").read_text()) | {
        "train_micro_batch_size_per_gpu": 1
    }
    if variant == "fp32_grads":  # with stage 1 and bf16, another class of DeepSpeed
        section["data_types"] = {"grad_accum_dtype": "fp32"}
    elif variant:
        section["zero_optimization"][variant] = True
    # So that a small model is partitioned as a large one is; zero3_offload keeps small parameters whole.
    if config == "zero3":
        section["zero_optimization"] |= AS_LARGE
    path = folder.with_suffix(".json")
    ranks.on_rank0(lambda: path.write_text(json.dumps(section)))
    ds_config = load_ds_config(path, cfg, ranks.world_size())
    run = Run(cfg, ds_config, causal_lm.__file__)
    made_up = Dataset.from_dict({"number": range(rows)})
    run.plan(made_up)
    model = load_model(lambda: build(hidden_size), ds_config, cfg.seed)
    optimizer = make_adamw(cfg, model, ds_config)
    schedule = make_schedule(cfg, optimizer, run.total_steps)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=ds_config)
    run.attach(engine, {})
    losses = []
    for step, micro_batches in run.steps(made_up, lambda rows: {"number": torch.tensor(rows["number"])}):
        # Few rows: it learns them, so that any lost state shows.
        ids = torch.randint(0, 67, (BATCH, 16), generator=torch.Generator().manual_seed(step % 2))
        total = torch.zeros(())
        for row in ids[ranks.rank() :: ranks.world_size()]:
            logits = engine(input_ids=row[None, :-1]).logits.float()
            loss = F.cross_entropy(logits.flatten(0, 1), row[1:], reduction="sum") / (BATCH * 15)
            if step == poisoned_step and ranks.rank() == ranks.world_size() - 1:
                loss = loss + math.inf  # its gradients are as before
            engine.backward(run.undivided(loss))
            engine.step()
            total += loss.detach()
        micro_batches[:] = [{"input_ids": ids}]  # what is kept as evidence at a step that is not finite
        run.log_step(step, total, tokens=torch.tensor(BATCH * 15))
        losses.append(run.metrics.loss_of(step))
    if poisoned_step:
        assert run.metrics.skipped_steps == 1
    done = run.resumed_at
    forwards_before = done * BATCH // run.checkpoint[1]["world_size"] if run.checkpoint else 0
    # The buffer was restored too.
    assert float(engine.module.seen) == forwards_before + (run.total_steps - done) * BATCH // ranks.world_size()
    run.close()
    engine.destroy()
    return losses


def copy_half(source: Path, target: Path) -> None:
    """The run folder as it was after half of the steps."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(checkpoint_files.folder_of(STEPS), ".lock"))


def poison(config: str, folder: Path, precision: str) -> dict[str, Any]:
    """What happens at a step whose loss is infinite: the error, the checkpoint of the weights before it, and the losses
    when it is skipped.
    """
    try:
        train(config, folder, precision, resume=False, poisoned_step=3)
        error = "there was none"
    except UserError as found:
        error = str(found)
    evidence = sorted(path.name for path in (folder / "not_finite-step-00000003").iterdir())
    skipping = train(
        config, folder.with_name(f"{folder.name}-skip"), precision, resume=False, poisoned_step=3, not_finite="skip"
    )
    return {"error": error, "evidence": evidence, "skipping": skipping}


def main(what: str, where: str, precision: str, *configs: str) -> None:
    folder = Path(where)
    ranks.init(timeout_minutes=2)
    world_size = ranks.world_size()
    result: dict[str, Any] = {}
    if what == "write":
        for config in configs:
            result[config] = train(config, folder / f"{config}-{world_size}", precision, resume=False)
    elif what == "poison":
        for config in configs:
            result[config] = poison(config, folder / f"{config}-{world_size}", precision)
    elif what == "resume":
        config, changes = configs
        given: Any = {name: int(value) for name, value in (change.split("=") for change in changes.split(","))}
        train(config, folder, precision, resume=True, **given)
    else:
        for config in configs:
            for source in ranks.on_rank0(lambda: sorted(path for path in folder.glob("zero*-[0-9]"))):
                target = folder / "resumed" / f"{source.name}-to-{config}-{world_size}"
                ranks.on_rank0(functools.partial(copy_half, source, target))
                result[f"{source.name} {config}"] = train(config, target, precision, resume=True)
    if ranks.rank() == 0:
        (folder / f"{what}-{world_size}.json").write_text(json.dumps(result))
