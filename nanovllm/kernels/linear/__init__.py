"""Products with a weight, at the speed at which memory can be read: few rows on a GPU, packed weights on a CPU; SwiGLU."""
