"""What a run starts from: an earlier launch in its workdir, or a checkpoint that the configuration
names, and its data.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from lm.config import Config, UserError
from lm.data import prepare, tokenizers
from lm.data.prepare import Prepared
from lm.data.tokenizers import Tokenizer
from lm.parallel import processes
from lm.run import checkpoint, record


class Origin(NamedTuple):
    """`folder` of the checkpoint the configuration names, if it is still to be read; `decay_start`
    in tokens, if a decay branched from it.
    """

    folder: Path | None
    decay_start: float | None
    data: Prepared


def find(config: Config, workdir: Path, data_dir: Path) -> Origin:
    """Reads what is there and prepares the data.

    Raises:
      UserError: the workdir holds another run, or anything named cannot be used.
    """
    record.check_unchanged(workdir, config)
    # A run that is named may go on writing: all processes take the checkpoint the first one found.
    named = processes.agree(str(_locate(config, workdir) or ""))
    folder = Path(named) if named else None
    data = prepare.prepare(
        config.data,
        data_dir,
        progress=processes.is_first(),
        tokenizer=_tokenizer(config, workdir, folder),
        verify=not (workdir / "run.json").exists(),
        is_writer=processes.is_first(),
    )
    return Origin(folder, _decay_start(config, workdir, folder), data)


def _locate(config: Config, workdir: Path) -> Path | None:
    """The checkpoint folder the configuration names, if it is still to be read: a run that has
    checkpoints of its own no longer needs it.
    """
    named = config.decay_from or config.init_from
    return checkpoint.locate(Path(named)) if named and not checkpoint.steps(workdir) else None


def _decay_start(config: Config, workdir: Path, origin: Path | None) -> float | None:
    """Tokens at which the decay branched; a resumed run reads its own record, never again the
    trunk.
    """
    if not config.decay_from:
        return None
    if origin is not None:
        return float(checkpoint.read_meta(origin).tokens)
    return record.recorded(workdir, "decay_start")


def _tokenizer(config: Config, workdir: Path, origin: Path | None) -> Tokenizer | None:
    """The tokenizer this run, or the one it starts from, already uses.

    Raises:
      UserError: it is not the one recorded, or not the one that the configuration gives.
    """
    own = workdir / checkpoint.TOKENIZER
    if own.exists():
        used, known = tokenizers.load(own), record.recorded(workdir, "tokenizer", "sha256")
        if used.sha256 != known:
            raise UserError(
                f"{own} has sha256 {used.sha256[:12]}, recorded was {known[:12]}; restore it or "
                "choose another workdir"
            )
        return used
    if origin is None:
        return None
    path = origin.parent.parent / checkpoint.TOKENIZER
    used, asked = tokenizers.load(path), config.data.tokenizer
    # A trained one is known by its file alone; every other kind the configuration gives whole.
    known = used.kind if asked.kind == "bpe" else tokenizers.create(asked).sha256
    if known != ("tokenizers" if asked.kind == "bpe" else used.sha256):
        raise UserError(
            f"{path} is another tokenizer (kind {used.kind}, sha256 {used.sha256[:12]}) than "
            f"data.tokenizer.kind={asked.kind!r} gives; set data.tokenizer to the one it came from"
        )
    return used
