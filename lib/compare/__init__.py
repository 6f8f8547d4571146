"""Runs a recipe under several DeepSpeed JSONs, and says what it measured."""
