"""From logits to a token: edits of the logits, truncation, noise and the draw; log-probabilities."""
