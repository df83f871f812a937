"""What every compressible module shares: its compressor, strict loading."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from mmengine.logging import print_log
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor, nn

from ..core import Compressor, MergingCompressor, TokenCompressor
from ..core.base import LayerOutputs, run_dense
from ..core.structure import Grid
from .layers import layer_cost, token_dims

#: Values of ``type`` in a ``compression`` dict.
COMPRESSIONS: dict[str, Callable[..., Compressor]] = {
    'prune_merge': TokenCompressor,
    'tome': partial(MergingCompressor, method='tome'),
    'algm': partial(MergingCompressor, method='algm'),
}

_COMPRESSOR = 'compressor.'


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


class CompressibleMixin:
    """For modules with ``layers``, run on P prefix and h x w patch tokens.

    Adds a ``compressor`` (None if the module is dense) and loading that fails
    on what would silently change the results: mmengine loads with
    ``strict=False`` and only logs missing, unexpected or misshapen entries.
    """

    compressor: Compressor | None
    layers: nn.ModuleList

    #: Prefixes of entries which mean another model if they are unexpected.
    own_keys: tuple[str, ...] = ('layers.', 'compressor.')

    #: Options of 'prune_merge' where a ``compression`` dict is silent.
    default_compression: Mapping[str, object] = {}

    def build_compressor(
        self, compression: dict | None, grid: Grid, num_prefix: int
    ) -> None:
        """Create ``self.compressor`` from the user's ``compression`` dict.

        Raises:
            ValueError: On an unknown type or key.
        """
        self.compressor = None
        if compression is None:
            return
        options = {
            'grid': grid,
            'dims': token_dims(self.layers[0]),
            'layer_cost': layer_cost(self.layers[0]),
            **compression,
        }
        kind = options.pop('type', 'prune_merge')
        if kind not in COMPRESSIONS:
            raise ValueError(
                f'compression type={kind!r} is unknown; choose one of '
                f'{tuple(COMPRESSIONS)}'
            )
        if kind == 'prune_merge':
            with_cp = getattr(self.layers[0], 'with_cp', False)
            options = {
                **self.default_compression,
                'checkpoint': with_cp,
                **options,
            }
        try:
            self.compressor = COMPRESSIONS[kind](
                depth=len(self.layers), num_prefix=num_prefix, **options
            )
        except TypeError as error:
            raise ValueError(
                f'compression={dict(compression)} has an unknown key '
                f'({error}); see pm_seg.core for the options of {kind!r}'
            ) from error

    def run_layers(
        self, x: Tensor, grid: Grid, outputs: Sequence[int] = ()
    ) -> LayerOutputs:
        """Run all layers, see :meth:`pm_seg.core.Compressor.run`."""
        if self.compressor is None:
            return run_dense(self.layers, x, outputs)
        return self.compressor.run(self.layers, x, grid, outputs)

    @property
    def score_taps(self) -> list[nn.Module]:
        """Modules the values of each layer's attention pass through."""
        return [layer.attn.value_tap for layer in self.layers]

    def load_pretrained(self) -> bool:
        """Load the weights ``init_cfg=dict(type='Pretrained', ...)`` names.

        Other than mmengine's own way, a checkpoint of a whole model is
        accepted and one which does not fit raises ``RuntimeError``.

        Returns:
            bool: Whether ``init_cfg`` is of this type.
        """
        cfg = self.init_cfg
        if not (isinstance(cfg, dict) and cfg.get('type') == 'Pretrained'):
            return False
        checkpoint = CheckpointLoader.load_checkpoint(
            cfg['checkpoint'], map_location='cpu'
        )
        state = dict(checkpoint.get('state_dict', checkpoint))
        prefix = cfg.get('prefix', 'backbone.')
        if any(key.startswith(prefix) for key in state):
            state = {
                key[len(prefix) :]: value
                for key, value in state.items()
                if key.startswith(prefix)
            }
        self._fit_pretrained(state)
        result = self.load_state_dict(state, strict=False)
        if result.unexpected_keys:
            print_log(
                f'{type(self).__name__} does not use these entries of '
                f'{cfg["checkpoint"]}: {", ".join(result.unexpected_keys)}',
                logger='current',
            )
        return True

    def _fit_pretrained(self, state_dict: dict[str, Tensor]) -> None:
        """Adapt pretrained weights to this model, in place."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args, **kwargs
    ) -> None:
        self._adapt_state_dict(state_dict, prefix)
        problems = list(self._state_dict_problems(state_dict, prefix))
        if problems:
            shown = '\n  '.join(problems[:12])
            more = len(problems) - 12
            shown += f'\n  ... and {more} more' if more > 0 else ''
            if any(': missing' in problem for problem in problems):
                shown += (
                    '\n(weights of another code base? see tools/'
                    'convert_checkpoint.py)'
                )
            raise RuntimeError(
                f'the checkpoint does not fit {type(self).__name__}'
                f'{f" ({prefix[:-1]})" if prefix else ""}:\n  {shown}'
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _adapt_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str
    ) -> None:
        """Let a dense checkpoint leave the compressor as it is.

        Subclasses add or convert other entries before the check.
        """
        start = prefix + _COMPRESSOR
        if not any(key.startswith(start) for key in state_dict):
            for key, value in self.state_dict(prefix=prefix).items():
                if key.startswith(start):
                    state_dict[key] = value

    def _state_dict_problems(
        self, state_dict: dict[str, Tensor], prefix: str
    ) -> Iterator[str]:
        own = self.state_dict()
        given = {
            key[len(prefix) :]: value
            for key, value in state_dict.items()
            if key.startswith(prefix)
        }
        if self.compressor is None and any(
            key.startswith(_COMPRESSOR) for key in given
        ):
            yield (
                'it is a compressed checkpoint, the config is dense; give '
                'the config the compression=dict(...) it was made with'
            )
        for key, value in own.items():
            if key not in given:
                yield f'{key}: missing, expected {tuple(value.shape)}'
            elif given[key].shape != value.shape:
                yield (
                    f'{key}: shape {tuple(given[key].shape)}, expected '
                    f'{tuple(value.shape)}{self._shape_remedy(key)}'
                )
        for key in given:
            foreign = key not in own and key.startswith(self.own_keys)
            explained = self.compressor is None and key.startswith(_COMPRESSOR)
            if foreign and not explained:
                yield f'{key}: unexpected, the model has no such entry'

    def _shape_remedy(self, key: str) -> str:
        if key.startswith(_COMPRESSOR):
            return (
                '; the compression was made for another grid (img_size) or '
                'other num_groups'
            )
        return ''
