"""Attention through the block table: QK-norm, RoPE, the store of keys and values, and decode or prefill attention."""
