"""A run on disk and on the screen: where it starts, its folder, its checkpoints, its progress."""
