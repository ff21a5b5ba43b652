"""Model text becomes an answer's parts as it arrives: reasoning, content, tool calls. Nothing here knows HTTP."""
