"""Classifier that is fine-tuned against its dense version."""

from __future__ import annotations

import copy

from mmpretrain.models import ImageClassifier
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from ..distillation import DistillationMixin


@MODELS.register_module()
class DistilledImageClassifier(DistillationMixin, ImageClassifier):
    """mmpretrain's ``ImageClassifier`` with a soft-target loss in training.

    The loss is ``(1 - alpha) * CE + alpha * tau^2 * KL(teacher || student)``
    on softened class probabilities (Hinton et al., arXiv 1503.02531); the
    paper uses alpha 0.8 to 1 for DeiT. Inference and checkpoint keys are the
    base class's.

    Args:
        teacher (dict, optional): See
            :meth:`~pm_seg.models.distillation.DistillationMixin.init_distillation`.
            Defaults to None, training on labels alone.
    """

    def __init__(
        self, backbone: dict, *args, teacher: dict | None = None, **kwargs
    ) -> None:
        config = dict(
            backbone=copy.deepcopy(backbone),
            neck=copy.deepcopy(kwargs.get('neck')),
            head=copy.deepcopy(kwargs.get('head')),
        )
        super().__init__(backbone, *args, **kwargs)
        self.init_distillation(teacher, config)

    def build_teacher(self, config: dict) -> nn.Module:
        with MODELS.switch_scope_and_registry('mmpretrain') as registry:
            return registry.build({'type': 'ImageClassifier', **config})

    def logits(self, model: ImageClassifier, inputs: Tensor) -> Tensor:
        """Class logits, (B, classes)."""
        return model.head(model.extract_feat(inputs))

    def loss(self, inputs: Tensor, data_samples: list) -> dict[str, Tensor]:
        """Losses of one batch, see the class."""
        if not self.distils:
            return super().loss(inputs, data_samples)
        features = self.extract_feat(inputs)
        hard: dict[str, Tensor] = {}
        if self.alpha < 1:
            hard = self.head.loss(features, data_samples)
        logits = self.head(features)
        return self.distillation_losses(inputs, logits, hard)
