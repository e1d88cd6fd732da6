"""A Llama-style language model on real text, trained in full precision or through the INT8 plugin."""
