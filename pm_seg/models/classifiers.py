"""Classifier that is fine-tuned against its dense version."""

from __future__ import annotations

from mmpretrain.models import ImageClassifier
from mmpretrain.registry import MODELS
from torch import Tensor

from .distillation import DistillationMixin


@MODELS.register_module()
class DistilledImageClassifier(DistillationMixin, ImageClassifier):
    """mmpretrain's ``ImageClassifier`` with a soft-target loss in training.

    The loss is that of :class:`~pm_seg.models.DistilledEncoderDecoder` on the
    logits (B, classes); the paper uses alpha 0.8 to 1 for DeiT. Inference and
    checkpoint keys are the base class's.

    Args:
        teacher (dict, optional): As there.
        **config: Arguments of the base class.
    """

    scope, plain, head_name = 'mmpretrain', 'ImageClassifier', 'head'

    def hard_losses(
        self, features: tuple, logits: Tensor, data_samples: list
    ) -> dict[str, Tensor]:
        return self.head.loss(features, data_samples)
