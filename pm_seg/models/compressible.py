"""What every compressible module shares: its compressor."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from ..core import Compressor, Outputs, make_compressor, run_dense
from ..core.merging import Grid
from .layers import encoder_shape
from .loading import StrictLoading


def check_patches(size: Sequence[int], patch: Sequence[int]) -> None:
    """Raise ``ValueError`` unless an image has at least one whole patch.

    Args:
        size (tuple[int, int]): Height and width of the image.
        patch (tuple[int, int]): Height and width of a patch.
    """
    if any(n < p for n, p in zip(size, patch)):
        raise ValueError(
            f'an image of {size[0]}x{size[1]} pixels is smaller than a patch '
            f'({patch[0]}x{patch[1]}); resize images, or set img_size, to at '
            'least that'
        )


def check_out_indices(
    out_indices: int | Sequence[int], depth: int
) -> list[int]:
    """Layers by their numbers, of which negative ones count from the end.

    Args:
        out_indices (int | Sequence[int]): One or several of them.
        depth (int): Layers there are.

    Raises:
        ValueError: If there is no such layer.
    """
    given = [out_indices] if isinstance(out_indices, int) else out_indices
    chosen = [i + depth if i < 0 else i for i in given]
    if not all(0 <= i < depth for i in chosen):
        raise ValueError(
            f'out_indices={out_indices} must lie in {-depth}..{depth - 1}, '
            'the layers of this model'
        )
    return chosen


def check_arguments(owner: object, stock: type, given: Iterable[str]) -> None:
    """Raise ``ValueError`` unless a stock backbone has all these arguments.

    Args:
        owner (object): A backbone of ours.
        stock (type): Whose arguments it takes.
        given (Iterable[str]): Their names.
    """
    unknown = sorted(set(given) - set(inspect.signature(stock).parameters))
    if unknown:
        name, package = type(owner).__name__, stock.__module__.split('.')[0]
        other = {'mmseg': 'mmpretrain', 'mmpretrain': 'mmseg'}[package]
        raise ValueError(
            f'{package}.{name} has no argument {", ".join(unknown)}; it takes '
            f'those of {package}.{stock.__name__}: leave out what belongs to '
            f"another backbone, or write type='{other}.{name}'"
        )


class CompressibleMixin(StrictLoading):
    """For modules with ``layers``, run on P prefix and h x w patch tokens.

    Adds a ``compressor``, None if the module is dense.
    """

    compressor: Compressor | None
    layers: nn.ModuleList

    own_keys = ('layers.', 'compressor.')

    #: Options where a ``compression`` dict is silent.
    default_compression: Mapping[str, object] = {}

    #: Whether the outputs are of prefix tokens alone.
    reads_prefix = False

    def build_compressor(
        self,
        compression: dict | None,
        grid: Grid,
        num_prefix: int,
        extra_dims: int = 0,
    ) -> None:
        """Create ``self.compressor`` from the user's ``compression`` dict.

        Raises:
            ValueError: On an unknown type, an unknown option or a value out
                of range.
        """
        self.geometry = (grid, num_prefix, extra_dims)
        self.compressor = None
        if compression is not None:
            shape = encoder_shape(self.blocks, *self.geometry)
            self.compressor = make_compressor(
                compression, shape, self.default_compression
            )
            if self.reads_prefix:
                self.compressor.leave_merged()

    def run_layers(
        self,
        x: Tensor,
        grid: Grid,
        outputs: Sequence[int] = (),
        extra: Tensor | None = None,
    ) -> Outputs:
        """Run all layers, see :meth:`pm_seg.core.Compressor.run`."""
        if self.compressor is None:
            return run_dense(self.layers, x, outputs, extra)
        return self.compressor.run(self.layers, x, grid, outputs, extra)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The layers as modules, for hooks."""
        return self.layers

    @property
    def score_taps(self) -> list[nn.Module]:
        """Modules the values of each layer's attention pass through."""
        return [layer.attn.value_tap for layer in self.layers]

    def _adapt_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str
    ) -> None:
        """Let a dense checkpoint leave the compressor as it is."""
        super()._adapt_state_dict(state_dict, prefix)
        start = f'{prefix}compressor.'
        if not any(key.startswith(start) for key in state_dict):
            for key, value in self.state_dict(prefix=prefix).items():
                if key.startswith(start):
                    state_dict[key] = value
