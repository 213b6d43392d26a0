"""Metrics and diagnosis of a run that Megatron lacks: Prometheus endpoint, out-of-memory errors."""
