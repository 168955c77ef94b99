"""The policy writes its own training data: a raw completion a prompt and sample (paper, Eq. 12-13)."""

from spd_dist.stages.generate.complete_prompts import generate
from spd_dist.stages.generate.corpus_requests import prompts_folder, rendered_together
from spd_dist.stages.generate.merge_corpus import CorpusSummary

__all__ = ["CorpusSummary", "generate", "prompts_folder", "rendered_together"]
