"""Calls between nodes."""
