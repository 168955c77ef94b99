"""Stage 2, sketch: fold a stream of gradient rows into a state of fixed size, with a certificate of what it lost.

plan.py                 which form a site's sketch takes, and why
frequent_directions.py  the two updates: add an outer product, shrink a stack of rows
group.py                the state of all sites of one width
shard.py                the state of one logical shard, and its file
unfinished.py           what a stopped attempt leaves for the next
stream.py               the stage
"""

from spd_dist.stages.sketch.frequent_directions import SketchPlan, plan_sketches
from spd_dist.stages.sketch.shard import ShardSketch, load_sketches, save_sketches
from spd_dist.stages.sketch.sketch_rows import Unfinished, sketch

__all__ = ["ShardSketch", "SketchPlan", "Unfinished", "load_sketches", "plan_sketches", "save_sketches", "sketch"]
