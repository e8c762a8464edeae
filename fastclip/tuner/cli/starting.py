"""The study file that `fastclip tune init` writes."""

from __future__ import annotations

from pathlib import Path

STUDY = """\
# A study of fastclip. Check it with `fastclip tune validate`, start it with `fastclip tune run -o DIRECTORY`.

[study]
n_trials = 30                 # how many points of the space are tried
max_epochs = 10
# patience = 3                # epochs without a better score after which a fold ends
# sampler = "tpe"             # or random, gp, cmaes, grid, ...
# scoring = "f1_macro"        # default: accuracy for classes, R2 for numbers
# n_jobs = 4                  # folds trained at the same time
# devices = ["cuda:0"]        # default: every GPU, or the CPU
# search_clipped = true       # train with fastclip.ClippedOptimizer
seed = 0                      # the same seed gives the same trials

[model]
factory = "my_task:make_model"    # in my_task.py: def make_model(params) -> torch.nn.Module
# Or a network of fastclip[demo] in the place of a factory: three-conv, four-conv, batch-norm, simple or
# deep-mlp for images, embedding-bag or recurrent for texts.
#   name = "four-conv"

[data]
source = "my_task:load"       # function -> Dataset, (X, y) or (X, y, groups)
# path = "data.npz"           # every other key is an argument of it
# Or data that fastclip[demo] reads, in the place of a source: imagefolder, cifar10, mnist, text or digits. It
# brings a part to test on. The path is seen from where the command is started.
#   kind = "imagefolder"
#   path = "photos"
#   size = 64                 # of imagefolder: pixels of a side
#   skip_unreadable = true    # of imagefolder and text: leave out what is broken or foreign, and list it

[cv]
folds = 5                     # or test_size = 0.2, or splitter = "GroupKFold" and its arguments

# [test]                      # set apart, seen by no trial, measured at the end; not needed with a kind
# size = 0.2                  # or source = "my_task:load_test"

# [explosion]
# loss_factor = 3.0           # a loss this many times that of the start counts as exploded

[space]                       # a range, choices, or a fixed value; "none" stands for None
# The product of rate and threshold is the length of a clipped step: searched apart, they seldom explode.
lr_x_max_norm = { low = 1e-3, high = 1.0, log = true }
max_norm = { low = 0.3, high = 15.0, log = true }    # see `fastclip tune suggest-clip`
optimizer = "sgd"             # any of torch.optim
momentum = 0.9
# batch_size = { choices = [32, 64, 128] }
# accumulate = 4              # mini-batches whose gradients make one step
# amp = "bfloat16"            # or "float16": precision of autocast
# weight_decay = { low = 1e-6, high = 1e-2, log = true }
# no_decay = true             # of biases and norms
# param_groups = "my_task:groups"    # def groups(model, params) -> list of groups
# scheduler = { choices = ["none", "cosine", "one_cycle"] }
"""


def write_study(path: Path) -> None:
    """Write a commented study file.

    Raises:
        ValueError: the file is there already.
    """
    try:
        with open(path, "x") as file:
            file.write(STUDY)
    except FileExistsError:
        raise ValueError(f"init: {path} exists; expected the name of a new file.") from None
