"""One device: takes step plans, keeps the rows and the cache, runs the model, and hands back a handle for the tokens."""
