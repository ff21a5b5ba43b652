"""The decisions, in plain Python: which sequences run, which blocks they hold, what is refused. Imports no torch."""
