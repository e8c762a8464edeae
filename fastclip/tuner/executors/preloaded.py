"""What every worker process needs, imported once by the server that they are forked from."""

import torch

import fastclip.tuner.executors.processes  # noqa: F401

# torch imports its compiler with the first optimizer.
torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
