#!/bin/sh
# A server that keeps its KV cache in the node's pool, and starts the node's daemon if it is not
# running. Restart it, or start a second one: what was computed before is loaded.
#
#   ./serve.sh Qwen/Qwen3-0.6B --port 8000
set -eu
# Block names begin with this seed: all engines that share blocks have the same.
export PYTHONHASHSEED=0
exec vllm serve "$@" --kv-transfer-config '{
    "kv_connector": "PegaKVConnector",
    "kv_connector_module_path": "pegaflow.connector",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
    "kv_connector_extra_config": {"pegaflow.autostart": true}
}'
