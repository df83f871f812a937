"""Gradient-weighted attention scores, without an attention map.

The paper (section 3.2) scores key token k by the sum over heads h and queries
q of ``A[h, q, k] * dL/dA[h, q, k]``. With the attention output ``O = A V``
the gradient of the attention map is ``dL/dA = dL/dO V^T``, hence::

    sum_q A[h, q, k] dL/dA[h, q, k] = <v[h, k], sum_q A[h, q, k] dL/dO[h, q]>
                                    = <v[h, k], dL/dv[h, k]>

It needs O(N C) memory, and any fused attention kernel will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .compressor import check_option

if TYPE_CHECKING:
    from typing_extensions import Self


def value_gradient_scores(value: Tensor, grad: Tensor) -> Tensor:
    """Signed score of each key token, ``<v, dL/dv>`` summed over heads, of
    values and their gradient, (B, heads, T, D) -> float64, (B, T)."""
    return (value.double() * grad.double()).sum(dim=(1, 3))


class GradientWatcher(ExitStack):
    """Context manager that sees the values of attention and their gradients.

    Args:
        taps (Sequence[nn.Module]): One module for each layer through which
            the values (B, heads, T, D) pass, see
            :class:`pm_seg.models.layers.HalvedLayer`.
    """

    def __init__(self, taps: Sequence[nn.Module]) -> None:
        super().__init__()
        self.taps = taps

    def __enter__(self) -> Self:
        for layer, tap in enumerate(self.taps):
            watch = partial(self._watch, layer)
            self.enter_context(tap.register_forward_hook(watch))
        return self

    def _watch(
        self, layer: int, tap: nn.Module, args: tuple, value: Tensor
    ) -> Tensor:
        if torch.is_grad_enabled():
            if not value.requires_grad:  # everything before it is frozen
                value = value.detach().clone().requires_grad_()
            value.register_hook(partial(self._record, layer, value.detach()))
        return value

    def _record(self, layer: int, value: Tensor, grad: Tensor) -> None:
        """Called in the backward pass, (B, heads, T, D) each."""
        raise NotImplementedError

    def _require_gradients(self, seen: Tensor) -> None:
        """Raise ``RuntimeError`` unless all layers saw some, (L,)."""
        silent = (seen == 0).nonzero().flatten().tolist()
        if silent:
            raise RuntimeError(
                f'no gradient reached the values of layers {silent}; run '
                'forward and backward, with gradients enabled'
            )


class ScoreRecorder(GradientWatcher):
    """Adds up the scores of every layer while losses are back-propagated.

    Use as a context manager around ``loss.backward()`` calls::

        with ScoreRecorder(taps, num_tokens=1024, num_prefix=1) as recorder:
            for images, labels in batches:
                loss_fn(model(images), labels).backward()
        scores = recorder.scores()

    No parameter needs a gradient for this: freeze them all to halve the cost
    of the backward pass.

    Args:
        taps (Sequence[nn.Module]): See :class:`GradientWatcher`.
        num_tokens (int): N, patch tokens of the grid that is scored.
        num_prefix (int): P, tokens in front of them, not scored.
        reduction (str): 'image' adds up ``|score|`` image by image with the
            loss taken as a mean over the batch, so that the result does not
            depend on how images are split into batches. 'batch' adds up the
            absolute value of each batch's sum, as the release does.
            Defaults to 'image'.

    Raises:
        ValueError: When a batch has another number of tokens.
    """

    def __init__(
        self,
        taps: Sequence[nn.Module],
        num_tokens: int,
        num_prefix: int,
        reduction: str = 'image',
    ) -> None:
        check_option('reduction', reduction, ('image', 'batch'))
        super().__init__(taps)
        self.num_tokens = num_tokens
        self.num_prefix = num_prefix
        self.reduction = reduction
        self.total = torch.zeros(len(taps), num_tokens, dtype=torch.float64)
        self.weight = torch.zeros(len(taps), 1, dtype=torch.float64)

    def _watch(
        self, layer: int, tap: nn.Module, args: tuple, value: Tensor
    ) -> Tensor:
        patches = value.shape[2] - self.num_prefix
        if patches != self.num_tokens:
            raise ValueError(
                f'layer {layer} got {patches} patch tokens, expected '
                f'{self.num_tokens}; scores are gathered uncompressed, on '
                'images of the size the model was built for: check img_size '
                'of the backbone and the crop of calib_pipeline or '
                'train_pipeline'
            )
        return super()._watch(layer, tap, args, value)

    @torch.no_grad()
    def _record(self, layer: int, value: Tensor, grad: Tensor) -> None:
        score = value_gradient_scores(value, grad)[:, self.num_prefix :]
        batch, heads, tokens, _ = value.shape
        if self.reduction == 'image':
            # d(mean over the batch) -> d(loss of this image)
            score, weight = score.abs().sum(0) * batch, batch
        else:
            score, weight = score.sum(0).abs() / batch, 1
        self.total[layer] += (score / (heads * tokens)).cpu()
        self.weight[layer] += weight

    def scores(self) -> Tensor:
        """Mean scores, float32, (L, N).

        Raises:
            RuntimeError: If a layer saw no gradient.
        """
        self._require_gradients(self.weight.flatten())
        return (self.total / self.weight).float()
