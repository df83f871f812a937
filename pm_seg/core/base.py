"""What all kinds of token compression have in common."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from .structure import Grid

#: Tokens (B, P+N, C) after the last layer, and after layers asked for.
LayerOutputs = tuple[Tensor, dict[int, Tensor]]
#: Gets layers, the group of each of their patch tokens, int64, (B or 1, N),
#: None where all are on their own, and the grid; in the order they run.
Observer = Callable[[tuple[int, ...], Tensor | None, Grid], None]


class Compressor(nn.Module):
    """Runs the layers of a transformer on fewer tokens.

    Args:
        depth (int): Number of transformer layers.
        grid (tuple[int, int]): Patch rows and columns (h, w), N = h * w.
        num_prefix (int): P, tokens in front that are never compressed.
        keep (float): Share of the tokens to work on.
        dims (int, optional): C, channels of a token.
        layer_cost (tuple[float, float]): a and b of the multiply-accumulates
            ``a T + b T^2`` of a layer on T tokens.
    """

    #: Whether a structure is derived from scores of the patch positions.
    uses_scores: bool

    def __init__(
        self,
        depth: int,
        grid: Grid,
        num_prefix: int,
        keep: float,
        dims: int | None,
        layer_cost: tuple[float, float],
    ) -> None:
        super().__init__()
        self.depth = depth
        self.grid = (int(grid[0]), int(grid[1]))
        self.num_prefix = num_prefix
        self.num_tokens = self.grid[0] * self.grid[1]
        self.keep = keep
        self.dims = dims or 1
        self.layer_cost = layer_cost
        self._enabled = True
        #: Called while the layers run, see
        #: :class:`~pm_seg.core.observe.GroupRecorder`.
        self.observer: Observer | None = None

    @property
    def has_structure(self) -> bool:
        """Whether it is known how many tokens each layer works on."""
        raise NotImplementedError

    def build(self) -> None:
        """Derive the structure for the current ``keep``."""
        raise NotImplementedError

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
        layers: Sequence[nn.Module],
        x: Tensor,
        grid: Grid,
        outputs: Collection[int] = (),
    ) -> LayerOutputs:
        """Run all layers.

        Args:
            layers (Sequence[nn.Module]): ``depth`` modules, each a function
                of tokens.
            x (Tensor): (B, P+N, C).
            grid (tuple[int, int]): Patch rows and columns, N = h * w.
            outputs (Collection[int]): Layers after which all tokens are
                wanted.

        Returns:
            tuple: Tokens after the last layer (B, P+N, C), and after each
            layer of ``outputs``.
        """
        if not self._enabled:
            return run_dense(layers, x, outputs)
        return self._run(layers, x, grid, outputs)

    def _run(
        self,
        layers: Sequence[nn.Module],
        x: Tensor,
        grid: Grid,
        outputs: Collection[int],
    ) -> LayerOutputs:
        raise NotImplementedError


def run_dense(
    layers: Sequence[nn.Module], x: Tensor, outputs: Collection[int] = ()
) -> LayerOutputs:
    """Run all layers on all tokens, see :meth:`Compressor.run`."""
    collected = {}
    for index, layer in enumerate(layers):
        x = layer(x)
        if index in outputs:
            collected[index] = x
    return x, collected
