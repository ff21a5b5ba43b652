"""Text at both ends: conversations and prompts to token ids; token ids to text; stop strings and bad words."""
