"""DINO-R50, 4 scales, 12 epochs, as detrex has it: 49.2 AP (its model zoo).

For the weights of https://github.com/IDEA-Research/detrex, projects/dino. It differs in its
position codes and in heads of its own for every decoder layer.
"""

from .dino_r50_4scale_12ep import dataloader, dataset, lr_multiplier, model, optimizer, train

model.neck.position_encoding.update(temperature=10000, offset=-0.5)
model.heads.num_layers = "${..decoder.num_layers}"
train.output_dir = "./output/dino_detrex_r50_4scale_12ep"
