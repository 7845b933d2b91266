"""Measurements on real shapes with random weights: what checking M tokens costs, and what speculation gains."""
