"""Distillation from the dense model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor, nn


def soft_target_loss(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """Soft-target loss of Hinton et al., arXiv 1503.02531.

    ``tau^2 KL(softmax(teacher / tau) || softmax(student / tau))``, averaged
    over everything but the classes. The factor tau^2 keeps the size of the
    gradient independent of tau.

    Args:
        student, teacher (Tensor): Logits, (B, classes, ...).
        tau (float): Temperature.
    """
    student = F.log_softmax(student.float() / tau, dim=1)
    teacher = F.log_softmax(teacher.float() / tau, dim=1)
    loss = F.kl_div(student, teacher, reduction='none', log_target=True)
    return tau**2 * loss.sum(dim=1).mean()


class _Unregistered:
    """Keeps a module out of its owner's state, copies and parameters."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict) -> _Unregistered:
        return self


def strip_compression(node: object) -> object:
    """A copy of a model config with every ``compression`` set to None."""
    if isinstance(node, dict):
        return {
            key: None if key == 'compression' else strip_compression(value)
            for key, value in node.items()
        }
    if isinstance(node, (list, tuple)):
        return type(node)(strip_compression(value) for value in node)
    return copy.deepcopy(node)


class DistillationMixin:
    """Trains an mmengine model against a frozen, dense teacher.

    The teacher is no submodule: it is in no checkpoint, optimiser or EMA, and
    a trained student loads anywhere without it. It exists after
    :meth:`load_teacher` only, which ``PruneMergeHook`` calls.

    See :class:`~pm_seg.models.DistilledEncoderDecoder` for the arguments.
    """

    #: The stock class: its package, its name and that of its head.
    scope: str
    plain: str
    head_name: str

    #: From features, logits and data samples to losses of labels, with
    #: 'loss' in their names, and metrics.
    hard_losses: Callable[[tuple, Tensor, list], dict[str, Tensor]]

    def __init__(self, *, teacher: dict | None = None, **config) -> None:
        # Options that have no part in the teacher's logits are left out.
        parts = ('backbone', 'neck', self.head_name)
        same = {part: config[part] for part in parts if part in config}
        same = strip_compression(same)
        super().__init__(**config)
        self.supervised_only = teacher is None
        options = dict(teacher or {})
        self.alpha = float(options.pop('alpha', 1.0))
        self.tau = float(options.pop('tau', 20.0))
        self.teacher_checkpoint = options.pop('checkpoint', None)
        self._teacher_config = options.pop('model', None) or same
        self._teacher: _Unregistered | None = None
        if options:
            raise ValueError(
                f'teacher has unknown keys {sorted(options)}; expected alpha, '
                'tau, checkpoint, model'
            )
        if not 0 < self.alpha <= 1:
            raise ValueError(
                f'teacher.alpha={self.alpha} is not in (0, 1]; set '
                'teacher=None to train on labels alone'
            )
        if self.tau <= 0:
            raise ValueError(
                f'teacher.tau={self.tau} must be above 0, for example 20'
            )

    def load_teacher(self, default_checkpoint: str | None = None) -> None:
        """Build the teacher and load its weights, or raise ``RuntimeError``.

        ``default_checkpoint`` is used if ``teacher`` names none.
        """
        if self.supervised_only or self._teacher is not None:
            return
        path = self.teacher_checkpoint or default_checkpoint
        if path is None:
            raise RuntimeError(
                'distillation needs the dense checkpoint; set '
                "model.teacher=dict(checkpoint='dense.pth') or load_from, or "
                'train on labels alone with model.teacher=None'
            )
        saved = CheckpointLoader.load_checkpoint(path, map_location='cpu')
        state = {
            key: value
            for key, value in saved.get('state_dict', saved).items()
            if '.compressor.' not in key
        }
        with MODELS.switch_scope_and_registry(self.scope) as registry:
            teacher = registry.build(
                {'type': self.plain, **self._teacher_config}
            )
        try:
            missing = teacher.load_state_dict(state, strict=False).missing_keys
            if missing:
                raise RuntimeError(f'It lacks {missing[:8]}')
        except RuntimeError as error:
            raise RuntimeError(
                f'the teacher checkpoint {path} is of another architecture '
                'than teacher.model: give the dense checkpoint this model '
                'was compressed from, or set teacher.model to the config of '
                f'the checkpoint. {error}'
            ) from None
        device = next(self.parameters()).device
        teacher.requires_grad_(False).eval().to(device)
        self._teacher = _Unregistered(teacher)
        print_log(f'Distilling from {path}', logger='current')

    @property
    def teacher(self) -> nn.Module | None:
        """The teacher, None before :meth:`load_teacher`."""
        return self._teacher and self._teacher.module

    @contextmanager
    def supervised(self) -> Iterator[None]:
        """Train on labels alone inside the block, as scoring does."""
        previous, self.supervised_only = self.supervised_only, True
        try:
            yield
        finally:
            self.supervised_only = previous

    def loss(self, inputs: Tensor, data_samples: list) -> dict[str, Tensor]:
        """``(1 - alpha) * losses from labels + alpha * soft-target loss``."""
        if self.supervised_only:
            return super().loss(inputs, data_samples)
        if self.teacher is None:
            raise RuntimeError(
                'the teacher is not loaded; add dict(type='
                "'PruneMergeHook') to custom_hooks, call load_teacher(), or "
                'set teacher=None'
            )
        features = self.extract_feat(inputs)
        logits = getattr(self, self.head_name)(features)
        with torch.no_grad():
            known = self.teacher.extract_feat(inputs)
            target = getattr(self.teacher, self.head_name)(known)
        if target.shape[1] != logits.shape[1]:
            raise ValueError(
                f'the teacher has {target.shape[1]} classes, expected the '
                f'{logits.shape[1]} of this model; set teacher.model to one '
                'with the same classes'
            )
        losses: dict[str, Tensor] = {}
        if self.alpha < 1:
            losses = self.hard_losses(features, logits, data_samples)
        share = 1 - self.alpha
        for name, value in losses.items():
            if 'loss' in name and isinstance(value, list):
                losses[name] = [v * share for v in value]
            elif 'loss' in name:
                losses[name] = value * share
        soft = soft_target_loss(logits, target, self.tau)
        losses['loss_distill'] = self.alpha * soft
        return losses

    def _apply(self, *args, **kwargs) -> nn.Module:
        if self.teacher is not None:
            self.teacher._apply(*args, **kwargs)
        return super()._apply(*args, **kwargs)
