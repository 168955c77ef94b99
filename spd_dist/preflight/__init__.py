"""Before a run: what each rank finds on its host, what ranks find together, and what of it is wrong where.

facts.py     this rank's host: code, versions, config, devices, memory, disks, model, data; and what all ranks find
             together: the shared folder, the all-reduce and its bandwidth, the clocks
findings.py  from the facts of all ranks to a list of what is right and wrong; pure
"""

from spd_dist.preflight.facts import Facts, Meeting, gather_facts, meet
from spd_dist.preflight.findings import Finding, Needs, judge

__all__ = ["Facts", "Finding", "Meeting", "Needs", "gather_facts", "judge", "meet"]
