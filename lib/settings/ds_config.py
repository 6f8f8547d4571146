"""The DeepSpeed JSON: read strictly, checked against the settings, filled in, and checked again by DeepSpeed itself.

DeepSpeed 0.19.8 ignores unknown top-level keys, so that a typo can train without ZeRO. It reads "auto" as fp32, and
replaces the JSON's optimizer by the client's in silence. Here each of these is an error of one line. A JSON that was
written for the HF Trainer runs unchanged if it does not contradict the settings: they fill in each "auto".
"""

import json
import logging
import math
import typing
from pathlib import Path
from typing import Any

import hjson
from pydantic import BaseModel, ValidationError

from lib.errors import UserError, did_you_mean, display_path
from lib.settings.config import check_value

# Keys that may only change memory, speed or the log. DeepSpeed checks their values.
MEMORY_AND_SPEED = {
    "zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "disable_allgather",
    "data_types", "communication_data_type", "activation_checkpointing", "aio", "compile", "disable_python_gc",
    "tensor_parallel", "sequence_parallel_size", "expert_parallel", "pipeline",
    "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger", "flops_profiler",
    "tensorboard", "wandb", "csv_monitor", "comet", "log_level", "timers",
}  # fmt: skip
# Keys whose values the settings give too. The two must agree.
SHARED_WITH_SETTINGS = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "bf16", "fp16", "optimizer", "scheduler",
}  # fmt: skip
# Keys that DeepSpeed reads but that change nothing here, and why. They are dropped, with a note.
WITHOUT_EFFECT = {
    "checkpoint": "the run writes checkpoints of its own",
    "dataloader_drop_last": "the recipe cuts the batches",
    "vocabulary_size": "DeepSpeed only warns by it",
    "use_data_before_expert_parallelism": "ranks that share experts are neighbours",
    "seq_parallel_communication_data_type": "parts of rows are exchanged in the precision of training",
}
# Keys that would change what is trained, unseen by the settings: (values that turn the key off, why it is refused).
NOT_ENABLED = {"enabled": (False,)}
REFUSED: dict[str, tuple[Any, str]] = {
    "torch_autocast": (NOT_ENABLED, "it is a second place for the precision; set 'precision' in the YAML"),
    "data_efficiency": (NOT_ENABLED, "it would change the data; the recipe decides what a batch holds"),
    "gradient_allreduce_op": (("mean",), "the recipe's loss counts on the mean over ranks, which is the default"),
    "managed_gradient_accumulation": (
        (True,),
        "the recipe's loop counts on DeepSpeed to manage accumulation, which is the default",
    ),
    "prescale_gradients": (
        (False,),
        "it changes how gradients are rounded between ranks, and ZeRO refuses it where it reduces and scatters;"
        " leave it out",
    ),
    "gradient_predivide_factor": (
        (1,),
        "it changes how gradients are rounded between ranks, and ZeRO refuses it where it reduces and scatters;"
        " leave it out",
    ),
    "weight_quantization": ({}, "it would change the weights"),
    "hybrid_engine": (NOT_ENABLED, "it is for reinforcement learning"),
    "autotuning": (NOT_ENABLED, "run DeepSpeed's autotuner on its own"),
}
# Sections in which DeepSpeed ignores unknown keys, and the keys that DeepSpeed reads in each.
LOOSE_SECTIONS = {
    "optimizer": {"type", "params", "legacy_fusion"},
    "scheduler": {"type", "params"},
    "data_types": {"grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"},
    "aio": {"block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"},
    "flops_profiler": {
        "enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules", "detailed", "output_file",
    },
    "activation_checkpointing": {
        "partition_activations", "number_checkpoints", "contiguous_memory_optimization",
        "synchronize_checkpoint_boundary", "profile", "cpu_checkpointing",
    },
}  # fmt: skip
SECTIONS = {
    "zero_optimization",
    "bf16",
    "fp16",
    "tensorboard",
    "wandb",
    "csv_monitor",
    "comet",
    "comms_logger",
    "compile",
    "tensor_parallel",
    "pipeline",
    "expert_parallel",
    "timers",
    *LOOSE_SECTIONS,
}
# DeepSpeed's schedulers, as JSONs for the HF Trainer name them, and the setting `lr_schedule` that each stands for.
SCHEDULERS = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
# The key of the filled config that carries notes to the run's header, for a recipe is called with nothing but the
# settings and this config. A key that begins with _ is a comment, which DeepSpeed ignores; Run takes the key out.
NOTES = "_notes"


