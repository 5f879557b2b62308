"""Weight quantization: row-exact int8 and NF4."""
