"""The DeepSpeed JSON: read strictly, checked against the settings, filled in, and checked once more by DeepSpeed itself.

DeepSpeed 0.19.8 ignores unknown top-level keys, so that a typo trains without ZeRO; takes "auto" for fp32; and lets a client
optimizer replace the JSON's in silence. Here each of these is an error of one line. A JSON written for the HF Trainer runs
as it is when it does not contradict the settings: "auto" is filled in from them.
"""

import json
import logging
from pathlib import Path
from typing import Any

import hjson
from pydantic import BaseModel, ValidationError

from lib.config import UserError, did_you_mean, shown

# Keys that may only change memory and speed (or the log), and are DeepSpeed's to check.
MEMORY_AND_SPEED = {
    "zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "prescale_gradients", "gradient_predivide_factor", "disable_allgather", "data_types", "activation_checkpointing",
    "aio", "compile", "disable_python_gc", "steps_per_print", "wall_clock_breakdown", "memory_breakdown",
    "dump_state", "comms_logger", "flops_profiler", "tensorboard", "wandb", "csv_monitor", "comet", "log_level", "timers",
}  # fmt: skip
# Keys that the settings decide too: they must agree.
SHARED_WITH_SETTINGS = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "bf16", "fp16", "optimizer", "scheduler",
}  # fmt: skip
# Keys that DeepSpeed knows and that would change what is trained behind the settings' back.
REFUSED = {
    "bfloat16": "it is an old name; write 'bf16'",
    "torch_autocast": "it is a second place for the precision; set 'precision' in the YAML",
    "tensor_parallel": "this recipe gives every rank other rows, which tensor parallelism must not do",
    "autotp": "this recipe gives every rank other rows, which tensor parallelism must not do",
    "pipeline": "this recipe is data parallel only",
    "sequence_parallel_size": "this recipe is data parallel only",
    "expert_parallel": "this recipe is data parallel only",
    "data_efficiency": "it would change the data; the recipe decides what a batch holds",
    "gradient_allreduce_op": "the recipe's loss counts on the mean over ranks, which is the default",
    "managed_gradient_accumulation": "the recipe's loop counts on DeepSpeed to manage accumulation, which is the default",
    "weight_quantization": "it would change the weights",
    "hybrid_engine": "it is for reinforcement learning",
    "communication_data_type": "it would round the gradients between ranks, so that the losses depend on their number",
    "checkpoint": "the recipe does not load DeepSpeed checkpoints",
    "autotuning": "run DeepSpeed's autotuner on its own",
}
# Sections whose unknown keys DeepSpeed ignores, and the keys that it reads in them.
LOOSE_SECTIONS = {
    "optimizer": {"type", "params", "legacy_fusion"},
    "scheduler": {"type", "params"},
    "data_types": {"grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"},
    "aio": {"block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"},
    "flops_profiler": {"enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules", "detailed", "output_file"},
    "activation_checkpointing": {
        "partition_activations", "number_checkpoints", "contiguous_memory_optimization", "synchronize_checkpoint_boundary",
        "profile", "cpu_checkpointing",
    },
}  # fmt: skip
SECTIONS = {"zero_optimization", "bf16", "fp16", "tensorboard", "wandb", "csv_monitor", "comet", "comms_logger", "compile", "timers", *LOOSE_SECTIONS}
# The HF Trainer derives these from the hidden size when they are "auto". They only change speed; here DeepSpeed's default stands.
AUTO_BY_DEFAULT = {
    "reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold",
    "stage3_max_live_parameters", "stage3_max_reuse_distance", "sub_group_size", "overlap_comm", "contiguous_gradients",
}  # fmt: skip
# DeepSpeed's schedulers, as the HF Trainer's JSONs name them, and the `lr_schedule` that they stand for.
SCHEDULERS = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a DeepSpeed JSON (comments and trailing commas allowed, as DeepSpeed does; a key given twice is not)."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(f"{shown(path)}: key '{key}' stands twice; remove one")
        return dict(pairs)

    try:
        config = hjson.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except FileNotFoundError:
        there = sorted(file.name for file in path.parent.glob("*.json"))
        raise UserError(f"{shown(path)}: no such file; in {shown(path.parent)} there are: {', '.join(there) or 'no .json files'}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{shown(path)}: cannot be read: {error}") from None
    except hjson.HjsonDecodeError as error:
        raise UserError(f"{shown(path)}:{error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(config, dict):
        raise UserError(f"{shown(path)}: expected a JSON object, found {type(config).__name__}")
    return config


def load_ds_config(path: Path, cfg: Any, world_size: int) -> dict[str, Any]:
    """The DeepSpeed config to pass to `deepspeed.initialize`: complete, without "auto", agreeing with the settings `cfg`.

    `cfg` has batch_size, gradient_clipping, precision, learning_rate, weight_decay, adam_betas, adam_eps, warmup_steps, lr_schedule and monitor.
    """
    config = read_json(path)
    name = shown(path)
    _check_keys(config, name)
    _check_zero(config, name)
    _check_precision(config, name, cfg.precision)
    _check_batch(config, name, cfg.batch_size, world_size)
    _agree(config, "gradient_clipping", cfg.gradient_clipping, name, "gradient_clipping", cfg.gradient_clipping)
    _check_optimizer(config, name, cfg)
    _check_scheduler(config, name, cfg)
    _add_monitor(config, name, cfg)
    left = _first_auto(config)
    if left:
        raise UserError(f'{name}: {left} is "auto", and no setting of the recipe can fill it; write a value')
    config.setdefault("steps_per_print", 2**31 - 1)  # the run prints its own progress
    _ask_deepspeed(config, name)
    return config


def stage_of(ds_config: dict[str, Any]) -> int:
    """The ZeRO stage of a config; 0 where there is no ZeRO section, as DeepSpeed has it."""
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))