class Findings:
    """What checking one JSON against the settings has found. Problems are collected, so that the user sees all at once.

    settings: the run's settings. Where the JSON contradicts one, the JSON's value replaces it, as the flags in the
    message would. So later checks, such as the arithmetic of the batch, check what the next start will have.
    """

    def __init__(self, name: str, cfg: Any):
        self.name = name
        self.settings = dict(vars(cfg))
        self.kinds = typing.get_type_hints(type(cfg), include_extras=True)
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.flags: list[str] = []  # settings that the JSON contradicts
        self.stated: dict[str, str] = {}  # setting -> the JSON's statement about it: key and value

    def state(self, statement: str, setting: str, value: Any) -> None:
        """Note that the JSON gives a setting this value. statement: the key and value, as the message words them."""
        try:
            value = check_value(value, self.kinds.get(setting, Any), statement, text=False)
        except UserError as error:
            self.problems.append(f"{error} (it stands for {setting})")
            return
        if setting in self.stated and value != self.settings[setting]:
            self.problems.append(f"{statement}, but {self.stated[setting]}; make them equal")
        elif value != self.settings[setting]:
            self.problems.append(f"{statement}, but the settings have {setting} {_shown(self.settings[setting])}")
            self.flags.append(setting)
            self.settings[setting] = value
        self.stated.setdefault(setting, statement)

    def agree(self, section: dict[str, Any], key: str, setting: str, path: str = "") -> None:
        """Check that section[key] equals the setting, and fill it in where it is missing or "auto".

        path: the key's path in the JSON, for the message; by default the key itself.
        """
        if section.get(key, "auto") != "auto":
            self.state(f"{path or key} is {_shown(section[key])}", setting, section[key])
        section[key] = self.settings[setting]

    def raise_problems(self) -> None:
        """Raise a UserError that names all problems and ends with flags by which the settings agree with the JSON."""
        if not self.problems:
            return
        text = "; ".join(self.problems)
        if self.flags:
            flags = " ".join(f"--{setting} {_argument(self.settings[setting])}" for setting in self.flags)
            text += f'; make them equal: write "auto" in the JSON, or add {flags}'
        raise UserError(f"{self.name}: {text}")


def _shown(value: Any) -> str:
    """A value as it is written in a JSON, but text without quotes."""
    return value if isinstance(value, str) else json.dumps(value)


def _argument(value: Any) -> str:
    """A value as the command line takes it."""
    return ",".join(map(str, value)) if isinstance(value, list) else _shown(value)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a DeepSpeed JSON. Comments and trailing commas are allowed, as DeepSpeed does.

    Raises UserError, for a key that is given twice too.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(f"{display_path(path)}: key '{key}' stands twice; remove one")
        return dict(pairs)

    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors on Windows put a byte order mark before the text
        try:
            config = json.loads(text, object_pairs_hook=unique)
        except ValueError:  # hjson is tried second, for it reads Infinity, which accelerate writes, as text
            config = hjson.loads(text, object_pairs_hook=unique)
    except FileNotFoundError:
        json_files = sorted(file.name for file in path.parent.glob("*.json"))
        raise UserError(
            f"{display_path(path)}: no such file;"
            f" in {display_path(path.parent)} there are: {', '.join(json_files) or 'no .json files'}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{display_path(path)}: cannot be read: {error}") from None
    except hjson.HjsonDecodeError as error:
        raise UserError(f"{display_path(path)}:{error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(config, dict):
        raise UserError(f"{display_path(path)}: expected a JSON object, found {type(config).__name__}")
    return config


def load_ds_config(path: Path, cfg: Any, world_size: int) -> dict[str, Any]:
    """The DeepSpeed config to pass to `deepspeed.initialize`: complete, without "auto", in agreement with `cfg`.

    cfg: settings, with batch_size, gradient_clipping, precision, learning_rate, weight_decay, adam_betas, adam_eps,
    warmup_steps, lr_schedule, max_steps and monitor. Raises a UserError that names everything that is wrong. What is
    not wrong but may surprise the user is a note under the config's key NOTES.
    """
    config, found = read_json(path), Findings(display_path(path), cfg)
    _check_keys(config, found)
    world_size = _check_pipeline(config, found, world_size, needed=cfg.is_pipeline)
    world_size = _check_tensor_parallel(config, found, world_size)  # from here on, ranks with the same matrices
    _check_expert_parallel(config, found, world_size)
    _check_batch(config, found, _check_sequence_parallel(config, found, world_size))
    found.agree(config, "gradient_clipping", "gradient_clipping")
    _check_precision(config, found)
    _check_zero(config, found, world_size)
    _check_mixtures(config, found)
    _check_data_types(config, found)
    _check_optimizer(config, found)
    _check_scheduler(config, found)
    _add_monitor(config, found)
    found.raise_problems()
    if tensor_parallel_size(config) > 1:
        del config["train_batch_size"]  # DeepSpeed 0.19.8 divides it by all ranks, those that share rows too
    config.setdefault("steps_per_print", 2**31 - 1)  # the run prints its own progress
    _ask_deepspeed(config, found.name)
    if found.notes:
        config[NOTES] = [f"{found.name}: {note}" for note in found.notes]
    return config


def stage_of(ds_config: dict[str, Any]) -> int:
    """The ZeRO stage of a config; 0, as in DeepSpeed, where there is no ZeRO section."""
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))


def tensor_parallel_size(ds_config: dict[str, Any]) -> int:
    """How many ranks share each matrix of the model; 1: none does."""
    return int(ds_config.get("tensor_parallel", {}).get("autotp_size") or 1)


def shares_vocabulary(ds_config: dict[str, Any]) -> bool:
    """Whether each rank of a tensor-parallel group has the logits of a part of the vocabulary only."""
    return bool(ds_config.get("tensor_parallel", {}).get("vocab_parallel_lm_head"))


def sequence_parallel_size(ds_config: dict[str, Any]) -> int:
    """How many ranks share the tokens of each row; 1: none does."""
    return int(ds_config.get("sequence_parallel_size", 1))


def pipeline_stages(ds_config: dict[str, Any]) -> int:
    """How many ranks have a part of the layers each; 1: each rank has all of them."""
    return int(ds_config.get("pipeline", {}).get("stages", 1))


