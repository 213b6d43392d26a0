"""Text of any format, read in chunks: sources, readers, sampling, duplicates."""