def offload_device(ds_config: dict[str, Any], what: str) -> str:
    """Where `what` ("optimizer" or "param") is offloaded to: "none", "cpu" or "nvme"."""
    section = ds_config.get("zero_optimization", {}).get(f"offload_{what}") or {}
    return str(section.get("device", "none"))


def _agree(config: dict[str, Any], key: str, value: Any, name: str, setting: str, shown_value: Any) -> None:
    """Fill config[key] with the value that the settings give it, or refuse another one."""
    if config.get(key, "auto") == "auto":
        config[key] = value
    elif config[key] != value or isinstance(config[key], bool) != isinstance(value, bool):
        raise UserError(f'{name}: {key} is {config[key]}, but the settings have {setting} {shown_value}; make them equal, or write "auto" in the JSON')


def _check_keys(config: dict[str, Any], name: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfigError, _reject_removed_config_keys

    try:
        _reject_removed_config_keys(config)
    except DeepSpeedConfigError as error:
        raise UserError(f"{name}: {error}") from None
    known = MEMORY_AND_SPEED | SHARED_WITH_SETTINGS
    for key, section in config.items():
        if key in REFUSED:
            raise UserError(f"{name}: '{key}' cannot be used here: {REFUSED[key]}")
        if key not in known:
            raise UserError(f"{name}: unknown key '{key}'{did_you_mean(key, known)}")
        if key in SECTIONS and not isinstance(section, dict):
            raise UserError(f"{name}: '{key}' must be an object, not {section!r}")
        if key in ("optimizer", "scheduler") and not (isinstance(section.get("type"), str) and isinstance(section.get("params", {}), dict)):
            raise UserError(f'{name}: \'{key}\' needs a "type" (text) and may have "params" (an object)')
        if key in LOOSE_SECTIONS:
            for inner in section:
                if inner not in LOOSE_SECTIONS[key]:
                    raise UserError(f"{name}: unknown key '{key}.{inner}'{did_you_mean(inner, LOOSE_SECTIONS[key])}")
    for key, value in config.get("activation_checkpointing", {}).items():
        if value not in (False, None):
            raise UserError(
                f"{name}: activation_checkpointing.{key} works with DeepSpeed's own checkpoint function only, which transformers' "
                "models do not use; leave it out (the section itself turns on transformers' activation checkpointing)"
            )


def _check_model(model: type[BaseModel], section: Any, name: str, key: str) -> None:
    """Check a strict section by DeepSpeed's own pydantic model."""
    if not isinstance(section, dict):
        raise UserError(f"{name}: '{key}' must be an object, not {section!r}")
    try:
        model(**section)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join([key, *(str(part) for part in problem["loc"])])
        if problem["type"] == "extra_forbidden":
            inner = model
            for part in problem["loc"][:-1]:  # the section in a section, such as offload_param
                for choice in getattr(inner.model_fields[str(part)].annotation, "__args__", ()):
                    inner = choice if isinstance(choice, type) and issubclass(choice, BaseModel) else inner
            raise UserError(f"{name}: unknown key '{where}'{did_you_mean(str(problem['loc'][-1]), inner.model_fields)}") from None
        raise UserError(f"{name}: {where}: {problem['msg']}, found {problem.get('input')!r}") from None
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"{name}: {key}: {error}") from None


