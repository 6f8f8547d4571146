"""The settings of every run, and which of them another start of the same run may change."""

import dataclasses
from typing import Literal

from pydantic import PositiveInt

from lib.settings.config import Minutes


@dataclasses.dataclass(kw_only=True)
class RunSettings:
    """How a run is kept: the same in every recipe, and no part of what it trains. A recipe's Config adds the rest."""

    is_pipeline = False  # no setting: whether the recipe trains a pipeline, so that its JSONs have the section

    run_dir: str | None = None  # where the run is written; null: runs/<recipe>-<config>-<time>
    resume: bool = False  # whether to go on with the run in run_dir, from its newest checkpoint
    overwrite: bool = False  # whether a run that is there already is deleted, once this one begins to train
    monitor: Literal["tensorboard", "wandb"] | None = None  # DeepSpeed's monitor; metrics.jsonl is always written
    eval_every: PositiveInt | None = None  # steps between scores on the validation rows; null: none
    log_every: PositiveInt = 10  # steps between writes to metrics.jsonl, which has every step
    save_every: PositiveInt | None = None  # steps between checkpoints; null: none by steps
    save_minutes: Minutes | None = 10.0  # minutes between checkpoints; null: none by time
    keep_checkpoints: PositiveInt = 2  # how many of the newest are kept
    keep_best: bool = False  # whether the best one by validation score is kept, and in the end exported and tested
    time_limit: Minutes | None = None  # minutes from the start after which the run saves and stops; null: none
    rank_timeout: Minutes = 10.0  # minutes that a rank waits for another before the run ends
    not_finite: Literal["stop", "skip"] = "stop"  # what to do at a step whose loss or gradient is not finite


# Settings that another start of the same run may change, as none of them changes what a step does. Of a dataset the
# rows themselves are compared.
MAY_CHANGE = {field.name for field in dataclasses.fields(RunSettings)}
MAY_CHANGE |= {"dataset", "max_steps", "epochs", "trust_remote_code", "packing", "scored_rows"}

# Settings that older checkpoints lack, and what they were trained with.
NEWER = {"adam_betas": [0.9, 0.999], "adam_eps": 1e-8}
NEWER |= {"streaming": False, "held_out": 200}
NEWER |= {"num_experts": None, "experts_per_token": 2, "balance_loss": 0.01}  # which dense models do not have
