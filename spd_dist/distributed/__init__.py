"""Ranks: the world, collectives, ZeRO-3 and DeepSpeed engines."""
