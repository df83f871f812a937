"""Bad input and faults, one function each, and the messages they give.

``python tests/bad_input.py docs/robustness.md`` writes the messages into the
tables of that page; ``tests/test_bad_input.py`` runs all of them.
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import torch
from helpers import ROOT, dense_checkpoint, small_config
from make_scenes import write_scenes
from mmcv.transforms import BaseTransform
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import init_default_scope
from mmseg.registry import HOOKS, MODELS, TRANSFORMS

from pm_seg.cli import (
    benchmark,
    compress,
    convert_checkpoint,
    export_onnx,
    test,
    train,
)
from pm_seg.core import EncoderShape, LayerCost, StaticCompressor
from pm_seg.engine import compress as run_compression

TABLES = ('Bad input', 'Faults in a run')


class Workspace:
    """A user's folder: scenes, configs, a dense and a compressed model.

    The configs are pm.py, paper.py with the paper's compression, and
    dense.py.

    Args:
        root (Path): Empty folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        for _ in write_scenes(root / 'scenes', num_train=4, num_val=2):
            pass
        cfg = small_config(root / 'scenes', root / 'work', iters=4)
        cfg.data_root = str(root / 'scenes')
        cfg.model.decode_head.num_layers = 1
        cfg.custom_hooks[0].update(score_batches=1, calib_batches=1)
        cfg.default_hooks.checkpoint.update(interval=1, max_keep_ckpts=1)
        cfg.log_level = 'ERROR'
        cfg.dump(root / 'pm.py')
        self.cfg = cfg
        dense_checkpoint(cfg, root)
        cfg = copy.deepcopy(cfg)
        cfg.model.backbone.compression = dict(type='paper', keep_rate=0.7)
        cfg.dump(root / 'paper.py')
        cfg.model.backbone.compression = None
        cfg.custom_hooks = []
        cfg.dump(root / 'dense.py')
        torch.save(dict(state_dict=self.compressed), root / 'pm.pth')

    @cached_property
    def compressed(self) -> dict[str, torch.Tensor]:
        """State of a compressed model."""
        return self._compressed('pm.py')

    @cached_property
    def paper(self) -> dict[str, torch.Tensor]:
        """The same with the paper's compression, from random scores."""
        return self._compressed('paper.py')

    def _compressed(self, config: str) -> dict[str, torch.Tensor]:
        init_default_scope('mmseg')
        model = MODELS.build(Config.fromfile(self(config)).model)
        state = torch.load(self.root / 'dense.pth')['state_dict']
        model.load_state_dict(state)
        compressor = model.backbone.compressor
        if compressor.needs_scores:
            compressor.set_scores(torch.rand_like(compressor.scores) + 0.1)
        compressor.settle()
        return model.state_dict()

    def __call__(self, name: str) -> str:
        return str(self.root / name)

    def files(self) -> dict[str, str]:
        """Contents of all files but logs, as checksums."""
        return {
            str(path.relative_to(self.root)): hashlib.sha256(
                path.read_bytes()
            ).hexdigest()
            for path in sorted(self.root.rglob('*'))
            if path.is_file() and not self._is_log(path)
        }

    def tidy(self) -> None:
        """Remove what a run left in its work directory, but logs."""
        for path in Path(self('work')).glob('*'):
            if path.is_file():
                path.unlink()

    @staticmethod
    def _is_log(path: Path) -> bool:
        parts = path.parts
        return (
            path.suffix in ('.log', '.json')
            or 'vis_data' in parts
            or path.name in ('.lock', 'faulty.py')
            or path.name in ('pm.py', 'paper.py', 'dense.py')
        )

    # ------------------------------------------------------------ the tools

    def train(self, *options: str, config: str = 'pm.py') -> None:
        train.main(
            [self(config), '--work-dir', self('work')]
            + (['--cfg-options', *options] if options else [])
        )

    def test(self, checkpoint: str, *options: str, config='pm.py') -> None:
        test.main(
            [self(config), self(checkpoint), '--work-dir', self('work')]
            + (['--cfg-options', *options] if options else [])
        )

    def compress(
        self,
        *flags: str,
        checkpoint: str = 'dense.pth',
        config: str = 'pm.py',
    ) -> None:
        out = [] if '--out' in flags else ['--out', self('out.pth')]
        compress.main([self(config), self(checkpoint), *out, *flags])

    def from_compressed(self) -> Config:
        """For training from the compressed checkpoint."""
        cfg = copy.deepcopy(self.cfg)
        cfg.load_from = self('pm.pth')
        return cfg

    def tune(self, *options: str) -> None:
        """Train from the compressed checkpoint: no scoring, quick."""
        self.train(f'load_from={self("pm.pth")}', *options)


