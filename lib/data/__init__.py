"""Columns, rows and padding: sources, checked rows, samples, batches, blocks of tokens."""
