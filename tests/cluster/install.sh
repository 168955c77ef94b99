#!/usr/bin/env bash
# What the cluster tests need from the system: checked, and installed by apt-get if it is missing.
# Ends with 1 and the reason if it can't be had.
PACKAGES="slurm-wlm munge pdsh openssh-server openssh-client iproute2 util-linux numactl"
PATH=$PATH:/usr/sbin:/sbin
fail() { echo "$*" >&2; exit 1; }
missing() { for word in slurmctld slurmd srun munged pdsh sshd ssh ip nsenter unshare; do
  command -v $word > /dev/null || { echo "$word"; return 0; }; done; return 1; }
[ "$(id -u)" = 0 ] || fail "cluster tests need root: they make network namespaces"
unshare --net --mount --uts --pid --fork --mount-proc true 2> /dev/null ||
  fail "cluster tests need namespaces of network, mounts and processes, which are not allowed here"
if missing > /dev/null; then
  command -v apt-get > /dev/null || fail "$(missing) is missing, and there is no apt-get to install: $PACKAGES"
  log=$(mktemp)
  install() { timeout 120 apt-get update -qq &&
    DEBIAN_FRONTEND=noninteractive timeout 240 apt-get install -y -qq --no-install-recommends $PACKAGES; }
  install > "$log" 2>&1 < /dev/null || fail "apt-get could not install $PACKAGES: $(tail -n 1 "$log")"
  ! missing > /dev/null || fail "$(missing) is still missing after the installation of $PACKAGES"
fi
unshare --net bash -c 'ip link add br0 type bridge && ip link add v0 type veth peer name v1' > /dev/null 2>&1 ||
  fail "cluster tests need a bridge and virtual cables, which this kernel does not have"