@dataclass(frozen=True)
class Case:
    """One row of a table.

    Attributes:
        what (str): What is wrong.
        run (Callable): Does it, with a Workspace.
        says (tuple[str | tuple[str, ...], ...]): What the message must have:
            the value, the expectation, the remedy; a tuple is one of several.
        table (str): Of ``TABLES``.
        leaves (tuple[str, ...]): Files the run may leave or change.
    """

    what: str
    run: Callable[[Workspace], None]
    says: tuple[str | tuple[str, ...], ...]
    table: str = TABLES[0]
    leaves: tuple[str, ...] = ()


CASES: dict[str, Case] = {}


def case(what: str, *says: str | tuple[str, ...], **options) -> Callable:
    """Decorator: add a row."""

    def decorator(run: Callable) -> Callable:
        CASES[run.__name__] = Case(what, run, says, **options)
        return run

    return decorator


def message(ws: Workspace, name: str) -> str:
    """Run a case and return what the user is told, paths shortened."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT,
                signal.SIGTERM, signal.SIGCHLD)}  # fmt: skip
    try:
        CASES[name].run(ws)
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        text = ws_errors.pop() if ws_errors else str(error)
    else:
        raise AssertionError(f'{name}: nothing was raised')
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    text = text.replace(f'{ws.root}/', '').replace(str(ws.root), '.')
    return re.sub(r'\s+', ' ', text).strip()


#: Texts on stderr of cases whose exception is an exit status.
ws_errors: list[str] = []


@contextmanager
def stderr_is_the_message() -> Iterator[None]:
    """For tools that print why they stop and exit with a number."""
    written: list[str] = []
    with mock.patch.object(sys, 'stderr', mock.Mock(wraps=sys.stderr)) as err:
        err.write = lambda text: written.append(text) or len(text)
        try:
            yield
        except SystemExit:
            ws_errors.append(''.join(written))
            raise


@contextmanager
def _file(ws: Workspace, content: object, name: str = 'bad.pth') -> Iterator:
    """A file of bytes, or what ``torch.save`` writes; it goes again."""
    if isinstance(content, bytes):
        (ws.root / name).write_bytes(content)
    else:
        torch.save(content, ws(name))
    try:
        yield name
    finally:
        os.remove(ws(name))


# -------------------------------------------------------------- the options


OPTION = 'model.backbone.compression.'


@case('`keep` of 0', 'keep=0.0', '(0, 1]', 'for example --keep=0.5')
def keep_zero(ws: Workspace) -> None:
    with stderr_is_the_message():
        ws.compress('--keep', '0')


@case('`keep` above 1', 'keep=1.5', '(0, 1]', 'for example keep=0.5')
def keep_high(ws: Workspace) -> None:
    ws.train(f'{OPTION}keep=1.5')


@case('`keep` is no number', "keep='much'", '(0, 1]', 'for example keep=0.5')
def keep_text(ws: Workspace) -> None:
    ws.train(f'{OPTION}keep=much')


@case(
    '`keep` below what a schedule can',
    'keep=0.3 is out of reach', 'is its least', 'keep more', 'a lower first',
)  # fmt: skip
def keep_unreachable(ws: Workspace) -> None:
    ws.train(f'{OPTION}keep=0.3', f'{OPTION}first=1')


@case(
    'a target that cannot be met',
    'share=0.01 cannot be met', 'the least found is share=0.4', 'ask for',
)  # fmt: skip
def target_unreachable(ws: Workspace) -> None:
    ws.compress('--target', 'share=0.01')


@case('an unknown option', 'kepe=0.5', "did you mean 'keep'?", 'schedule')
def unknown_option(ws: Workspace) -> None:
    ws.train(f'{OPTION}kepe=0.5')


@case('an unknown type', "type='papier'", "did you mean 'paper'?", 'tome')
def unknown_type(ws: Workspace) -> None:
    ws.train(f'{OPTION}type=papier')


@case("an option's unknown value", "restore='all'", 'residual', 'replace')
def unknown_value(ws: Workspace) -> None:
    ws.train(f'{OPTION}restore=all')


@case('`keep` for the paper', 'keep=0.5', "did you mean 'keep_rate'?")
def keep_for_paper(ws: Workspace) -> None:
    ws.train(f'{OPTION}keep=0.5', config='paper.py')


@case('the paper: rates above 1', 'keep_rate=0.7', 'prune_rate=0.5', 'lower')
def rates_high(ws: Workspace) -> None:
    ws.train(f'{OPTION}prune_rate=0.5', config='paper.py')


@case('the paper: a layer that is not there', 'layers=[1, 12]', '0..1')
def layers_out_of_range(ws: Workspace) -> None:
    ws.train(f'{OPTION}layers=[1,12]', config='paper.py')


@case('the paper: no layer at all', 'layers=[]', 'at least one')
def layers_empty(ws: Workspace) -> None:
    ws.train(f'{OPTION}layers=[]', config='paper.py')


SHAPE = EncoderShape(2, (4, 4), 1, 8, 4, LayerCost(1, 1, 1))


@case(
    'the paper: no token left in a layer',
    'layer 1 would keep none of its tokens', 'keep more',
)  # fmt: skip
def zero_centres(ws: Workspace) -> None:
    scores = torch.rand(2, 16) + 0.1
    scores[1] = 0.1  # flat, below all thresholds after normalisation
    scores[0, :4] = 9
    StaticCompressor(
        SHAPE, keep_rate=0.1, threshold='global', decay=0.9
    ).set_scores(scores)


@case('the paper: zero groups by hand', 'num_groups=[0, 4]', '1..16')
def zero_groups(ws: Workspace) -> None:
    StaticCompressor(SHAPE, num_groups=[0, 4])


@case('the paper: no images to score', 'scores need images', "type='pm'")
def nothing_to_score(ws: Workspace) -> None:
    init_default_scope('mmseg')
    model = MODELS.build(Config.fromfile(ws('paper.py')).model)
    run_compression(model)


# ------------------------------------------------------------------- scores


def _scores(value: float) -> None:
    scores = torch.rand(2, 16)
    scores[1, 3:] = value
    if value == 0:
        scores[1] = 0
    StaticCompressor(SHAPE).set_scores(scores)


@case('scores with NaN', 'layer 1', 'NaN or inf', 'gather them again')
def scores_nan(ws: Workspace) -> None:
    _scores(float('nan'))


@case('scores with inf', 'layer 1', 'NaN or inf', 'gather them again')
def scores_inf(ws: Workspace) -> None:
    _scores(float('inf'))


@case('scores below zero', '-1', 'must be >= 0', 'take absolute values')
def scores_negative(ws: Workspace) -> None:
    _scores(-1.0)


@case('scores that are all zero', 'layer 1', 'all zero', 'with labels')
def scores_zero(ws: Workspace) -> None:
    _scores(0.0)


@case('scores of another grid', '(2, 25)', '(2, 16)', '(4, 4)')
def scores_grid(ws: Workspace) -> None:
    StaticCompressor(SHAPE).set_scores(torch.rand(2, 25))


@case(
    'scores of crops of another size',
    'got 64 patch tokens', 'expected 16', 'img_size',
)  # fmt: skip
def crops_of_another_size(ws: Workspace) -> None:
    ws.compress(
        '--cfg-options', 'model.data_preprocessor.size=(128,128)',
        config='paper.py',
    )  # fmt: skip


@case('NaN scores in a checkpoint', 'layer 1', 'NaN or inf', 'gather')
def checkpoint_scores_nan(ws: Workspace) -> None:
    state = {k: v.clone() for k, v in ws.paper.items()}
    state['backbone.compressor.scores'][1, 0] = float('nan')
    with _file(ws, dict(state_dict=state)) as name:
        ws.compress('--keep', '0.5', checkpoint=name, config='paper.py')


# -------------------------------------------------------------------- sizes


@case(
    'a checkpoint of another image size',
    'shape (1, 17, 192)', 'expected (1, 37, 192)', 'set img_size',
)  # fmt: skip
def checkpoint_grid(ws: Workspace) -> None:
    ws.test('pm.pth', 'model.backbone.img_size=(96,96)')


@case('`img_size` below a patch', '8x8', '16x16', 'set img_size')
def image_below_patch(ws: Workspace) -> None:
    ws.train('model.backbone.img_size=(8,8)')


# --------------------------------------------------------------------- data


@case('no data at all', 'images/training does not exist', 'data_root=')
def dataset_missing(ws: Workspace) -> None:
    ws.train('data_root=nowhere')


@case('no image of the right kind', 'empty', 'ending in .jpg', 'img_suffix')
def dataset_empty(ws: Workspace) -> None:
    root = ws.root / 'empty'
    for split in ('training', 'validation'):
        for kind in ('images', 'annotations'):
            (root / kind / split).mkdir(parents=True)
            (root / kind / split / 'readme.txt').touch()
    try:
        ws.train(f'data_root={root}')
    finally:
        shutil.rmtree(root)


@contextmanager
def _wrong_labels(ws: Workspace) -> Iterator[None]:
    folder = ws.root / 'scenes/annotations/training'
    shutil.copytree(folder, ws('saved'))
    for file in folder.iterdir():
        cv2.imwrite(str(file), np.full_like(cv2.imread(str(file), 0), 201))
    try:
        yield
    finally:
        shutil.rmtree(folder)
        shutil.move(ws('saved'), folder)


@case('a label that is no class', 'label 200', '0..23 or 255', 'num_classes')
def labels_out_of_range(ws: Workspace) -> None:
    with _wrong_labels(ws):
        ws.compress()


@case(
    'the same while training', 'label 200', '0..23 or 255', 'num_classes',
)  # fmt: skip
def labels_in_training(ws: Workspace) -> None:
    with _wrong_labels(ws):
        ws.tune()


# -------------------------------------------------------------- checkpoints


@case('no such checkpoint', 'none.pth', 'Give the path', 'load_from=None')
def checkpoint_missing(ws: Workspace) -> None:
    ws.test('none.pth')


@case(
    'a dense checkpoint, the paper\'s config',
    'there is no structure yet', 'tools/compress.py', 'compression=None',
)  # fmt: skip
def dense_for_paper(ws: Workspace) -> None:
    ws.test('dense.pth', config='paper.py')


@case(
    'a compressed checkpoint, a dense config',
    'it is a compressed checkpoint', 'the model is dense', 'give its config',
)  # fmt: skip
def compressed_for_dense(ws: Workspace) -> None:
    ws.test('pm.pth', config='dense.py')


@case(
    'a checkpoint compressed in another way',
    'compressed in another way', 'dense checkpoint', 'tools/compress.py',
)  # fmt: skip
def compressed_otherwise(ws: Workspace) -> None:
    ws.test('pm.pth', config='paper.py')


@case(
    'a checkpoint compressed with pm_seg 0.1',
    'pm_seg 0.1', 'dense checkpoint', 'tools/compress.py',
)  # fmt: skip
def compressed_before(ws: Workspace) -> None:
    state = torch.load(ws('dense.pth'))['state_dict']
    for module, layers in (('backbone', 2), ('decode_head', 1)):
        for name in ('scores', 'group', 'merge_weight', 'restore_weight'):
            values = torch.ones(layers, 16)
            state[f'{module}.compressor.{name}'] = values
    with _file(ws, dict(state_dict=state)) as name:
        ws.test(name)


@case('a truncated checkpoint', 'bad.pth', 'truncated', 'download or copy')
def checkpoint_truncated(ws: Workspace) -> None:
    with _file(ws, Path(ws('pm.pth')).read_bytes()[:-5000]) as name:
        ws.test(name)


@case('an empty file', 'it has 0 bytes', 'truncated', 'download or copy')
def checkpoint_empty(ws: Workspace) -> None:
    with _file(ws, b'') as name:
        ws.test(name)


@case('a checkpoint with changed bytes', 'wrong checksum', 'damaged', 'copy')
def checkpoint_corrupt(ws: Workspace) -> None:
    content = bytearray(Path(ws('pm.pth')).read_bytes())
    middle = len(content) // 2
    content[middle : middle + 9] = b'corrupted'
    with _file(ws, bytes(content)) as name:
        ws.test(name)


@case('a picture instead', 'no .pth file', 'download or copy')
def checkpoint_picture(ws: Workspace) -> None:
    picture = next(Path(ws('scenes')).rglob('*.jpg'))
    with _file(ws, picture.read_bytes()) as name:
        ws.test(name)


@case('a .npz file instead', 'bad.npz', 'tools/convert_checkpoint.py')
def checkpoint_npz(ws: Workspace) -> None:
    np.savez(ws('bad.npz'), weight=np.ones(2))
    try:
        ws.test('bad.npz')
    finally:
        os.remove(ws('bad.npz'))


@case('a checkpoint without weights', 'holds a list', 'expected a dict')
def checkpoint_list(ws: Workspace) -> None:
    with _file(ws, [1, 2]) as name:
        ws.test(name)


FOREIGN = {'conv1.weight': torch.ones(4, 3, 7, 7)}


@case(
    'the checkpoint of another model',
    'does not fit PMVisionTransformer', 'missing, expected',
    'convert_checkpoint.py',
)  # fmt: skip
def checkpoint_foreign(ws: Workspace) -> None:
    with _file(ws, FOREIGN) as name:
        ws.test(name)


@case(
    'another model, to convert',
    'Cannot convert', 'expected',
)  # fmt: skip
def convert_foreign(ws: Workspace) -> None:
    with _file(ws, FOREIGN) as name:
        convert_checkpoint.main(['timm', ws(name), ws('out.pth')])


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def malicious(ws: Workspace, name: str = 'bad.pth') -> str:
    """A whole checkpoint that also makes the folder 'pwned'."""
    state = dict(ws.compressed)
    meta = dict(iter=1, epoch=0, note=Attack(ws('pwned')))
    torch.save(dict(state_dict=state, meta=meta), ws(name))
    return name


@case('a checkpoint with code', 'holds more than weights', 'run code', 'trust')
def checkpoint_code(ws: Workspace) -> None:
    try:
        ws.test(malicious(ws))
    finally:
        os.remove(ws('bad.pth'))


@case(
    'a teacher of another architecture',
    'another architecture', 'unexpected', 'set teacher.model',
)  # fmt: skip
def teacher_architecture(ws: Workspace) -> None:
    cfg = copy.deepcopy(ws.cfg)
    cfg.model.backbone.num_layers = 3
    folder = ws.root / 'other'
    folder.mkdir()
    try:
        path = dense_checkpoint(cfg, folder)
        cfg = ws.from_compressed()
        cfg.model.teacher = dict(alpha=0.5, tau=20.0, checkpoint=path)
        cfg.dump(ws('faulty.py'))
        ws.train(config='faulty.py')
    finally:
        os.remove(ws('faulty.py'))
        shutil.rmtree(folder)


# ------------------------------------------------------------------ outputs


@case('output below a file', 'pm.py is a file', 'expected a folder', 'choose')
def output_below_file(ws: Workspace) -> None:
    ws.compress('--out', ws('pm.py/out.pth'))


@case('output that is a folder', 'scenes', 'it is a folder', 'name of a file')
def output_folder(ws: Workspace) -> None:
    ws.compress('--out', ws('scenes'))


@case('an output folder without permission', 'no permission', 'choose')
def output_forbidden(ws: Workspace) -> None:
    # Whoever runs this may be root, whom no permission stops.
    with mock.patch('os.access', lambda path, mode: False):
        ws.compress('--out', ws('new/out.pth'))


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """The system lets no file grow beyond ``size`` bytes."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@case('no room for the output', 'Cannot write', 'unchanged', 'Make room')
def disk_full_compress(ws: Workspace) -> None:
    shutil.copy(ws('pm.pth'), ws('out.pth'))
    try:
        with full_disk(200_000):
            ws.compress('--keep', '0.5', checkpoint='pm.pth')
        # what stood there stays
    finally:
        same = (
            Path(ws('out.pth')).read_bytes() == Path(ws('pm.pth')).read_bytes()
        )
        os.remove(ws('out.pth'))
        assert same


