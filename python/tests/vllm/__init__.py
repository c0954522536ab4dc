"""Tests of the connector with a real vLLM, in processes of its own, on the CPU."""
