"""What tables and kernels agree on: columns, flags and tags.

The numbers that the host writes, too, are those of `table`, `step_table` and `unit_table`.
"""

import torch
import triton.language as tl

from fastclip.kernels import step_table, table, unit_table

# Tags of dtypes.
FLOAT32 = tl.constexpr(table.DTYPES.index(torch.float32))
FLOAT64 = tl.constexpr(table.DTYPES.index(torch.float64))
BFLOAT16 = tl.constexpr(table.DTYPES.index(torch.bfloat16))
FLOAT16 = tl.constexpr(table.DTYPES.index(torch.float16))

# Columns of `chunks`, one row per chunk.
ROW_ADDRESS = tl.constexpr(table.ROW_ADDRESS)
ROW_NUMEL = tl.constexpr(table.ROW_NUMEL)
ROW_DTYPE = tl.constexpr(table.ROW_DTYPE)
ROW_SPAN = tl.constexpr(table.ROW_SPAN)
ROW_LENGTH = tl.constexpr(table.ROW_LENGTH)

# Columns of `targets`, one row per tensor: addresses, but for the last two. step_table.py writes them.
TARGET_GRAD = tl.constexpr(step_table.GRAD)
TARGET_PARAM = tl.constexpr(step_table.PARAM)
TARGET_STATE = tl.constexpr(step_table.STATE)  # up to three, 0 where there is none
TARGET_COUNTER = tl.constexpr(step_table.COUNTER)
TARGET_RULE = tl.constexpr(step_table.RULE)  # its row of `rules`
TARGET_FLAGS = tl.constexpr(step_table.TARGET_FLAGS)
TARGET_LENGTH = tl.constexpr(step_table.TARGET_LENGTH)

FLAG_ALIKE = tl.constexpr(step_table.FLAG_ALIKE)  # its memories lie alike between 16-byte boundaries
FLAG_FRESH = tl.constexpr(step_table.FLAG_FRESH)  # its state was made for this step
FLAG_WIDE_COUNTER = tl.constexpr(step_table.FLAG_WIDE_COUNTER)  # its counter is float64, not float32

# Columns of `runs`, one row per run of units.
RUN_GRAD = tl.constexpr(unit_table.GRAD)
RUN_WEIGHTS = tl.constexpr(unit_table.WEIGHTS)
RUN_NUMEL = tl.constexpr(unit_table.NUMEL)
RUN_COUNT = tl.constexpr(unit_table.COUNT)
RUN_DTYPE = tl.constexpr(unit_table.DTYPE)
RUN_LENGTH = tl.constexpr(unit_table.RUN_LENGTH)

# Columns of `coefficients`, one row per tensor; coefficients.py writes them.
FACTOR = tl.constexpr(0)
DECAY_FACTOR = tl.constexpr(1)  # decoupled weight decay: 1 - lr * weight_decay, or 1
COUPLED_DECAY = tl.constexpr(2)  # weight decay that is added to the gradient, or 0
BETA1 = tl.constexpr(3)
BETA2 = tl.constexpr(4)
STEP_SIZE = tl.constexpr(5)  # lr / (1 - beta1^step)
INVERSE_CORRECTION = tl.constexpr(6)  # 1 / sqrt(1 - beta2^step)
EPS = tl.constexpr(7)

LR = tl.constexpr(1)
MOMENTUM = tl.constexpr(3)
GRAD_SHARE = tl.constexpr(4)  # of the gradient in the momentum: 1 - dampening, or 1 in a buffer's first step
NESTEROV = tl.constexpr(5)

COEFFICIENTS_LENGTH = tl.constexpr(step_table.NUM_COEFFICIENTS)

# Columns of `rules`, one row of float64 per group; csrc/python/read.cpp writes them.
RULE_LR = tl.constexpr(0)
RULE_LR_ADDRESS = tl.constexpr(1)  # the bits of an address on the device, 0 if lr is a number
RULE_LR_WIDE = tl.constexpr(2)  # whether there is a float64, not a float32
RULE_SIGN = tl.constexpr(3)  # -1 to maximize
RULE_WEIGHT_DECAY = tl.constexpr(4)

RULE_BETA1 = tl.constexpr(5)
RULE_BETA2 = tl.constexpr(6)
RULE_EPS = tl.constexpr(7)
RULE_DECOUPLED = tl.constexpr(8)

RULE_MOMENTUM = tl.constexpr(5)
RULE_DAMPENING = tl.constexpr(6)
RULE_NESTEROV = tl.constexpr(7)

RULE_LENGTH = tl.constexpr(9)

# Elements of `counts`, as optim/outcome.py keeps them.
COUNT_CLIPPED = tl.constexpr(0)
COUNT_SKIPPED = tl.constexpr(1)
COUNT_STEPS = tl.constexpr(2)
COUNT_CONSECUTIVE = tl.constexpr(3)
COUNT_LARGEST_NORM = tl.constexpr(4)

VECTOR_NBYTES = tl.constexpr(table.VECTOR_NBYTES)
