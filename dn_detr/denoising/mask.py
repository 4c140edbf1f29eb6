"""Who may see whom in the decoder's self-attention (DN-DETR, Li et al., CVPR 2022, sec. 4.4)."""

from torch import Tensor

SHARED = -1
"""Group number of queries that belong to no group and that every group may see."""


def group_attention_mask(groups: Tensor) -> Tensor:
    """Attention mask of queries in groups: each sees its own group and the shared queries only.

    The shared queries see each other only, so that nothing of a group's ground truth leaks to them.
    The same rule serves Group-DETR (no shared queries) and class-conditioned query sets.

    Args:
        groups: [T] integers, the group of every query, `SHARED` for a shared one.

    Returns:
        [T, T] bool, True where a query (row) must *not* see a key (column), as in
        `nn.MultiheadAttention`.
    """
    return (groups[None, :] != SHARED) & (groups[None, :] != groups[:, None])
