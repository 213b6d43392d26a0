"""What a person on call looks at: an endpoint for Prometheus, the slowest rank, memory, a profile.

Megatron does part of it; here is what it lacks. All but the endpoint's own thread runs where
Megatron waits for the device anyway.
"""
