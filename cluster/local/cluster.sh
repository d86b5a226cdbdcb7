#!/usr/bin/env bash
# A Ray cluster on this machine that grows and shrinks: a head without CPUs, and up to 3 nodes of 1 CPU when a run asks.
#
#     cluster/local/cluster.sh start
#     eval "$(cluster/local/cluster.sh env)"           # this shell joins it: ray status, ray-ep train, ray job submit
#     ray-ep train cluster.ranks=2 optim.steps=50      # two nodes come for its ranks
#     ray status                                       # and go some seconds after it
#     cluster/local/cluster.sh stop                    # ends this cluster, and no other Ray
#
# Its files are in $RAY_EP_LOCAL (/tmp/ray-ep-local), its port is $RAY_EP_LOCAL_PORT (6399). For Linux.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
dir=${RAY_EP_LOCAL:-/tmp/ray-ep-local}
port=${RAY_EP_LOCAL_PORT:-6399}
head_id=fffffffffffffffffffffffffffffffffffffffffffffffffff00000

settings() {
    . "$here/../ray.env"
    export RAY_AUTH_TOKEN_PATH="$dir/auth_token"
    unset RAY_ADDRESS
}

# Whatever was started for this cluster has this in its environment. Some of Ray's processes write their title over it: they
# are children of others.
mark="RAY_EP_LOCAL_CLUSTER=$dir"
processes() {
    local found
    found=$(grep -lzxF -- "$mark" /proc/[0-9]*/environ 2> /dev/null | cut -d/ -f3 || true)
    while [ -n "$found" ]; do
        echo "$found"
        found=$(pgrep -P "$(echo $found | tr ' ' ,)" || true)
    done
}
living() { ps -o pid= -p "$(echo $1 | tr ' ' ,)" 2> /dev/null || true; }

start() {
    if [ -n "$(processes)" ]; then
        echo "a cluster of $dir is running: $0 stop" >&2
        exit 2
    fi
    mkdir -p "$dir"
    chmod 700 "$dir"
    rm -rf "$dir/gcs"
    python -c 'import secrets; print(secrets.token_hex(32))' > "$dir/auth_token"
    settings
    ip=$(python -c 'import ray; print(ray.util.get_node_ip_address())')
    echo "$ip:$port" > "$dir/address"
    sed "s/gcs_address: ADDRESS/gcs_address: $ip:$port/" "$here/autoscaler.yaml" > "$dir/autoscaler.yaml"
    # What the dashboard asks first: it has the pages of runs, at /ray_ep/.
    env "$mark" ray-ep dashboards proxy --address="$ip:$port" --port=$((port + 4)) > "$dir/proxy.log" 2>&1 < /dev/null &
    # The first two say which node of the autoscaler's the head is.
    env "$mark" RAY_CLOUD_INSTANCE_ID=$head_id RAY_OVERRIDE_NODE_ID_FOR_TESTING=$head_id RAY_FAKE_CLUSTER=1 \
        RAY_enable_autoscaler_v2=1 AUTOSCALER_UPDATE_INTERVAL_S=1 \
        RAY_gcs_storage=rocksdb RAY_gcs_storage_path="$dir/gcs" \
        ray start --head --port="$port" --num-cpus=0 --num-gpus=0 --temp-dir="$dir" \
        --dashboard-port=$((port + 1)) --dashboard-agent-listen-port=$((port + 2)) \
        --ray-client-server-port=$((port + 3)) --min-worker-port=0 --max-worker-port=0 \
        --object-store-memory=100000000 --disable-usage-stats --autoscaling-config="$dir/autoscaler.yaml" \
        --proxy-server-url=http://127.0.0.1:$((port + 4))
}

print_env() {
    if [ ! -e "$dir/address" ]; then
        echo "no cluster in $dir: $0 start" >&2
        exit 2
    fi
    echo ". '$here/../ray.env'"
    echo "export RAY_ADDRESS=$(cat "$dir/address") RAY_AUTH_TOKEN_PATH='$dir/auth_token'"
    echo "export RAY_API_SERVER_ADDRESS=http://127.0.0.1:$((port + 1))"
}

stop() {
    if [ ! -e "$dir/address" ]; then
        echo "no cluster in $dir" >&2
        exit 2
    fi
    local pids
    pids=$(processes | sort -u)
    for signal in TERM KILL; do
        [ -z "$pids" ] || kill -s "$signal" $pids 2> /dev/null || true
        for _ in $(seq 25); do
            pids=$(living "$pids")
            [ -n "$pids" ] || break
            sleep 0.2
        done
    done
    rm -rf "$dir"/{address,auth_token,autoscaler.yaml,gcs,proxy.log,prom_metrics_*,ray_current_cluster,session_20*,session_latest}
    rmdir --ignore-fail-on-non-empty "$dir"
}

case "${1:-}" in
    start) start ;;
    env) print_env ;;
    stop) stop ;;
    *)
        echo "usage: $0 start | env | stop" >&2
        exit 2
        ;;
esac