# ------------------------------------------------------------- environments


@case(
    'both OpenMMLab stacks installed',
    'onedl-mmcv and mmcv own the same files', 'expected one stack',
    'pip uninstall',
)  # fmt: skip
def mixed_stacks(ws: Workspace) -> None:
    real = metadata.version

    def version(name: str) -> str:
        return {'mmcv': '2.1.0', 'onedl-mmcv': '2.3.6'}.get(name) or real(name)

    with mock.patch.object(metadata, 'version', version):
        ws.test('pm.pth')


# ------------------------------------------------------------------- faults


@TRANSFORMS.register_module()
class FaultAt(BaseTransform):
    """Sends its own process a signal when an image is loaded.

    Args:
        image (int): The how manieth.
        number (int): Of the signal.
    """

    def __init__(self, image: int, number: int) -> None:
        self.image, self.number, self.count = image, number, 0

    def transform(self, results: dict) -> dict:
        self.count += 1
        if self.count == self.image:
            os.kill(os.getpid(), self.number)
        return results


@HOOKS.register_module()
class SpoilHook(Hook):
    """Makes a weight NaN before an iteration, or the disk full after it."""

    priority = 'VERY_HIGH'

    def __init__(self, kind: str, at: int) -> None:
        self.kind, self.at = kind, at

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if runner.iter == self.at and self.kind == 'nan':
            with torch.no_grad():
                next(runner.model.parameters()).fill_(float('nan'))
        if runner.iter == self.at and self.kind == 'disk':
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY)
            )


