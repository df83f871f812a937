"""Drawn scenes in ADE20K's folder layout and label numbering.

A stand-in for the real dataset: streets and rooms with objects where one
expects them, thin structures (poles, lamps, fences), textures, shadows, noise
and varied image sizes. Annotation values are ADE20K's (class number 1-150 of
the scene parsing benchmark, 0 is void), so configs for ADE20K run unchanged.

examples:
  # 400 to train on and 60 to validate on
  python tools/make_scenes.py data/scenes
  # a handful
  python tools/make_scenes.py data/few --num-train 12 --num-val 4
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np

from pm_seg.cli.arguments import make_parser
from pm_seg.cli.ending import command
from pm_seg.utils import ProgressReporter

#: ADE20K numbers of the classes that scenes contain.
CLASS_IDS = {
    'wall': 1, 'building': 2, 'sky': 3, 'floor': 4, 'tree': 5, 'ceiling': 6,
    'road': 7, 'bed ': 8, 'windowpane': 9, 'grass': 10, 'cabinet': 11,
    'sidewalk': 12, 'person': 13, 'door': 15, 'table': 16, 'mountain': 17,
    'chair': 20, 'car': 21, 'painting': 23, 'fence': 33, 'lamp': 37,
    'signboard': 44, 'streetlight': 88, 'pole': 94,
}  # fmt: skip
VOID = 0
SIZES = ((256, 256), (256, 341), (288, 384), (320, 256), (300, 400))
SPLITS = {'training': 'train', 'validation': 'val'}

Colour = tuple[int, int, int]
Points = Sequence[tuple[float, float]]

# BGR
_BRICKS = ((90, 110, 165), (120, 130, 140), (95, 95, 110))
_CARS = ((40, 40, 190), (180, 70, 40), (210, 210, 210), (30, 30, 35))
_GREY, _WOOD, _RED = (70, 70, 70), (50, 80, 110), (40, 40, 120)


class _Canvas:
    """An image and its annotation, drawn together in unit coordinates."""

    def __init__(self, size: tuple[int, int], rng: np.random.Generator):
        self.height, self.width = size
        self.rng = rng
        self.image = np.zeros((*size, 3), np.float32)
        self.label = np.zeros(size, np.uint8)
        self.textures = [
            cv2.resize(
                rng.normal(0, 1, (8, 8)).astype(np.float32),
                size[::-1],
                interpolation=cv2.INTER_CUBIC,
            )
            + rng.normal(0, 0.5, size).astype(np.float32)
            for _ in range(4)
        ]
        self.shade = np.linspace(6, -6, size[0], dtype=np.float32)

    def _scaled(self, points: Points) -> np.ndarray:
        scale = np.array([self.width, self.height])
        return np.round(np.array(points) * scale).astype(np.int32)

    def _paint(
        self, mask: np.ndarray, name: str, colour: Colour, grain: float
    ) -> None:
        """Fill a mask with a grainy, slightly shaded colour."""
        rows, columns = mask.nonzero()
        if not len(rows):
            return
        colour = np.array(colour) + self.rng.normal(0, 8, 3)
        texture = self.textures[self.rng.integers(len(self.textures))]
        paint = grain * texture[rows, columns] + self.shade[rows]
        self.image[rows, columns] = colour + paint[:, None]
        self.label[rows, columns] = CLASS_IDS[name]

    def polygon(
        self, name: str, points: Points, colour: Colour, grain: float = 8
    ) -> None:
        mask = np.zeros_like(self.label)
        cv2.fillPoly(mask, [self._scaled(points)], 1)
        self._paint(mask, name, colour, grain)

    def box(
        self, name: str, corners: Sequence[float], colour: Colour,
        grain: float = 8,
    ) -> None:  # fmt: skip
        """Corners are left, top, right and bottom."""
        left, top, right, bottom = corners
        points = [(left, top), (right, top), (right, bottom), (left, bottom)]
        self.polygon(name, points, colour, grain)

    def ellipse(
        self, name: str, centre: tuple[float, float],
        radii: tuple[float, float], colour: Colour, grain: float,
    ) -> None:  # fmt: skip
        mask = np.zeros_like(self.label)
        place, axes = self._scaled([centre, radii]).tolist()
        axes = [max(axis, 1) for axis in axes]
        cv2.ellipse(mask, place, axes, 0, 0, 360, 1, -1)
        self._paint(mask, name, colour, grain)

    def line(
        self, name: str, points: Points, width: float, colour: Colour
    ) -> None:
        mask = np.zeros_like(self.label)
        thickness = max(int(round(width * self.width)), 2)
        cv2.polylines(mask, [self._scaled(points)], False, 1, thickness)
        self._paint(mask, name, colour, 4)


def _draw_street(c: _Canvas) -> None:
    rng = c.rng
    horizon = rng.uniform(0.38, 0.52)
    c.box('sky', (0, 0, 1, horizon + 0.05), (225, 180, 120), 5)
    if rng.random() < 0.6:
        xs = np.linspace(0, 1, 7)
        tops = horizon - rng.uniform(0.05, 0.25, 7)
        ridge = [(0.0, horizon + 0.06), *zip(xs, tops), (1.0, horizon + 0.06)]
        c.polygon('mountain', ridge, (120, 105, 95), 10)
    c.box('grass', (0, horizon, 1, 1), (60, 140, 70), 14)
    x = rng.uniform(-0.1, 0.05)
    while x < 1:
        width = rng.uniform(0.15, 0.35)
        top = horizon - rng.uniform(0.08, 0.36)
        if rng.random() < 0.8:
            colour = _BRICKS[rng.integers(3)]
            c.box('building', (x, top, x + width, horizon + 0.06), colour, 6)
            for i in range(3):
                left = x + width * (0.15 + 0.28 * i)
                right = left + width * 0.14
                for row in np.arange(top + 0.03, horizon - 0.02, 0.08):
                    pane = left, row, right, row + 0.04
                    c.box('windowpane', pane, (190, 160, 110), 4)
        x += width + rng.uniform(0, 0.08)
    middle = rng.uniform(0.35, 0.65)
    near, far = rng.uniform(0.3, 0.42), rng.uniform(0.04, 0.08)
    for name, end, start, colour, grain in (
        ('sidewalk', far + 0.03, near + 0.12, (160, 165, 170), 8),
        ('road', far, near, (85, 82, 80), 6),
    ):
        top = [(middle - end, horizon + 0.05), (middle + end, horizon + 0.05)]
        bottom = [(middle + start, 1.0), (middle - start, 1.0)]
        c.polygon(name, top + bottom, colour, grain)
    for _ in range(rng.integers(1, 4)):
        x = rng.choice([rng.uniform(0, 0.25), rng.uniform(0.75, 1)])
        ground = rng.uniform(horizon + 0.08, 0.8)
        size = (ground - horizon) * 0.7 + 0.08
        top = ground - size
        c.box('tree', (x - 0.012, top, x + 0.012, ground), (45, 70, 95))
        crown = size * 0.5, size * 0.55
        c.ellipse('tree', (x, top), crown, (40, 100, 45), 18)
    if rng.random() < 0.5:
        y = rng.uniform(horizon + 0.06, horizon + 0.15)
        end = rng.uniform(0.2, 0.4)
        for rail in (y, y + 0.03, y + 0.06):
            c.line('fence', [(0, rail), (end, rail)], 0.006, _GREY)
        for post in np.arange(0, end, 0.05):
            points = [(post, y - 0.02), (post, y + 0.09)]
            c.line('fence', points, 0.008, _GREY)
    for _ in range(rng.integers(1, 4)):
        ground = rng.uniform(horizon + 0.12, 0.95)
        scale = (ground - horizon) * 0.55
        x = middle + rng.uniform(-1, 1) * (ground - horizon) * 0.5
        colour = _CARS[rng.integers(4)]
        top = ground - scale * 0.5
        c.box('car', (x - scale, top, x + scale, ground), colour, 5)
        c.ellipse('car', (x, top), (scale * 0.6, scale * 0.3), colour, 5)
    for _ in range(rng.integers(0, 4)):
        ground = rng.uniform(horizon + 0.12, 0.95)
        height = (ground - horizon) * 0.7
        x = rng.uniform(0.03, 0.97)
        half, top = height * 0.12, ground - height * 0.8
        body = x - half, top, x + half, ground
        c.box('person', body, (60, 50, 140), 10)
        head = x, ground - height * 0.9
        c.ellipse('person', head, (height * 0.1, half), (140, 170, 215), 4)
    for name in ('pole', 'streetlight'):
        if rng.random() < 0.7:
            x = rng.choice([rng.uniform(0.05, 0.3), rng.uniform(0.7, 0.95)])
            top = rng.uniform(0.1, 0.3)
            points = [(x, 0.8), (x, top)]
            if name == 'streetlight':
                points.append((x + 0.08 * np.sign(0.5 - x), top))
            grey = (50, 50, 50) if name == 'pole' else (120, 110, 90)
            c.line(name, points, 0.014, grey)
            if name == 'pole' and rng.random() < 0.7:
                sign = x - 0.05, top, x + 0.05, top + 0.08
                c.box('signboard', sign, (50, 190, 230), 4)


def _draw_room(c: _Canvas) -> None:
    rng = c.rng
    low, high = rng.uniform(0.6, 0.72), rng.uniform(0.08, 0.2)
    c.box('wall', (0, 0, 1, 1), (170, 195, 205), 5)
    inset = rng.uniform(0.05, 0.2)
    corners = [(0, 0), (1, 0), (1 - inset, high), (inset, high)]
    c.polygon('ceiling', corners, (235, 235, 235), 3)
    corners = [(inset, low), (1 - inset, low), (1, 0.95), (1, 1), (0, 1)]
    c.polygon('floor', [*corners, (0, 0.95)], (70, 105, 150), 10)
    # Name: top, width, bottom, colour, grain.
    things = {
        'windowpane': (high + 0.1, 0.16, low - 0.15, (235, 215, 180), 5),
        'painting': (high + 0.08, 0.14, high + 0.25, (60, 60, 160), 25),
        'door': (high + 0.12, 0.13, low + 0.02, (60, 90, 120), 5),
        'cabinet': (low - 0.25, 0.18, low + 0.05, (90, 130, 170), 6),
    }
    for slot, name in zip(rng.permutation(4), rng.permutation(list(things))):
        left = 0.08 + 0.22 * slot
        top, width, bottom, colour, grain = things[name]
        c.box(name, (left, top, left + width, bottom), colour, grain)
    if rng.random() < 0.6:
        x, y = rng.uniform(0, 0.5), low + 0.02
        corners = [(x, y), (x + 0.4, y), (x + 0.5, 0.95), (x - 0.08, 0.95)]
        c.polygon('bed ', corners, (200, 170, 190), 8)
    for _ in range(rng.integers(1, 3)):
        x, y = rng.uniform(0.1, 0.8), rng.uniform(low + 0.02, 0.85)
        c.box('table', (x, y - 0.1, x + 0.22, y - 0.06), _WOOD, 5)
        for leg in (x + 0.01, x + 0.21):
            c.line('table', [(leg, y - 0.08), (leg, y + 0.06)], 0.012, _WOOD)
    for _ in range(rng.integers(1, 4)):
        x, y = rng.uniform(0.05, 0.9), rng.uniform(low + 0.05, 0.92)
        c.box('chair', (x, y - 0.2, x + 0.02, y + 0.06), _RED, 5)
        c.box('chair', (x, y - 0.04, x + 0.11, y), _RED, 5)
        c.line('chair', [(x + 0.1, y), (x + 0.1, y + 0.06)], 0.012, _RED)
    if rng.random() < 0.7:
        x = rng.uniform(0.3, 0.7)
        c.line('lamp', [(x, 0), (x, high + 0.1)], 0.008, (60, 60, 60))
        c.ellipse('lamp', (x, high + 0.12), (0.05, 0.04), (150, 230, 250), 3)


def draw_scene(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """One scene; the same seed gives the same scene.

    Args:
        seed (int): Seed of everything in it, its size included.

    Returns:
        tuple[np.ndarray, np.ndarray]: Image, uint8 BGR, (H, W, 3), and
        annotation, uint8, (H, W), 0 for void, ADE20K class numbers else.
    """
    rng = np.random.default_rng(seed)
    canvas = _Canvas(SIZES[rng.integers(len(SIZES))], rng)
    (_draw_street if rng.random() < 0.65 else _draw_room)(canvas)
    light = rng.uniform(0.75, 1.2)
    noise = rng.normal(0, 4, canvas.image.shape)
    image = np.clip(canvas.image * light + noise, 0, 255).astype(np.uint8)
    image = cv2.GaussianBlur(image, (3, 3), 0)
    if rng.random() < 0.3:  # an unlabelled patch, as annotators leave them
        y, x = (int(rng.uniform(0, 0.9) * n) for n in canvas.label.shape)
        canvas.label[y : y + 20, x : x + 30] = VOID
    return image, canvas.label


def write_scenes(
    root: str | Path, num_train: int = 400, num_val: int = 60, seed: int = 0
) -> Iterator[tuple[int, int]]:
    """Write a dataset of scenes in ADE20K layout.

    Creates ``images/{training,validation}/ADE_*.jpg`` and
    ``annotations/{training,validation}/ADE_*.png``.

    Args:
        root (str | Path): Data root, created if needed.
        num_train, num_val (int): Scenes of each split. Default to 400, 60.
        seed (int): Different seeds give disjoint datasets. Defaults to 0.

    Yields:
        tuple[int, int]: Scenes written so far, scenes in all.
    """
    root = Path(root)
    total = num_train + num_val
    done = 0
    for split, count in zip(SPLITS, (num_train, num_val)):
        for kind in ('images', 'annotations'):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            image, label = draw_scene(seed * 1_000_000 + done)
            name = f'{split}/ADE_{SPLITS[split]}_{i + 1:08d}'
            cv2.imwrite(f'{root}/images/{name}.jpg', image)
            cv2.imwrite(f'{root}/annotations/{name}.png', label)
            done += 1
            yield done, total


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser('make_scenes.py', __doc__)
    parser.add_argument('root', help='folder to write to')
    group = parser.add_argument_group('what to draw')
    for name, default, what in (
        ('--num-train', 400, 'training scenes'),
        ('--num-val', 60, 'validation scenes'),
        ('--seed', 0, 'other seeds draw other scenes'),
    ):
        group.add_argument(
            name,
            type=int,
            default=default,
            metavar='N',
            help=f'{what} (default {default})',
        )
    return parser.parse_args(argv)


@command()
def main(argv: list[str] | None = None) -> None:
    """Write the dataset and say where."""
    args = parse_args(argv)
    total = args.num_train + args.num_val
    with ProgressReporter('Drawing scenes', total) as report:
        for done, _ in write_scenes(
            args.root, args.num_train, args.num_val, args.seed
        ):
            report(done)
    print(f'Wrote {total} scenes to {args.root}')


if __name__ == '__main__':
    main()
