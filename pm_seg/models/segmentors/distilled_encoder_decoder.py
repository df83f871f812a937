"""Segmentor that is fine-tuned against its dense version."""

from __future__ import annotations

import copy

from mmseg.models import EncoderDecoder
from mmseg.registry import MODELS
from mmseg.utils import add_prefix
from torch import Tensor, nn

from ..distillation import DistillationMixin


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
        teacher (dict, optional): See
            :meth:`~pm_seg.models.distillation.DistillationMixin.init_distillation`.
            Defaults to None, training on labels alone.

    Example:
        >>> model = dict(
        ...     type='DistilledEncoderDecoder',
        ...     teacher=dict(alpha=1.0, tau=20.0))
        >>> custom_hooks = [dict(type='PruneMergeHook')]
    """

    def __init__(
        self,
        backbone: dict,
        decode_head: dict,
        *args,
        teacher: dict | None = None,
        **kwargs,
    ) -> None:
        # Options that have no part in the teacher's logits are left out.
        config = dict(
            backbone=copy.deepcopy(backbone),
            decode_head=copy.deepcopy(decode_head),
            neck=copy.deepcopy(kwargs.get('neck')),
        )
        super().__init__(backbone, decode_head, *args, **kwargs)
        self.init_distillation(teacher, config)

    def build_teacher(self, config: dict) -> nn.Module:
        with MODELS.switch_scope_and_registry('mmseg') as registry:
            return registry.build({'type': 'EncoderDecoder', **config})

    def logits(self, model: EncoderDecoder, inputs: Tensor) -> Tensor:
        """Mask logits (B, classes, h, w) on the head's own grid."""
        return model.decode_head(model.extract_feat(inputs))

    def loss(self, inputs: Tensor, data_samples: list) -> dict[str, Tensor]:
        """Losses of one batch, see the class."""
        if not self.distils:
            return super().loss(inputs, data_samples)
        features = self.extract_feat(inputs)
        logits = self.decode_head(features)
        hard: dict[str, Tensor] = {}
        if self.alpha < 1:
            decode = self.decode_head.loss_by_feat(logits, data_samples)
            hard.update(add_prefix(decode, 'decode'))
            if self.with_auxiliary_head:
                hard.update(
                    self._auxiliary_head_forward_train(features, data_samples)
                )
        return self.distillation_losses(inputs, logits, hard)
