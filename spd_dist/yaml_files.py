"""YAML files, read with a bound on how deep they nest: beyond it, the parser written in C ends the process."""

from __future__ import annotations

from pathlib import Path

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf

MAX_DEPTH = 100


def load_yaml(path: str | Path) -> DictConfig | ListConfig:
    """What a YAML file holds; numbers, texts, lists and mappings alone.

    Raises:
        yaml.YAMLError: it is not YAML, or nests deeper than `MAX_DEPTH`.
        OSError, UnicodeDecodeError, OmegaConfBaseException: as `OmegaConf.load`.
    """
    depth = 0
    text = Path(path).read_text(encoding="utf-8")
    for event in yaml.parse(text, Loader=yaml.SafeLoader):  # one event after the other: nothing is built yet
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise yaml.YAMLError(f"it nests deeper than {MAX_DEPTH} levels")
    return OmegaConf.load(path)
