"""Which query answers for which ground truth.

A matcher finds it; denoising knows it in advance.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Assignment:
    """Pairs of a query and a ground-truth row, padded to K pairs a decoder layer and image.

    Attributes:
        slots: [L, B, K] int64, the query of a pair. L may be 1: the same pairs for every layer.
        rows: [L, B, K] int64, its row in `Targets`.
        valid: [L, B, K] bool, False for pairs that only fill up.
    """

    slots: Tensor
    rows: Tensor
    valid: Tensor

    def pairs(self, layer: int = -1) -> list[tuple[Tensor, Tensor]]:
        """(slots, rows) of each image without padding: the form other Hungarian matchers return.

        This waits for the accelerator; the criterion of this library does not need it.
        """
        return [
            (slots[valid], rows[valid])
            for slots, rows, valid in zip(self.slots[layer], self.rows[layer], self.valid[layer])
        ]
