"""Definitions in float64 NumPy, written to be read beside the papers; what compiled code is compared with."""
