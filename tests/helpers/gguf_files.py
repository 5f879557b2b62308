"""GGUF files made from a Hugging Face folder, by llama.cpp's conventions, and vocabularies to go with them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import gguf
import torch
from safetensors import safe_open
from swarmnode.kernels.loading.gguf_model import block_names

SPM_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "[mm]"]
CONTROL, USER_DEFINED, BYTE, NORMAL = 3, 4, 6, 1


def write_gguf(
    path: Path, folder: Path, architecture: str, *, matrix_type: str = "F32", table_type: str = "F32", extra=()
) -> Path:
    """Convert as convert_hf_to_gguf does: permuted rotary rows (llama), norms plus one (gemma), own names."""
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
    family = "gemma3" if architecture == "gemma3" else "llama"
    theirs = block_names(family)
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in sorted(file.keys()):
            tensor = _converted(name, file.get_tensor(name).float(), architecture, config)
            kind = "F32"
            if tensor.dim() > 1:
                kind = table_type if "embed" in name or "lm_head" in name else matrix_type
            quantization = gguf.GGMLQuantizationType[kind]
            stored = gguf.quantize(tensor.contiguous().numpy(), quantization)
            writer.add_tensor(_gguf_name(name, theirs), stored, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_config(writer, architecture, config):
    keys = {
        "block_count": "num_hidden_layers",
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim",
        "attention.sliding_window": "sliding_window",
    }
    for key, name in keys.items():
        if config.get(name) is not None:
            writer.add_uint32(f"{architecture}.{key}", config[name])
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", config["rms_norm_eps"])
    rope = config.get("rope_parameters", {})
    writer.add_float32(f"{architecture}.rope.freq_base", rope.get("full_attention", rope)["rope_theta"])


def _converted(name, tensor, architecture, config):
    if architecture == "gemma3" and name.endswith("norm.weight"):
        return tensor + 1
    if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
        heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape)
    return tensor


def _gguf_name(name, theirs):
    fixed = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in fixed:
        return fixed[name]
    _, _, index, rest = name.split(".", 3)
    stem, _, suffix = rest.rpartition(".")
    return f"blk.{index}.{theirs[stem]}.{suffix}"


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
