"""A run on disk and on the screen: its origin, its folder, its checkpoints, its progress bar."""
