#!/usr/bin/env bash
# End what up.sh started: the death of a host's pid 1 ends all its processes, SLURM's among them.
D=${SPD_CLUSTER_DIR:-/run/spd-cluster}
for file in "$D"/node?.pid "$D"/node?.outer.pid "$D/munge/pid"; do
  [ -s "$file" ] && kill -KILL "$(cat "$file")" 2> /dev/null
done
for _ in $(seq 50); do  # a namespace can be deleted once its processes are gone
  pgrep -F "$D/node0.pid" > /dev/null 2>&1 || pgrep -F "$D/node1.pid" > /dev/null 2>&1 || break; sleep 0.1
done
for space in spd-node0 spd-node1 spd-switch; do ip netns del $space 2> /dev/null; rm -rf "/etc/netns/$space"; done
rm -rf "$D"
