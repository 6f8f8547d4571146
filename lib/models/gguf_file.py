"""A language model as one GGUF file, for llama.cpp and what is built on it.

It writes what llama.cpp's convert_hf_to_gguf.py writes, for Llama and Qwen models with byte-level BPE tokenizers, and
refuses what it does not know: a file that loads and then answers wrongly is worse than none.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib.errors import UserError

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
DTYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
LLAMA3_SPLIT, QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    + numbers
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for numbers in ("{1,3}", "")
)
REMEDY = (
    "llama.cpp's convert_hf_to_gguf.py may know it (of a LoRA run, ./launch.sh merge writes the model folder it takes)"
)


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, dtype: str, name: str) -> None:
    """Write the model with its tokenizer and chat template.

    dtype: of the matrices, one of DTYPES; other weights are fp32. Raises UserError where llama.cpp would read the file
    as something else.
    """
    check(model.config.to_dict())
    kind, file_type = DTYPES[dtype]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[model.config.model_type]])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_config(writer, model.config)
    _add_tokenizer(writer, tokenizer, rows=model.get_input_embeddings().weight.shape[0])
    _add_end_of_turn(writer, model, tokenizer)
    _add_weights(writer, model, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check(config: dict[str, Any]) -> None:
    """Raise a UserError where a model with this config cannot be written."""
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise UserError(f"a model of type {kind} is not written as GGUF ({', '.join(ARCHITECTURES)} are); {REMEDY}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    usual = {
        "hidden_act": config.get("hidden_act", "silu") == "silu",
        "attention_bias": not config.get("attention_bias"),
        "mlp_bias": not config.get("mlp_bias"),
        "use_sliding_window": not config.get("use_sliding_window"),
        "rope_type": rope.get("rope_type", rope.get("type", "default")) == "default",
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1) == 1,
        "quantization_config": not config.get("quantization_config"),
    }
    for key, is_usual in usual.items():
        if not is_usual:
            raise UserError(f"a {kind} model with {key} {config.get(key, rope.get(key))} is not written; {REMEDY}")


def _add_config(writer: gguf.GGUFWriter, config: Any) -> None:
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def pre_tokenizer_name(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name for the way in which a tokenizer cuts a text into words before BPE.

    tokenizer: a tokenizer.json. llama.cpp has the regular expressions in its code, by name. Raises UserError for a
    tokenizer that it would not read as it is.
    """
    bpe, before = tokenizer["model"], tokenizer["pre_tokenizer"] or {}
    steps = before.get("pretokenizers", [before])
    # {what the steps are: name}. ByteLevel has GPT-2's regular expression, unless use_regex is off.
    byte_level = [step.get("use_regex", True) for step in steps if step["type"] == "ByteLevel"]
    cuts = [step for step in steps if step["type"] != "ByteLevel"]
    name = None
    if byte_level == [True] and not cuts:
        name = "gpt-2"
    elif byte_level == [True] and [(cut["type"], cut.get("individual_digits")) for cut in cuts] == [("Digits", True)]:
        name = "smollm"
    elif byte_level == [False] and len(cuts) == 1 and cuts[0]["type"] == "Split" and cuts[0]["behavior"] == "Isolated":
        name = {LLAMA3_SPLIT: "llama-bpe", QWEN2_SPLIT: "qwen2"}.get(cuts[0]["pattern"].get("Regex"))
    normalizer = (tokenizer.get("normalizer") or {}).get("type")
    strips = [
        token["content"] for token in tokenizer["added_tokens"] if token["lstrip"] or token["rstrip"]
    ]  # llama.cpp has no such tokens
    if (
        name is None
        or bpe["type"] != "BPE"
        or bpe.get("byte_fallback")
        or bpe.get("continuing_subword_prefix")
        or bpe.get("end_of_word_suffix")
        or normalizer not in (None, "NFC")  # llama.cpp leaves NFC out, as for Qwen
        or any(step.get("add_prefix_space") for step in steps)
        or strips
    ):
        raise UserError(f"llama.cpp's name for this tokenizer's pre-tokenizer is not known here; {REMEDY}")
    return name


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """rows: of the embeddings, of which there may be more than tokens."""
    as_json = json.loads(tokenizer.backend_tokenizer.to_str())
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")  # which stands for byte-level BPE
    writer.add_tokenizer_pre(pre_tokenizer_name(as_json))
    writer.add_token_list([names.get(number, f"[PAD{number}]") for number in range(rows)])
    writer.add_token_types(
        [
            (kinds.CONTROL if added[number].special else kinds.USER_DEFINED)
            if number in added
            else kinds.NORMAL
            if number in names
            else kinds.UNUSED
            for number in range(rows)
        ]
    )
    merges = as_json["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_add_space_prefix(False)
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    writer.add_add_bos_token(whole[: -len(plain)] == [tokenizer.bos_token_id])
    if whole[-1:] != plain[-1:] or len(whole) - len(plain) > 1 or whole[-len(plain) :] != plain:
        raise UserError(f"this tokenizer puts more than a begin-of-text token around a text; {REMEDY}")
    for add, number in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if number is not None:
            add(number)
    if isinstance(tokenizer.chat_template, dict):  # several, by name
        writer.add_chat_template(
            [{"name": name, "template": template} for name, template in tokenizer.chat_template.items()]
        )
    elif tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _add_end_of_turn(writer: gguf.GGUFWriter, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Name the token that ends an answer, where it is another one than the end of a text."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    others = [end for end in (ends if isinstance(ends, list) else [ends]) if end not in (None, tokenizer.eos_token_id)]
    if others:
        writer.add_eot_token_id(others[0])


def _add_weights(writer: gguf.GGUFWriter, model: PreTrainedModel, kind: gguf.GGMLQuantizationType) -> None:
    config = model.config
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp takes the embeddings
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise UserError(f"GGUF has no name for the weight {name}; {REMEDY}")
        weights = tensor.detach().float().cpu().numpy()
        if config.model_type == "llama" and ".self_attn.q_proj." in name:
            weights = _interleaved(weights, config.num_attention_heads)
        elif config.model_type == "llama" and ".self_attn.k_proj." in name:
            weights = _interleaved(weights, config.num_key_value_heads)
        chosen = kind if weights.ndim == 2 else gguf.GGMLQuantizationType.F32
        if chosen == gguf.GGMLQuantizationType.Q8_0 and weights.shape[-1] % 32:  # it has blocks of 32 numbers
            chosen = gguf.GGMLQuantizationType.F16
        writer.add_tensor(target, gguf.quantize(weights, chosen), raw_dtype=chosen)


def _interleaved(weights: np.ndarray, heads: int) -> np.ndarray:
    """The rows of each head in the order 0, n/2, 1, n/2 + 1, ...

    Rotary positions turn pairs of rows: transformers pairs row i with row i + n/2, llama.cpp row 2i with row 2i + 1.
    """
    return weights.reshape(heads, 2, weights.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weights.shape)
