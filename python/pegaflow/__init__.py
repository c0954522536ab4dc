"""PegaFlow over shared memory: one KV-cache pool per host for all its inference engines.

`pegaflow.client` talks to the node's daemon, `pegaflow.connector` is the connector for vLLM.
"""

__version__ = "0.1.0"