def _train_faulty(ws: Workspace, cfg: Config) -> None:
    cfg.dump(ws('faulty.py'))
    try:
        with stderr_is_the_message():
            ws.train(config='faulty.py')
    finally:
        os.remove(ws('faulty.py'))


def _faulty(ws: Workspace, image: int, number: int, **changes) -> None:
    """Train with a signal when an image is loaded."""
    cfg = ws.from_compressed()
    cfg.train_dataloader.dataset.pipeline.insert(
        1, dict(type='FaultAt', image=image, number=int(number))
    )
    cfg.default_hooks.checkpoint.interval = changes.pop('interval', 100)
    cfg.train_dataloader.update(changes)
    _train_faulty(ws, cfg)


def _spoilt(ws: Workspace, kind: str, at: int) -> None:
    cfg = ws.from_compressed()
    cfg.custom_hooks += [dict(type='SpoilHook', kind=kind, at=at)]
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        _train_faulty(ws, cfg)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


FAULTS = dict(table=TABLES[1])
SAVED = ('work/iter_2.pth', 'work/last_checkpoint')


@case(
    'Ctrl-C (SIGINT) in iteration 2',
    'SIGINT', 'saved after iteration 2', 'work/iter_2.pth', '--resume',
    leaves=SAVED, **FAULTS,
)  # fmt: skip
def sigint(ws: Workspace) -> None:
    _faulty(ws, 3, signal.SIGINT)


