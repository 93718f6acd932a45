#!/usr/bin/env bash
# Three replicas on one database and nginx before them, as processes of this machine. Ctrl-C ends them all.
#
#   pip install '.[postgres]'
#   SIDECAR_DATABASE=postgresql://user:password@host/database examples/replicas/run.sh --model offline
#
# Options are those of `session-sidecar serve`. nginx listens on PORT (8080), the replicas on the three ports after it, and
# REPLICAS_HOME (./replicas) has their homes. All of it is on loopback, so there are no tokens.
set -euo pipefail
: "${SIDECAR_DATABASE:?is postgresql://user:password@host/database}"
port=${PORT:-8080}
homes=${REPLICAS_HOME:-replicas}
export SIDECAR_REPLICA_SECRET=${SIDECAR_REPLICA_SECRET:-$(openssl rand -hex 32)}
export SIDECAR_HOSTS=replicas # as nginx asks

mkdir -p "$homes"
trap 'trap "" INT TERM; kill $(jobs -p) 2>/dev/null; wait' EXIT
trap 'exit 0' INT TERM

addresses=(-e "s/listen 8080/listen 127.0.0.1:$port/")
for number in 1 2 3; do
  address=127.0.0.1:$((port + number))
  SIDECAR_REPLICA_URL=http://$address \
    session-sidecar serve --home "$homes/$number" --port "${address#*:}" "$@" &
  addresses+=(-e "s/sidecar-$number:8000/$address/")
done
sed "${addresses[@]}" "$(dirname "$0")/nginx.conf" >"$homes/nginx.conf"
nginx -e stderr -p "$homes" -c "nginx.conf" &
wait
