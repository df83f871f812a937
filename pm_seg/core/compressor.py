"""What all kinds of token compression have in common."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .merging import Grid, TokenGroups
from .rows import extra_of


class Layer(Protocol):
    """What a compressor needs of a transformer layer: itself, its halves where
    tokens merge in between, as in ToMe, and ``mean_keys`` to compare tokens.
    """

    def __call__(
        self, x: Tensor, log_size: Tensor | None = None, *extra: Tensor
    ) -> Tensor:
        """Run the layer on tokens (B, T, C). ``log_size``, float32, (B, T),
        is added to the attention logits of each key: a token counts as often
        as the patches it stands for. ``extra`` is what
        :meth:`Compressor.run` has for these tokens."""

    def attend(
        self, x: Tensor, log_size: Tensor | None = None, *extra: Tensor
    ) -> Tensor:
        """The first half: attention and its shortcut."""

    def feed_forward(self, x: Tensor) -> Tensor:
        """The second half: MLP and its shortcut."""

    def mean_keys(self, x: Tensor) -> Tensor:
        """Keys of tokens (B, T, C), averaged over the heads, (B, T, D)."""


@dataclass(frozen=True)
class LayerCost:
    """Multiply-accumulates of a layer whose parts run on T tokens.

    Attributes:
        attention (float): Of the projections around attention, per token.
        mlp (float): Of the MLP, per token.
        square (float): Of attention itself, per pair of tokens.
    """

    attention: float
    mlp: float
    square: float

    def __call__(self, attended: float, kept: float | None = None) -> float:
        """MACs with attention on ``attended`` and the MLP on ``kept``."""
        kept = attended if kept is None else kept
        attention = self.attention * attended + self.square * attended**2
        return attention + self.mlp * kept


@dataclass(frozen=True)
class EncoderShape:
    """The transformer that is compressed.

    Attributes:
        depth (int): Number of layers, L.
        grid (tuple[int, int]): Patch rows and columns (h, w), N = h * w.
        num_prefix (int): P, tokens in front that are never compressed.
        dims (int): C, channels of a token.
        key_dims (int): D, channels of a key.
        cost (LayerCost): Of each layer.
        extra_dims (int): Channels that belong to a patch token beside its
            own and merge with it, of all layers. Defaults to 0.
    """

    depth: int
    grid: Grid
    num_prefix: int
    dims: int
    key_dims: int
    cost: LayerCost
    extra_dims: int = 0

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1]

    @property
    def dense_macs(self) -> float:
        """MACs of all layers on all tokens of one image."""
        return self.depth * self.cost(self.num_prefix + self.num_tokens)


@dataclass(frozen=True)
class LayerLoad:
    """What one layer works on and costs, one image of the native size.

    Attributes:
        attended, kept (int): Patch tokens of its attention and of its MLP.
        macs (float): Multiply-accumulates, finding groups, merge and restore
            included.
        pruned (int): Patch tokens that bypass it.
    """

    attended: int
    kept: int
    macs: float
    pruned: int = 0


class Outputs(NamedTuple):
    """What :meth:`Compressor.run` returns.

    Attributes:
        last (Tensor): Tokens after the last layer, (B, P+N, C).
        layers (dict[int, Tensor]): The same after each layer asked for.
        groups (TokenGroups, optional): What the last layer worked on, None
            if it worked on all tokens or on groups that are not of images.
    """

    last: Tensor
    layers: dict[int, Tensor]
    groups: TokenGroups | None = None


class Compressor(nn.Module):
    """Runs the layers of a transformer, an EncoderShape, on fewer tokens."""

    #: Whether there is no structure without gradient-weighted scores.
    needs_scores = False

    #: What :meth:`run` does where it compresses, with the same arguments.
    _run: Callable[..., Outputs]

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.shape = shape
        self._enabled = True
        #: Sees the groups of each layer, in the order they run.
        self.observer: GroupRecorder | None = None

    @property
    def has_structure(self) -> bool:
        """Whether it is known how many tokens each layer works on."""
        return True

    def leave_merged(self) -> None:
        """Say that prefix tokens alone are read: patch tokens may stay merged
        in the outputs, and leave before the last MLP."""

    @property
    def compressed(self) -> bool:
        """Whether it was compressed to a budget, here or in a checkpoint."""
        return self.has_structure

    def settle(self) -> None:
        """Say that it was compressed; checkpoints will know."""

    def set_keep(self, keep: float) -> None:
        """Make the layers cost this share of the dense layers' MACs, or raise
        ``ValueError`` if it is out of reach."""
        raise NotImplementedError

    def set_grid(self, grid: Grid) -> None:
        """Count costs on another native grid; structures of positions stay
        those of theirs."""

    def loads(self) -> list[LayerLoad]:
        """What each layer works on and costs, on the native grid."""
        raise NotImplementedError

    @property
    def share(self) -> float:
        """MACs of all layers, as a share of the dense layers'."""
        return sum(load.macs for load in self.loads()) / self.shape.dense_macs

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the transformer uncompressed inside the ``with`` block."""
        previous, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = previous

    def run(
        self,
        layers: Sequence[Layer],
        x: Tensor,
        grid: Grid,
        outputs: Collection[int] = (),
        extra: Tensor | None = None,
    ) -> Outputs:
        """Run all layers.

        Args:
            layers (Sequence[Layer]): ``depth`` of them.
            x (Tensor): (B, P+N, C).
            grid (tuple[int, int]): Patch rows and columns, N = h * w; any.
            outputs (Collection[int]): Layers whose outputs are wanted too.
            extra (Tensor, optional): What layers take beside each patch
                token, such as rotary position tables: (N, E), the same for
                all layers, or (L, heads, N, E). Merged tokens get the mean of
                their patches, for each image: (B, 1 or heads, T, E).

        Raises:
            ValueError: If ``x`` does not have P + h * w tokens.
        """
        if not self._enabled:
            return run_dense(layers, x, outputs, extra)
        expected = self.shape.num_prefix + grid[0] * grid[1]
        if x.shape[1] != expected:
            raise ValueError(
                f'got {x.shape[1]} tokens, expected {expected}: '
                f'{self.shape.num_prefix} prefix tokens and a '
                f'{grid[0]}x{grid[1]} grid of patches'
            )
        return self._run(layers, x, grid, outputs, extra)


class GroupRecorder:
    """Context manager that keeps the groups of the last forward pass.

    Args:
        compressor (Compressor): What to watch.

    Attributes:
        grid (tuple[int, int]): Patch rows and columns (h, w) of the images
            seen last, None before.
        groups (list[Tensor]): Group of each patch token in each layer, int64,
            (B or 1, N), -1 if pruned; N groups where it runs on all tokens.

    Example:
        >>> with GroupRecorder(model.backbone.compressor) as recorder:
        ...     model(images, mode='tensor')
        >>> recorder.groups[3].shape
    """

    def __init__(self, compressor: Compressor) -> None:
        self.compressor = compressor
        self.grid: Grid | None = None
        self.groups: list[Tensor] = []

    def __enter__(self) -> GroupRecorder:
        self.compressor.observer = self
        return self

    def __exit__(self, *error: object) -> None:
        self.compressor.observer = None

    @torch.compiler.disable
    def _see(self, layer: int, group: Tensor | None, grid: Grid) -> None:
        """Groups (B or 1, N), None where all tokens are on their own."""
        if layer == 0:
            self.grid, self.groups = grid, []
        if group is None:
            group = torch.arange(grid[0] * grid[1])[None]
        self.groups.append(group.detach().cpu())


def run_dense(
    layers: Sequence[Layer],
    x: Tensor,
    outputs: Collection[int] = (),
    extra: Tensor | None = None,
) -> Outputs:
    """Run all layers on all tokens, see :meth:`Compressor.run`."""
    collected = {}
    for index, layer in enumerate(layers):
        x = plainly(layer, x, extra_of(extra, index))
        if index in outputs:
            collected[index] = x
    return Outputs(x, collected)


def plainly(layer: Layer, x: Tensor, extra: Sequence[Tensor]) -> Tensor:
    """A layer on tokens of which none counts more than another."""
    return layer(x, None, *extra) if extra else layer(x)


def check_share(name: str, value: float) -> None:
    """Raise ``ValueError`` unless ``value`` is a number in (0, 1]."""
    if not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(
            f'{name}={value!r} is not in (0, 1]; it is the share of the '
            f"layers' operations that is left, for example {name}=0.5"
        )


def check_option(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of those allowed."""
    if value not in allowed:
        raise ValueError(f'{name}={value!r} must be one of {tuple(allowed)}')
