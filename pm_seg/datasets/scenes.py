"""Drawn scenes in ADE20K's folder layout and label numbering.

A stand-in for the real dataset: streets and rooms with objects where one
expects them, thin structures (poles, lamps, fences), textures, shadows, noise
and varied image sizes. Annotation values are ADE20K's (class number 1-150 of
the scene parsing benchmark, 0 is void), so configs for ADE20K run unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

#: ADE20K numbers of the classes that scenes contain.
CLASS_IDS = {
    'wall': 1,
    'building': 2,
    'sky': 3,
    'floor': 4,
    'tree': 5,
    'ceiling': 6,
    'road': 7,
    'bed ': 8,
    'windowpane': 9,
    'grass': 10,
    'cabinet': 11,
    'sidewalk': 12,
    'person': 13,
    'door': 15,
    'table': 16,
    'mountain': 17,
    'chair': 20,
    'car': 21,
    'painting': 23,
    'fence': 33,
    'lamp': 37,
    'signboard': 44,
    'streetlight': 88,
    'pole': 94,
}
VOID = 0
SIZES = ((256, 256), (256, 341), (288, 384), (320, 256), (300, 400))
SPLITS = {'training': 'train', 'validation': 'val'}

Colour = tuple[int, int, int]


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

    def _points(self, points: list[tuple[float, float]]) -> np.ndarray:
        scale = np.array([self.width, self.height])
        return np.round(np.array(points) * scale).astype(np.int32)

    def _paint(
        self, mask: np.ndarray, name: str, colour: Colour, grain: float
    ) -> None:
        """Fill a mask with a grainy, slightly shaded colour."""
        inside = mask.astype(bool)
        if not inside.any():
            return
        rows, columns = inside.nonzero()
        colour = np.array(colour) + self.rng.normal(0, 8, 3)
        texture = self.textures[self.rng.integers(len(self.textures))]
        paint = grain * texture[rows, columns] + self.shade[rows]
        self.image[rows, columns] = colour + paint[:, None]
        self.label[inside] = CLASS_IDS[name]

    def polygon(
        self,
        name: str,
        points: list[tuple[float, float]],
        colour: Colour,
        grain: float = 8,
    ) -> None:
        mask = np.zeros_like(self.label)
        cv2.fillPoly(mask, [self._points(points)], 1)
        self._paint(mask, name, colour, grain)

    def box(
        self,
        name: str,
        left: float,
        top: float,
        right: float,
        bottom: float,
        colour: Colour,
        grain: float = 8,
    ) -> None:
        corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
        self.polygon(name, corners, colour, grain)

    def ellipse(
        self,
        name: str,
        x: float,
        y: float,
        radius_x: float,
        radius_y: float,
        colour: Colour,
        grain: float = 8,
    ) -> None:
        mask = np.zeros_like(self.label)
        (centre,) = self._points([(x, y)])
        axes = self._points([(radius_x, radius_y)])[0].clip(1)
        cv2.ellipse(
            mask, tuple(map(int, centre)), tuple(map(int, axes)), 0, 0, 360,
            1, -1,
        )  # fmt: skip
        self._paint(mask, name, colour, grain)

    def line(
        self,
        name: str,
        points: list[tuple[float, float]],
        width: float,
        colour: Colour,
    ) -> None:
        mask = np.zeros_like(self.label)
        thickness = max(int(round(width * self.width)), 2)
        cv2.polylines(mask, [self._points(points)], False, 1, thickness)
        self._paint(mask, name, colour, 4)


def _draw_street(c: _Canvas) -> None:
    rng = c.rng
    horizon = rng.uniform(0.38, 0.52)
    c.box('sky', 0, 0, 1, horizon + 0.05, (225, 180, 120), 5)
    if rng.random() < 0.6:
        xs = np.linspace(0, 1, 7)
        tops = horizon - rng.uniform(0.05, 0.25, 7)
        ridge = [(0.0, horizon + 0.06), *zip(xs, tops), (1.0, horizon + 0.06)]
        c.polygon('mountain', ridge, (120, 105, 95), 10)
    c.box('grass', 0, horizon, 1, 1, (60, 140, 70), 14)
    x = rng.uniform(-0.1, 0.05)
    while x < 1:
        width = rng.uniform(0.15, 0.35)
        top = horizon - rng.uniform(0.08, 0.36)
        if rng.random() < 0.8:
            colour = (
                (90, 110, 165),
                (120, 130, 140),
                (95, 95, 110),
            )[rng.integers(3)]
            c.box('building', x, top, x + width, horizon + 0.06, colour, 6)
            for i in range(3):
                left = x + width * (0.15 + 0.28 * i)
                for row in np.arange(top + 0.03, horizon - 0.02, 0.08):
                    c.box(
                        'windowpane', left, row, left + width * 0.14,
                        row + 0.04, (190, 160, 110), 4,
                    )  # fmt: skip
        x += width + rng.uniform(0, 0.08)
    middle = rng.uniform(0.35, 0.65)
    near, far = rng.uniform(0.3, 0.42), rng.uniform(0.04, 0.08)
    top = horizon + 0.05
    side = 0.12
    c.polygon(
        'sidewalk',
        [
            (middle - far - 0.03, top),
            (middle + far + 0.03, top),
            (middle + near + side, 1.0),
            (middle - near - side, 1.0),
        ],
        (160, 165, 170),
        8,
    )
    c.polygon(
        'road',
        [
            (middle - far, top),
            (middle + far, top),
            (middle + near, 1.0),
            (middle - near, 1.0),
        ],
        (85, 82, 80),
        6,
    )
    for _ in range(rng.integers(1, 4)):
        x = rng.choice([rng.uniform(0, 0.25), rng.uniform(0.75, 1)])
        ground = rng.uniform(horizon + 0.08, 0.8)
        size = (ground - horizon) * 0.7 + 0.08
        c.box(
            'tree', x - 0.012, ground - size, x + 0.012, ground, (45, 70, 95)
        )
        c.ellipse(
            'tree', x, ground - size, size * 0.5, size * 0.55, (40, 100, 45),
            18,
        )  # fmt: skip
    if rng.random() < 0.5:
        y = rng.uniform(horizon + 0.06, horizon + 0.15)
        end = rng.uniform(0.2, 0.4)
        for rail in (0, 0.03, 0.06):
            c.line('fence', [(0, y + rail), (end, y + rail)], 0.006, (70,) * 3)
        for post in np.arange(0, end, 0.05):
            c.line('fence', [(post, y - 0.02), (post, y + 0.09)], 0.008,
                   (70,) * 3)  # fmt: skip
    for _ in range(rng.integers(1, 4)):
        ground = rng.uniform(horizon + 0.12, 0.95)
        scale = (ground - horizon) * 0.55
        x = middle + rng.uniform(-1, 1) * (ground - horizon) * 0.5
        colour = (
            (40, 40, 190),
            (180, 70, 40),
            (210, 210, 210),
            (30, 30, 35),
        )[rng.integers(4)]
        c.box('car', x - scale, ground - scale * 0.5, x + scale, ground,
              colour, 5)  # fmt: skip
        c.ellipse('car', x, ground - scale * 0.5, scale * 0.6, scale * 0.3,
                  colour, 5)  # fmt: skip
    for _ in range(rng.integers(0, 4)):
        ground = rng.uniform(horizon + 0.12, 0.95)
        height = (ground - horizon) * 0.7
        x = rng.uniform(0.03, 0.97)
        c.box('person', x - height * 0.12, ground - height * 0.8,
              x + height * 0.12, ground, (60, 50, 140), 10)  # fmt: skip
        c.ellipse('person', x, ground - height * 0.9, height * 0.1,
                  height * 0.12, (140, 170, 215), 4)  # fmt: skip
    for name in ('pole', 'streetlight'):
        if rng.random() < 0.7:
            x = rng.choice([rng.uniform(0.05, 0.3), rng.uniform(0.7, 0.95)])
            top = rng.uniform(0.1, 0.3)
            points = [(x, 0.8), (x, top)]
            if name == 'streetlight':
                points.append((x + 0.08 * np.sign(0.5 - x), top))
            grey = (50,) * 3 if name == 'pole' else (120, 110, 90)
            c.line(name, points, 0.014, grey)
            if name == 'pole' and rng.random() < 0.7:
                c.box('signboard', x - 0.05, top, x + 0.05, top + 0.08,
                      (50, 190, 230), 4)  # fmt: skip


def _draw_room(c: _Canvas) -> None:
    rng = c.rng
    low, high = rng.uniform(0.6, 0.72), rng.uniform(0.08, 0.2)
    c.box('wall', 0, 0, 1, 1, (170, 195, 205), 5)
    inset = rng.uniform(0.05, 0.2)
    c.polygon(
        'ceiling',
        [(0, 0), (1, 0), (1 - inset, high), (inset, high)],
        (235, 235, 235),
        3,
    )
    c.polygon(
        'floor',
        [(inset, low), (1 - inset, low), (1, 0.95), (1, 1), (0, 1), (0, 0.95)],
        (70, 105, 150),
        10,
    )
    slots = rng.permutation(4)
    for slot, name in zip(
        slots, rng.permutation(['windowpane', 'painting', 'door', 'cabinet'])
    ):
        left = 0.08 + 0.22 * slot
        if name == 'windowpane':
            c.box(name, left, high + 0.1, left + 0.16, low - 0.15,
                  (235, 215, 180), 5)  # fmt: skip
        elif name == 'painting':
            c.box(name, left, high + 0.08, left + 0.14, high + 0.25,
                  (60, 60, 160), 25)  # fmt: skip
        elif name == 'door':
            c.box(name, left, high + 0.12, left + 0.13, low + 0.02,
                  (60, 90, 120), 5)  # fmt: skip
        else:
            c.box(name, left, low - 0.25, left + 0.18, low + 0.05,
                  (90, 130, 170), 6)  # fmt: skip
    if rng.random() < 0.6:
        x = rng.uniform(0, 0.5)
        c.polygon(
            'bed ',
            [(x, low + 0.02), (x + 0.4, low + 0.02), (x + 0.5, 0.95),
             (x - 0.08, 0.95)],
            (200, 170, 190),
            8,
        )  # fmt: skip
    for _ in range(rng.integers(1, 3)):
        x, y = rng.uniform(0.1, 0.8), rng.uniform(low + 0.02, 0.85)
        c.box('table', x, y - 0.1, x + 0.22, y - 0.06, (50, 80, 110), 5)
        for leg in (x + 0.01, x + 0.21):
            c.line('table', [(leg, y - 0.08), (leg, y + 0.06)], 0.012,
                   (50, 80, 110))  # fmt: skip
    for _ in range(rng.integers(1, 4)):
        x, y = rng.uniform(0.05, 0.9), rng.uniform(low + 0.05, 0.92)
        c.box('chair', x, y - 0.2, x + 0.02, y + 0.06, (40, 40, 120), 5)
        c.box('chair', x, y - 0.04, x + 0.11, y, (40, 40, 120), 5)
        c.line('chair', [(x + 0.1, y), (x + 0.1, y + 0.06)], 0.012,
               (40, 40, 120))  # fmt: skip
    if rng.random() < 0.7:
        x = rng.uniform(0.3, 0.7)
        c.line('lamp', [(x, 0), (x, high + 0.1)], 0.008, (60, 60, 60))
        c.ellipse('lamp', x, high + 0.12, 0.05, 0.04, (150, 230, 250), 3)


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
        images = root / 'images' / split
        annotations = root / 'annotations' / split
        images.mkdir(parents=True, exist_ok=True)
        annotations.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            image, label = draw_scene(seed * 1_000_000 + done)
            name = f'ADE_{SPLITS[split]}_{i + 1:08d}'
            cv2.imwrite(str(images / f'{name}.jpg'), image)
            cv2.imwrite(str(annotations / f'{name}.png'), label)
            done += 1
            yield done, total
