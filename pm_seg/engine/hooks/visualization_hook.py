"""Pictures of a compression during training."""

from __future__ import annotations

from matplotlib.figure import Figure
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from ...registry import register
from ...visualization.figures import to_array
from ...visualization.inspection import inspect
from ...visualization.layers import structure_figures
from ..scoring import compressible_modules


@register('HOOKS')
class CompressionVisualizationHook(Hook):
    """Draws structure, token groups and predictions with the visualizer.

    Once before training, after ``PruneMergeHook`` has found the structure:
    the tokens each layer keeps and the scores; then, and after every
    ``interval`` validations: the groups of every layer and the predictions,
    dense (these weights, compression off) and compressed, on images of the
    validation data. Pictures go to all backends of the config's
    ``visualizer``, for example ``LocalVisBackend`` (files in
    ``vis_data/vis_image``) and ``TensorboardVisBackend``.

    Args:
        interval (int): Validations between pictures; 0 for none after the
            first. Defaults to 1.
        num_images (int): Validation images to draw, evenly spread over the
            data. Defaults to 2.

    Raises:
        ValueError: On a negative number.

    Example:
        >>> custom_hooks = [
        ...     dict(type='PruneMergeHook'),
        ...     dict(type='CompressionVisualizationHook', interval=4)]
        >>> visualizer = dict(
        ...     vis_backends=[dict(type='TensorboardVisBackend')])
    """

    # After PruneMergeHook, and after EMAHook has put the weights back.
    priority = 'LOW'

    def __init__(self, interval: int = 1, num_images: int = 2) -> None:
        if min(interval, num_images) < 0:
            raise ValueError(
                f'interval={interval} and num_images={num_images} must be at '
                'least 0'
            )
        self.interval = interval
        self.num_images = num_images
        self._validations = 0

    def before_train(self, runner: Runner) -> None:
        """Draw the structure, if there is one by now."""
        modules = compressible_modules(runner.model).values()
        if not all(m.compressor.has_structure for m in modules):
            runner.logger.warning(
                'CompressionVisualizationHook: no token groups to draw yet; '
                "add dict(type='PruneMergeHook') to custom_hooks"
            )
        elif modules and is_main_process():
            _add(runner, structure_figures(runner.model))
            self._draw_images(runner)

    def after_val_epoch(self, runner: Runner, **kwargs) -> None:
        """Draw the images, every ``interval`` validations."""
        self._validations += 1
        if self.interval and self._validations % self.interval == 0:
            self._draw_images(runner)

    def _draw_images(self, runner: Runner) -> None:
        model, loop = runner.model, runner.val_loop
        drawn = compressible_modules(model) and is_main_process()
        if not drawn or loop is None:
            return
        dataset = loop.dataloader.dataset
        count = min(self.num_images, len(dataset))
        for number in range(count):
            one = inspect(
                model.module if is_model_wrapper(model) else model,
                dataset[number * len(dataset) // count],
            )
            figures = one.figures(getattr(dataset, 'metainfo', {}))
            _add(runner, {f'{k}_{one.name}': f for k, f in figures.items()})


def _add(runner: Runner, figures: dict[str, Figure]) -> None:
    for name, figure in figures.items():
        runner.visualizer.add_image(
            f'compression_{name}', to_array(figure), runner.iter
        )
