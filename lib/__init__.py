"""What the recipes share: settings, data, evaluation, the run folder, export.

Small modules of plain functions. None of them calls the engine's forward, backward or step: the loop is in the recipe.
"""
