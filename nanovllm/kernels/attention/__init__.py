"""Attention through the block table: QK-norm, RoPE and the store of keys and values, then decode or prefill attention."""
