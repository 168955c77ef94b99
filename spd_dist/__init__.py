"""Self-Policy Distillation (arXiv 2605.22675), distributed: a model learns from what it generates in its own capability subspace."""
