"""Text in, batches out.

sources -> documents -> tokenizers -> store -> packing -> mixture -> loader -> batch
"""
