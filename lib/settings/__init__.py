"""Settings: the YAML and the command line, the DeepSpeed JSON, what every run can be told. Read before torch is imported."""
