"""What decodes: one seam, several engines, and each is shown to run the projected policy before it is trusted."""

from spd_dist.models.engines.choice import Engine, open_engine

__all__ = ["Engine", "open_engine"]
