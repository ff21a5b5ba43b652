"""The HTTP server, and what it needs to know about requests and about the text that a model writes."""
