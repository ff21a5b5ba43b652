"""Engines in processes of their own, and their client for asyncio: what the server runs on."""
