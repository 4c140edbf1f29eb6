"""Augmentations that detectron2 lacks."""

from collections.abc import Sequence

import numpy as np

from dn_detr.requirements import require_detectron2

require_detectron2()

from detectron2.data import transforms as T  # noqa: E402


class TransposeTransform(T.Transform):
    """Swaps x and y: mirrors the image at its main diagonal."""

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """[H, W] or [H, W, C] to [W, H] or [W, H, C]."""
        return img.swapaxes(0, 1)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Points (x, y), [N, 2], to (y, x)."""
        return coords[:, ::-1]

    def inverse(self) -> T.Transform:
        """Itself."""
        return self


class RandomTranspose(T.Augmentation):
    """Swaps x and y with probability ``prob``."""

    def __init__(self, prob: float = 0.5) -> None:
        super().__init__()
        self.prob = prob

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """The transform for one image [H, W, C]."""
        return TransposeTransform() if self._rand_range() < self.prob else T.NoOpTransform()


class RandomChoice(T.Augmentation):
    """Applies one of several augmentations, each as likely as the others."""

    def __init__(self, choices: Sequence[T.Augmentation]) -> None:
        super().__init__()
        self.choices = list(choices)

    def __call__(self, aug_input: T.AugInput) -> T.Transform:
        """Changes ``aug_input`` in place and returns the transform used.

        It is not ``get_transform``, since a list of augmentations needs the image between steps.
        """
        return self.choices[np.random.randint(len(self.choices))](aug_input)


class ResizeShortestEdge(T.ResizeShortestEdge):
    """detectron2's, but no side gets shorter than one pixel, as that of a 1x5000 image would."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """The transform for one image [H, W, C]."""
        transform = super().get_transform(image)
        if isinstance(transform, T.ResizeTransform):
            transform.new_h, transform.new_w = max(1, transform.new_h), max(1, transform.new_w)
        return transform
