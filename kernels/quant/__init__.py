"""Weight quantization: row-exact int8, NF4, LLM.int8."""
