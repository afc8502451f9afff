"""Published layers, one file each; a mixer is found by the name of its file (lm/layers.py)."""
