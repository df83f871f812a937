"""Layer-wise learning rates."""

from __future__ import annotations

from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from ..registry import register

_TOKENS = ('cls_token', 'dist_token', 'reg_token', 'pos_embed')
_EMBEDDING = (*_TOKENS, 'patch_embed', 'rope', 'norm_pre')


def layer_index(name: str, depth: int) -> int:
    """0 for the embedding, 1..depth for the layers, depth + 1 for the rest,
    by the name of a parameter in the whole model."""
    parts = [part for part in name.split('.') if part != 'timm_model']
    if parts[0] == 'backbone' and parts[1] in _EMBEDDING:
        return 0
    if parts[0] == 'backbone' and parts[1] in ('layers', 'blocks'):
        return int(parts[2]) + 1
    return depth + 1


@register('OPTIM_WRAPPER_CONSTRUCTORS')
class PMLayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Learning rates that decay from the head to the embedding.

    mmseg's own layer-decay constructors recognise backbones by their class
    names and raise for Vision Transformers, the stock one included. A
    parameter of layer i gets ``lr * decay_rate ** (depth + 1 - i)``; biases,
    norms, embeddings and the merge and restore weights have no weight decay.

    Args:
        paramwise_cfg (dict): ``decay_rate``, and optionally
            ``compressor_lr_mult`` for merge and restore weights (default 1).

    Example:
        >>> optim_wrapper = dict(
        ...     constructor='PMLayerDecayOptimWrapperConstructor',
        ...     paramwise_cfg=dict(decay_rate=0.65))
    """

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        if 'decay_rate' not in self.paramwise_cfg:
            raise ValueError(
                'paramwise_cfg needs decay_rate, for example '
                'paramwise_cfg=dict(decay_rate=0.65)'
            )

    def add_params(
        self, params: list[dict], module: nn.Module, **kwargs
    ) -> None:
        """Add all trainable parameters of a whole model, in groups."""
        depth = len(module.backbone.layers)
        rate = self.paramwise_cfg['decay_rate']
        multiplier = self.paramwise_cfg.get('compressor_lr_mult', 1.0)
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            scale = rate ** (depth + 1 - layer_index(name, depth))
            decays = parameter.dim() > 1 and not name.endswith(_TOKENS)
            if '.compressor.' in name:
                scale, decays = multiplier, False
            groups.setdefault((scale, decays), []).append(parameter)
        for (scale, decays), members in groups.items():
            decay = (self.base_wd or 0.0) if decays else 0.0
            lr = self.base_lr * scale
            params.append(dict(params=members, lr=lr, weight_decay=decay))
