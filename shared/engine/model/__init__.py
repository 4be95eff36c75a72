"""The networks: a causal Wan DiT with a rolling KV cache, and streaming autoencoders. Needs torch."""
