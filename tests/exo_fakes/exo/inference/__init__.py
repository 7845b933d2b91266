"""Engines, shards and tokenizers."""
