"""RMSNorm with the residual addition before it, and the all-reduce between devices that ends in the same kernel."""
