"""Find where the keys and values of an architecture come from: `KVSite`s, by layer.

Keys and values are taken at the output of the linear module that makes them: before any normalisation and RoPE, where
they can be projected in every engine and folded into the weights.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from spd_dist.errors import DataError
from spd_dist.models.dye import Origin, output_width, trace_origins
from spd_dist.types import Kind, KVSite

logger = logging.getLogger(__name__)

Layers = Sequence[int | Literal["middle", "last"]]
KINDS: Mapping[str, tuple[Kind, ...]] = {"both": ("key", "value"), "key": ("key",), "value": ("value",)}


def discover_sites(
    model: nn.Module,
    layers: Layers = ("middle", "last"),
    kinds: Literal["both", "key", "value"] = "both",
    *,
    whole_keys: bool = False,
) -> list[KVSite]:
    """The keys and values of `layers`, sorted by layer and kind.

    Args:
        model: a causal LM, plain or with adapters, whole or sharded; its weights are not touched.
        layers: zero-based indices in the full model; "middle" and "last" of those layers that make keys and values.
        kinds: keys, values or both.
        whole_keys: refuse keys of which the site holds only a part. Multi-head latent attention makes their RoPE part
            in another module than the rest.

    Raises:
        DataError: no attention, or a layer from which these kinds can't be taken; it names the usable layers.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    prefix = next(name for name, module in model.named_modules() if module is base)
    found, reasons = _sites_by_layer(trace_origins(base), whole_keys)
    usable = {
        layer: [sites[kind] for kind in KINDS[kinds]]
        for layer, sites in sorted(found.items())
        if all(kind in sites for kind in KINDS[kinds])
    }
    chosen = _choose(layers, list(usable), reasons, base)
    sites = [_checked(site, base, prefix) for layer in chosen for site in usable[layer]]
    logger.info(
        "calibrate.layers: %s -> %s, among the %d layers that make keys and values (%s)",
        list(layers), chosen, len(usable), ", ".join(site.module for site in sites),
    )  # fmt: skip
    return sorted(sites)


def _sites_by_layer(
    origins: Iterable[Origin], whole_keys: bool
) -> tuple[dict[int, dict[Kind, KVSite]], dict[int, str]]:
    """What can be taken where, and why not elsewhere."""
    found: dict[int, dict[Kind, KVSite]] = {}
    reasons: dict[int, str] = {}
    for origin in origins:
        reader = _layer_index(origin.reader)
        site = _site(origin)
        if site is None:
            reasons[reader] = f"no linear module puts out its {origin.kind}s"
        elif site.layer != reader:
            reasons[reader] = f"it reads the {origin.kind}s of layer {site.layer}"
        elif origin.num_calls > 1:
            reasons[reader] = f"{site.module} runs {origin.num_calls} times in a forward pass"
        elif origin.kind == "key" and whole_keys and len(origin.head_slots) > 1:
            reasons[reader] = f"its keys come from several modules, {' and '.join(sorted(origin.head_slots))}"
        else:
            found.setdefault(reader, {})[origin.kind] = site
    return found, reasons


def _site(origin: Origin) -> KVSite | None:
    """The module that puts out the most of it. MLA: `kv_b_proj`, which leaves out the keys' shared RoPE part."""
    if not origin.head_slots:
        return None
    widths = {name: len(set().union(*slots)) for name, slots in origin.head_slots.items()}
    module = max(widths, key=widths.__getitem__)
    heads = list(dict.fromkeys(slots for slots in origin.head_slots[module] if slots))  # shared heads are counted once
    features, num_heads = [feature for head in heads for feature in head], len(heads)
    if max(map(len, heads)) > origin.head_width:  # a norm over all heads mixes them: each is made of every feature
        features, num_heads = sorted(set(features)), len(origin.head_slots[module])
    return KVSite(_layer_index(module), origin.kind, module, _ranges(features), num_heads)


def _layer_index(name: str) -> int:
    return int(re.search(r"\d+", name)[0])


def _ranges(features: Iterable[int]) -> tuple[tuple[int, int], ...]:
    ranges: list[tuple[int, int]] = []
    for feature in features:
        if ranges and ranges[-1][1] == feature:
            ranges[-1] = (ranges[-1][0], feature + 1)
        else:
            ranges.append((feature, feature + 1))
    return tuple(ranges)


def _choose(layers: Layers, usable: list[int], reasons: Mapping[int, str], model: PreTrainedModel) -> list[int]:
    if not usable:
        detail = "; ".join(f"layer {layer}: {reason}" for layer, reason in sorted(reasons.items()))
        raise DataError(
            f"model.name: {type(model).__name__} has no layer that makes keys and values "
            f"({detail or 'it has no attention'}); choose a model with attention"
        )
    named = {"middle": usable[len(usable) // 2], "last": usable[-1]}
    chosen = sorted({named.get(layer, layer) for layer in layers})
    for layer in chosen:
        if layer not in usable:
            reason = reasons.get(layer, "it has no attention, or is not there at all")
            raise DataError(
                f"calibrate.layers: keys and values can't be taken from layer {layer} of {type(model).__name__}: "
                f"{reason}; usable layers: {usable}"
            )
    return chosen


def _checked(site: KVSite, model: PreTrainedModel, prefix: str) -> KVSite:
    """The site with its name in the outer model; a name that says another kind is worth a warning, no more."""
    width = output_width(model.get_submodule(site.module))
    if width is None or width < site.columns[-1][1]:
        raise DataError(
            f"model.name: {site.module} should put out keys or values, but its width is {width}: no linear module"
        )
    other = "v_proj" if site.kind == "key" else "k_proj"
    if site.module.rsplit(".", 1)[-1] == other:
        logger.warning("%s is made by %s, whatever its name says", site, site.module)
    module = f"{prefix}.{site.module}" if prefix else site.module
    return KVSite(site.layer, site.kind, module, site.columns, site.num_heads)
