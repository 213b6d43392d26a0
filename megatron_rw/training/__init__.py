"""The seams to Megatron's training program: flags, batches, loss, metrics, checkpointed state.

Only this package imports `megatron.training`. What Megatron already does is not done here.
"""
