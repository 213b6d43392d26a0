"""Megatron's tokenizers, as the data tools load, call and train them."""
