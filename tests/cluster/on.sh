#!/usr/bin/env bash
# on.sh nodeK COMMAND...: run it on an emulated host, in all its namespaces, with this folder and this environment.
host=$1; shift
exec nsenter -t "$(cat "${SPD_CLUSTER_DIR:-/run/spd-cluster}/$host.pid")" -m -u -n -p --wd="$PWD" -- "$@"
