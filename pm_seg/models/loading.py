"""Loading that fails on what would silently change the results."""

from __future__ import annotations

from collections.abc import Iterator

from mmengine.runner.checkpoint import CheckpointLoader, load_state_dict
from torch import Tensor

State = dict[str, Tensor]


class StrictLoading:
    """For modules whose checkpoints have to fit.

    mmengine loads with ``strict=False`` and only logs missing, unexpected or
    misshapen entries.
    """

    #: Prefixes of entries which mean another model if they are unexpected.
    own_keys: tuple[str, ...] = ('',)

    #: What helps against position embeddings of another shape.
    position_remedy = ''

    def load_pretrained(self) -> bool:
        """Load the weights ``init_cfg=dict(type='Pretrained', ...)`` names.

        Other than mmengine's own way, it accepts a checkpoint of a whole
        model and raises ``RuntimeError`` if one does not fit. False if
        ``init_cfg`` is of another type.
        """
        cfg = self.init_cfg
        if not (isinstance(cfg, dict) and cfg.get('type') == 'Pretrained'):
            return False
        checkpoint = CheckpointLoader.load_checkpoint(
            cfg['checkpoint'], map_location='cpu'
        )
        state = dict(checkpoint.get('state_dict', checkpoint))
        state = _below(cfg.get('prefix', 'backbone.'), state) or state
        self._fit_pretrained(state)
        load_state_dict(self, state, strict=False, logger='current')
        return True

    def _fit_pretrained(self, state_dict: State) -> None:
        """Adapt pretrained weights to this model, in place."""

    def _adapt_state_dict(self, state_dict: State, prefix: str) -> None:
        """Add or convert entries before the check, in place."""

    def _load_from_state_dict(
        self, state_dict: State, prefix: str, *args, **kwargs
    ) -> None:
        self._adapt_state_dict(state_dict, prefix)
        problems = list(self._problems(_below(prefix, state_dict)))
        if problems:
            shown = problems[:12]
            if len(problems) > 12:
                shown.append(f'... and {len(problems) - 12} more')
            if any(': missing' in problem for problem in problems):
                shown.append(
                    '(weights of another code base? see tools/'
                    'convert_checkpoint.py)'
                )
            where = f' ({prefix[:-1]})' if prefix else ''
            raise RuntimeError(
                f'the checkpoint does not fit {type(self).__name__}{where}:'
                + ''.join(f'\n  {line}' for line in shown)
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _problems(self, given: State) -> Iterator[str]:
        own = self.state_dict()
        known, found = (_below('compressor.', s) for s in (own, given))
        if found and not known.keys() & found.keys():
            if known or 'compressor.' not in self.own_keys:
                yield (
                    'it was compressed in another way, or by pm_seg 0.1: load '
                    'the dense checkpoint, which runs compressed as it is, or '
                    'compress that again with tools/compress.py'
                )
            else:
                yield (
                    'it is a compressed checkpoint and the model is dense; '
                    'give its config the compression=dict(...) it was made '
                    'with'
                )
            return
        remedies = {
            'compressor': '; the compression was made for another grid '
            '(img_size) or other num_groups',
            'pos_embed': self.position_remedy,
        }
        for key, value in own.items():
            expected = f'expected {tuple(value.shape)}'
            if key not in given:
                yield f'{key}: missing, {expected}'
            elif given[key].shape != value.shape:
                shape = tuple(given[key].shape)
                remedy = remedies.get(key.split('.')[0], '')
                yield f'{key}: shape {shape}, {expected}{remedy}'
        for key in given:
            if key not in own and key.startswith(self.own_keys):
                yield f'{key}: unexpected, the model has no such entry'


def _below(prefix: str, state: State) -> State:
    """Entries whose names begin so, without it."""
    return {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if key.startswith(prefix)
    }
