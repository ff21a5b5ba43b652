"""Products with a weight, as fast as memory is read: few rows on a GPU, packed weights on a CPU. And SwiGLU's gate."""