def expert_parallel_size(ds_config: dict[str, Any]) -> int:
    """How many ranks share the experts of each layer of a mixture of experts; 1: none does."""
    return int(ds_config.get("expert_parallel", {}).get("autoep_size", 1))


def offload_device(ds_config: dict[str, Any], what: str) -> str:
    """Where `what` ("optimizer" or "param") is offloaded to: "none", "cpu" or "nvme"."""
    section = ds_config.get("zero_optimization", {}).get(f"offload_{what}") or {}
    return str(section.get("device", "none"))


def takes_cpu_adam(ds_config: dict[str, Any]) -> bool:
    """Whether the optimizer is DeepSpeed's own for CPUs, which is compiled at its first use."""
    return offload_device(ds_config, "optimizer") != "none" and ds_config.get("zero_force_ds_cpu_optimizer", True)


def _drop_auto(section: dict[str, Any]) -> None:
    """Delete each "auto" in a section, so that DeepSpeed's default or the run's own applies.

    The "auto" of a ZeRO stage or of an offload device stays, to be refused: its value would be a guess.
    """
    for key, value in list(section.items()):
        if isinstance(value, dict):
            _drop_auto(value)
        elif value == "auto" and key not in ("stage", "device"):
            del section[key]


def _check_keys(config: dict[str, Any], found: Findings) -> None:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS

    for key in [key for key in config if key.startswith(("_", "//", "$"))]:
        del config[key]  # a comment
    if "bfloat16" in config:  # the old name of bf16
        if "bf16" in config:
            found.problems.append("'bf16' and 'bfloat16' are two names of one section; remove one")
        config.setdefault("bf16", config.pop("bfloat16"))
    known = MEMORY_AND_SPEED | SHARED_WITH_SETTINGS
    for key, section in list(config.items()):
        if key in WITHOUT_EFFECT:
            found.notes.append(f"'{key}' is without effect here: {WITHOUT_EFFECT[key]}")
            del config[key]
        elif key in _REMOVED_TOP_LEVEL_CONFIG_KEYS:  # DeepSpeed refuses these even where they are off
            found.problems.append(f"'{key}' has been removed from DeepSpeed; delete it")
            del config[key]
        elif key in REFUSED:
            off, why = REFUSED[key]
            if not _is_off(section, off):
                found.problems.append(f"'{key}' cannot be used here: {why}")
            del config[key]
        elif key not in known:
            found.problems.append(f"unknown key '{key}'{did_you_mean(key, known)}")
            del config[key]
        elif section == "auto" and key in MEMORY_AND_SPEED:
            del config[key]
        elif key in SECTIONS and not isinstance(section, dict):
            found.problems.append(f"'{key}' must be an object, not {section!r}")
            del config[key]
        elif key in ("optimizer", "scheduler") and not (
            isinstance(section.get("type"), str) and isinstance(section.get("params", {}), dict)
        ):
            found.problems.append(f'\'{key}\' needs a "type" (text) and may have "params" (an object)')
            del config[key]
        elif isinstance(section, dict):
            found.problems += [
                f"unknown key '{key}.{inner}'{did_you_mean(inner, LOOSE_SECTIONS[key])}"
                for inner in section
                if inner not in LOOSE_SECTIONS.get(key, section)
            ]
            if key in MEMORY_AND_SPEED:
                _drop_auto(section)
    strict = {
        "comms_logger": CommsLoggerConfig,
        "compile": CompileConfig,
        "tensorboard": TensorBoardConfig,
        "wandb": WandbConfig,
        "csv_monitor": CSVConfig,
    }
    for key, model in (strict | {"comet": CometConfig}).items():
        if key in config:
            _check_model(model, config[key], found, key)
    if config.get("steps_per_print") == math.inf:  # it means never, which is the run's default
        del config["steps_per_print"]
    _check_compile(config, found)
    _check_activation_checkpointing(config, found)


def _is_off(value: Any, off: Any) -> bool:
    """Whether a key's value turns the key off.

    off: the values that turn it off. For a section, {key: values that turn it off}: each of these keys must be off or
    missing. Where `off` is an empty dict, the section must be empty.
    """
    if value == "auto":  # the recipe decides, and leaves it off
        return True
    if isinstance(off, dict):
        return isinstance(value, dict) and (
            all(_is_off(value.get(key, "auto"), values) for key, values in off.items()) if off else not value
        )
    return (value.lower() if isinstance(value, str) else value) in off


def _check_compile(config: dict[str, Any], found: Findings) -> None:
    section = config.pop("compile", {})
    if section.get("deepcompile"):
        found.problems.append(
            "compile.deepcompile is on, but does nothing until engine.compile() is called, which recipes do not;"
            " leave it out"
        )
    elif section:
        found.notes.append("'compile' is without effect here: compile.deepcompile is off")


def _check_activation_checkpointing(config: dict[str, Any], found: Findings) -> None:
    section = config.get("activation_checkpointing", {})
    keys_on = [key for key, value in section.items() if value not in (False, None)]
    if keys_on:
        found.problems.append(
            f"activation_checkpointing.{keys_on[0]} works with DeepSpeed's own checkpoint function only, which "
            "transformers' models do not use; "
            'write "activation_checkpointing": {} for that of transformers, or leave the section out for none'
        )
    elif section:
        found.notes.append(
            "activation checkpointing is off, as each key of its section is; "
            'the empty section "activation_checkpointing": {} turns it on'
        )
        del config["activation_checkpointing"]


