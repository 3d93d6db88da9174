"""Depth attention, layers and loss as plain torch modules. Knows no pipeline, no files, no DeepSpeed."""
