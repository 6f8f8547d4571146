"""Encoder-decoders and their tokenizers: from scratch, an encoder with a new or pre-trained decoder, or pre-trained."""

import copy
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    T5GemmaModuleConfig,
)  # fmt: skip

from lib.distributed import ranks
from lib.errors import UserError
from lib.models.checks import check_generates, is_causal
from lib.models.hub import (
    check_length,
    check_tokens,
    hub_errors,
    load_config,
    load_tokenizer,
    load_weights,
    set_dropout,
)
from lib.models.scratch import train_tokenizer

# For generate: one text a source, as the recipes' settings say and not as a hub model's own generation config does.
ONE_TEXT: dict[str, Any] = {
    "do_sample": False, "num_return_sequences": 1, "return_dict_in_generate": False,
    "min_length": 0, "repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0,
}  # fmt: skip
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def load_tokenizers(
    cfg: Any, sources: Sequence[str], targets: Sequence[str]
) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """(of the sources, of the targets). Every rank must call it.

    From scratch (model null) one byte-level BPE is learned from both; for a pre-trained encoder, one from the targets,
    unless its decoder is pre-trained too and brings its own; a pre-trained encoder-decoder brings its own for both, or,
    as those that these recipes export, another one for the targets in target_tokenizer.
    """
    if cfg.decoder is not None and (cfg.model is None or _brings_decoder(cfg)):
        raise UserError(
            f"decoder {cfg.decoder} needs an encoder as the model, and {cfg.model or 'null'} is none; "
            "set --decoder null, or another --model"
        )
    if cfg.model is None:
        joint = train_tokenizer([*sources, *targets], cfg.vocab_size, SPECIAL_TOKENS, "$A </s>")
        return joint, joint
    if _brings_decoder(cfg):
        if cfg.pretrained_learning_rate == 0:
            raise UserError(
                f"model {cfg.model} is pre-trained as a whole, and with pretrained_learning_rate 0 nothing is trained; "
                "set it, to 3e-5 perhaps"
            )
        config = load_config(cfg.model, 0.0, cfg.trust_remote_code)
        check_length(getattr(config, "decoder", config), cfg.max_target_length, "max_target_length")
        tokenizer = load_tokenizer(cfg.model, cfg.max_source_length, cfg.trust_remote_code, "max_source_length")
        of_targets = Path(cfg.model) / "target_tokenizer"
        with hub_errors(str(of_targets)):
            target_tokenizer = AutoTokenizer.from_pretrained(of_targets) if of_targets.is_dir() else tokenizer
        if hasattr(config, "decoder"):
            remedy = "if it has a folder target_tokenizer, download the model and give its folder"
            check_tokens(f"model {cfg.model}: its decoder", config.decoder, target_tokenizer, remedy)
        return tokenizer, target_tokenizer
    tokenizer = load_tokenizer(cfg.model, cfg.max_source_length, cfg.trust_remote_code, "max_source_length")
    if cfg.decoder is None:
        return tokenizer, train_tokenizer(targets, cfg.vocab_size, SPECIAL_TOKENS, "$A </s>")
    return tokenizer, _tokenizer_of_decoder(cfg)


def _tokenizer_of_decoder(cfg: Any) -> PreTrainedTokenizerBase:
    """That of cfg.decoder, but a text gets its end-of-text token and nothing before: what a decoder is to write.

    Raises UserError before weights are read.
    """
    ranks.rank0_first(_config_of_decoder)(cfg)  # refuses what cannot attend to an encoder
    tokenizer = load_tokenizer(cfg.decoder, cfg.max_target_length, cfg.trust_remote_code, "max_target_length")
    special = {
        "bos_token": tokenizer.bos_token or tokenizer.cls_token,
        "eos_token": tokenizer.eos_token or tokenizer.sep_token,
    }
    if None in special.values():
        raise UserError(
            f"decoder {cfg.decoder}: its tokenizer has no tokens that begin and end a text (bos and eos, or cls and "
            "sep); set them, and save it"
        )
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    end = special["eos_token"]
    backend.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.convert_tokens_to_ids(end))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **special, pad_token=tokenizer.pad_token, unk_token=tokenizer.unk_token
    )


def _brings_decoder(cfg: Any) -> bool:
    """Whether cfg.model is a pre-trained encoder-decoder. Every rank must call it."""
    return (
        cfg.model is not None
        and ranks.rank0_first(load_config)(cfg.model, 0.0, cfg.trust_remote_code).is_encoder_decoder
    )


