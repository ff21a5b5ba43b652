"""The decisions, in plain Python: who runs, who holds which block, what is refused. It never imports torch."""
