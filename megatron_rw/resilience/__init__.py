"""What a run of weeks meets: checkpoints half written, signals, bad numbers, ranks that go missing.

Megatron does most of it; here is what it lacks, hooked in where it has no place for more.
"""
