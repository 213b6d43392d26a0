"""Megatron pretraining with loss-based sample reweighting."""
