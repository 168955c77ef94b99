"""What runs in the process of vLLM, by an interpreter that has it: nothing of this package is imported there."""
