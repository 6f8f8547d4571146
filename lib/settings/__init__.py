"""Settings: the YAML and the command line, the DeepSpeed JSON, the settings that every run has.

They are read and checked before torch is imported.
"""
