"""The sections of a run's configuration: model, parametrization, loss, mesh and the rest.

No field has a default: experiments/base.py states every key. Marks on a field (lm/mapping.py) state
its bounds, and whether a resumed run may differ in it. The meaning of a field stands in the section
"Attributes:" of its class; docs/reference.md and --help_config are generated from there. The
sections of the data are in lm/data/config.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from lm import families
from lm.mapping import FREE, NOT_NEGATIVE, POSITIVE, SHARE, Bound, Count, Duration, Later, Tokens

DEPTH_EXPONENT = Bound("must lie in [0.5, 1]; set mup.alpha=1.0", lambda x: 0.5 <= x <= 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and layers of a model.

    Attributes:
      width: width D of the residual stream
      num_layers: number of layers
      num_heads: query heads H of a layer
      num_kv_heads: key and value heads G of a softmax or stick-breaking layer; divides `num_heads`
      head_dim: width K of a head
      ffn_dim: width F of the feed-forward
      layers: label -> {"mixer", **options of the mixer}; add "mlp", "residual" or "matrix" where
        the layer differs from the model; mlp "none" means the mixer alone; the name of a mixer is a
        label by itself
      pattern: labels or names of mixers: "a", "a,b" or a list of them cycled over the depth, or
        groups ((repeat, labels), ...)
      mlp: the feed-forward of every layer
      residual: the block of every layer, which joins mixer and feed-forward to the residual stream
      matrix: what the matrices between activations are made of
      tied_embeddings: whether the embedding is also the output matrix
      norm_eps: added to the mean square in every norm
      precision: precision of activations and products; bfloat16_operands rounds only the operands
        of products; parameters are float32
      remat: what the backward pass recomputes: nothing, everything, all but matrix products, or all
        but the tensors in `kept`
      kept: tensor (a name in lm/modules/remat.py) -> where it is kept for the backward pass, under
        remat "named"
      unroll: whether the layers of a group are compiled one after another instead of as one scan
      cpu_unroll: on a CPU they are also where the model has at most so many layers (lm/model.py)
    """

    width: Count
    num_layers: Count
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    ffn_dim: Count
    layers: Annotated[Mapping[str, Mapping[str, Any]], families.LAYERS]
    pattern: Any
    mlp: Annotated[families.Choice, families.FEED_FORWARDS]
    residual: Annotated[families.Choice, families.BLOCKS]
    matrix: Annotated[families.Choice, families.MATRICES]
    tied_embeddings: bool
    norm_eps: Annotated[float, POSITIVE]
    precision: Literal["float32", "bfloat16", "bfloat16_operands"]
    remat: Annotated[Literal["none", "full", "dots", "named"], FREE]
    kept: Annotated[Mapping[str, Literal["device", "host"]], FREE]
    unroll: Annotated[bool, FREE]
    cpu_unroll: Annotated[int, NOT_NEGATIVE, FREE, Later(0)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MupConfig:
    """Parametrization: how rates and initial values change with width and depth (lm/mup.py).

    Attributes:
      parametrization: muP, the standard one, or CompleteP, which extends muP to the depth
      base_width: width at which the learning rate and the initial values are stated
      init_std: standard deviation of initial weights at the base width
      embedding_multiplier: factor of the embedding's output; 1 under `standard`
      residual_multiplier: factor of each residual branch; 1 under `standard`
      base_depth: layers at which the rates are stated, under `completep`; 0 otherwise
      alpha: exponent with which residual branches shrink with the depth, under `completep`; 1
        otherwise
    """

    parametrization: Literal["mup", "standard", "completep"]
    base_width: Annotated[float, POSITIVE]
    init_std: Annotated[float, POSITIVE]
    embedding_multiplier: Annotated[float, POSITIVE]
    residual_multiplier: Annotated[float, POSITIVE]
    base_depth: Annotated[int, NOT_NEGATIVE, Later(0)]
    alpha: Annotated[float, DEPTH_EXPONENT, Later(1.0)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The cross-entropy.

    Attributes:
      z_loss: factor of the squared log normalizer that is added to the loss; 0: none
      chunk_size: tokens whose logits are in memory at a time
    """

    z_loss: Annotated[float, NOT_NEGATIVE]
    chunk_size: Tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The number of devices along each axis; one of the four may be -1, which takes the rest.

    Attributes:
      data: copies of the model, each with its rows of the batch
      fsdp: parts of parameters and optimizer state, gathered layer by layer (ZeRO-3)
      tensor: parts of heads, feed-forward and vocabulary
      sequence: parts of the tokens of a row (docs/sequence.md)
      replicate: letters of dimensions that are replicated if they do not divide: D, F, H, G, vocab
      zero1: whether the optimizer state is split over the data axis
      stream_over_tensor: whether the residual stream is split over time on the tensor axis
        (Korthikanti et al. 2022, arXiv 2205.05198, who call it sequence parallelism)
      sequence_strategy: how ops share the tokens of a row: auto, a strategy (kernels/README.md), or
        "label=strategy,..." where layers differ
      sequence_layout: which tokens a device of the sequence axis holds; zigzag balances the work of
        attention
    """

    data: int
    fsdp: int
    tensor: int
    sequence: int
    replicate: tuple[str, ...]
    zero1: bool
    stream_over_tensor: bool
    sequence_strategy: Annotated[str, Later("auto")]
    sequence_layout: Annotated[Literal["contiguous", "zigzag"], Later("contiguous")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Length of the run and of a step.

    Attributes:
      length: length of the run
      accumulation: microbatches per step, processed one after another
      keep_compiled: whether compiled programs are kept in the data folder, where a later launch
        finds them (lm/run/compiled.py)
    """

    length: Annotated[Duration, FREE]
    accumulation: Annotated[int, POSITIVE, FREE]
    keep_compiled: Annotated[bool, FREE, Later(True)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is measured while a run trains.

    Attributes:
      every: how often the validation sets and the tasks are evaluated; the end of the run always
        is; 0 steps: only the end
      share: largest part of the training FLOPs that evaluations may take if `every` is in percent;
        a short run is then evaluated less often, but always at the end; 0: no limit
      max_tokens: tokens scored in each validation set, evenly spread over it
      tasks: label -> {"task", **options of the task}; the name of a task is a label by itself
    """

    every: Duration
    share: Annotated[float, SHARE, Later(0.0)]
    max_tokens: Tokens
    tasks: Annotated[Mapping[str, Mapping[str, Any]], families.Labels(families.TASKS)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What a run logs.

    Attributes:
      every: how often a step is written to metrics.jsonl
      samples: prompts that are continued at the end of the run
      sample_tokens: length of a continuation
      gradient_noise: whether a step measures the noise scale of its gradient (lm/step.py: Noise),
        which needs at least two parts of a batch
      tracker: where the records are shown while the run trains
    """

    every: Duration
    samples: tuple[str, ...]
    sample_tokens: Annotated[Tokens, Bound("must be at most 2^20", lambda n: n <= 1 << 20)]
    gradient_noise: Annotated[bool, Later(False)]
    tracker: Annotated[Any, families.TRACKERS, Later({"family": "tensorboard"})]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What a run saves. The checkpoint at which the decay of the schedule begins is always kept.

    Attributes:
      every: how often a checkpoint is saved
      keep_last: number of newest checkpoints that are kept
      keep_every: checkpoints at multiples of this are also kept; 0 steps: none
    """

    every: Duration
    keep_last: Count
    keep_every: Duration
