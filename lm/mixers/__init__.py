"""Published layers, one file each; a name is found by its file (lm/layers.py)."""
