"""Stage 3, reduce: sum the sketches of every logical shard, each site at the rank that owns it.

Shapes: D width of a site; flat tensors have no suffix.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import astuple, fields

import torch
import torch.distributed as dist
from torch import Tensor

from spd_dist.config import Reduce
from spd_dist.distributed.collectives import collective_device, together
from spd_dist.distributed.world import World
from spd_dist.errors import DataError
from spd_dist.types import Certificate, KVSite, SiteMoments, record_of

log = logging.getLogger(__name__)

NUM_CERTIFIED = len(fields(Certificate))


def reduce(
    sketches: Mapping[int, Mapping[KVSite, SiteMoments]],
    sites: Sequence[KVSite],
    config: Reduce,
    *,
    num_shards: int,
    world: World,
) -> dict[KVSite, SiteMoments]:
    """The moments over every rank's rows, of the sites that this rank owns: each `world.size`-th in sorted order.

    Owners get one float64 Gram matrix a shard and add them in shard order, without a further shrink. So no error is
    added to that of the sketches, certificates add up, and the result has the same bits at every world size. As many
    sites as ranks, and one shard of each rank, are on the way at a time. A collective.

    Args:
        sketches: shard -> moments of every site, for the shards that this rank owns: s with s % world.size == rank.
            Shards without examples may be absent.
        sites: every site, on every rank.
        config: how exactly energies must add up.
        num_shards: logical shards of the whole run.
        world: this rank.

    Raises:
        DataError: on all ranks at once: a shard at the wrong rank, or a site whose energy in is not energy kept + lost.
    """
    with together("reducing the sketches"):
        _check_shards(sketches, num_shards, world)
    ordered, owned = sorted(sites), {}
    for start in range(0, len(ordered), world.size):
        in_flight = ordered[start : start + world.size]
        summed = _exchange(sketches, in_flight, num_shards, world)
        if world.rank < len(in_flight):
            owned[in_flight[world.rank]] = summed
    with together("checking the energy of the sketches"):
        for site, moments in owned.items():
            _check_energy(site, moments, config)
    return owned


def _exchange(
    sketches: Mapping[int, Mapping[KVSite, SiteMoments]], in_flight: Sequence[KVSite], num_shards: int, world: World
) -> SiteMoments:
    """Send each owner its site's moments of my shards; the sum over all shards of the site that I own, if any.

    Shard s is rank s % world.size's: of a round, one of each rank, the next shards arrive in their order.
    """
    numels = [_numel(site.width) for site in in_flight] + [0] * (world.size - len(in_flight))
    device = torch.device("cpu") if world.size == 1 else collective_device()
    total = torch.zeros(numels[world.rank], dtype=torch.float64, device=device)
    for first in range(0, num_shards, world.size):
        num_sending = min(world.size, num_shards - first)
        is_sending = world.rank < num_sending
        parts = [_packed(sketches, first + world.rank, site).to(device) for site in in_flight if is_sending]
        received = _all_to_all(
            torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64, device=device),
            sent=[numel * is_sending for numel in numels],
            received=[numels[world.rank] * (rank < num_sending) for rank in range(world.size)],
            world=world,
        )
        for of_shard in received.view(num_sending, len(total)):
            total += of_shard
    return _unpacked(total, in_flight[world.rank].width if world.rank < len(in_flight) else 0)


def _all_to_all(outgoing: Tensor, *, sent: list[int], received: list[int], world: World) -> Tensor:
    if world.size == 1:
        return outgoing
    incoming = outgoing.new_empty(sum(received))
    dist.all_to_all_single(incoming, outgoing, received, sent)
    return incoming


def _numel(width: int) -> int:
    return width * width + width + NUM_CERTIFIED


def _packed(sketches: Mapping[int, Mapping[KVSite, SiteMoments]], shard: int, site: KVSite) -> Tensor:
    if shard not in sketches:
        return torch.zeros(_numel(site.width), dtype=torch.float64)
    moments = sketches[shard][site]
    certified = moments.gram_DD.new_tensor(astuple(moments.certificate))
    return torch.cat([moments.gram_DD.flatten(), moments.sum_D, certified])


def _unpacked(total: Tensor, width: int) -> SiteMoments:
    """The moments that `total` holds, on the CPU, where project needs them."""
    gram, sum_D, certified = total.cpu().split([width * width, width, len(total) - width * width - width])
    typed = zip(fields(Certificate), certified.tolist(), strict=False)
    counts = {field.name: int(value) if field.type == "int" else value for field, value in typed}
    return SiteMoments(gram.view(width, width).clone(), sum_D.clone(), record_of(Certificate, counts))


def _check_shards(sketches: Mapping[int, object], num_shards: int, world: World) -> None:
    owned = range(world.rank, num_shards, world.size)
    for shard in sorted(sketches):
        if shard not in owned:
            raise DataError(
                f"rank {world.rank} of {world.size} holds shard {shard}, and owns {list(owned)} of {num_shards} "
                "shards; read the examples of each rank by calibrate.num_shards"
            )


def _check_energy(site: KVSite, moments: SiteMoments, config: Reduce) -> None:
    """Energy that came in must be energy kept plus energy lost: three numbers that were summed independently."""
    certificate = moments.certificate
    kept = moments.gram_DD.trace().item()
    gap = abs(certificate.energy - kept - certificate.lost_energy)
    if not gap <= config.energy_tolerance * certificate.energy:
        raise DataError(
            f"{site}: the sketch lost track of its energy: in {certificate.energy:.9g}, kept {kept:.9g}, lost "
            f"{certificate.lost_energy:.9g}, and the gap may be {config.energy_tolerance:.1e} of it "
            "(reduce.energy_tolerance); a device that multiplies wrongly, or a damaged sketch state: calibrate again"
        )
    log.info("reduce: %s: %d rows, energy %.6g", site, certificate.num_rows, certificate.energy)
