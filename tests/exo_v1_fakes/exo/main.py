"""The command line: every option of the parser is one of the arguments, and none besides."""

import argparse


class Args:
    """What was typed."""

    def __init__(self, *, verbosity, no_batch):
        self.verbosity, self.no_batch = verbosity, no_batch

    @classmethod
    def parse(cls):
        parser = argparse.ArgumentParser(prog="EXO")
        parser.add_argument("-v", "--verbose", action="count", dest="verbosity", default=0)
        parser.add_argument("--no-batch", action="store_true")
        return cls(**vars(parser.parse_args()))


def main():
    return Args.parse()
