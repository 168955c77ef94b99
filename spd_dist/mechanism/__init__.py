"""Whether the capability subspace carries correctness: held-out answers' likelihood under it and under its controls."""