def _check_zero(config: dict[str, Any], name: str) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    if "zero_optimization" not in config:
        return
    zero = config["zero_optimization"]
    if not isinstance(zero, dict) or "stage" not in zero:
        raise UserError(f"{name}: zero_optimization.stage is missing; write 0, 1, 2 or 3")
    if not isinstance(zero["stage"], int) or isinstance(zero["stage"], bool):
        raise UserError(f"{name}: zero_optimization.stage is {zero['stage']!r}; write 0, 1, 2 or 3")
    for key in AUTO_BY_DEFAULT & set(zero):
        if zero[key] == "auto":
            del zero[key]
    left = _first_auto(zero)
    if left:
        raise UserError(f'{name}: zero_optimization.{left} is "auto", and no setting of the recipe can fill it; write a value')
    _check_model(DeepSpeedZeroConfig, zero, name, "zero_optimization")
    # DeepSpeed accepts these where they do nothing.
    stage = zero["stage"]
    if offload_device(config, "param") != "none" and stage < 3:
        raise UserError(f"{name}: zero_optimization.offload_param has no effect at stage {stage}; it needs stage 3")
    if offload_device(config, "optimizer") != "none" and stage < 1:
        raise UserError(f"{name}: zero_optimization.offload_optimizer has no effect at stage 0; it needs stage 1, 2 or 3")
    if zero.get("zero_quantized_gradients") and stage < 3:
        raise UserError(f"{name}: zero_optimization.zero_quantized_gradients has no effect at stage {stage}; it needs stage 3")
    if (zero.get("offload_optimizer") or {}).get("ratio", 1) != 1 or (zero.get("offload_optimizer") or {}).get("super_offload"):
        raise UserError(f"{name}: offload_optimizer.ratio below 1 and super_offload step in a second optimizer, which checkpoints do not hold; leave them out")
    if zero.get("compute_grad_norm") is False:
        raise UserError(f"{name}: zero_optimization.compute_grad_norm false would let a gradient that is not finite change the weights; leave it out")
    if zero.get("zenflow"):
        raise UserError(f"{name}: zero_optimization.zenflow changes the weights when it starts (DeepSpeed 0.19.8); leave it out")


