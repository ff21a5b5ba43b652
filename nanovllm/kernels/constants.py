"""Numbers that kernels of several families use."""

LOG2_E = 1.4426950408889634  # exp(x) = exp2(x * LOG2_E): the hardware has an instruction for exp2 and none for exp
