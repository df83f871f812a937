"""What tokens are compared by, and how much it matters that they stay apart.

Without data a sketch, keys, or tokens as they are; what
:class:`~pm_seg.core.importance.ImportanceFitter` finds on some images is
better.
"""

from __future__ import annotations

from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .compressor import EncoderShape, Layer, check_option
from .importance import predicted_scores
from .similarity import COMPONENTS, random_signs, sketch


class Comparison(nn.Module):
    """How the layers of a transformer compare tokens.

    Args:
        shape (EncoderShape): The transformer.
        compare, balance: See
            :class:`~pm_seg.core.progressive.ProgressiveCompressor`.

    Attributes:
        components (Tensor): What tells tokens apart, (L, C, D).
        importance (Tensor): What makes a token important, (L, C).
        strength (Tensor): How much importance counts, a scalar.
        calibrated (bool): Whether there are any of these.

    Raises:
        ValueError: On an unknown option or a value out of range.
    """

    def __init__(
        self, shape: EncoderShape, compare: str, balance: float
    ) -> None:
        super().__init__()
        check_option('compare', compare, ('sketch', 'keys', 'tokens'))
        if not isinstance(balance, Real) or not balance >= 0:
            raise ValueError(f'balance={balance!r} must be a number >= 0')
        self.without_data, self.balance = compare, balance
        dims = shape.depth, shape.dims, min(COMPONENTS, shape.dims)
        self.register_buffer('components', torch.zeros(dims))
        self.register_buffer('importance', torch.zeros(dims[:2]))
        self.register_buffer('strength', torch.zeros(()))
        signs = random_signs(shape.dims).to(self.strength.device)
        self.register_buffer('signs', signs, persistent=False)
        self.calibrated, self._strength = False, 0.0

    @torch.no_grad()
    def learn(self, directions: Tensor, components: Tensor) -> None:
        """Keep what was found, (L, C) and (L, C, D)."""
        self.importance.copy_(directions)
        self.components.copy_(components)
        self.calibrated = True

    def set_strength(self, strength: float) -> None:
        """Say how much importance counts against similarity, 0 for not."""
        self.strength.fill_(strength)
        self._strength = strength

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.strength.is_meta:
            self.calibrated = bool(self.components.any())
            self._strength = float(self.strength)

    def forward(
        self, x: Tensor, size: Tensor, index: int, layer: Layer, by: str
    ) -> tuple[Tensor, Tensor | None]:
        """What to compare patch tokens by before a layer.

        Args:
            x (Tensor): (B, T, C).
            size (Tensor): Patches each stands for, (B, T).
            index (int): Of the layer.
            layer (Layer): The layer.
            by (str): Key of :data:`~pm_seg.core.similarity.COMPARES`.

        Returns:
            tuple[Tensor, Tensor | None]: (B, T, D), and how much it matters
            that a token stays alone, (B, T), both float32; see
            :func:`~pm_seg.core.similarity.match`.
        """
        # Under autocast tokens may come in half precision, or weights be.
        metric, weight = x.to(self.components.dtype), None
        if by == 'components' or self._strength:
            normed = F.layer_norm(metric.float(), metric.shape[2:])
        if self._strength:
            direction = self._strength * self.importance[index]
            weight = predicted_scores(normed, direction)
        if self.balance:
            grown = size**self.balance
            weight = grown if weight is None else weight * grown
        if by == 'components':
            metric = normed @ self.components[index].float()
        elif by == 'sketch':
            metric = sketch(metric, self.signs)
        elif by == 'keys':
            metric = layer.mean_keys(metric)
        return metric.float(), weight