def _check_precision(config: dict[str, Any], name: str, precision: str) -> None:
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config

    for key, model in (("bf16", DeepSpeedBF16Config), ("fp16", DeepSpeedFP16Config)):
        section = config.get(key, {})
        if not isinstance(section, dict):
            raise UserError(f"{name}: '{key}' must be an object, not {section!r}")
        for inner in [inner for inner, value in section.items() if value == "auto" and inner != "enabled"]:
            del section[inner]  # the HF Trainer has no value of its own for the loss scale: DeepSpeed's default stands
        stated = section.get("enabled", "auto")
        if stated not in ("auto", precision == key):
            stated_as = f"{key}.enabled is {str(stated).lower()}"
            raise UserError(f'{name}: {stated_as}, but precision is {precision}; make them agree, or write "auto" in the JSON')
        for inner in ("bf16_master_weights_and_grads", "bf16_optimizer_states", "fp16_master_weights_and_grads", "auto_cast"):
            if section.get(inner):
                raise UserError(f"{name}: {key}.{inner} would change the optimizer's precision, which is fp32 here; leave it out")
        if section.get("check_grad_overflow") is False:
            raise UserError(f"{name}: {key}.check_grad_overflow false would let a gradient that is not finite change the weights; leave it out")
        if precision == key:
            config[key] = {**section, "enabled": True}
            _check_model(model, config[key], name, key)
        else:
            config.pop(key, None)
    if stage_of(config) == 0 and config.get("data_types", {}).get("grad_accum_dtype", precision) != precision:
        raise UserError(f"{name}: data_types.grad_accum_dtype must be {precision}, as precision is, at stage 0 (DeepSpeed 0.19.8 refuses others)")
    accelerator = get_accelerator()
    supported = {"fp32": True, "bf16": accelerator.is_bf16_supported(), "fp16": accelerator.is_fp16_supported()}
    if accelerator.device_name() == "cpu":
        supported["fp16"] = False  # DeepSpeed's wrapper refuses it there
    if not supported[precision]:
        others = " or ".join(kind for kind, there in supported.items() if there)
        raise UserError(f"precision is {precision}, which this device ({accelerator.device_name()}) cannot train in; use {others}")


