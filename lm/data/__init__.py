"""From text to batches.

sources -> documents -> tokenizers -> store -> packing -> mixture -> loader -> batch
"""
