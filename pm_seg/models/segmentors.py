"""Segmentor that is fine-tuned against its dense version."""

from __future__ import annotations

from mmseg.models import EncoderDecoder
from mmseg.registry import MODELS
from mmseg.utils import add_prefix
from torch import Tensor

from .distillation import DistillationMixin


@MODELS.register_module()
class DistilledEncoderDecoder(DistillationMixin, EncoderDecoder):
    """mmseg's ``EncoderDecoder`` with a soft-target loss in training.

    The loss is ``(1 - alpha) * CE + alpha * tau^2 * KL(teacher || student)``
    on softened class probabilities (Hinton et al., arXiv 1503.02531), with
    the paper's alpha = 1 and tau = 20 as defaults. The KL term is taken on
    the head's own mask grid (B, classes, h, w): upsampling both to the image,
    as for labels, adds no information and 256 times the work at patch size
    16. With alpha = 1 labels are not used at all.

    Inference, checkpoint keys and everything else are the base class's; a
    student loads in a plain ``EncoderDecoder``.

    Args:
        teacher (dict, optional): ``alpha`` (share of the soft-target loss,
            default 1), ``tau`` (temperature, default 20), ``checkpoint``
            (default: what the run starts from) and ``model`` (config,
            default: this model, uncompressed). Defaults to None, training on
            labels alone.
        **config: Arguments of the base class.

    Raises:
        ValueError: On unknown keys of ``teacher`` or values out of range.

    Example:
        >>> model = dict(
        ...     type='DistilledEncoderDecoder',
        ...     teacher=dict(alpha=1.0, tau=20.0))
        >>> custom_hooks = [dict(type='PruneMergeHook')]
    """

    scope, plain, head_name = 'mmseg', 'EncoderDecoder', 'decode_head'

    def hard_losses(
        self, features: tuple, logits: Tensor, data_samples: list
    ) -> dict[str, Tensor]:
        losses = self.decode_head.loss_by_feat(logits, data_samples)
        losses = add_prefix(losses, 'decode')
        if self.with_auxiliary_head:
            losses.update(
                self._auxiliary_head_forward_train(features, data_samples)
            )
        return losses
