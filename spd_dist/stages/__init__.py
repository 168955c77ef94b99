"""The method, one module a stage. A stage imports no other stage; `spd_dist.pipeline` joins them.

stage        takes                           gives
calibrate    policy, labelled examples       a stream of GradientBatch
sketch       a stream of GradientBatch       this rank's sketches, one a logical shard
reduce       this rank's sketches            SiteMoments of every rank's rows, each site at its owner
project      SiteMoments                     Subspace, and the Projection that generation applies
generate     policy, Projection, prompts     Completions
finetune     policy, Completions             a checkpoint or adapter
evaluate     checkpoints, tasks              Report
"""
