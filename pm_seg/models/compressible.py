"""What compressible modules share."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

from mmengine.utils import to_2tuple
from torch import Tensor, nn

from ..core import Compressor, Outputs, make_compressor, run_dense
from ..core.merging import Grid
from .layers import HalvedLayer, encoder_shape
from .loading import State, StrictLoading


def check_patches(size: Sequence[int], patch: Sequence[int]) -> None:
    """Raise ``ValueError`` unless an image (h, w) has a whole patch."""
    if any(n < p for n, p in zip(size, patch)):
        raise ValueError(
            f'an image of {size[0]}x{size[1]} pixels is smaller than a patch '
            f'({patch[0]}x{patch[1]}); resize images, or set img_size, to at '
            'least that'
        )


def check_out_indices(
    out_indices: int | Sequence[int], depth: int
) -> list[int]:
    """Numbers of layers, of which negative ones count from the end.

    Or ``ValueError`` if there is no such layer among ``depth``.
    """
    given = [out_indices] if isinstance(out_indices, int) else out_indices
    chosen = [i + depth if i < 0 else i for i in given]
    if not all(0 <= i < depth for i in chosen):
        raise ValueError(
            f'out_indices={out_indices} must lie in {-depth}..{depth - 1}, '
            'the layers of this model'
        )
    return chosen


class CompressibleMixin(StrictLoading):
    """For modules with ``layers``, run on P prefix and h x w patch tokens.

    Adds a ``compressor``, None if the module is dense.
    """

    compressor: Compressor | None
    layers: nn.ModuleList

    #: The native grid, P, and ``EncoderShape.extra_dims``.
    geometry: tuple[Grid, int, int]

    #: Options where a ``compression`` dict is silent.
    default_compression: Mapping[str, object] = {}

    #: Whether the outputs are of prefix tokens alone.
    reads_prefix = False

    def build_compressor(
        self, compression: dict | None, grid: Grid | None = None
    ) -> None:
        """Create ``self.compressor`` from the user's ``compression`` dict,
        for another native grid if one is given.
        """
        self.compressor = None
        if compression is not None:
            native, *rest = self.geometry
            shape = encoder_shape(self.blocks, grid or native, *rest)
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

    def _adapt_state_dict(self, state_dict: State, prefix: str) -> None:
        """Let a dense checkpoint leave the compressor as it is."""
        super()._adapt_state_dict(state_dict, prefix)
        start = f'{prefix}compressor.'
        if self.compressor is not None and not any(
            key.startswith(start) for key in state_dict
        ):
            state_dict.update(self.compressor.state_dict(prefix=start))


class StockBackbone(CompressibleMixin):
    """For backbones of mmseg and mmpretrain: the stock class builds one, and
    its layers become ours.
    """

    stock: type[nn.Module]
    layer_class: type[HalvedLayer]

    own_keys = ('layers.', 'compressor.', 'patch_embed.', 'pos_embed')

    def __init__(
        self,
        *args,
        out_indices: int | Sequence[int] = -1,
        compression: dict | None = None,
        **kwargs,
    ) -> None:
        self._check_arguments(kwargs)
        try:
            super().__init__(*args, out_indices=0, **kwargs)
        except AssertionError as error:
            raise ValueError(f'{type(self).__name__}: {error}') from error
        self.out_indices = check_out_indices(out_indices, len(self.layers))
        self.adopt(compression)

    def _check_arguments(self, given: Mapping[str, object]) -> None:
        known = {
            name
            for base in self.stock.__mro__
            for name in inspect.signature(base.__init__).parameters
        }
        unknown = sorted(given.keys() - known)
        if unknown:
            name, stock = type(self).__name__, self.stock.__name__
            package = self.stock.__module__.split('.')[0]
            remedy = 'leave out what belongs to another backbone'
            if stock == 'VisionTransformer':  # of both packages
                other = 'mmpretrain' if package == 'mmseg' else 'mmseg'
                remedy += f", or write type='{other}.{name}'"
            raise ValueError(
                f'{package}.{name} has no argument {", ".join(unknown)}; it '
                f'takes those of {package}.{stock}: {remedy}'
            )

    def adopt(self, compression: dict | None) -> None:
        """Let what the stock class built run compressed."""
        check_patches(
            to_2tuple(self.img_size), self.patch_embed.projection.kernel_size
        )
        for layer in self.layers:
            self.layer_class.adopt(layer)
        self.build_compressor(compression)

    def run_to_outputs(
        self, x: Tensor, grid: Grid, extra: Tensor | None = None
    ) -> Outputs:
        """:meth:`run_layers` for ``out_indices``, with the final norm."""
        found = self.run_layers(x, grid, self.out_indices, extra)
        last = len(self.layers) - 1
        if self.final_norm and last in found.layers:
            found.layers[last] = self.norm1(found.layers[last])
        return found

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)  # returns nothing
        return self

    def init_weights(self) -> None:
        """Initialise, or load ``init_cfg=dict(type='Pretrained', ...)``."""
        if not self.load_pretrained():
            super().init_weights()