@case(
    'a scheduler ends the job (SIGTERM)',
    'SIGTERM', 'saved after iteration 2', 'work/iter_2.pth', '--resume',
    leaves=SAVED, **FAULTS,
)  # fmt: skip
def sigterm(ws: Workspace) -> None:
    _faulty(ws, 3, signal.SIGTERM)


@case(
    'a loss that is NaN',
    'The loss is nan at iteration 3', 'expected a finite number',
    'Lower the learning rate', 'work/iter_2.pth',
    leaves=SAVED, **FAULTS,
)  # fmt: skip
def nan_loss(ws: Workspace) -> None:
    _spoilt(ws, 'nan', 2)


@case(
    'no room for a checkpoint',
    'Cannot save', 'iteration 3', 'Nothing was removed', 'work/iter_2.pth',
    leaves=SAVED, **FAULTS,
)  # fmt: skip
def disk_full_training(ws: Workspace) -> None:
    _spoilt(ws, 'disk', 2)


@case(
    'a process that loads images is killed',
    # Which process sees it first, and whether one more iteration has ended
    # by then, is chance.
    'DataLoader worker (pid', ('killed by signal', 'exited unexpectedly'),
    'lower num_workers', ('work/iter_1.pth', 'work/iter_2.pth'),
    leaves=('work/iter_1.pth', *SAVED), **FAULTS,
)  # fmt: skip
def dead_worker(ws: Workspace) -> None:
    _faulty(
        ws, 5, signal.SIGKILL, num_workers=1, interval=1, prefetch_factor=1
    )


