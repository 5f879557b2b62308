"""Checkpoints on disk: safetensors and GGUF, manifests, tokenizers."""
