"""Sites of the tiny model, operators on them, and what tests ask of a model that is projected."""

from __future__ import annotations

import torch

from spd_dist.types import KVSite, Projection, SiteOperator

WIDTH = 16
TOKENS_BT = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(5))


def site(layer: int = 2, kind: str = "key", prefix: str = "model.") -> KVSite:
    name = f"{prefix}layers.{layer}.self_attn.{kind[0]}_proj"
    return KVSite(layer, kind, name, ((0, WIDTH),), num_heads=2)


def operator(rank: int = 6, keep: float = 0.0, weight: float = 1.0, seed: int = 0, width: int = WIDTH) -> SiteOperator:
    noise = torch.randn(width, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return SiteOperator(keep, torch.linalg.qr(noise).Q.float(), torch.full((rank,), weight))


def four_sites(rank: int = 6, **changes: object) -> Projection:
    sites = [site(layer, kind) for layer in (2, 3) for kind in ("key", "value")]
    return Projection({place: operator(rank, seed=index) for index, place in enumerate(sites)}, **changes)


def per_head(rank_per_head: int = 3) -> SiteOperator:
    blocks = [operator(rank_per_head, seed=head, width=WIDTH // 2).factor_DR for head in range(2)]
    return SiteOperator(0.0, torch.block_diag(*blocks), torch.ones(2 * rank_per_head))


def logits(model: torch.nn.Module, **options: object) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS_BT, **options).logits


def num_hooks(model: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
