"""Shards in MLX."""
