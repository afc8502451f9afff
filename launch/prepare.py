"""Prepares the data of a configuration and prints its size.

    espalier prepare --config=quickstart [--data_dir=DIR] [--verify]

espalier train does this too; run it to prepare data ahead of time, or to check files with --verify.
"""

from absl import flags
from rich.console import Console
from rich.table import Table

from launch import cli
from lm.data.prepare import Prepared, prepare, resolve_data_dir

_CONFIG = cli.config_flag()
_DATA_DIR = cli.data_dir_flag()
_VERIFY = flags.DEFINE_bool("verify", False, "read all token files and compare their hashes")


def main(argv: list[str]) -> None:
    del argv  # cli.run refuses positional arguments
    config = cli.load_config(_CONFIG.value)
    data_dir = resolve_data_dir(_DATA_DIR.value)
    prepared = prepare(config.data, data_dir, verify=_VERIFY.value)
    console = Console(highlight=False, markup=False)
    console.print(_table(prepared))
    size = prepared.tokenizer.vocab_size
    console.print(f"tokenizer: {size:,} ids of {config.data.tokenizer.vocab_size:,}")
    console.print(f"files{' verified' if _VERIFY.value else ''} below {data_dir}", soft_wrap=True)


def _table(prepared: Prepared) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for column in ("source", "split", "documents", "tokens", "bytes", "bytes/token", "folder"):
        is_text = column in ("source", "split", "folder")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=True)
    for name, splits in prepared.stores.items():
        for split, store in splits.items():
            meta = store.meta
            counts = [f"{meta[key]:,}" for key in ("documents", "tokens", "bytes")]
            # The end-of-text token of each document has no bytes.
            ratio = meta["bytes"] / max(1, meta["tokens"] - meta["documents"])
            folder = store.folder.parent.name
            table.add_row(name, split, *counts, f"{ratio:.2f}", folder)
    return table


if __name__ == "__main__":
    cli.run(main)
