#!/usr/bin/env bash
# Runs inside the guest: a soft-RoCE device, then the tests with the host's own virtual environment.
set -uo pipefail
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp PYTHONPATH=$(cd "$(dirname "$0")/../.." && pwd)
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 AIODISAGG_MOONCAKE=mooncake AIODISAGG_TEST_SLOWNESS=10
cd "$(dirname "$0")/../.."
ip link set lo up
ip link add dummy0 type dummy
ip addr add 10.77.0.1/24 dev dummy0
ip link set dummy0 mtu 4200 up
rdma link add rxe0 type rxe netdev dummy0 || exit 1
rdma link
ulimit -l unlimited
what=$(sed -n 's/.*what=\([^ ]*\).*/\1/p' /proc/cmdline)
failed=0
step() {
    local began=$SECONDS
    "$@" || failed=1
    echo "guest: $((SECONDS - began)) s, failed=$failed: ${*: -2}"
}
pytest() { .venv/bin/python -m pytest -q -p no:cacheprovider --color=no --tb=short --timeout 400 --durations=5 "$@"; }
case "${what:-all}" in
    shell) exec setsid bash -i </dev/ttyS0 >/dev/ttyS0 2>&1 ;;
    conformance) step pytest tests/transport/test_mooncake.py -k uvloop ;;
    processes) step pytest tests/transport/test_mooncake_processes.py ;;
    end_to_end) step .venv/bin/python tests/rdma/end_to_end.py ;;
    hosts) # a network that loses and delays, where the host's own kernel has no netem
        step .venv/bin/python -m aiodisagg bench transport --only hosts
        ;;
    script) step .venv/bin/python /tmp-host/script.py ;;
    *)
        step pytest tests/transport/test_mooncake.py
        step pytest tests/transport/test_mooncake_processes.py
        step .venv/bin/python tests/rdma/end_to_end.py
        ;;
esac
exit $failed
