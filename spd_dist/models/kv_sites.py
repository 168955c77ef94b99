"""Find where the keys and values of an architecture come from: `KVSite`s, by layer.

Keys and values are taken at the output of the linear module that makes them: before any normalisation and RoPE, where
they can be projected in every engine and folded into the weights.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from spd_dist.errors import DataError
from spd_dist.models.kv_tracing import Origin, output_width, trace_origins
from spd_dist.models.lora import base_model
from spd_dist.types import Kind, KVSite

logger = logging.getLogger(__name__)

Layers = Sequence[int | Literal["middle", "last"]]
KINDS: Mapping[str, tuple[Kind, ...]] = {"both": ("key", "value"), "key": ("key",), "value": ("value",)}


class SiteModule(NamedTuple):
    """A linear module that makes keys or values, and what has them from it."""

    origin: Origin
    module: str


def discover_sites(
    model: PreTrainedModel | PeftModel,
    layers: Layers = ("middle", "last"),
    kinds: Literal["both", "key", "value"] = "both",
    *,
    whole_keys: bool = False,
    setting: str = "calibrate.layers",
) -> list[KVSite]:
    """The keys and values of `layers`, sorted by layer and kind.

    Args:
        model: a causal LM, plain or with adapters, whole or sharded; its weights are not touched.
        layers: zero-based indices in the full model; "middle" and "last" of those layers that make keys and values.
        kinds: keys, values or both.
        whole_keys: refuse keys of which the site holds only a part. Multi-head latent attention makes their RoPE part
            in another module than the rest.
        setting: the key that names the layers, for what is said of them.

    Raises:
        DataError: no attention, or a layer from which these kinds can't be taken; it names the usable layers.
    """
    base = base_model(model) if isinstance(model, PeftModel) else model
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is base)
    sources, reasons = _sources_by_layer(trace_origins(base), whole_keys)
    usable = sorted(layer for layer, found in sources.items() if all(kind in found for kind in KINDS[kinds]))
    chosen = _choose(layers, usable, reasons, type(base).__name__, setting)
    sites = [_site(sources[layer][kind], base) for layer in chosen for kind in KINDS[kinds]]
    sites = [site for site in sites if not _is_repeated(site, sites)]
    logger.info(
        "%s: %s are layers %s of %d that make keys and values: %s",
        setting, list(layers), chosen, len(usable), ", ".join(site.module for site in sites),
    )  # fmt: skip
    return sorted(replace(site, module=prefix + site.module) for site in sites)


def _sources_by_layer(
    origins: Iterable[Origin], whole_keys: bool
) -> tuple[dict[int, dict[Kind, SiteModule]], dict[int, str]]:
    """What can be taken where, and why not elsewhere."""
    sources: dict[int, dict[Kind, SiteModule]] = {}
    reasons: dict[int, str] = {}
    for origin in origins:
        layer = _layer_index(origin.reader)
        reason = _obstacle(origin, layer, whole_keys)
        if origin.kind in sources.get(layer, {}):
            reason = f"it takes its {origin.kind}s several times"
        if reason is None:
            sources.setdefault(layer, {})[origin.kind] = SiteModule(origin, _main_module(origin))
        else:
            reasons.setdefault(layer, reason)
    for layer in reasons:
        sources.pop(layer, None)
    return sources, reasons


def _obstacle(origin: Origin, layer: int, whole_keys: bool) -> str | None:
    """Why these keys or values can't be taken, if so."""
    modules = sorted(origin.leaves)
    if not modules:
        return f"no linear module puts out its {origin.kind}s"
    main = _main_module(origin)
    if _layer_index(main) != layer:
        return f"it reads the {origin.kind}s of layer {_layer_index(main)}"
    for module in modules:
        if len(origin.leaves[module]) > 1:
            return f"{_in_layer(module)} runs {len(origin.leaves[module])} times in a forward pass"
    in_parts = torch.stack([origin.states_of(module).int() for module in modules]).sum(0).max() == 1
    if len(modules) > 1 and (whole_keys or origin.kind == "value" or not in_parts):
        return f"its {origin.kind}s come from several modules, {' and '.join(map(_in_layer, modules))}"
    return None


def _main_module(origin: Origin) -> str:
    """The module that puts out the most of it. MLA: `kv_b_proj`, without the keys' RoPE part, that all heads share."""
    return max(origin.leaves, key=origin.num_features)


def _layer_index(name: str) -> int:
    """The first number in a dotted name; -1 outside of all layers."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def _in_layer(name: str) -> str:
    """What follows the layer's index in a dotted name."""
    return name.partition(f".{_layer_index(name)}.")[2] or name


def _choose(layers: Layers, usable: list[int], reasons: Mapping[int, str], name: str, setting: str) -> list[int]:
    if not usable:
        layers_by_reason: dict[str, list[int]] = {}
        for layer, reason in sorted(reasons.items()):
            layers_by_reason.setdefault(reason, []).append(layer)
        detail = "; ".join(f"layers {where}: {reason}" for reason, where in layers_by_reason.items())
        raise DataError(
            f"model.name: {name} has no layer to take keys and values from ({detail or 'it has no attention'}); "
            f"usable layers: none; choose a model with attention"
        )
    named = {"middle": usable[len(usable) // 2], "last": usable[-1]}
    chosen = sorted({layer if isinstance(layer, int) else named[layer] for layer in layers})
    for layer in chosen:
        if layer not in usable:
            reason = reasons.get(layer, "there is no attention at that index")
            raise DataError(
                f"{setting}: keys and values can't be taken from layer {layer} of {name}: {reason}; "
                f"usable layers: {usable}"
            )
    return chosen


def _site(source: SiteModule, model: PreTrainedModel) -> KVSite:
    """The columns of the module, KV head after KV head; they must be there in the model itself."""
    origin, module = source
    by_head = origin.features(module)
    heads = list(dict.fromkeys(features for features in by_head if features))  # heads that share are counted once
    features, num_heads = [feature for head in heads for feature in head], len(heads)
    if max(map(len, heads)) > origin.states_HD.shape[1]:  # a norm over all heads: each is made of every feature
        features, num_heads = sorted(set(features)), len(by_head)
    width = output_width(model.get_submodule(module))
    if width is None or width <= max(features):
        raise DataError(
            f"model.name: {module} puts out {width} features, but by the model's config {origin.kind}s lie up to "
            f"{max(features)}; the module does not fit the config"
        )
    if module.rsplit(".", 1)[-1] == ("v_proj" if origin.kind == "key" else "k_proj"):
        logger.warning("%s makes the %ss of its layer, whatever its name says", module, origin.kind)
    return KVSite(_layer_index(module), origin.kind, module, _ranges(features), num_heads)


def _ranges(features: Iterable[int]) -> tuple[tuple[int, int], ...]:
    ranges: list[tuple[int, int]] = []
    for feature in features:
        if ranges and ranges[-1][1] == feature:
            ranges[-1] = (ranges[-1][0], feature + 1)
        else:
            ranges.append((feature, feature + 1))
    return tuple(ranges)


def _is_repeated(site: KVSite, sites: Sequence[KVSite]) -> bool:
    """Whether these values are the same outputs as the keys: one site, or they would be projected twice."""
    return site.kind == "value" and replace(site, kind="key") in sites
