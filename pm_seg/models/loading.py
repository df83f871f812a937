"""Loading that fails on what would silently change the results."""

from __future__ import annotations

from collections.abc import Iterator

from mmengine.logging import print_log
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor

_COMPRESSOR = 'compressor.'


class StrictLoading:
    """For modules whose checkpoints have to fit.

    mmengine loads with ``strict=False`` and only logs missing, unexpected or
    misshapen entries.
    """

    #: Prefixes of entries which mean another model if they are unexpected;
    #: None for all.
    own_keys: tuple[str, ...] | None = ('layers.',)

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
        """Add or convert entries before the check, in place."""

    def _state_dict_problems(
        self, state_dict: dict[str, Tensor], prefix: str
    ) -> Iterator[str]:
        own = self.state_dict()
        given = {
            key[len(prefix) :]: value
            for key, value in state_dict.items()
            if key.startswith(prefix)
        }
        foreign = self._foreign_compression(own, given)
        if foreign:
            yield foreign
            own, given = (
                {k: v for k, v in entries.items() if not _compresses(k)}
                for entries in (own, given)
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
            ours = self.own_keys is None or key.startswith(self.own_keys)
            if key not in own and ours:
                yield f'{key}: unexpected, the model has no such entry'

    def _foreign_compression(
        self, own: dict[str, Tensor], given: dict[str, Tensor]
    ) -> str | None:
        """What is wrong if the checkpoint is compressed in another way."""
        known = {key for key in own if _compresses(key)}
        found = {key for key in given if _compresses(key)}
        if not found or known & found:
            return None
        if known or self.own_keys is None:
            return (
                'it was compressed in another way, or by pm_seg 0.1: load '
                'the dense checkpoint, which runs compressed as it is, or '
                'compress that again with tools/compress.py'
            )
        return (
            'it is a compressed checkpoint and the model is dense; give its '
            'config the compression=dict(...) it was made with'
        )

    def _shape_remedy(self, key: str) -> str:
        """What helps against another shape, to end a message with."""
        if _compresses(key):
            return (
                '; the compression was made for another grid (img_size) or '
                'other num_groups'
            )
        return ''


def _compresses(key: str) -> bool:
    return key.startswith(_COMPRESSOR)
