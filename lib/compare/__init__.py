"""The comparison: runs a recipe under several DeepSpeed JSONs, and reports what it measured."""
