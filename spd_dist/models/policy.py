"""Load a policy: any Hugging Face causal LM by hub name, local folder or GGUF file; under ZeRO-3 its weights load sharded."""
