"""Pictures of a compression during training."""

from __future__ import annotations

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
        """Draw the structure and the images, if there is one by now."""
        modules = compressible_modules(runner.model).values()
        if all(module.compressor.has_structure for module in modules):
            self._draw(runner, structure=True)
        else:
            runner.logger.warning(
                'CompressionVisualizationHook: no token groups to draw yet; '
                "add dict(type='PruneMergeHook') to custom_hooks"
            )

    def after_val_epoch(self, runner: Runner, **kwargs) -> None:
        """Draw the images, every ``interval`` validations."""
        self._validations += 1
        if self.interval and self._validations % self.interval == 0:
            self._draw(runner)

    def _draw(self, runner: Runner, structure: bool = False) -> None:
        model = runner.model
        if not compressible_modules(model) or not is_main_process():
            return
        figures = structure_figures(model) if structure else {}
        model = model.module if is_model_wrapper(model) else model
        dataset = runner.val_loop.dataloader.dataset if runner.val_loop else ()
        count = min(self.num_images, len(dataset))
        for number in range(count):
            one = inspect(model, dataset[number * len(dataset) // count])
            drawn = one.figures(getattr(dataset, 'metainfo', {}))
            figures.update({f'{k}_{one.name}': f for k, f in drawn.items()})
        for name, figure in figures.items():
            runner.visualizer.add_image(
                f'compression_{name}', to_array(figure), runner.iter
            )
