#!/usr/bin/env bash
# Runs a real etcd of one or several members on loopback, below one folder, for tests and for trying things out.
#
#   tests/engines/etcd.sh FOLDER [--members N] [--ports CLIENT,PEER,CLIENT,PEER,...] [--remove]
#                                [--cert FILE --key FILE --ca FILE] [--user root --password SECRET]
#
# Prints a line of JSON when all members answer: {"endpoints":[...],"pids":[...]}. A line `start N` on standard input
# starts member N (from 0) again on the data that it had, and is answered by {"member":N,"pid":...}. At the end of
# standard input, by SIGTERM and by SIGINT it kills its members: what etcd acknowledged is on disk. With --remove the
# folder goes, too. By hand: `sleep infinity | tests/engines/etcd.sh /tmp/etcd`.
set -euo pipefail

folder=${1:?the folder to work in}
shift
members=1 ports="" remove="" cert="" key="" ca="" user="" password=""
while [ $# -gt 0 ]; do
  case "$1" in
    --remove) remove=1 && shift ;;
    --members | --ports | --cert | --key | --ca | --user | --password) printf -v "${1#--}" %s "$2" && shift 2 ;;
    *) echo "Unknown option \"$1\"" >&2 && exit 2 ;;
  esac
done
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
source "${BASH_SOURCE[0]%/*}/common.sh"

scheme=http tls=() ctl_tls=()
if [ -n "$cert" ]; then
  scheme=https
  tls=(--cert-file "$cert" --key-file "$key")
  ctl_tls=(--cacert "$ca")
fi
[ -n "$ports" ] || ports=$(free_ports $((2 * members)))
IFS=', ' read -ra ports <<<"$(tr '\n' ' ' <<<"$ports")"

cluster="" endpoints="" quoted=""
for ((n = 0; n < members; n++)); do
  cluster="$cluster,member$n=http://127.0.0.1:${ports[2 * n + 1]}"
  endpoints="$endpoints,$scheme://127.0.0.1:${ports[2 * n]}"
  quoted="$quoted,\"$scheme://127.0.0.1:${ports[2 * n]}\""
done

start() {
  local client=$scheme://127.0.0.1:${ports[2 * $1]} peer=http://127.0.0.1:${ports[2 * $1 + 1]}
  run "member$1" etcd --name "member$1" --data-dir "$folder/member$1" \
    --listen-client-urls "$client" --advertise-client-urls "$client" \
    --listen-peer-urls "$peer" --initial-advertise-peer-urls "$peer" \
    --initial-cluster "${cluster:1}" --initial-cluster-token "$folder" --log-level warn "${tls[@]}"
}

etcdctl() { ETCDCTL_API=3 command etcdctl --endpoints "${endpoints:1}" "${ctl_tls[@]}" "$@" 2>&1; }

healthy() { etcdctl endpoint health --command-timeout 2s >"$folder/health.log"; }

pids=""
for ((n = 0; n < members; n++)); do
  start "$n"
  pids="$pids,$pid"
done
until_true healthy
if [ -n "$user" ]; then
  { etcdctl user add "$user:$password" && etcdctl user grant-role "$user" root && etcdctl auth enable; } \
    >"$folder/auth.log" || fail auth.log
fi
echo "{\"endpoints\":[${quoted:1}],\"pids\":[${pids:1}]}"

while read -r command member; do
  [ "$command" = start ] || continue
  start "$member"
  echo "{\"member\":$member,\"pid\":$pid}"
done
