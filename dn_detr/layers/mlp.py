"""Perceptrons of the transformer: the heads' MLP and the feed-forward block."""

from torch import Tensor, nn

ACTIVATIONS = {"relu": nn.ReLU, "prelu": nn.PReLU, "gelu": nn.GELU}


class MLP(nn.Module):
    """Perceptron with ReLU between its layers; no dropout, nothing behind the last one.

    `torchvision.ops.MLP` adds a dropout behind every layer and numbers its parameters accordingly.
    """

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int):
        super().__init__()
        dims = [input_dim] + [hidden_dim] * (num_layers - 1) + [output_dim]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(dims[:-1], dims[1:]))

    def forward(self, x: Tensor) -> Tensor:
        """[..., input_dim] -> [..., output_dim]"""
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


class FeedForward(nn.Module):
    """Two linear layers with an activation between, its own where it has parameters (PReLU)."""

    def __init__(self, embed_dim: int, feedforward_dim: int, activation: str = "prelu"):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}")
        self.linear1 = nn.Linear(embed_dim, feedforward_dim)
        self.activation = ACTIVATIONS[activation]()
        self.linear2 = nn.Linear(feedforward_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]"""
        return self.linear2(self.activation(self.linear1(x)))
