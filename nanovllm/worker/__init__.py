"""One device: takes step plans, keeps the rows and the cache, runs the model, hands back a handle for the tokens."""
