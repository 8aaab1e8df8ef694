#!/bin/bash
# A Ray worker that comes back: a node that was cut off for a minute is declared dead by the head, and its processes end.
#   cluster/ray-worker.sh HEAD:6379 [options of ray start]
# Returns once the worker has joined, or after two minutes with exit code 1; started again, it takes the place of an earlier one.
# It ends by itself when no head has answered for 10 minutes (60 tries, or RAY_WORKER_TRIES, each of 10 s where the connection is
# refused, of up to 70 s where nothing answers); before that: kill $(cat ~/.ray/worker-$(hostname).pid); ray stop
address=$1
ray="$(dirname "$0")/../.venv/bin/ray"
[ -x "$ray" ] || ray=ray
note=~/.ray/worker-$(hostname).pid log=~/.ray/worker-$(hostname).log
umask 077
mkdir -p ~/.ray

if [ "$2" != --loop ]; then
  if [ -f "$note" ] && grep -q ray-worker "/proc/$(cat "$note")/cmdline" 2> /dev/null; then kill "$(cat "$note")"; fi
  "$ray" stop > /dev/null 2>&1
  : > "$log"
  setsid nohup "$0" "$address" --loop "${@:2}" > "$log" 2>&1 < /dev/null &
  for _ in {1..240}; do
    grep -q "Ray runtime started" "$log" && exit 0
    sleep 0.5
  done
  cat "$log" >&2
  exit 1
fi

echo $$ > "$note"
forget() { if [ "$(cat "$note" 2> /dev/null)" = $$ ]; then rm -f "$note"; fi; } # it may be that of the next one
trap 'forget; exit 0' TERM
tries=0
while [ $tries -lt "${RAY_WORKER_TRIES:-60}" ]; do
  tries=$((tries + 1))
  if timeout 60 "$ray" health-check --address "$address" > /dev/null 2>&1; then
    tries=0
    "$ray" start --block --address "$address" "${@:3}" &
    wait $! # a signal ends this wait, not the worker
    echo "the worker ended, $(date)"
  fi
  sleep 10 &
  wait $!
done
forget
