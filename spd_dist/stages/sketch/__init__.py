"""Stage 2, sketch: fold a stream of gradient rows into a state of fixed size, with a certificate of what it lost.

frequent_directions.py  which form a site's sketch takes, and why; its two updates; all sites of one width at once
shard.py                the state of one logical shard, and its file
sketch_rows.py          the stage, and what a stopped attempt leaves for the next
"""

from spd_dist.stages.sketch.frequent_directions import SketchPlan, plan_sketches
from spd_dist.stages.sketch.shard import ShardSketch, load_sketches, save_sketches
from spd_dist.stages.sketch.sketch_rows import ShardPlan, Unfinished, sketch

__all__ = [
    "ShardPlan", "ShardSketch", "SketchPlan", "Unfinished", "load_sketches", "plan_sketches", "save_sketches",
    "sketch",
]  # fmt: skip
