"""Text in, batches out: sources -> tokenizers -> store -> packing -> mixture -> loader -> batch."""
