"""The method, in the words of the paper: networks, loss, optimizer, training step.

`byol.py` has the networks and the loss, `resnet.py` and `timm_networks.py` the encoders, `step.py` one training step,
`optim.py` and `update.py` its LARS and moving average, `graph.py` its CUDA graph, `distributed.py` the ranks.
`kernels/` fuses operations of the step, `run/` runs a training, `quality/` judges an encoder. May import configs and
files, never pipelines. Begin with `byol.py`, then `step.py`.
"""
