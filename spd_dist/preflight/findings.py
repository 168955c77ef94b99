"""From the facts of all ranks to what is right, what is wrong, and where: a pure function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from spd_dist.preflight.facts import Facts, Meeting

_OF_CODE = "hash of the package's files, on every host the same; it is no git commit"
_OF_CONFIG = "hash of the settings that results depend on"


@dataclass(frozen=True)
class Finding:
    """A line of the table."""

    check: str
    is_right: bool
    where: str
    what: str


@dataclass(frozen=True)
class Needs:
    """What a run needs, and what is tolerated."""

    disk_gib: float = 5.0
    is_sharded: bool = True
    gigabytes_per_second: float = 0.0
    """The slowest all-reduce that is accepted."""
    skew_seconds: float = 1.0


def judge(facts: Sequence[Facts], meeting: Meeting | None, needs: Needs) -> list[Finding]:
    """Every check, in the order of the table: one line if it is right, one a place where it is wrong."""
    found = [
        *_same("code", facts, lambda one: one.code, "the same commit must be checked out on every host", _OF_CODE),
        *_same("python", facts, lambda one: one.python, "use one virtual environment"),
        *_same("packages", facts, _versions, "use one virtual environment"),
        *_same("config", facts, lambda one: one.config, "the hosts read different files or words", _OF_CONFIG),
        *_devices(facts),
        *_memory(facts, needs),
        *_disks(facts, needs),
        *_inputs(facts),
        *_sandboxes(facts),
    ]
    if meeting is not None and len(facts) > 1:
        found += [*_folder(facts, meeting), *_network(facts, meeting, needs), *_clocks(facts, meeting, needs)]
    return found


def _same(
    check: str, facts: Sequence[Facts], value: Callable[[Facts], str], remedy: str, meaning: str = ""
) -> Iterator[Finding]:
    """What must be equal everywhere: the value of most ranks counts as the right one; `meaning` says what it is."""
    counts = Counter(map(value, facts))
    usual = counts.most_common(1)[0][0]
    if len(counts) == 1:
        yield Finding(check, True, _everywhere(facts), f"{usual}, {meaning}" if meaning else usual)
    for other in counts.keys() - {usual}:
        where = _hosts(one for one in facts if value(one) == other)
        yield Finding(check, False, where, f"{_difference(other, usual)}; {remedy}")


def _difference(other: str, usual: str) -> str:
    """What differs: of a list, the items that do."""
    mine, theirs = other.split(", "), usual.split(", ")
    ours = ", ".join(item for item in mine if item not in theirs) or "less"
    return f"{ours}, elsewhere {', '.join(item for item in theirs if item not in mine) or 'less'}"


def _versions(facts: Facts) -> str:
    return ", ".join(f"{package} {version}" for package, version in facts.versions.items())


def _visible(facts: Facts) -> str:
    return f"{facts.num_devices} x {facts.device}" if facts.num_devices else facts.device


def _devices(facts: Sequence[Facts]) -> Iterator[Finding]:
    yield from _same("device", facts, _visible, "every host must show as many devices, of one kind")
    faults = []
    for host, ranks in _by_host(facts).items():
        first, num_ranks = ranks[0], len(ranks)
        # One visible device for several ranks is what srun shows to each task.
        if first.num_devices > 1 and num_ranks > first.num_devices:
            faults.append(Finding("device", False, host, f"{num_ranks} ranks on {first.num_devices} devices"))
        elif first.num_devices == 0 and num_ranks > first.num_cores:
            faults.append(Finding("cores", False, host, f"{num_ranks} ranks on {first.num_cores} cores"))
    counts = Counter(len(ranks) for ranks in _by_host(facts).values())
    if len(counts) > 1:
        usual = counts.most_common(1)[0][0]
        odd = [host for host, ranks in _by_host(facts).items() if len(ranks) != usual]
        faults.append(Finding("ranks", False, ", ".join(odd), f"not {usual} ranks, as elsewhere"))
    yield from faults
    if not faults:
        yield Finding("ranks", True, _everywhere(facts), f"{next(iter(counts))} a host, {len(facts)} in all")


def _memory(facts: Sequence[Facts], needs: Needs) -> Iterator[Finding]:
    """Each rank must hold its part of the weights, and half as much again to work with."""
    model_gib = max(one.model_gib for one in facts)
    part_gib = model_gib / (len(facts) if needs.is_sharded else 1)
    place = "device memory" if facts[0].num_devices else "host memory"
    short = [one for one in facts if one.free_memory_gib < 1.5 * part_gib]
    least = min(one.free_memory_gib for one in facts)
    for one in short:
        what = f"rank {one.rank} has {one.free_memory_gib:.1f} GiB free, its part of the weights is {part_gib:.1f} GiB"
        yield Finding("memory", False, one.host, f"{what}; end what else runs there, or take more ranks")
    if not short:
        whole = "fit" if least >= 1.5 * model_gib else "do not fit"
        weights = f"the whole weights ({model_gib:.1f} GiB) {whole} on every rank"
        text = f"{least:.1f} GiB of {place} free for a rank, at least; {weights}"
        yield Finding("memory", True, _everywhere(facts), text)


def _disks(facts: Sequence[Facts], needs: Needs) -> Iterator[Finding]:
    for name, limit in {"run_dir": needs.disk_gib, "temporary": min(1.0, needs.disk_gib)}.items():
        first = {host: ranks[0] for host, ranks in _by_host(facts).items()}
        free = {host: one.free_disk_gib[name] for host, one in first.items() if name in one.free_disk_gib}
        full = {host: gib for host, gib in free.items() if gib < limit}
        for host, gib in full.items():
            yield Finding(f"disk: {name}", False, host, f"{gib:.2f} GiB free, {limit:g} needed; make room")
        if free and not full:
            what = f"{min(free.values()):.1f} GiB free on its disk, at least"
            yield Finding(f"disk: {name}", True, _everywhere(facts), what)


def _inputs(facts: Sequence[Facts]) -> Iterator[Finding]:
    """Model, data, and what else a rank could not do."""
    for name in dict.fromkeys(name for one in facts for name in (*one.reachable, *one.faults)):
        by_fault: dict[str, list[Facts]] = {}
        for one in facts:
            if name in one.faults:
                by_fault.setdefault(one.faults[name], []).append(one)
        for fault, ranks in by_fault.items():
            yield Finding(name, False, _hosts(ranks), fault)
        having = [one for one in facts if name in one.reachable]
        if having:
            yield from _same(name, having, lambda one, name=name: one.reachable[name], "the hosts see other files")


def _sandboxes(facts: Sequence[Facts]) -> Iterator[Finding]:
    """What holds the limits of programs; hosts may differ in it."""
    for held in dict.fromkeys(one.sandbox for one in facts if one.sandbox):
        yield Finding("sandbox", True, _hosts(one for one in facts if one.sandbox == held), held)


def _folder(facts: Sequence[Facts], meeting: Meeting) -> Iterator[Finding]:
    host_of = {one.rank: one.host for one in facts}
    faults = {host_of[rank]: what for rank, what in meeting.unwritable.items()}
    for rank, others in meeting.unseen.items():
        hosts = ", ".join(dict.fromkeys(host_of[other] for other in others))
        faults.setdefault(host_of[rank], f"does not see what {hosts} wrote; run_dir must be on a disk that all share")
    for host, what in faults.items():
        yield Finding("shared folder", False, host, what)
    if not faults:
        yield Finding("shared folder", True, _everywhere(facts), "each rank sees what every other wrote")


def _network(facts: Sequence[Facts], meeting: Meeting, needs: Needs) -> Iterator[Finding]:
    speed = f"{meeting.gigabytes_per_second:.2f} GB/s, {meeting.latency_ms:.2f} ms"
    if not meeting.is_sum_right:
        yield Finding("all-reduce", False, _everywhere(facts), "the sum is wrong: a device or a link changes numbers")
    elif meeting.gigabytes_per_second < needs.gigabytes_per_second:
        what = f"{speed}; {needs.gigabytes_per_second:g} GB/s wanted: is distributed.interface the fast network?"
        yield Finding("all-reduce", False, _everywhere(facts), what)
    else:
        yield Finding("all-reduce", True, _everywhere(facts), speed)


def _clocks(facts: Sequence[Facts], meeting: Meeting, needs: Needs) -> Iterator[Finding]:
    offsets = {one.host: meeting.clock_offset_seconds[one.rank] for one in facts}
    off = {host: offset for host, offset in offsets.items() if abs(offset) > needs.skew_seconds}
    for host, offset in off.items():
        yield Finding("clock", False, host, f"{offset:+.1f} s against {facts[0].host}; let NTP set it")
    if not off:
        largest = max(map(abs, offsets.values()))
        yield Finding("clock", True, _everywhere(facts), f"at most {largest:.2f} s apart")


def _by_host(facts: Iterable[Facts]) -> dict[str, list[Facts]]:
    hosts: dict[str, list[Facts]] = {}
    for one in facts:
        hosts.setdefault(one.host, []).append(one)
    return hosts


def _hosts(facts: Iterable[Facts]) -> str:
    return ", ".join(_by_host(facts))


def _everywhere(facts: Sequence[Facts]) -> str:
    num_hosts = len(_by_host(facts))
    return f"all {num_hosts} hosts" if num_hosts > 1 else facts[0].host
