"""Hugging Face causal language models: loading, key and value sites, gradients at them, adapters, saving."""