def pretrained_parameters(cfg: Any, model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """The parameters that cfg.model brought to the model of build_model: none, the encoder's, or all.

    Every rank must call it.
    """
    if _brings_decoder(cfg):
        return list(model.parameters())
    return [] if cfg.model is None else list(model.get_encoder().parameters())


def build_model(cfg: Any, target_tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The encoder-decoder, whole, in host memory.

    cfg: model (null: a small T5Gemma from scratch; an encoder, to which comes a decoder; an encoder-decoder: as it is),
    decoder (null: a new GPT-2; a model: its weights, and new ones for the attention to the source), trust_remote_code,
    hidden_size, intermediate_size, num_layers, num_heads, max_source_length, max_target_length.
    """
    special = {name: getattr(target_tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if cfg.model is None:
        return _from_scratch(cfg, special, len(target_tokenizer))
    model = _from_pretrained(cfg, special, len(target_tokenizer))
    check_generates(model, "take another architecture", decoder_start_token_id=0, num_beams=2, **ONE_TEXT)
    return model


def _deviation(cfg: Any) -> float:
    """Of new weights. 0.02, made for larger models, would leave a small one's attention idle for most of a short
    run."""
    return float(cfg.hidden_size**-0.5)


def _from_scratch(cfg: Any, special: dict[str, int], vocab_size: int) -> PreTrainedModel:
    head_dim = cfg.hidden_size // cfg.num_heads
    if cfg.hidden_size % cfg.num_heads or head_dim % 2:
        raise UserError(
            f"hidden_size {cfg.hidden_size} is no multiple of twice num_heads {cfg.num_heads}, as rotary positions need"
        )
    half: Any = T5GemmaModuleConfig(
        vocab_size=vocab_size, hidden_size=cfg.hidden_size, intermediate_size=cfg.intermediate_size,
        num_hidden_layers=cfg.num_layers, num_attention_heads=cfg.num_heads, num_key_value_heads=cfg.num_heads,
        head_dim=head_dim, query_pre_attn_scalar=head_dim, attn_logit_softcapping=None, final_logit_softcapping=None,
        max_position_embeddings=max(cfg.max_source_length, cfg.max_target_length + 1),
        initializer_range=_deviation(cfg), **special,
    )  # fmt: skip
    both: Any = T5GemmaConfig(
        encoder=half, decoder=copy.deepcopy(half), initializer_range=_deviation(cfg), vocab_size=vocab_size, **special,
        decoder_start_token_id=special["bos_token_id"],
    )  # fmt: skip
    model = T5GemmaForConditionalGeneration(both)
    # Drawn apart, the two embeddings would have to be matched, token by token, before the model can copy a word.
    with torch.no_grad():
        model.get_encoder().embed_tokens.weight.copy_(model.get_decoder().embed_tokens.weight)
    return _generates_at_most(model, cfg.max_target_length)


def _from_pretrained(cfg: Any, special: dict[str, int], vocab_size: int) -> Any:
    config = load_config(cfg.model, 0.0, cfg.trust_remote_code)
    if config.is_encoder_decoder:
        return load_weights(AutoModelForSeq2SeqLM, cfg.model, config, cfg.trust_remote_code)
    encoder = load_weights(AutoModel, cfg.model, config, cfg.trust_remote_code)
    if is_causal(encoder):
        raise UserError(
            f"model {cfg.model} is a decoder; take an encoder, which gets a new decoder, or an encoder-decoder"
        )
    decoder = _new_decoder(cfg, special, vocab_size) if cfg.decoder is None else _pretrained_decoder(cfg)
    both = EncoderDecoderConfig.from_encoder_decoder_configs(
        encoder.config, decoder.config, **special, decoder_start_token_id=special["bos_token_id"]
    )
    return _generates_at_most(EncoderDecoderModel(both, encoder, decoder), cfg.max_target_length)


def _new_decoder(cfg: Any, special: dict[str, int], vocab_size: int) -> PreTrainedModel:
    if cfg.hidden_size % cfg.num_heads:
        raise UserError(f"hidden_size {cfg.hidden_size} is no multiple of num_heads {cfg.num_heads}")
    config = GPT2Config(
        vocab_size=vocab_size, n_embd=cfg.hidden_size, n_layer=cfg.num_layers, n_head=cfg.num_heads,
        n_inner=cfg.intermediate_size, n_positions=cfg.max_target_length + 1, **special,
        add_cross_attention=True, initializer_range=_deviation(cfg),
    )  # fmt: skip
    return GPT2LMHeadModel(set_dropout(config, 0.0))


def _pretrained_decoder(cfg: Any) -> PreTrainedModel:
    """Rothe et al. 2020: the weights of cfg.decoder, an encoder or a decoder.

    New are its attention to the source and, if it was saved without, its output layer.
    """
    return load_weights(AutoModelForCausalLM, cfg.decoder, _config_of_decoder(cfg), cfg.trust_remote_code)


def _config_of_decoder(cfg: Any) -> PretrainedConfig:
    config = load_config(cfg.decoder, 0.0, cfg.trust_remote_code, is_decoder=True, add_cross_attention=True)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    attends = model_class is not None and "encoder_hidden_states" in inspect.signature(model_class.forward).parameters
    if config.is_encoder_decoder or not attends:
        raise UserError(
            f"decoder {cfg.decoder}: its architecture, {config.model_type}, cannot attend to an encoder; "
            "take a BERT, a RoBERTa or a GPT-2, say"
        )
    return config


def _generates_at_most(model: PreTrainedModel, tokens: int) -> PreTrainedModel:
    """A new model whose export generates so many tokens, for which its decoder has positions, unless it is asked for
    fewer."""
    model.generation_config.max_new_tokens = tokens
    return model


def decoder_start(model: PreTrainedModel) -> int:
    """The token that a decoder reads first."""
    token = getattr(model.config, "decoder_start_token_id", None)
    if token is None:
        token = model.generation_config.decoder_start_token_id
    if token is None:
        raise UserError(
            f"{type(model).__name__}: neither its config nor its generation config says the decoder_start_token_id; "
            "add it there"
        )
    return int(token)
