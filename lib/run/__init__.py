"""The run folder and the console: one training run, its metrics, its checkpoints, its end."""
