"""Metrics and diagnosis of a run: Prometheus endpoint, slowest rank, memory, profile.

This is what Megatron lacks. Everything but the endpoint's own thread runs where Megatron waits for
the device anyway.
"""
