"""Merging by similarity, image by image: ToMe and ALGM with restoration.

Written from the papers, as alternatives to compare with:

- ToMe (Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023): in
  every block, between attention and MLP, the r most similar pairs of a
  bipartite matching on the keys are averaged, weighted by how many patches
  they stand for. Attention counts a token as often (proportional attention).
- ALGM (Norouzi et al., "ALGM: Adaptive Local-then-Global Token Merging",
  CVPR 2024): 2x2 windows of similar tokens are averaged in the first block
  (CLAP), and similar tokens of the whole image in the middle one (GBM, the
  matching of ToMe on the tokens themselves).

Merged tokens stay merged to the last layer; then every patch gets the token
it went into, so that the map is whole for the decoder. The papers' adaptive
number of ALGM merges differs between images; here each image merges equally
many, which is what allows batches and comparisons at equal cost.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Compressor, LayerOutputs
from .matching import WINDOW, match, match_windows, pool
from .structure import Grid, check_rates


class MergingCompressor(Compressor):
    """Tokens merged by similarity, restored after the last layer.

    Layers need two more methods than a plain call: ``attend(x, key_bias)``,
    which returns the tokens after attention and the keys (B, heads, T, D),
    and ``feed_forward(x)``.

    Args:
        keep (float): Mean share of the patch tokens over the layers'
            feed-forward parts.
        method (str): 'tome' or 'algm'.
        proportional (bool, optional): Whether attention counts a token as
            often as the patches it stands for. Defaults to True for 'tome'
            and False for 'algm'.
        **kwargs: See :class:`~pm_seg.core.base.Compressor`.

    Raises:
        ValueError: If the tokens cannot become that few.
    """

    uses_scores = False

    def __init__(
        self,
        depth: int,
        grid: Grid,
        num_prefix: int,
        keep: float = 0.7,
        method: str = 'tome',
        proportional: bool | None = None,
        dims: int | None = None,
        layer_cost: tuple[float, float] = (1.0, 0.0),
    ) -> None:
        check_rates(keep, 0.0)
        super().__init__(depth, grid, num_prefix, keep, dims, layer_cost)
        if method not in ('tome', 'algm'):
            raise ValueError(
                f"method={method!r} is unknown; choose 'tome' or 'algm'"
            )
        if method == 'algm' and depth < 2:
            raise ValueError(f"'algm' needs two layers, got {depth}")
        self.method = method
        self.proportional = (
            method == 'tome' if proportional is None else proportional
        )
        # Share of the patch tokens left after each layer's merge.
        self.register_buffer('shares', torch.zeros(depth))
        self._refresh()

    def _refresh(self) -> None:
        """Keep the shares at hand without a copy from the device."""
        meta = self.shares.is_meta
        self._shares = [0.0] * self.depth if meta else self.shares.tolist()

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._refresh()

    @property
    def has_structure(self) -> bool:
        """Whether :meth:`build` ran, or a checkpoint had its result."""
        return min(self._shares) > 0

    @torch.no_grad()
    def build(self) -> None:
        """Find the schedule whose mean share is ``keep``.

        Raises:
            ValueError: If ``keep`` is below what the method can reach.
        """
        low, high = 0.0, 1.0
        for _ in range(40):
            strength = (low + high) / 2
            shares = self._schedule(strength)
            if sum(shares) / self.depth > self.keep:
                low = strength
            else:
                high = strength
        shares = self._schedule(high)
        if sum(shares) / self.depth > self.keep + 1e-3:
            raise ValueError(
                f'{self.method!r} cannot work on keep={self.keep} of the '
                f'tokens, {sum(shares) / self.depth:.2f} is its least'
            )
        self.shares.copy_(torch.tensor(shares))
        self._refresh()

    def _schedule(self, strength: float) -> list[float]:
        """Shares after each layer; fewer with more strength in [0, 1]."""
        if self.method == 'tome':
            shares, share = [], 1.0
            for _ in range(self.depth):
                share -= min(strength / 2, share / 2)
                shares.append(share)
            return shares
        half = self.depth // 2
        local = 1 - 0.75 * strength
        both = local * max(1 - 0.75 * strength, 0.5)
        return [local] * half + [both] * (self.depth - half)

    def tokens_after(self, grid: Grid) -> list[int]:
        """Patch tokens left after each layer's merge."""
        total = grid[0] * grid[1]
        windows = (grid[0] // 2) * (grid[1] // 2)
        counts, left = [], total
        for layer, share in enumerate(self._shares):
            wanted = round(share * total)
            if self.method == 'algm' and layer == 0:
                merged = min(round((total - wanted) / 3), windows)
                left -= merged * (WINDOW - 1)
            else:
                left = max(min(wanted, left), left - left // 2)
            counts.append(left)
        return counts

    def _run(
        self,
        layers: Sequence[nn.Module],
        x: Tensor,
        grid: Grid,
        outputs: Collection[int],
    ) -> LayerOutputs:
        if not self.has_structure:
            self.build()
        patches = grid[0] * grid[1]
        place = torch.arange(patches, device=x.device).expand(len(x), -1)
        size = x.new_ones(len(x), patches, 1)
        collected = {}
        for index, (layer, left) in enumerate(
            zip(layers, self.tokens_after(grid))
        ):
            merged = size.shape[1] < patches
            bias = self._key_bias(size) if merged else None
            x, keys = layer.attend(x, bias)
            if left < size.shape[1]:
                prefix, body = x.tensor_split([self.num_prefix], dim=1)
                position = self._positions(index, body, keys, grid, left)
                body, size = pool(body, size, position, left)
                place = position.gather(1, place)
                x = torch.cat([prefix, body.to(prefix.dtype)], dim=1)
            if self.observer is not None:
                self.observer((index,), place, grid)
            x = layer.feed_forward(x)
            if index in outputs:
                collected[index] = self._restore(x, place)
        return self._restore(x, place), collected

    def _positions(
        self, layer: int, x: Tensor, keys: Tensor, grid: Grid, left: int
    ) -> Tensor:
        """Where each patch token goes in this layer's merge, (B, T)."""
        if self.method == 'tome':
            metric = keys[:, :, self.num_prefix :].mean(1)
        elif layer > 0:
            metric = x
        else:
            merged = (x.shape[1] - left) // (WINDOW - 1)
            return match_windows(x, grid, merged)
        return match(metric, x.shape[1] - left)

    def _key_bias(self, size: Tensor) -> Tensor | None:
        """Log of the sizes for the attention logits, (B, 1, 1, P+T)."""
        if not self.proportional:
            return None
        bias = F.pad(size.squeeze(-1).log(), (self.num_prefix, 0))
        return bias[:, None, None]

    def _restore(self, x: Tensor, place: Tensor) -> Tensor:
        """Every patch gets the token it went into."""
        prefix, body = x.tensor_split([self.num_prefix], dim=1)
        place = place.unsqueeze(-1).expand(-1, -1, body.shape[2])
        return torch.cat([prefix, body.gather(1, place)], dim=1)

    def extra_repr(self) -> str:
        return f'method={self.method!r}, grid={self.grid}, keep={self.keep}'
