"""The layers of a model that one machine runs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shard:
    """Layers start_layer to end_layer, both included."""

    model_id: str
    start_layer: int
    end_layer: int
    n_layers: int

    def is_first_layer(self):
        return self.start_layer == 0

    def is_last_layer(self):
        return self.end_layer + 1 == self.n_layers
