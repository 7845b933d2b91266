"""A stand-in for exo's first generation, written for the tests: its names and signatures, one machine, no network."""
