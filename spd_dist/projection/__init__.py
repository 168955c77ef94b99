"""The projection at work: operators at a model's key and value sites, by hooks, in weights, and in exported files."""
