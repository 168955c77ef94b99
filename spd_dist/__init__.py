"""Distributed Self-Policy Distillation: a model learns from what it writes in its own capability subspace."""
