"""Verdicts: what of an output is its answer, and whether that equals the reference."""
