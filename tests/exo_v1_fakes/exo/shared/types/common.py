"""Ids."""


class ModelId(str):
    """A repository."""

    def normalize(self):
        return self.replace("/", "--")
