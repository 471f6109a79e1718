# What the scripts of all engines share; each sources it once `folder` and `remove` are set.

# Whatever they start is written down here, so that it ends with them, however they end.
started=()

# Starts a command in the background under a name, its output in FOLDER/NAME.log; sets `pid`. The kernel kills it when
# this script is killed itself.
run() {
  local name=$1
  shift
  setpriv --pdeathsig KILL "$@" >>"$folder/$name.log" 2>&1 </dev/null &
  pid=$!
  started+=("$pid")
}

stop_all() {
  trap '' TERM INT HUP
  kill -KILL "${started[@]}" 2>/dev/null || true
  wait "${started[@]}" 2>/dev/null || true
  [ -z "$remove" ] || rm -rf "$folder"
}
trap stop_all EXIT
trap 'exit 0' TERM INT HUP

# Ports of 127.0.0.1 at which nobody listens, a line each: below the range that the kernel hands out by itself.
free_ports() {
  local found=" " port
  while [ "$(wc -w <<<"$found")" -lt "$1" ]; do
    port=$((12000 + (SRANDOM % 20000)))
    case "$found" in *" $port "*) continue ;; esac
    (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null || found="$found$port "
  done
  tr ' ' '\n' <<<"${found# }"
}

# Says what a log says, and ends.
fail() {
  echo "${0##*/} failed:" >&2
  tail -n 20 "$folder/$1" >&2
  exit 1
}

# Asks until it is so, for a minute; what was started must be running all the while.
until_true() {
  local end=$((SECONDS + 60)) one
  until "$@"; do
    for one in "${started[@]}"; do
      kill -0 "$one" 2>/dev/null || { tail -n 5 "$folder"/*.log >&2 && exit 1; }
    done
    [ "$SECONDS" -lt "$end" ] || { echo "${0##*/}: not ready after a minute" >&2 && exit 1; }
    sleep 0.05
  done
}
