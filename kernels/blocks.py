"""Tile sizes of the forms: frozen dataclasses, validated when they are created.

The defaults of `Attention` were measured on XLA:CPU (the README of each op holds the numbers).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Attention:
    """A tile is `block_q` queries by `block_kv` keys; sums along keys are taken `run` at a time."""

    block_q: int = 256
    block_kv: int = 256
    run: int = 32

    def __post_init__(self) -> None:
        for name in ("block_q", "block_kv", "run"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.block_kv % self.run:
            raise ValueError(
                f"block_kv={self.block_kv} must be a multiple of run={self.run}; "
                f"set block_kv={round_up(self.block_kv, self.run)}"
            )

    def fit(self, num_queries: int, num_keys: int) -> "Attention":
        """These tiles, capped at the sizes of the arrays rounded up to whole runs."""
        block_q = min(self.block_q, round_up(num_queries, self.run))
        block_kv = min(self.block_kv, round_up(num_keys, self.run))
        return Attention(block_q, block_kv, self.run)


@dataclass(frozen=True)
class Chunk:
    """A recurrence in chunks of `length` tokens. A per-channel decay and the inverse of the delta
    rule first work in parts of `sub` tokens, then combine the parts."""

    length: int = 64
    sub: int = 16

    def __post_init__(self) -> None:
        for name in ("length", "sub"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.length % self.sub:
            raise ValueError(
                f"length={self.length} must be a multiple of sub={self.sub}; "
                f"set length={round_up(self.length, self.sub)}"
            )


@dataclass(frozen=True)
class TritonAttention:
    """Tiles of `block_q` queries by `block_kv` keys on a GPU, and how a tile is computed.

    A program has `num_warps` warps and keeps `num_stages` tiles of keys in flight. After every
    `span` tiles it checks whether any query still needs more keys.
    """

    block_q: int = 128
    block_kv: int = 64
    num_warps: int = 8
    num_stages: int = 2
    span: int = 4

    def __post_init__(self) -> None:
        for name in ("block_q", "block_kv", "num_warps"):
            size = getattr(self, name)
            if size < 1 or size & (size - 1):
                raise ValueError(f"{name}={size} must be a power of two")
        for name in ("num_stages", "span"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.block_kv < 32 or self.block_q % self.block_kv:
            raise ValueError(
                f"block_q={self.block_q} must be a multiple of block_kv={self.block_kv}, "
                "which is at least 32"
            )


@dataclass(frozen=True)
class PallasChunk:
    """A recurrence on a TPU: chunks of `length` tokens (a power of two), and up to `heads` heads in
    one program (more only where fewer heads do not fill whole rows of lanes)."""

    length: int = 128
    heads: int = 4

    def __post_init__(self) -> None:
        if self.length < 16 or self.length & (self.length - 1):
            raise ValueError(f"length={self.length} must be a power of two, 16 or more")
        if self.heads < 1:
            raise ValueError(f"heads={self.heads} must be at least 1")


@dataclass(frozen=True)
class TritonChunk:
    """A recurrence in Triton: chunks of `length` tokens, tiles of `key` by `value` channels.

    `channel_key` replaces `key` where the decay is per channel. A program carries a tile of
    `state_key` by `state_value` from chunk to chunk; smaller tiles mean more programs, and each
    program reads all tokens again. The delta rule carries all of K by `recall_value`, and its
    inverse starts from blocks of `base` rows. All sizes are powers of two that the tensor cores
    accept. Warps and stages are Triton's: `state_*` for the programs that go from chunk to chunk,
    `wide_*` for programs that hold many tiles at once.
    """

    length: int = 64
    key: int = 64
    channel_key: int = 32
    value: int = 64
    state_key: int = 64
    state_value: int = 64
    recall_value: int = 32
    base: int = 16
    num_warps: int = 4
    wide_warps: int = 8
    state_warps: int = 4
    num_stages: int = 2
    state_stages: int = 3

    def __post_init__(self) -> None:
        tiles = "key", "channel_key", "value", "state_key", "state_value", "recall_value"
        for name in ("length", "base", *tiles):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ValueError(f"{name}={size} must be a power of two, 16 or more")
        if self.length < self.base:
            raise ValueError(f"base={self.base} must be at most length={self.length}")
        for name in ("num_warps", "wide_warps", "state_warps"):
            if getattr(self, name) not in (1, 2, 4, 8, 16):
                raise ValueError(f"{name}={getattr(self, name)} must be one of 1, 2, 4, 8, 16")
        for name in ("num_stages", "state_stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


def attention(num_queries: int, num_keys: int) -> Attention:
    """Default tiles for this many queries and keys."""
    size = 128 if num_keys <= 1024 else 256
    return Attention(size, size).fit(num_queries, num_keys)


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `size`."""
    return -(-size // multiple) * multiple
