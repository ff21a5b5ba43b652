"""A mixture of experts: which experts a token takes, the order of the work, and the products with their weights."""
