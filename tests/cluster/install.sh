#!/usr/bin/env bash
# What the cluster tests need from the system: checked, and installed by apt-get if it is missing.
# Ends with 1 and the reason if it can't be had.
PACKAGES="slurm-wlm munge pdsh openssh-server openssh-client iproute2 util-linux numactl"
PATH=$PATH:/usr/sbin:/sbin
missing() { for word in slurmctld slurmd srun munged pdsh sshd ssh ip nsenter unshare; do
  command -v $word > /dev/null || { echo "$word"; return 0; }; done; return 1; }
[ "$(id -u)" = 0 ] || { echo "cluster tests need root: they make network namespaces" >&2; exit 1; }
unshare --net true 2> /dev/null || { echo "cluster tests need network namespaces, which are not allowed here" >&2; exit 1; }
missing > /dev/null || exit 0
command -v apt-get > /dev/null || { echo "$(missing) is missing, and there is no apt-get to install: $PACKAGES" >&2; exit 1; }
log=$(mktemp)
{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $PACKAGES; } \
  > "$log" 2>&1 || { echo "apt-get could not install $PACKAGES: $(tail -n 1 "$log")" >&2; exit 1; }
! missing || { echo "... is still missing after the installation of $PACKAGES" >&2; exit 1; }
