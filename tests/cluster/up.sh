#!/usr/bin/env bash
# Two emulated hosts on one machine, and a real SLURM on them. Each host has a network, mount, uts and pid namespace of its
# own, with its own address, /etc/hosts, /dev/shm and sshd; they hang on a bridge in a namespace of its own, so that the
# machine itself gets no interface and no address. Run commands on them by on.sh; down.sh ends everything.
#   SPD_CLUSTER_DIR  state, logs and pids (default /run/spd-cluster)
set -euo pipefail
D=${SPD_CLUSTER_DIR:-/run/spd-cluster} HERE=$(cd "$(dirname "$0")" && pwd) NODES="0 1" NET=10.77.0
PATH=$PATH:/usr/sbin:/sbin
wait_for() { for _ in $(seq 200); do "$@" > /dev/null 2>&1 && return; sleep 0.05; done; echo "never: $*" >&2; return 1; }

# ---- hosts
mkdir -p "$D"/{munge,ctld,log,devices} /run/sshd; chmod 755 "$D" "$D/munge"
[ -s "$D/id" ] || ssh-keygen -q -t ed25519 -N '' -f "$D/id"
{ echo "127.0.0.1 localhost"; for i in $NODES; do echo "$NET.$((i + 1)) node$i"; done; } > "$D/hosts"
ip netns list | grep -qw spd-switch || {
  ip netns add spd-switch; ip -n spd-switch link add br0 type bridge; ip -n spd-switch link set br0 up; }
for i in $NODES; do
  host=node$i space=spd-node$i etc=/etc/netns/spd-node$i address=$NET.$((i + 1))
  mkdir -p "$etc/ssh"; cp "$D/hosts" "$etc/hosts"; echo "$host" > "$etc/hostname"; : > "$etc/resolv.conf"
  printf '%s\n' "hosts: files" "passwd: files" "group: files" "shadow: files" > "$etc/nsswitch.conf"
  cp "$D/id" "$etc/ssh/id_spd"; cp "$D/id.pub" "$etc/ssh/authorized_keys"; chmod 600 "$etc/ssh/id_spd"
  printf '%s\n' "Host *" " IdentityFile /etc/ssh/id_spd" " StrictHostKeyChecking no" " UserKnownHostsFile /dev/null" \
    " LogLevel ERROR" " BatchMode yes" > "$etc/ssh/ssh_config"
  printf '%s\n' "ListenAddress $address" "HostKey /etc/ssh/id_spd" "AuthorizedKeysFile /etc/ssh/authorized_keys" \
    "PermitRootLogin prohibit-password" "PasswordAuthentication no" "UsePAM no" "StrictModes no" "PidFile none" \
    > "$etc/ssh/sshd_config"
  ip netns list | grep -qw "$space" || {
    ip netns add "$space"
    ip link add eth0 netns "$space" type veth peer name "port$i" netns spd-switch
    ip -n spd-switch link set "port$i" master br0 up
    ip -n "$space" addr add "$address/24" dev eth0
    ip -n "$space" link set eth0 up; ip -n "$space" link set lo up; }
  [ -s "$D/$host.pid" ] && kill -0 "$(cat "$D/$host.pid")" 2> /dev/null && continue
  # The host's pid 1 is a shell that reaps. slurmd wants the cgroup mounts, which a sysfs of this network would hide.
  nsenter --net="/run/netns/$space" -- unshare --uts --pid --fork --kill-child=KILL --mount --mount-proc \
    --propagation private bash -c "
      hostname $host; mkdir -p $D/cgroup
      mount --rbind /sys/fs/cgroup $D/cgroup && mount -t sysfs sysfs /sys && mount --rbind $D/cgroup /sys/fs/cgroup
      for file in hosts hostname resolv.conf nsswitch.conf ssh; do mount --bind $etc/\$file /etc/\$file; done
      mount -t tmpfs -o size=2g tmpfs /dev/shm
      /usr/sbin/sshd -D -e & while :; do wait -n || sleep 1; done" > "$D/log/$host.log" 2>&1 < /dev/null &
  outer=$!; disown; echo $outer > "$D/$host.outer.pid"
  wait_for pgrep -P $outer; pgrep -P $outer | head -n 1 > "$D/$host.pid"
done
for i in $NODES; do wait_for "$HERE/on.sh" node$((1 - i)) ssh node$i true; done

# ---- SLURM
{ for n in 0 1 2 3; do : > "$D/devices/gpu$n"; done
  echo "NodeName=node[0-1] Name=gpu Type=h100 File=$D/devices/gpu[0-3]"; } > "$D/gres.conf"
cat > "$D/slurm.conf" <<CONF
ClusterName=spdtest
SlurmctldHost=node0($NET.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# a requeued job is held until its credential has expired
AuthInfo=socket=$D/munge/socket,cred_expire=5
CommunicationParameters=NoAddrCache
SlurmctldPort=27000
SlurmdPort=27001
StateSaveLocation=$D/ctld
SlurmdSpoolDir=$D/spool.%n
SlurmctldPidFile=$D/slurmctld.pid
SlurmdPidFile=$D/slurmd.%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,sched_min_interval=0,requeue_delay=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdTimeout=10
KillWait=5
MinJobAge=3600
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
GresTypes=gpu
NodeName=node0 NodeAddr=$NET.1 CPUs=8 RealMemory=4000 Gres=gpu:h100:4 State=UNKNOWN
NodeName=node1 NodeAddr=$NET.2 CPUs=8 RealMemory=4000 Gres=gpu:h100:4 State=UNKNOWN
PartitionName=main   Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10
PartitionName=cheap  Nodes=ALL Default=NO  MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL Default=NO  MaxTime=INFINITE State=UP PriorityTier=100
CONF
export SLURM_CONF=$D/slurm.conf
alive() { [ -s "$2" ] && "$HERE/on.sh" "$1" kill -0 "$(cat "$2")" 2> /dev/null; }
[ -s "$D/munge/key" ] || { dd if=/dev/urandom of="$D/munge/key" bs=128 count=1 status=none; chmod 600 "$D/munge/key"; }
{ [ -s "$D/munge/pid" ] && kill -0 "$(cat "$D/munge/pid")" 2> /dev/null; } || munged --force --key-file="$D/munge/key" \
  --socket="$D/munge/socket" --pid-file="$D/munge/pid" --log-file="$D/munge/log" --seed-file="$D/munge/seed"
alive node0 "$D/slurmctld.pid" || "$HERE/on.sh" node0 slurmctld
for i in $NODES; do
  mkdir -p "$D/spool.node$i"
  alive node$i "$D/slurmd.node$i.pid" || "$HERE/on.sh" node$i slurmd -N node$i
done
both_idle() { [ "$("$HERE/on.sh" node0 sinfo -h -N -p main -o %T | grep -c idle)" = 2 ]; }
wait_for both_idle || { tail -n 5 "$D"/log/*.log >&2; exit 1; }