@case(
    'another run in the same work directory',
    'in use by process', 'Two runs in one', '--work-dir', **FAULTS,
)  # fmt: skip
def work_dir_in_use(ws: Workspace) -> None:
    lock = ROOT / 'pm_seg/utils/lock.py'
    code = (
        'import runpy, sys; '
        f'lock = runpy.run_path({str(lock)!r})["work_dir_lock"]\n'
        f'with lock({ws("work")!r}): print("held", flush=True); '
        'sys.stdin.read()'
    )
    with subprocess.Popen(
        [sys.executable, '-c', code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout.readline() == b'held\n'
        try:
            ws.tune()
        finally:
            other.stdin.close()


# ------------------------------------------------------------------ the page


def rows(ws: Workspace, table: str) -> list[str]:
    """Lines of one table, in Markdown."""
    lines = ['| what is wrong | what it says |', '|---|---|']
    for name, entry in CASES.items():
        if entry.table == table:
            text = steady(message(ws, name)).replace('|', '\\|')
            if len(text) > 450:
                text = f'{text[:330]} [...] {text[-100:]}'
            lines.append(f'| {entry.what} | {text} |')
            ws.tidy()
    return lines


def steady(text: str) -> str:
    """A message without what differs from run to run."""
    text = re.sub(r'process \d+ on \S+, since [\d:. -]+\d', 'process 4711 on '
                  'HOST, since 2026-11-20 12:00:00', text)  # fmt: skip
    text = re.sub(r'pid(\(s\))? \d+', r'pid\1 4711', text)
    return re.sub(r'\S*/(site-packages|pm_seg)/(\S+\.py)', r'\2', text)


def main(page: str) -> None:
    """Write the tables into a page, between their markers."""
    import tempfile

    path = Path(page)
    text = path.read_text()
    with tempfile.TemporaryDirectory() as folder:
        ws = Workspace(Path(folder))
        for table in TABLES:
            start, end = f'<!-- {table} -->', f'<!-- end of {table} -->'
            head, _, rest = text.partition(start)
            _, _, tail = rest.partition(end)
            body = '\n'.join(rows(ws, table))
            text = f'{head}{start}\n{body}\n{end}{tail}'
    path.write_text(text)
    print(f'Wrote {len(CASES)} messages to {path}')


# Unused imports are tools whose safety tests/test_security.py checks.
__all__ = ['CASES', 'Workspace', 'benchmark', 'export_onnx', 'message']

if __name__ == '__main__':
    main(*sys.argv[1:])
