"""Megatron's `.bin/.idx` datasets: read, written, joined, checked and described."""
