#!/usr/bin/env bash
# The figures of docs/serving.md: what `cashtag serve` answers at saturation, at half of it, and at five times as much.
#
#   scripts/serving_figures.sh saturation     as a share of `cashtag bench classify`, with the same texts and prompt
#   scripts/serving_figures.sh half           p99 at half of that rate, against one lone request
#   scripts/serving_figures.sh overload       five times that rate: who is refused, how fast; who is late; memory
#   SECONDS_OF_LOAD=600 scripts/serving_figures.sh overload       memory over ten minutes
#
# `saturation` leaves its rate in target/serving_rate for the others; RATE=… sets it. Nothing else should run meanwhile.
# Server and load generator are two processes that share the machine. Needs `cargo build --release --workspace --examples`.
set -euo pipefail
cd "$(dirname "$0")/.."
target=${CARGO_TARGET_DIR:-target}
cashtag=${CASHTAG:-$target/release/cashtag}
load=${LOAD:-$target/release/examples/load}
texts=${TEXTS:-corpus/h-1.jsonl}
# The deadline of a request, in seconds.
timeout=${TIMEOUT:-5}
work=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server" 2>/dev/null || true; rm -rf "$work"' EXIT

start() {
    "$cashtag" serve --port 0 --timeout "$timeout" "$@" >"$work/url" 2>"$work/log" &
    server=$!
    for _ in $(seq 600); do
        address=$(sed -n 's#^http://##p' "$work/url")
        if [ -n "$address" ] && curl -sf "http://$address/health" >/dev/null; then
            # Warm: pages, caches, and the estimate of a row's time.
            "$load" "$address" --seconds 3 --connections 4 --texts "$texts" >/dev/null
            return
        fi
        kill -0 "$server" || { cat "$work/log"; exit 1; }
        sleep 0.1
    done
    echo "error: not ready within a minute" >&2
    exit 1
}

stop() {
    kill "$server"
    wait "$server"
    server=
}

# field NAME STATUS FILE: a figure of the load generator's line for a status; "rate" is answers per second.
field() {
    awk -v name="$1" -v status="status $2:" 'index($0, status) == 1 {
        if (name == "rate") { match($0, /\([0-9.]+/); print substr($0, RSTART + 1, RLENGTH - 1) }
        else { split($0, part, name " "); sub(/,.*/, "", part[2]); print part[2] }
    }' "$3"
}

rate() { echo "${RATE:-$(cat "$target/serving_rate")}"; }

case ${1:-} in
saturation)
    for run in 1 2; do
        "$cashtag" bench classify --data "$texts" --rows 1000 --seconds 15 --json >"$work/bench" 2>/dev/null
        bench=$(sed -n 's/.*"examples_per_second":\([0-9.]*\).*/\1/p' "$work/bench")
        # Nobody is refused for being late here: what is asked for is what can be done.
        timeout=60 start
        "$load" "$address" --seconds 15 --connections 64 --texts "$texts" | tee "$work/load"
        stop
        served=$(field rate 200 "$work/load")
        awk -v run="$run" -v b="$bench" -v s="$served" 'BEGIN { printf "run %d: bench %.2f texts/s, served %.2f texts/s, share %.1f %%\n", run, b, s, 100 * s / b }'
        echo "$served" >"$target/serving_rate"
    done
    ;;
half)
    start
    "$load" "$address" --seconds 15 --connections 1 --texts "$texts" | tee "$work/lone"
    "$load" "$address" --seconds 60 --connections 64 --rate "$(rate | awk '{ print $1 / 2 }')" --texts "$texts" | tee "$work/half"
    stop
    awk -v lone="$(field p50 200 "$work/lone")" -v p99="$(field p99 200 "$work/half")" \
        'BEGIN { printf "lone p50 %.1f ms, p99 at half of saturation %.1f ms: %.1f times\n", lone, p99, p99 / lone }'
    ;;
overload)
    start
    "$load" "$address" --seconds "${SECONDS_OF_LOAD:-60}" --connections 512 --rate "$(rate | awk '{ print 5 * $1 }')" --texts "$texts" \
        --pid "$server" | tee "$work/over"
    stop
    echo "slowest answer $(field max 200 "$work/over") ms of $timeout s; refusals: p99 $(field p99 429 "$work/over") ms, slowest $(field max 429 "$work/over") ms"
    ;;
*)
    sed -n '2,/^set/p' "$0" | sed '$d;s/^# \{0,1\}//'
    exit 2
    ;;
esac
