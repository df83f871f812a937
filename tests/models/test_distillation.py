"""Soft targets, and a teacher that leaves no trace."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from mmengine.model import ExponentialMovingAverage

from pm_seg.engine.calibration import fit_importance
from pm_seg.models.distillation import soft_target_loss, strip_compression
from pm_seg.utils.checkpoints import read_checkpoint


def segmentor(
    compressed: bool = True, kind: str = 'DistilledEncoderDecoder', **options
):
    cfg = tiny.config(dict(keep=0.6, first=0) if compressed else None)
    cfg.update(type=kind, **options)
    cfg['backbone'].update(num_layers=2, drop_path_rate=0.0, drop_rate=0.0)
    cfg['decode_head'].update(
        num_layers=1, drop_path_rate=0.0, dropout_ratio=0.0
    )
    return tiny.build_from(cfg)


def batch(model) -> dict:
    return model.data_preprocessor(tiny.batch(0, 2), training=True)


@pytest.fixture
def dense_checkpoint(tmp_path) -> str:
    path = tmp_path / 'dense.pth'
    torch.save(dict(state_dict=segmentor(False).state_dict()), path)
    return str(path)


def test_soft_target_loss() -> None:
    student, teacher = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    p = (teacher / 5).softmax(1)
    q = (student / 5).softmax(1)
    expected = 25 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(
        soft_target_loss(student, teacher, 5.0), expected
    )
    assert soft_target_loss(teacher, teacher, 5.0).abs() < 1e-6


def test_gradient_does_not_shrink_with_the_temperature() -> None:
    teacher = torch.randn(1, 10)
    norms = []
    for tau in (10.0, 100.0):
        student = torch.zeros(1, 10, requires_grad=True)
        soft_target_loss(student, teacher, tau).backward()
        norms.append(student.grad.norm())
    assert norms[1] / norms[0] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize('alpha', [1.0, 0.3])
def test_loss(dense_checkpoint: str, alpha: float) -> None:
    model = segmentor(teacher=dict(alpha=alpha, tau=2.0))
    model.load_teacher(dense_checkpoint)
    data = batch(model)
    losses = model(**data, mode='loss')
    with torch.no_grad():
        student = model(data['inputs'], mode='tensor')
        teacher = model.teacher(data['inputs'], mode='tensor')
        with model.supervised():
            hard = model(**data, mode='loss')
    expected = alpha * soft_target_loss(student, teacher, 2.0)
    torch.testing.assert_close(losses['loss_distill'], expected)
    if alpha == 1:
        assert set(losses) == {'loss_distill'}
    else:
        torch.testing.assert_close(
            losses['decode.loss_ce'], 0.7 * hard['decode.loss_ce']
        )
    model.parse_losses(losses)[0].backward()
    assert all(p.grad is None for p in model.teacher.parameters())
    assert all(p.grad is not None for p in model.parameters())


def test_the_teacher_is_the_dense_model(dense_checkpoint: str) -> None:
    """Before compression student and teacher agree: no loss."""
    model = segmentor(teacher=dict())
    model.load_state_dict(read_checkpoint(dense_checkpoint)['state_dict'])
    model.load_teacher(dense_checkpoint)
    assert model.teacher.backbone.compressor is None
    with model.backbone.compressor.disabled():
        losses = model(**batch(model), mode='loss')
    assert losses['loss_distill'].abs() < 1e-5


def test_the_teacher_leaves_no_trace(dense_checkpoint: str) -> None:
    model = segmentor(teacher=dict())
    names = set(model.state_dict())
    count = len(list(model.parameters()))
    model.load_teacher(dense_checkpoint)
    assert set(model.state_dict()) == names
    assert len(list(model.parameters())) == count
    average = ExponentialMovingAverage(model)
    assert average.module.teacher is model.teacher, 'shared, not copied'
    assert copy.deepcopy(model).teacher is model.teacher
    model.train()
    assert not model.teacher.training
    assert not any(p.requires_grad for p in model.teacher.parameters())
    model.double()
    assert next(model.teacher.parameters()).dtype == torch.float64


def test_a_student_loads_in_a_plain_segmentor(dense_checkpoint) -> None:
    model = segmentor(teacher=dict()).eval()
    model.load_teacher(dense_checkpoint)
    plain = segmentor(kind='EncoderDecoder').eval()
    plain.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(plain(images), model(images))


def test_compressed_checkpoints_teach_with_their_dense_weights(
    tmp_path,
) -> None:
    source = segmentor()
    path = tmp_path / 'pm.pth'
    torch.save(dict(state_dict=source.state_dict()), path)
    model = segmentor(teacher=dict(checkpoint=str(path)))
    model.load_teacher()
    for name, value in model.teacher.state_dict().items():
        assert torch.equal(value, source.state_dict()[name])


def test_calibration_uses_labels(dense_checkpoint: str) -> None:
    """A student that equals its teacher would have no gradient at all."""
    model = segmentor(teacher=dict())
    raw = tiny.batch(0, 1)
    fit_importance(model, [raw])
    found = model.backbone.compressor.comparison.importance.clone()
    assert found.abs().sum(1).min() > 0
    model.load_teacher(dense_checkpoint)
    fit_importance(model, [raw])
    assert torch.equal(model.backbone.compressor.comparison.importance, found)


def test_errors(tmp_path, dense_checkpoint: str) -> None:
    with pytest.raises(ValueError, match=r"unknown keys \['beta'\]"):
        segmentor(teacher=dict(beta=1))
    with pytest.raises(ValueError, match='alpha=0.0 is not in'):
        segmentor(teacher=dict(alpha=0))
    with pytest.raises(ValueError, match='tau=-1.0 must be above 0'):
        segmentor(teacher=dict(tau=-1))
    model = segmentor(teacher=dict())
    with pytest.raises(RuntimeError, match='the teacher is not loaded'):
        model(**batch(model), mode='loss')
    with pytest.raises(RuntimeError, match='needs the dense checkpoint'):
        model.load_teacher()
    state = read_checkpoint(dense_checkpoint)['state_dict']
    del state['decode_head.cls_emb']
    torch.save(state, tmp_path / 'broken.pth')
    with pytest.raises(RuntimeError, match='cls_emb: missing'):
        model.load_teacher(str(tmp_path / 'broken.pth'))


def test_strip_compression() -> None:
    config = dict(a=[dict(compression=dict(keep=1), b=2)], c=(1, 2))
    assert strip_compression(config) == dict(
        a=[dict(compression=None, b=2)], c=(1, 2)
    )


@pytest.mark.parametrize('alpha', [1.0, 0.8])
def test_image_classifier(tmp_path, alpha: float) -> None:
    """The mmpretrain twin, here with mmpretrain's own backbone."""
    pytest.importorskip('mmpretrain')
    from mmpretrain.registry import MODELS as CLASSIFIERS
    from mmpretrain.structures import DataSample

    config = dict(
        backbone=dict(type='VisionTransformer', arch='deit-tiny', img_size=32),
        head=dict(
            type='VisionTransformerClsHead', num_classes=4, in_channels=192
        ),
    )
    with torch.random.fork_rng():
        plain = CLASSIFIERS.build(
            dict(
                type='mmpretrain.ImageClassifier', _scope_='mmpretrain',
                **config,
            )
        )  # fmt: skip
    torch.save(dict(state_dict=plain.state_dict()), tmp_path / 'dense.pth')
    model = CLASSIFIERS.build(
        dict(
            type='DistilledImageClassifier', _scope_='mmpretrain',
            teacher=dict(alpha=alpha, tau=1.0), **config,
        )
    )  # fmt: skip
    model.load_teacher(str(tmp_path / 'dense.pth'))
    images = torch.randn(3, 3, 32, 32)
    samples = [DataSample().set_gt_label(i) for i in range(3)]
    losses = model(images, samples, mode='loss')
    assert set(losses) == (
        {'loss_distill'} if alpha == 1 else {'loss', 'loss_distill'}
    )
    model.parse_losses(losses)[0].backward()
    plain.load_state_dict(model.state_dict())