def _check_batch(config: dict[str, Any], name: str, batch_size: int, world_size: int) -> None:
    """batch_size = micro-batch x accumulation steps x ranks: the JSON gives the micro-batch, the accumulation is computed."""
    _agree(config, "train_batch_size", batch_size, name, "batch_size", batch_size)
    micro, accumulation = (config.get(key, "auto") for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"))
    for key, value in (("train_micro_batch_size_per_gpu", micro), ("gradient_accumulation_steps", accumulation)):
        if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UserError(f"{name}: {key} is {value!r}; write a whole number from 1 up")
    if micro == "auto" and "train_micro_batch_size_per_gpu" not in config and accumulation == "auto":
        raise UserError(f'{name}: train_micro_batch_size_per_gpu is missing; write the rows that fit one device at a time, or "auto"')
    known = (micro if micro != "auto" else 1) * (accumulation if accumulation != "auto" else 1) * world_size
    if batch_size % known:
        lower = batch_size // known * known
        nearest = f"{lower} and {lower + known}" if lower else f"{known}"
        parts = [f"{micro} rows a micro-batch"] if micro != "auto" else []
        parts += [f"{accumulation} accumulation steps"] if accumulation != "auto" else []
        arithmetic = " x ".join([*parts, f"{world_size} rank{'s' if world_size > 1 else ''}"])
        raise UserError(f"batch_size {batch_size} cannot be cut into {arithmetic} ({name}): {known} does not divide it; nearest: {nearest}")
    if micro == "auto":  # as few accumulation steps as the JSON allows
        micro = batch_size // known
    computed = batch_size // (micro * world_size)
    if accumulation not in ("auto", computed):
        raise UserError(
            f"{name}: gradient_accumulation_steps is {accumulation}, but batch_size {batch_size} / (micro-batch {micro} x {world_size} "
            f'ranks) is {computed}; write "auto" or leave it out'
        )
    config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"] = micro, computed


def _check_optimizer(config: dict[str, Any], name: str, cfg: Any) -> None:
    """The recipe makes the optimizer. A section of the JSON must describe the same one, and is then dropped."""
    section = config.pop("optimizer", None)
    if section is None:
        return
    if section.get("type") != "AdamW":
        raise UserError(
            f"{name}: optimizer.type is {section.get('type')!r}, but the recipe trains with AdamW; change what make_adamw in lib/model.py returns instead"
        )
    params = section.get("params", {})
    ours = {"lr": cfg.learning_rate, "weight_decay": cfg.weight_decay, "betas": list(cfg.adam_betas), "eps": cfg.adam_eps}
    without_effect = {"torch_adam", "adam_w_mode", "fused", "bias_correction"}
    names = {"lr": "learning_rate"}
    for key in params:
        if key in ours:
            _agree(params, key, ours[key], name, names.get(key, f"the recipe's {key}"), ours[key])
        elif key not in without_effect:
            raise UserError(f"{name}: unknown key 'optimizer.params.{key}'{did_you_mean(key, [*ours, *without_effect])}")


def _check_scheduler(config: dict[str, Any], name: str, cfg: Any) -> None:
    """The recipe makes the learning-rate schedule. A section of the JSON must describe the same one, and is then dropped."""
    section = config.pop("scheduler", None)
    if section is None:
        return
    kind = section.get("type")
    if kind not in SCHEDULERS:
        raise UserError(f"{name}: scheduler.type is {kind!r}; known are {', '.join(SCHEDULERS)}")
    if SCHEDULERS[kind] != cfg.lr_schedule:
        raise UserError(
            f"{name}: scheduler.type is {kind}, which is lr_schedule {SCHEDULERS[kind]}, but lr_schedule is {cfg.lr_schedule}; "
            f"set --lr_schedule {SCHEDULERS[kind]} or leave the section out"
        )
    params = section.get("params", {})
    ours = {"warmup_max_lr": cfg.learning_rate, "warmup_min_lr": 0, "warmup_num_steps": cfg.warmup_steps, "warmup_type": "linear"}
    names = {"warmup_max_lr": "learning_rate", "warmup_num_steps": "warmup_steps"}
    if params.get("total_num_steps", "auto") != "auto":
        ours["total_num_steps"] = cfg.max_steps
        names["total_num_steps"] = "max_steps"
    for key in params:
        if key in ours:
            _agree(params, key, ours[key], name, names.get(key, f"the recipe's {key}"), ours[key])
        elif key != "total_num_steps":
            raise UserError(f"{name}: unknown key 'scheduler.params.{key}'{did_you_mean(key, ours)}")


def _add_monitor(config: dict[str, Any], name: str, cfg: Any) -> None:
    """Turn on the monitor of DeepSpeed that the setting `monitor` names. Its output path is the run folder, set by the run."""
    if cfg.monitor is not None:
        config[cfg.monitor] = {**config.get(cfg.monitor, {}), "enabled": True}
    for section, module in (("tensorboard", "tensorboard"), ("wandb", "wandb")):
        if config.get(section, {}).get("enabled"):
            try:
                __import__(module)
            except ImportError:
                raise UserError(f"{section} is asked for, but not installed: pip install {module}") from None


def _first_auto(value: Any, path: str = "") -> str | None:
    """The dotted path of the first "auto" in a nested config."""
    if value == "auto":
        return path
    if isinstance(value, dict):
        for key, inner in value.items():
            found = _first_auto(inner, f"{path}.{key}".lstrip("."))
            if found:
                return found
    return None


def _ask_deepspeed(config: dict[str, Any], name: str) -> None:
    """Let DeepSpeed parse the filled config, so that what only it refuses is refused now and not after the model is built."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.utils import logger

    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        # There are no process groups yet, so DeepSpeed counts one rank here; it checks the batch arithmetic again later.
        alone = {key: value for key, value in config.items() if key not in ("train_batch_size", "gradient_accumulation_steps")}
        DeepSpeedConfig(json.loads(json.dumps(alone)))
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(f"{name}: {'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}") from None
    except Exception as error:
        raise UserError(f"{name}: DeepSpeed refuses it: {error}") from None
    finally:
        logger.setLevel(level)
