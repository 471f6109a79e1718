#!/usr/bin/env bash
# Runs a real Ceph with an S3 gateway on loopback, below one folder, for tests and for trying things out: one monitor,
# one OSD that keeps its objects in a file, the gateway, and a user with fixed keys.
#
#   tests/engines/ceph.sh FOLDER [--port GATEWAY] [--size BYTES] [--access KEY] [--secret KEY] [--remove]
#
# Prints a line of JSON when the gateway takes writes: {"endpoint":...,"access":...,"secret":...,"region":...,"pids":
# {"mon":...,"osd":...,"rgw":...}}. A line `start NAME` on standard input starts one of the three again on the data that
# it had, and is answered by {"member":NAME,"pid":...}. At the end of standard input, by SIGTERM and by SIGINT it kills
# them. With --remove the folder goes, too. By hand: `sleep infinity | tests/engines/ceph.sh /tmp/ceph`.
set -euo pipefail

folder=${1:?the folder to work in}
shift
port="" size=$((4 << 30)) access=reprise secret=reprise-secret remove=""
while [ $# -gt 0 ]; do
  case "$1" in
    --remove) remove=1 && shift ;;
    --port | --size | --access | --secret) printf -v "${1#--}" %s "$2" && shift 2 ;;
    *) echo "Unknown option \"$1\"" >&2 && exit 2 ;;
  esac
done
mkdir -p "$folder/mon" "$folder/osd"
folder=$(cd "$folder" && pwd)
source "${BASH_SOURCE[0]%/*}/common.sh"

read -rd '' monitor found <<<"$(free_ports 2)" || true
port=${port:-${found%%[!0-9]*}}
fsid=$(</proc/sys/kernel/random/uuid)
osd=$(</proc/sys/kernel/random/uuid)

# Nobody else is let near, so nobody has to prove who he is; then nothing is encrypted either, which the gateway would
# insist on. A pool has one copy and one placement group: more take longer and hold no more. The rest is about waiting
# for nothing, which makes of 8 s to the start 2.5 s, and of 15 s to come back after a kill 1 s: the monitor gathers
# proposals for a second before it agrees with itself, a device is closed only after its next poll, whoever asked too
# early for a map asks again after 5 s, and a placement group takes no requests until a lease of 16 s from before has
# run out.
cat >"$folder/ceph.conf" <<CONF
[global]
fsid = $fsid
mon_host = [v2:127.0.0.1:$monitor]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
ms_mon_client_mode = crc
run_dir = $folder
crash_dir = $folder
admin_socket =
log_file =
log_to_stderr = false
err_to_stderr = true
mon_cluster_log_file =
ms_async_op_threads = 1

[mon]
mon_data = $folder/mon
mon_data_avail_warn = 1
mon_data_avail_crit = 0
paxos_propose_interval = 0.01
paxos_min_wait = 0.01
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 1
osd_pool_default_pgp_num = 1
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
osd_pool_default_read_lease_ratio = 0.05

[osd]
osd_data = $folder/osd
osd_objectstore = bluestore
bluestore_block_size = $size
bdev_aio_poll_ms = 10
bluestore_fsck_on_mkfs = false
bluestore_cache_autotune = false
bluestore_cache_size = 67108864
osd_op_num_shards = 1
osd_op_num_threads_per_shard = 2

[client]
objecter_tick_interval = 0.2
rgw_data = $folder
rgw_run_sync_thread = false
rgw_enable_quota_threads = false
rgw_enable_lc_threads = false
rgw_dynamic_resharding = false
rgw_override_bucket_index_max_shards = 1
rgw_frontends = beast endpoint=127.0.0.1:$port tcp_nodelay=1
CONF
conf=(-c "$folder/ceph.conf")

start() {
  case "$1" in
    mon) run mon ceph-mon "${conf[@]}" -f -i a ;;
    osd) run osd ceph-osd "${conf[@]}" -f -i 0 ;;
    rgw) run rgw radosgw "${conf[@]}" -f -n client.rgw ;;
  esac
}

answers() { (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; }

{
  monmaptool --create --fsid "$fsid" --addv a "[v2:127.0.0.1:$monitor]" "$folder/monmap"
  ceph-mon "${conf[@]}" --mkfs -i a --monmap "$folder/monmap"
} >"$folder/mkfs.log" 2>&1 || fail mkfs.log
ceph-osd "${conf[@]}" --no-mon-config --mkfs -i 0 --osd-uuid "$osd" --monmap "$folder/monmap" >"$folder/mkfs-osd.log" 2>&1 &
making=$!
start mon && mon_pid=$pid
timeout 60 ceph "${conf[@]}" osd new "$osd" 0 >"$folder/new.log" 2>&1 || fail new.log
wait "$making" || fail mkfs-osd.log
start osd && osd_pid=$pid
timeout 60 radosgw-admin "${conf[@]}" user create --uid reprise --display-name reprise \
  --access-key "$access" --secret-key "$secret" >"$folder/user.log" 2>&1 || fail user.log
start rgw && rgw_pid=$pid
until_true answers
printf '{"endpoint":"http://127.0.0.1:%s","access":"%s","secret":"%s","region":"default",' "$port" "$access" "$secret"
printf '"pids":{"mon":%s,"osd":%s,"rgw":%s}}\n' "$mon_pid" "$osd_pid" "$rgw_pid"

while read -r command member; do
  [ "$command" = start ] || continue
  start "$member"
  echo "{\"member\":\"$member\",\"pid\":$pid}"
done
