"""GGUF files made from a Hugging Face folder, by llama.cpp's conventions, and vocabularies to go with them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import gguf
import torch
from safetensors import safe_open

SPM_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "[mm]"]
CONTROL, USER_DEFINED, BYTE, NORMAL = 3, 4, 6, 1


PAIRED = ("llama", "mistral", "granite", "smollm3")
"""Architectures whose converters put rotary rows into pairs."""


def write_gguf(
    path: Path, folder: Path, architecture: str, *, matrix_type: str = "F32", table_type: str = "F32", extra=()
) -> Path:
    """Convert as convert_hf_to_gguf does; names are those of the gguf package."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_uint32("general.file_type", 0)
    _write_config(writer, architecture, config)
    for key, value in extra:
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - no mapping
    for name, tensor in sorted(_converted(tensors, architecture, config).items()):
        kind = "F32"
        if tensor.dim() > 1 and "ffn_gate_inp" not in name:
            kind = table_type if name in ("token_embd.weight", "output.weight") else matrix_type
        quantization = gguf.GGMLQuantizationType[kind]
        stored = gguf.quantize(tensor.contiguous().numpy(), quantization)
        writer.add_tensor(name, stored, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


INTEGERS = {
    "block_count": ("num_hidden_layers", "n_layer"),
    "context_length": ("max_position_embeddings", "seq_length"),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("ffn_hidden_size", "intermediate_size"),
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.key_length": ("head_dim",),
    "attention.sliding_window": ("sliding_window",),
    "expert_count": ("num_local_experts", "num_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "rope.scaling.original_context_length": ("original_max_position_embeddings",),
}
FLOATS = {
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon"),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "attention.scale": ("attention_multiplier",),
    "embedding_scale": ("embedding_multiplier",),
    "residual_scale": ("residual_multiplier",),
    "logit_scale": ("logits_scaling",),
}


def _write_config(writer, architecture, config):
    def first(names):
        return next((config[name] for name in names if config.get(name) is not None), None)

    for key, names in INTEGERS.items():
        if (value := first(names)) is not None:
            writer.add_uint32(f"{architecture}.{key}", value)
    for key, names in FLOATS.items():
        if (value := first(names)) is not None:
            writer.add_float32(f"{architecture}.{key}", value)
    heads = first(INTEGERS["attention.head_count"])
    writer.add_uint32(f"{architecture}.attention.head_count_kv", _kv_heads(architecture, config) or heads)
    if "use_parallel_residual" in config:
        writer.add_bool(f"{architecture}.use_parallel_residual", config["use_parallel_residual"])
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    if "rope_theta" in rope:
        writer.add_float32(f"{architecture}.rope.freq_base", rope["rope_theta"])
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    width = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_uint32(f"{architecture}.rope.dimension_count", int(width * (share or 1)))


def _kv_heads(architecture, config):
    if architecture == "falcon":
        return config["num_kv_heads"] if config["new_decoder_architecture"] else 1 if config["multi_query"] else None
    return None if architecture in ("gptneox", "bloom") else config.get("num_key_value_heads")


def _converted(tensors, architecture, config):
    """Stored tensors by GGUF's names."""
    known = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items() if name != "rwkv6"}
    arch = known.get(architecture, gguf.MODEL_ARCH.LLAMA)
    names = gguf.get_tensor_name_map(arch, 8)
    found = {}
    for name, tensor in _stacked(tensors).items():
        name = name.removeprefix("transformer.") if architecture == "bloom" else name
        spelled = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert spelled is not None, f"the gguf package knows no name for {name}"
        found[spelled] = _moved(name, tensor, architecture, config)
    rope = config.get("rope_parameters") or {}
    for length in ("long", "short"):
        if f"{length}_factor" in rope:
            found[f"rope_factors_{length}.weight"] = torch.tensor(rope[f"{length}_factor"])
    return found


def _stacked(tensors):
    """The experts of a block as one tensor each."""
    found, planes = {}, {}
    for name, tensor in tensors.items():
        head, expert, rest = name.partition(".experts.")
        number, _, part = rest.partition(".")
        if expert:
            planes.setdefault(f"{head}.experts.{part}", {})[int(number)] = tensor
        else:
            found[name] = tensor
    return found | {name: torch.stack([each[n] for n in sorted(each)]) for name, each in planes.items()}


def _moved(name, tensor, architecture, config):
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return tensor + 1
    if architecture in PAIRED and ("q_proj" in name or "k_proj" in name):
        heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape)
    if "query_key_value" in name:
        heads = config.get("num_attention_heads") or config["n_head"]
        kv_heads = _kv_heads(architecture, config) or heads
        groups = tensor.reshape(kv_heads, heads // kv_heads + 2, -1, *tensor.shape[1:])
        parts = (groups[:, :-2], groups[:, -2], groups[:, -1])
        return torch.cat([part.reshape(-1, *tensor.shape[1:]) for part in parts])
    if name.endswith("shared_expert_gate.weight"):
        return tensor[0]
    return tensor


def spm_vocabulary(words=("hello", "world", "the"), *, gemma=False):
    """A SentencePiece-like vocabulary: specials, 256 bytes, characters, and every prefix of some words."""
    pieces = dict.fromkeys(" ▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJ0123456789.,!?éß你好")
    pieces.pop(" ")
    for word in words:
        for spelled in (word, "▁" + word):
            pieces |= dict.fromkeys(spelled[:end] for end in range(2, len(spelled) + 1))
    spaces = ["  ", "   "] if gemma else ["▁▁", "▁▁▁"]
    tokens = [*SPM_TOKENS, *spaces, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    types = [CONTROL] * 4 + [USER_DEFINED] + [USER_DEFINED if gemma else NORMAL] * 2 + [BYTE] * 256
    types += [NORMAL] * (len(tokens) - len(types))
    return [
        ("tokenizer.ggml.model", "llama"),
        ("tokenizer.ggml.pre", "default"),
        ("tokenizer.ggml.tokens", tokens),
        ("tokenizer.ggml.scores", [-float(index) for index in range(len(tokens))]),
        ("tokenizer.ggml.token_type", types),
        ("tokenizer.ggml.bos_token_id", 2),
        ("tokenizer.ggml.eos_token_id", 1),
        ("tokenizer.ggml.unknown_token_id", 3),
        ("tokenizer.ggml.add_bos_token", True),
    ]


def byte_level_vocabulary(pre):
    """A GPT-2-like vocabulary: 256 byte letters and a few merges."""
    letters = byte_letters()
    # every token can be reached by merging, so that skipping merges (Llama 3) changes nothing here
    merges = ["Ġ t", "Ġt h", "Ġth e", "h e", "l l", "he ll", "hell o", "1 2", "12 3", "' s", "Ã ©", "Ġ Ġ"]
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*letters, *(merge.replace(" ", "") for merge in merges), *specials]
    return [
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.pre", pre),
        ("tokenizer.ggml.tokens", tokens),
        ("tokenizer.ggml.token_type", [NORMAL] * (len(tokens) - 3) + [CONTROL] * 3),
        ("tokenizer.ggml.merges", merges),
        ("tokenizer.ggml.eos_token_id", len(tokens) - 3),
        ("tokenizer.ggml.add_bos_token", False),
    ]


def byte_letters():
    """GPT-2's printable letter for each byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(hidden)) for byte in range(256)]


def random_strings(count, seed=0):
    """Texts of many scripts with emoji, joined characters, runs of spaces, control characters and contractions."""
    rng = random.Random(seed)
    alphabets = [
        "abcdefghijklmnopqrstuvwxyz",
        "ABCDEFGHIJ",
        "0123456789",
        "the hello world",
        ["é", "ß", "ñ", "ü", "ø", "œ"],
        "привет мир",
        "你好世界漢字",
        "こんにちは",
        "مرحبا",
        "שלום",
        "नमस्ते",
        "สวัสดี",
        "😀🤯👩‍👩‍👧🏳️‍🌈🇩🇪",
        "    ",
        "\n\n\t\r",
        ".,;:!?'\"-()[]{}<>/\\@#$%^&*_+=|~`",
        ["'s", "'ll", "don't", "I'VE"],
        ["<bos>", "<eos>", "<start_of_turn>", "<0x0A>", "<unused3>", "[multimodal]"],
        ["\u0000", "\u0007", "\u200b", "\u2028", "\ufeff", "\u0301", "▁", "�", "𝒳"],
    ]
    texts = []
    for _ in range(count):
        words = []
        for _ in range(rng.randrange(1, 9)):
            letters = list(rng.choice(alphabets))
            words.append("".join(rng.choice(letters) for _ in range(rng.randrange(1, 9))))
        texts.append(rng.choice(["", " ", "  ", "\n"]).join(words))
    return texts


def random_weights(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
