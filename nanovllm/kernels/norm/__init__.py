"""RMSNorm with the residual addition before it, and an all-reduce between devices that does both in its own kernel."""