def _check_model(model: type[BaseModel], section: dict[str, Any], found: Findings, key: str) -> Any:
    """The section as DeepSpeed's own pydantic model reads it; None where the model refuses it."""
    try:
        return model(**section)
    except ValidationError as error:
        for problem in error.errors():
            where = ".".join([key, *(str(part) for part in problem["loc"])])
            if problem["type"] == "extra_forbidden":
                inner = model
                for part in problem["loc"][:-1]:  # a section within the section, such as offload_param
                    for choice in getattr(inner.model_fields[str(part)].annotation, "__args__", ()):
                        inner = choice if isinstance(choice, type) and issubclass(choice, BaseModel) else inner
                known = {name for field, info in inner.model_fields.items() for name in (field, info.alias) if name}
                found.problems.append(f"unknown key '{where}'{did_you_mean(str(problem['loc'][-1]), known)}")
            else:
                found.problems.append(f"{where}: {problem['msg']}, found {problem.get('input')!r}")
    except (ValueError, TypeError, AssertionError) as error:
        found.problems.append(f"{key}: {error}")
    return None


def _check_pipeline(config: dict[str, Any], found: Findings, world_size: int, *, needed: bool) -> int:
    """Returns how many ranks have the same layers.

    needed: whether the recipe trains a pipeline, as others cannot.
    """
    section = config.pop("pipeline", {})
    found.problems += [f"pipeline.{key} is not used here; leave it out" for key in section if key != "stages"]
    stages = section.get("stages", 1)
    if not isinstance(stages, int) or isinstance(stages, bool) or stages < 1:
        found.problems.append(f"pipeline.stages is {stages!r}; write how many ranks have a part of the layers each")
        return world_size
    if (stages > 1) != needed:
        found.problems.append(
            'this recipe trains a pipeline of 2 stages or more; write "pipeline": {"stages": 2}'
            if needed
            else f"pipeline.stages is {stages}, but this recipe trains no pipeline; take pipeline_lm"
        )
        return world_size
    if stages == 1:
        return world_size
    _check_divides("pipeline.stages", stages, world_size, found)
    config["pipeline"] = {"stages": stages}
    return max(1, world_size // stages)


TENSOR_PARALLEL_KEYS = {"autotp_size", "vocab_parallel_lm_head", "tp_overlap_comm"}


def _check_tensor_parallel(config: dict[str, Any], found: Findings, world_size: int) -> int:
    """Leaves the section out where it is off, and completes it where it is on. Returns how many
    ranks have the same matrices."""
    from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig

    section = config.pop("tensor_parallel", {})
    for key in section:
        if key not in TENSOR_PARALLEL_KEYS:
            found.problems.append(
                f"tensor_parallel.{key} is not used here{did_you_mean(key, TENSOR_PARALLEL_KEYS)}; leave it out: "
                "the model's own plan says how its matrices are shared"
            )
    section = {key: value for key, value in section.items() if key in TENSOR_PARALLEL_KEYS}
    parsed = _check_model(TPTrainingConfig, section, found, "tensor_parallel")
    size = parsed.autotp_size if parsed is not None else 1
    if size < 0:
        found.problems.append(f"tensor_parallel.autotp_size is {size}; write how many ranks share each matrix")
    if size <= 1:
        return world_size
    _check_divides("tensor_parallel.autotp_size", size, world_size, found)
    # Left to itself, DeepSpeed decides by whether the output layer is tied.
    config["tensor_parallel"] = {"vocab_parallel_lm_head": False} | section
    return max(1, world_size // size)


def _check_sequence_parallel(config: dict[str, Any], found: Findings, world_size: int) -> int:
    """Returns the data-parallel size: how many groups of ranks have rows of their own."""
    size = config.pop("sequence_parallel_size", 1)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        found.problems.append(f"sequence_parallel_size is {size!r}; write how many ranks share the tokens of a row")
        return world_size
    if size == 1:
        return world_size
    config["sequence_parallel_size"] = size
    _check_divides("sequence_parallel_size", size, world_size, found)
    length = found.settings.get("max_length")
    if length is not None and length % size:
        below = length // size * size
        nearest = f"{below} and {below + size}" if below else str(size)
        found.problems.append(
            f"sequence_parallel_size is {size}, which does not divide max_length {length}; nearest: {nearest}"
        )
    return max(1, world_size // size)


EXPERT_PARALLEL_KEYS = {"enabled", "autoep_size", "preset_model"}


def _check_expert_parallel(config: dict[str, Any], found: Findings, world_size: int) -> None:
    """Leaves the section out where it is off. lib/distributed/expert_parallel.py checks it against the model."""
    section = config.pop("expert_parallel", {})
    for key in sorted(set(section) - EXPERT_PARALLEL_KEYS):
        found.problems.append(
            f"expert_parallel.{key} is not used here{did_you_mean(key, EXPERT_PARALLEL_KEYS)}; leave it out: "
            "the model says how its experts are shared"
        )
    enabled = section.get("enabled", False)
    size = section.get("autoep_size", None if enabled is True else 1)
    if not isinstance(enabled, bool):
        found.problems.append(f"expert_parallel.enabled is {enabled!r}; write true or false")
    elif "enabled" not in section and size != 1:
        found.problems.append('expert_parallel has no "enabled"; write true or false')
    if not isinstance(section.get("preset_model"), str | None):
        found.problems.append(f"expert_parallel.preset_model is {section['preset_model']!r}; leave it out")
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        found.problems.append(f"expert_parallel.autoep_size is {size!r}; write how many ranks share the experts")
    elif enabled is True and size > 1:
        _check_divides("expert_parallel.autoep_size", size, world_size, found)
        config["expert_parallel"] = {key: section[key] for key in EXPERT_PARALLEL_KEYS if key in section}


def _check_divides(path: str, size: int, world_size: int, found: Findings) -> None:
    if world_size % size:
        below = world_size // size * size
        nearest = f"{below} and {below + size}" if below else f"{size}"
        found.problems.append(
            f"{path} is {size}, which does not divide {world_size} rank{'s' if world_size > 1 else ''}; "
            f"nearest: --ranks {nearest}"
        )


def _check_mixtures(config: dict[str, Any], found: Findings) -> None:
    """What pipelines, expert and tensor parallelism cannot be mixed with."""
    if pipeline_stages(config) > 1:
        _check_mixtures_of_pipeline(config, found)
    if expert_parallel_size(config) > 1:
        _check_mixtures_of_experts(config, found)
    if tensor_parallel_size(config) == 1:
        return
    if sequence_parallel_size(config) > 1:
        found.problems.append("tensor_parallel and sequence_parallel_size are not tested together here; leave one out")
    precision = found.settings["precision"]
    if precision == "fp16":
        found.problems.append("tensor parallelism is not tested in fp16 here; set precision to bf16 or fp32")
    elif precision == "bf16" and stage_of(config) == 0:
        found.problems.append(
            "tensor parallelism at stage 0 in bf16 clips by the norm of one rank's part (DeepSpeed 0.19.8); "
            "take stage 1, 2 or 3"
        )
    if int(config.get("zero_optimization", {}).get("zero_hpz_partition_size", 1)) > 1:
        found.problems.append(
            "zero_hpz_partition_size and tensor_parallel would group the same ranks (DeepSpeed 0.19.8); leave one out"
        )


def _check_mixtures_of_pipeline(config: dict[str, Any], found: Findings) -> None:
    precision, stage = found.settings["precision"], stage_of(config)
    if stage > 1:
        found.problems.append(
            f"zero_optimization.stage is {stage}, but a pipeline works with stages 0 and 1 (DeepSpeed 0.19.8)"
        )
    zero = config.get("zero_optimization", {})
    if zero.get("overlap_comm"):
        found.notes.append("zero_optimization.overlap_comm is without effect in a pipeline: DeepSpeed turns it off")
    if offload_device(config, "optimizer") != "none":
        found.problems.append("a pipeline and offload_optimizer are not tested together here; leave one out")
    if tensor_parallel_size(config) * sequence_parallel_size(config) * expert_parallel_size(config) > 1:
        found.problems.append("a pipeline is not tested with another form of parallelism here; leave one out")
    if precision == "fp16":
        found.problems.append("a pipeline is not tested in fp16 here; set precision to bf16 or fp32")
    elif precision == "bf16" and stage == 0:
        found.problems.append(
            "a pipeline in bf16 is not stage 0 in DeepSpeed 0.19.8, whatever it is called; take stage 1"
        )


def _check_mixtures_of_experts(config: dict[str, Any], found: Findings) -> None:
    for form, size in (("tensor_parallel", tensor_parallel_size), ("sequence_parallel_size", sequence_parallel_size)):
        if size(config) > 1:
            found.problems.append(f"expert_parallel and {form} are not tested together here; leave one out")
    if stage_of(config) == 0:
        found.problems.append(
            "expert parallelism at stage 0 clips by the norm of one rank's experts (DeepSpeed 0.19.8); "
            "take stage 1, 2 or 3"
        )
    if found.settings["precision"] == "fp16":
        found.problems.append("expert parallelism is not tested in fp16 here; set precision to bf16 or fp32")
    zero = config.get("zero_optimization", {})
    for what in ("optimizer", "param"):
        if offload_device(config, what) != "none":
            found.problems.append(f"expert_parallel and offload_{what} are not tested together here; leave one out")
    if int(zero.get("zero_hpz_partition_size", 1)) > 1:
        found.problems.append("DeepSpeed 0.19.8 has no zero_hpz_partition_size with expert_parallel; leave one out")


def _check_batch(config: dict[str, Any], found: Findings, world_size: int) -> None:
    """batch_size = micro-batch x accumulation steps x ranks. The JSON gives the micro-batch; the steps are computed."""
    keys = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    micro, accumulation = (config.get(key, "auto") for key in keys)
    for key, value in zip(keys, (micro, accumulation), strict=True):
        if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            found.problems.append(f"{key} is {value!r}; write a whole number from 1 up")
            return
    is_shared = tensor_parallel_size(config) * sequence_parallel_size(config) * pipeline_stages(config) > 1
    kind = "data-parallel rank" if is_shared else "rank"
    ranks = f"{world_size} {kind}{'s' if world_size > 1 else ''}"
    known = (micro if micro != "auto" else 1) * (accumulation if accumulation != "auto" else 1) * world_size
    if config.get("train_batch_size", "auto") == "auto" and "auto" not in (micro, accumulation):
        found.state(f"{keys[0]} {micro} x {keys[1]} {accumulation} x {ranks} is {known}", "batch_size", known)
    elif not {"train_batch_size", *keys} & set(config):
        found.problems.append(f'{keys[0]} is missing; write the rows that fit one device at a time, or "auto"')
    found.agree(config, "train_batch_size", "batch_size")
    batch_size = found.settings["batch_size"]
    if batch_size % known:
        lower = batch_size // known * known
        nearest = f"{lower} and {lower + known}" if lower else f"{known}"
        parts = [f"{micro} rows a micro-batch"] if micro != "auto" else []
        parts += [f"{accumulation} accumulation steps"] if accumulation != "auto" else []
        found.problems.append(
            f"batch_size {batch_size} cannot be cut into {' x '.join([*parts, ranks])}:"
            f" {known} does not divide it; nearest: {nearest}"
        )
        return
    if micro == "auto":  # the largest micro-batch, so as few accumulation steps as the JSON allows
        micro = batch_size // known
        if pipeline_stages(config) > 1 and accumulation == "auto":  # but enough of them to fill the pipeline
            enough = 4 * pipeline_stages(config)
            micro = max(n for n in range(1, micro + 1) if not micro % n and (n == 1 or micro // n >= enough))
    computed = batch_size // (micro * world_size)
    if accumulation not in ("auto", computed):
        found.problems.append(
            f"gradient_accumulation_steps is {accumulation}, but"
            f" batch_size {batch_size} / (micro-batch {micro} x {ranks}) is {computed};"
            ' write "auto" or leave it out'
        )
    config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"] = micro, computed


def _check_precision(config: dict[str, Any], found: Findings) -> None:
    import torch
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config

    accelerator = get_accelerator()
    supported = {"fp32": True, "bf16": accelerator.is_bf16_supported(), "fp16": accelerator.is_fp16_supported()}
    if accelerator.device_name() == "cpu":
        supported["fp16"] = False  # DeepSpeed refuses fp16 on a CPU
    if accelerator.device_name() == "cuda":  # DeepSpeed counts GPUs that only emulate bf16, slowly
        supported["bf16"] = torch.cuda.is_bf16_supported(including_emulation=False)
    supported["tf32"] = accelerator.device_name() == "cuda" and supported["bf16"]  # the same GPUs have both
    others = " or ".join(kind for kind, is_supported in supported.items() if is_supported)
    sections = {key: config.pop(key) for key in ("bf16", "fp16") if key in config}
    enabled = {key: section.pop("enabled", "auto") for key, section in sections.items()}
    for key, value in enabled.items():
        if value not in (True, False, "auto"):
            found.problems.append(f'{key}.enabled is {value!r}; write true, false or "auto"')
    chosen = [key for key, value in enabled.items() if value is True]
    if len(chosen) == 2:
        found.problems.append('bf16.enabled and fp16.enabled are both true; write "auto" for one of them')
    elif chosen and not supported[chosen[0]]:
        found.problems.append(
            f"{chosen[0]}.enabled is true, but this device ({accelerator.device_name()}) cannot train in it;"
            f" set precision to {others}"
        )
    elif chosen:
        found.state(f"{chosen[0]}.enabled is true", "precision", chosen[0])
    elif enabled.get(found.settings["precision"]) is False:
        found.state(f"{found.settings['precision']}.enabled is false", "precision", "fp32")
    precision = found.settings["precision"]
    if not supported[precision]:
        found.problems.append(
            f"precision is {precision}, which this device ({accelerator.device_name()}) cannot train in; use {others}"
        )
    models: dict[str, type[BaseModel]] = {"bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config}
    for key, section in sections.items():  # a section that is off is checked too, as DeepSpeed does
        _drop_auto(section)  # the HF Trainer has no value of its own for the loss scale: DeepSpeed's default applies
        fp16_keys = [
            inner
            for inner in section
            if key == "bf16"
            and inner in DeepSpeedFP16Config.model_fields
            and inner not in DeepSpeedBF16Config.model_fields
        ]
        if fp16_keys:
            found.problems.append(
                f"bf16 has no loss scale: leave out {', '.join(f'bf16.{inner}' for inner in fp16_keys)}"
            )
        rest = {inner: value for inner, value in section.items() if inner not in fp16_keys}
        parsed = _check_model(models[key], rest | {"enabled": precision == key}, found, key)
        if precision != key or parsed is None:
            continue
        for inner in ("bf16_master_weights_and_grads", "bf16_optimizer_states", "fp16_master_weights_and_grads"):
            if getattr(parsed, inner, False):
                found.problems.append(
                    f"{key}.{inner} would change the optimizer's precision, which is fp32 here; leave it out"
                )
        if not getattr(parsed, "check_grad_overflow", True):
            found.problems.append(
                f"{key}.check_grad_overflow false would let a gradient that is not finite change the weights;"
                " leave it out"
            )
    if precision in models:
        config[precision] = {**sections.get(precision, {}), "enabled": True}


def _check_zero(config: dict[str, Any], found: Findings, world_size: int) -> None:
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.config import _REMOVED_ZERO_CONFIG_KEYS
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    if "zero_optimization" not in config:
        return
    zero = config["zero_optimization"]
    # DeepSpeed, too, reads these old keys as the new ones.
    for old, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
        if zero.pop(old, None) is True and zero.setdefault(new, {"device": "cpu"}) != {"device": "cpu"}:
            found.problems.append(f"zero_optimization.{old} is an old name of {new}, which is there too; remove it")
    for key in set(zero) & set(_REMOVED_ZERO_CONFIG_KEYS):
        found.problems.append(f"zero_optimization.{key} has been removed from DeepSpeed; delete it")
        del zero[key]
    for section_name in ("offload_optimizer", "offload_param"):
        if isinstance(zero.get(section_name), dict) and zero[section_name].get("device") == "auto":
            found.problems.append(
                f'zero_optimization.{section_name}.device is "auto", and no setting of the recipe can fill it;'
                ' write "cpu" or "none"'
            )
            del zero[section_name]
    stage = zero.get("stage")
    if stage not in (0, 1, 2, 3) or not isinstance(stage, int) or isinstance(stage, bool):
        found.problems.append(
            f"zero_optimization.stage is {repr(stage) if 'stage' in zero else 'missing'}; write 0, 1, 2 or 3"
        )
        zero["stage"] = stage = 3  # so that the other keys are checked: all have an effect at stage 3
    parsed = _check_model(DeepSpeedZeroConfig, zero, found, "zero_optimization")
    if parsed is None:
        del config["zero_optimization"]
        return
    offload = {section_name: offload_device(config, section_name) for section_name in ("optimizer", "param")}
    # (whether the key is on, the lowest stage at which it does anything). DeepSpeed accepts these at every stage.
    lowest_stages = {
        "offload_param": (offload["param"] != "none", 3), "offload_optimizer": (offload["optimizer"] != "none", 1),
        "zero_hpz_partition_size": (parsed.zero_hpz_partition_size > 1, 3),
        **{
            key: (getattr(parsed, key), 3)
            for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
        },
    }  # fmt: skip
    for key, (is_on, lowest_stage) in lowest_stages.items():
        if is_on and stage < lowest_stage:
            found.problems.append(
                f"zero_optimization.{key} has no effect at stage {stage};"
                f" it needs stage {'3' if lowest_stage == 3 else '1, 2 or 3'}"
            )
        elif is_on and "quantized" in key and get_accelerator().device_name() == "cpu":
            found.problems.append(f"zero_optimization.{key} needs a GPU; leave it out")
        elif is_on and "quantized" in key:
            found.notes.append(f"{key}: the losses are not those of the other configs")
    if "nvme" in offload.values():
        found.problems.append('checkpoints of states offloaded to NVMe are not supported; offload to "cpu"')
    if parsed.zero_hpz_partition_size > 1 and world_size % min(parsed.zero_hpz_partition_size, world_size):
        found.problems.append(
            f"zero_optimization.zero_hpz_partition_size is {parsed.zero_hpz_partition_size},"
            f" which does not divide {world_size} ranks"
        )
    if parsed.offload_optimizer is not None and (
        parsed.offload_optimizer.ratio != 1 or parsed.offload_optimizer.super_offload
    ):
        found.problems.append(
            "offload_optimizer.ratio below 1 and super_offload step in a second optimizer,"
            " which checkpoints do not hold; leave them out"
        )
    if not parsed.compute_grad_norm:
        found.problems.append(
            "zero_optimization.compute_grad_norm false would let a gradient that is not finite change the weights;"
            " leave it out"
        )
    if parsed.zenflow:
        found.problems.append(
            "zero_optimization.zenflow changes the weights when it starts (DeepSpeed 0.19.8); leave it out"
        )


def _check_data_types(config: dict[str, Any], found: Findings) -> None:
    """Numbers may be kept and sent in more digits than the precision has. Fewer are refused: they change the losses."""
    from deepspeed.runtime.config import DtypeEnum

    section = config.get("data_types", {})
    types = {f"data_types.{key}": section.get(key) for key in ("grad_accum_dtype", "param_dtype", "buffer_dtype")}
    types["communication_data_type"] = config.get("communication_data_type")
    precision = found.settings["precision"].replace("tf32", "fp32")  # as tensors are kept
    for path, value in types.items():
        if value is None:
            continue
        try:
            kind = DtypeEnum(value.lower()).name
        except (AttributeError, ValueError):
            found.problems.append(f"{path} is {value!r}; write fp32, bf16 or fp16")
            continue
        if path == "data_types.param_dtype":
            if kind != precision:
                found.state(f"{path} is {value}", "precision", kind)
            continue
        # DeepSpeed 0.19.8 accumulates gradients in the precision alone at stage 0, and refuses other types.
        at_stage0 = path == "data_types.grad_accum_dtype" and stage_of(config) == 0
        allowed = (
            ["fp32"]
            if path == "data_types.buffer_dtype"
            else [precision]
            if at_stage0
            else list(dict.fromkeys([precision, "fp32"]))
        )
        if kind not in allowed:
            rounded = "the model's constants" if path == "data_types.buffer_dtype" else "the gradients"
            why = (
                "DeepSpeed has no other at stage 0"
                if at_stage0 and kind == "fp32"
                else f"it would round {rounded}, and change the losses"
            )
            found.problems.append(f"{path} is {value}: {why}; write {' or '.join(allowed)}, or leave it out")


def _check_optimizer(config: dict[str, Any], found: Findings) -> None:
    """The recipe makes the optimizer. A section in the JSON must describe the same one, and is then dropped."""
    section = config.pop("optimizer", None)
    if section is None:
        return
    if section["type"].lower() not in ("adam", "adamw", "auto"):
        found.problems.append(
            f"optimizer.type is {section['type']!r}, but the recipe trains with AdamW; leave the section out"
        )
        return
    params = section.get("params", {})
    settings = {"lr": "learning_rate", "weight_decay": "weight_decay", "betas": "adam_betas", "eps": "adam_eps"}
    # Other values of these would change the steps.
    must_be = {"bias_correction": True, "amsgrad": False, "maximize": False, "fp32_optimizer_states": True}
    without_effect = {"torch_adam", "adam_w_mode", "fused", "foreach", "set_grad_none"}
    for key, value in list(params.items()):
        if key in settings:
            found.agree(params, key, settings[key], f"optimizer.params.{key}")
        elif key == "max_grad_norm":
            found.problems.append(
                "optimizer.params.max_grad_norm is refused by DeepSpeed; write gradient_clipping at the top level"
            )
        elif key in must_be:
            if value not in (must_be[key], "auto"):
                found.problems.append(
                    f"optimizer.params.{key} is {_shown(value)}, which would change the recipe's steps; leave it out"
                )
        elif key not in without_effect:
            found.problems.append(
                f"unknown key 'optimizer.params.{key}'{did_you_mean(key, [*settings, *must_be, *without_effect])}"
            )
    # DeepSpeed's Adam is AdamW unless adam_w_mode is false; without weight decay Adam and AdamW are the same.
    if (
        section["type"].lower() == "adam"
        and params.get("adam_w_mode", True) is False
        and found.settings["weight_decay"]
    ):
        found.problems.append(
            "optimizer.params.adam_w_mode is false, by which the weight decay acts through the gradients;"
            " leave it out: the recipe trains with AdamW"
        )


def _check_scheduler(config: dict[str, Any], found: Findings) -> None:
    """The recipe makes the schedule. A section in the JSON must describe the same one, and is then dropped."""
    section = config.pop("scheduler", None)
    if section is None:
        return
    kind, params = section["type"], section.get("params", {})
    if kind not in (*SCHEDULERS, "auto"):
        found.problems.append(
            f"scheduler.type is {kind!r}, which recipes do not have;"
            f" they have {', '.join(SCHEDULERS)}: write one, or leave the section out"
        )
        return
    if kind != "auto":
        found.state(
            f"scheduler.type is {kind}, which is lr_schedule {SCHEDULERS[kind]}", "lr_schedule", SCHEDULERS[kind]
        )
    settings = {"warmup_num_steps": "warmup_steps"}
    must_be: dict[str, Any] = {"warmup_type": "linear", "last_batch_iteration": -1}
    if kind in ("WarmupCosineLR", "auto"):
        must_be |= {"warmup_min_ratio": 0, "cos_min_ratio": 0}
    if kind != "WarmupCosineLR":
        settings["warmup_max_lr"] = "learning_rate"
        must_be["warmup_min_lr"] = 0
    if kind != "WarmupLR":
        settings["total_num_steps"] = "max_steps"
    for key, value in list(params.items()):
        if key in settings:
            found.agree(params, key, settings[key], f"scheduler.params.{key}")
        elif key not in must_be:
            found.problems.append(
                f"unknown key 'scheduler.params.{key}' of {kind}{did_you_mean(key, [*settings, *must_be])}"
            )
        elif value not in (must_be[key], "auto"):
            found.problems.append(
                f"scheduler.params.{key} is {_shown(value)}, but the recipe's is always {must_be[key]};"
                " write that, or leave it out"
            )
    if params.get("warmup_type", "auto") == "auto" and found.settings["warmup_steps"]:
        found.notes.append(
            "the learning rate warms up linearly, where DeepSpeed's own schedulers would do so logarithmically"
        )


def _add_monitor(config: dict[str, Any], found: Findings) -> None:
    """Turn on DeepSpeed's monitor that the setting `monitor` names. The run makes its own folder the monitor's."""
    monitor = found.settings["monitor"]
    if monitor is not None:
        config[monitor] = {**config.get(monitor, {}), "enabled": True}
    for section, module in (("tensorboard", "tensorboard"), ("wandb", "wandb")):
        if config.get(section, {}).get("enabled"):
            try:
                __import__(module)
            except ImportError:
                found.problems.append(f"{section} is asked for, but not installed: pip install {module}")


def _ask_deepspeed(config: dict[str, Any], name: str) -> None:
    """Let DeepSpeed parse the filled config, so that what only DeepSpeed refuses is refused before a model is built."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.utils import logger

    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        # There are no process groups yet, so that DeepSpeed counts one rank, and the batch's arithmetic would be wrong.
        # DeepSpeed checks it in deepspeed.initialize.
        without_batch = {
            key: value
            for key, value in config.items()
            if key not in ("train_batch_size", "gradient_accumulation_steps")
        }
        DeepSpeedConfig(json.loads(json.dumps(without_batch)))
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(f"{name}: {'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}") from None
    except Exception as error:
        raise UserError(f"{name}: DeepSpeed refuses it: {error}") from None
    finally:
        logger.setLevel(level)
