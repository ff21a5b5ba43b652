"""What models are made of, cut over tensor-parallel ranks where that is possible."""
