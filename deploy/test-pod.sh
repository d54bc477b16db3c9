#!/bin/sh
# Runs the test pod and says whether its three containers were treated as their annotations ask for:
#   c0 (swap-idle-data) has its idle memory in swap, c1 (track-working-set-size) is tracked but not swapped out,
#   c2 (no class) is left alone.
# On a node with nri-memtierd, swap, crictl or kubectl, as root:
#   deploy/test-pod.sh            creates the pod with kubectl; it must land on this node
#   deploy/test-pod.sh --crictl   creates it with crictl, without Kubernetes; images must be there
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
name=nri-memtierd-test-pod
wait_s=${WAIT_S:-90}
say() { printf '%s\n' "$*"; }
fail() { say "FAILED: $*" >&2; exit 1; }

if [ "${1:-}" = --crictl ]; then
    work=$(mktemp -d)
    trap 'crictl pods -q --name "$name" | xargs -r crictl rmp -f >/dev/null 2>&1; rm -rf "$work"' EXIT
    cat >"$work/pod.json" <<POD
{"metadata": {"name": "$name", "namespace": "default", "uid": "nri-memtierd-test", "attempt": 0},
 "log_directory": "$work", "linux": {"security_context": {"namespace_options": {"network": 2}}},
 "annotations": {"class.memtierd.nri.io": "swap-idle-data", "class.memtierd.nri.io/c1": "track-working-set-size",
  "class.memtierd.nri.io/c2": ""}}
POD
    pod=$(crictl runp "$work/pod.json")
    for c in c0 c1 c2; do
        cat >"$work/$c.json" <<CONTAINER
{"metadata": {"name": "$c", "attempt": 0}, "image": {"image": "${IMAGE:-busybox:1.36}"}, "log_path": "$c.log",
 "command": ["sh", "-c", "dd if=/dev/zero bs=80M count=1 | sleep 100000"]}
CONTAINER
        crictl start "$(crictl create "$pod" "$work/$c.json" "$work/pod.json")" >/dev/null
    done
else
    trap 'kubectl delete --wait=false -f "$here/sample-configs/nri-memtierd-test-pod.yaml" >/dev/null 2>&1' EXIT
    kubectl apply -f "$here/sample-configs/nri-memtierd-test-pod.yaml"
    kubectl wait --for=condition=Ready --timeout=120s "pod/$name"
fi

cgroup() { # the cgroup directory of a container of the pod
    id=$(crictl ps -q --label "io.kubernetes.pod.name=$name" --name "^$1$" 2>/dev/null)
    [ -n "$id" ] || id=$(crictl ps -q --name "^$1$" | head -n 1)
    find /sys/fs/cgroup -type d \( -name "$id" -o -name "*-$id.scope" -o -name "*-$id" \) | head -n 1
}
swapped_kb() { # VmSwap of all its processes
    total=0
    for pid in $(find "$(cgroup "$1")" -name cgroup.procs -exec cat {} +); do
        kb=$(sed -n 's/^VmSwap:[^0-9]*\([0-9]*\).*/\1/p' "/proc/$pid/status" 2>/dev/null)
        total=$((total + ${kb:-0}))
    done
    echo $total
}

until [ "$(swapped_kb c0)" -ge 61440 ]; do
    [ "$wait_s" -gt 0 ] || fail "c0 has only $(swapped_kb c0) kB in swap"
    sleep 1
    wait_s=$((wait_s - 1))
done
for c in c0 c1 c2; do
    say "$c: memory.swap.max $(cat "$(cgroup "$c")/memory.swap.max"), in swap $(swapped_kb "$c") kB"
done
[ "$(cat "$(cgroup c0)/memory.swap.max")" = max ] || fail "c0: memory.swap.max is not max"
[ "$(cat "$(cgroup c1)/memory.swap.max")" = 0 ] || fail "c1: memory.swap.max is not 0"
[ "$(swapped_kb c1)" -eq 0 ] || fail "c1 was swapped out"
[ "$(swapped_kb c2)" -eq 0 ] || fail "c2 was swapped out"
say "passed"
