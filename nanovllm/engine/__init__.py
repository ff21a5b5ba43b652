"""The decisions, in plain Python over integers: who runs, who holds which block, what is refused. Never imports torch."""
