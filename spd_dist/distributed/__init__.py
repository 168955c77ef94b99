"""Ranks: the world, collectives, ZeRO-3 and DeepSpeed engines."""

import logging


def _is_news(record: logging.LogRecord) -> bool:
    """That there is no accelerator is said where it matters, and not by every command that imports DeepSpeed."""
    return "Setting accelerator to CPU" not in record.getMessage()


logging.getLogger("DeepSpeed").addFilter(_is_news)
