"""From a dense model to a compressed one."""

from __future__ import annotations

import pytest
import torch
from tiny import batch, build

from pm_seg.core.budget import LEVELS
from pm_seg.engine import compress, describe
from pm_seg.engine.calibration import measure_losses
from pm_seg.engine.compression import needs_data
from pm_seg.models.distillation import soft_target_loss
from pm_seg.utils import count_macs

BATCHES = [batch(0, 2), batch(2, 2)]


def macs(module, *inputs) -> int:
    return count_macs(lambda: module(*inputs))


def test_everything_is_found_and_stored() -> None:
    model, seen = build(), []
    keep = compress(
        model, BATCHES, 2, progress=lambda *args: seen.append(args)
    )
    assert keep is None and model.training
    for module in (model.backbone, model.decode_head):
        compressor = module.compressor
        assert compressor.has_structure and compressor.has_losses
        assert (compressor.losses[:, 1:] > 0).all()
        assert compressor.detail_up.abs().sum() > 0
        assert min(compressor.num_groups) >= 1
    assert seen[0] == ('Scoring batches', 0, 2)
    assert seen[2] == ('Scoring batches', 2, 2)
    assert seen[3] == ('Measuring layers', 0, 5 * len(LEVELS))
    assert seen[-1] == ('Measuring layers', 5 * len(LEVELS), 5 * len(LEVELS))
    assert 'loss at 50 % alone' in describe(model)
    again = build()
    compress(again, BATCHES, 2)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, msg=key)


def test_losses_are_those_of_one_layer_alone() -> None:
    model = build().eval()
    compress(model, BATCHES, 2)
    stored = model.backbone.compressor.losses.clone()
    images = model.data_preprocessor(BATCHES[0], training=True)['inputs']
    model.backbone.compressor.losses.zero_()
    measured = measure_losses(model, [images])
    assert set(measured) == {'backbone'}
    assert not torch.equal(measured['backbone'], stored)  # other images
    compressor = model.backbone.compressor
    with torch.no_grad(), model.decode_head.compressor.disabled():
        compressor.build_single(1, 0.25)
        assert compressor.num_groups == [16, 4, 16]
        found = model(images, mode='tensor')
        with compressor.disabled():
            dense = model(images, mode='tensor')
    expected = soft_target_loss(found, dense, 1.0)
    torch.testing.assert_close(measured['backbone'][1, 2], expected)


def test_a_stored_measurement_is_not_repeated() -> None:
    model = build()
    compress(model, BATCHES, 2)
    assert needs_data(model)  # the detail paths depend on the structure
    titles = []
    model.backbone.compressor.keep = 0.3
    compress(
        model, BATCHES, 2, progress=lambda title, *_: titles.append(title)
    )
    assert titles == []
    plain = build(restore='replace')
    compress(plain, BATCHES, 2)
    assert not needs_data(plain)
    before = plain.backbone.compressor.group.clone()
    plain.backbone.compressor.keep = 0.25
    compress(plain, None)
    assert not torch.equal(plain.backbone.compressor.group, before)


def test_shares_of_the_backbone() -> None:
    model = build().eval()
    images = torch.zeros(1, 3, 64, 64)
    with model.backbone.compressor.disabled():
        dense = macs(model.backbone, images)
    keep = compress(model, BATCHES, 2, target=dict(backbone_share=0.75))
    assert 0 < keep < 1
    assert 0.6 * dense < macs(model.backbone, images) <= 0.75 * dense


@pytest.mark.parametrize('kind', ['tome', 'algm'])
def test_merging_needs_no_data(kind: str) -> None:
    model = build(type=kind, head=False).eval()
    assert not needs_data(model)
    compress(model, None, target=dict(backbone_share=0.8))
    images = torch.rand(2, 3, 64, 64)
    assert model.backbone(images)[0].shape == (2, 24, 4, 4)
    with model.backbone.compressor.disabled():
        dense = macs(model.backbone, images)
    assert macs(model.backbone, images) < 0.85 * dense
    assert f"method '{kind}'" in describe(model)


def test_empty_loader() -> None:
    with pytest.raises(ValueError, match='yields no batch'):
        compress(build(), [], 2)


@pytest.mark.parametrize('options', [{}, dict(type='tome', head=False)])
def test_the_whole_model_compiles(options: dict) -> None:
    """Encoder and decoder, one graph, under autocast too."""
    torch._dynamo.reset()
    model = build(**options).eval()
    compress(model, BATCHES, 2)
    images = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(
        lambda x: model(x, mode='tensor'), fullgraph=True, backend='aot_eager'
    )
    with torch.no_grad():
        expected = model(images, mode='tensor')
        torch.testing.assert_close(
            compiled(images), expected, rtol=1e-4, atol=1e-5
        )
        with torch.autocast('cpu', torch.bfloat16):
            mixed = compiled(images)
    assert (mixed - expected).abs().max() < 0.1 * expected.abs().max()


def test_matching_is_calibrated_without_scores() -> None:
    model, titles = build(builder='matching'), set()
    compress(model, BATCHES, 2, progress=lambda title, *_: titles.add(title))
    assert titles == {'Measuring layers'}
    compressor = model.backbone.compressor
    assert compressor.detail_up.abs().sum() > 0
    assert compressor.has_losses
    loss = model(torch.randn(2, 3, 64, 64), mode='tensor').square().sum()
    loss.backward()
    assert compressor.detail_down.grad.abs().sum() > 0
