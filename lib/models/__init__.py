"""Weights, architectures, tokenizers, token losses."""
