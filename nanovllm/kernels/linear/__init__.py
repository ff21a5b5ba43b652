"""Products with a weight at the speed of memory: few rows on a GPU, packed weights on a CPU; and SwiGLU."""
