"""timm's Vision Transformers as a backbone of mmseg and mmpretrain."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
from mmengine.model import BaseModule
from mmengine.utils import to_2tuple
from torch import Tensor, nn

from ...core import CLASSIFICATION
from ...core.compressor import check_option
from ...core.merging import Grid
from ...registry import register
from ..compressible import check_out_indices
from ..features import FeatureMaps
from ..loading import State
from ..timm_layers import TimmLayers
from ..timm_vit import (
    SUPPORTED,
    check_timm_vit,
    embed,
    find_timm_vit,
    geometry,
)

OUT_TYPES = ('featmap', 'featmap_cls', 'pooled')


@register('MODELS')
class PMTimmVisionTransformer(TimmLayers, BaseModule):
    """A Vision Transformer of timm with token compression.

    DINOv2, DINOv3, EVA-02, SigLIP, CLIP, DeiT and others: every
    ``VisionTransformer`` and ``Eva`` of timm. Images of any size: position
    embeddings are resampled, rotary tables computed anew, borders padded to
    whole patches. The state dict has timm's names after ``timm_model.``, as
    that of mmseg's and mmpretrain's ``TIMMBackbone``.

    Args:
        model_name (str): A name that ``timm.create_model`` knows.
        img_size (int | tuple[int, int]): Size of the training images, for
            the position embedding and the budget. Defaults to 224.
        out_indices (int | Sequence[int]): Layers whose outputs are returned,
            negative ones count from the end. Defaults to -1.
        out_type (str): 'featmap', maps of the patch tokens; 'featmap_cls',
            ``[map, class token]`` as DPT's head reads; 'pooled', what the
            model's own pooling makes of all tokens, for classifiers.
            Defaults to 'featmap'.
        norm (bool): Whether the outputs pass the model's last norm, if it
            has one. Defaults to True.
        pretrained (bool | str): timm's weights, or a file with weights under
            timm's names, or those timm converts, which ``init_weights``
            loads. Defaults to False.
        frozen_stages (int): 0 freezes the embedding, n the first n layers
            too, and all of them the last norm as well. Defaults to -1,
            nothing.
        drop_path_rate (float): Of the last layer. Defaults to 0.
        with_cp (bool): Activation checkpointing. Defaults to False.
        model_args (dict, optional): Further arguments of
            ``timm.create_model``.
        compression (dict, optional): See
            :class:`~pm_seg.models.PMVisionTransformer`. Defaults to None.
        init_cfg (dict, optional): As everywhere in mmengine.

    Raises:
        ValueError: If timm has no such model, it is of another architecture,
            or an option is out of range.

    Example:
        >>> model = dict(
        ...     backbone=dict(
        ...         type='PMTimmVisionTransformer',
        ...         model_name='vit_small_patch16_dinov3',
        ...         img_size=512,
        ...         pretrained=True,
        ...         compression=dict(keep=0.5)))
    """

    own_keys = ('timm_model.', 'compressor.')

    def __init__(
        self,
        model_name: str,
        img_size: int | Sequence[int] = 224,
        out_indices: int | Sequence[int] = -1,
        out_type: str = 'featmap',
        norm: bool = True,
        pretrained: bool | str = False,
        frozen_stages: int = -1,
        drop_path_rate: float = 0.0,
        with_cp: bool = False,
        model_args: dict | None = None,
        compression: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        check_option('out_type', out_type, OUT_TYPES)
        self.img_size = tuple(to_2tuple(img_size))
        self.out_type = out_type
        self.norm = norm
        self.pretrained = pretrained
        self.with_cp = with_cp
        self._arguments = dict(
            model_name=model_name,
            img_size=self.img_size,
            drop_path_rate=drop_path_rate,
            num_classes=0,
            dynamic_img_size=True,
            dynamic_img_pad=True,
            **(model_args or {}),
        )
        self.timm_model = vit = self._create()
        self.patch_size = vit.patch_embed.patch_size
        self.embed_dims = vit.embed_dim
        self.out_indices = check_out_indices(out_indices, len(vit.blocks))
        if out_type == 'featmap_cls' and vit.cls_token is None:
            raise ValueError(
                f'{model_name} has no class token; choose out_type='
                "'featmap' or another model"
            )
        self.build_compressor(compression)
        self.frozen_stages = frozen_stages
        for module in self._frozen():
            module.requires_grad_(False)

    def _create(self, **source) -> nn.Module:
        """A timm model without what the outputs do not need."""
        import timm

        name = self._arguments['model_name']
        if not timm.is_model(name):
            close = difflib.get_close_matches(name, timm.list_models())
            raise ValueError(
                f'model_name={name!r} is no model of timm {timm.__version__}; '
                f'{", ".join(close)} are near, timm.list_models() has all'
            )
        try:
            vit = timm.create_model(**self._arguments, **source)
        except TypeError as error:
            raise ValueError(
                f'timm builds no {name} that takes images of any size '
                f'({error}); expected {SUPPORTED}'
            ) from error
        check_timm_vit(find_timm_vit(vit))
        if self.out_type != 'pooled':
            vit.reset_classifier(0, '')
            vit.fc_norm = nn.Identity()
        if not self.norm:
            vit.norm = nn.Identity()
        return vit

    @property
    def blocks(self) -> nn.Sequential | nn.ModuleList:
        return self.timm_model.blocks

    @property
    def geometry(self) -> tuple[Grid, int, int]:
        return geometry(self.timm_model)

    @property
    def default_compression(self) -> dict[str, object]:
        return CLASSIFICATION if self.out_type == 'pooled' else {}

    @property
    def reads_prefix(self) -> bool:
        pooled = self.out_type == 'pooled'
        return pooled and self.timm_model.global_pool == 'token'

    def forward(self, images: Tensor) -> FeatureMaps:
        """Extract features of images (B, 3, H, W), any H and W.

        Returns:
            FeatureMaps: For each of ``out_indices`` a map (B, C, h, w), a
            map and its class token (B, C), or (B, C), by ``out_type``.
        """
        x, grid, rope = embed(self.timm_model, images)
        found = self.run_layers(x, grid, self.out_indices, rope)
        outs = [self._format(out, grid) for out in found.layers.values()]
        return FeatureMaps(outs, found.groups)

    def _format(self, x: Tensor, grid: Grid) -> Tensor | list[Tensor]:
        vit = self.timm_model
        x = vit.norm(x)
        if self.out_type == 'pooled':
            return vit.forward_head(x, pre_logits=True)
        out = x[:, vit.num_prefix_tokens :].mT.reshape(len(x), -1, *grid)
        return [out, x[:, 0]] if self.out_type == 'featmap_cls' else out

    def _frozen(self) -> list[nn.Module | nn.Parameter]:
        """What ``frozen_stages`` freezes."""
        if self.frozen_stages < 0:
            return []
        vit, count = self.timm_model, self.frozen_stages
        names = ('pos_embed', 'cls_token', 'reg_token', 'dist_token', 'rope')
        parts = [getattr(vit, name, None) for name in names]
        parts += [vit.patch_embed, vit.norm_pre, *list(vit.blocks)[:count]]
        parts += [vit.norm] if count >= len(vit.blocks) else []
        return [part for part in parts if part is not None]

    def train(self, mode: bool = True) -> PMTimmVisionTransformer:
        super().train(mode)
        for part in self._frozen():
            if isinstance(part, nn.Module):
                part.eval()
        return self

    def init_weights(self) -> None:
        """Initialise, or load what ``pretrained`` or ``init_cfg`` names."""
        if self.pretrained:
            file = self.pretrained
            overlay = None if file is True else dict(file=str(file))
            vit = self._create(pretrained=True, pretrained_cfg_overlay=overlay)
            self.timm_model.load_state_dict(vit.state_dict())
        elif not self.load_pretrained():
            super().init_weights()

    @torch.no_grad()
    def _adapt_state_dict(self, state_dict: State, prefix: str) -> None:
        """Resample a position embedding of another image size."""
        super()._adapt_state_dict(state_dict, prefix)
        vit, key = self.timm_model, f'{prefix}timm_model.pos_embed'
        own, given = getattr(vit, 'pos_embed', None), state_dict.get(key)
        if own is None or given is None or own.shape == given.shape:
            return
        from timm.layers import resample_abs_pos_embed

        grid = list(vit.patch_embed.grid_size)
        prefixes = own.shape[1] - grid[0] * grid[1]
        state_dict[key] = resample_abs_pos_embed(
            given, grid, num_prefix_tokens=prefixes
        )
