"""What a node of a ring fetches for the layers it is given."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from exo_session import fake_exo
from specfast.errors import RingError
from specfast.exo.held import HeldLayers

EMBEDDING, LAST = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
TIED = {
    "model.embed_tokens.weight": EMBEDDING, "model.layers.0.mlp.up_proj.weight": EMBEDDING,
    "model.layers.1.mlp.up_proj.weight": LAST, "model.norm.weight": LAST,
}  # fmt: skip


class Downloader:
    """Fetches as exo does: the files of the layers, the first file for the first layer and the last one for the last."""

    def __init__(self, folder, *, works=True):
        self.folder, self.works, self.asked = folder, works, []
        self.weights = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]

    async def ensure_shard(self, shard, engine):
        del engine
        layers = range(shard.start_layer, shard.end_layer + 1)
        self.asked.append(layers)
        if self.works or 0 not in layers:
            ends = {EMBEDDING} if 0 in layers else {LAST}
            of_layers = {file for name, file in self.weights.items() for i in layers if f"layers.{i}." in name}
            for file in ends | of_layers:
                (self.folder / file).touch()
        return self.folder


def fetch(folder, weights, **how):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    downloader = Downloader(folder, **how)
    with fake_exo(hook=False):
        found = asyncio.run(HeldLayers(downloader, SimpleNamespace())._fetch("llama", range(1, 2), 2))
    assert found == folder
    return downloader


def test_the_last_layers_get_the_file_of_an_embedding_that_is_the_head(tmp_path):
    assert fetch(tmp_path, TIED).asked == [range(1, 2), range(1)]
    assert (tmp_path / EMBEDDING).is_file()


def test_a_head_of_its_own_needs_no_more(tmp_path):
    assert fetch(tmp_path, {**TIED, "lm_head.weight": LAST}).asked == [range(1, 2)]
    assert not (tmp_path / EMBEDDING).exists()


def test_a_file_that_exo_does_not_fetch_is_an_error_with_the_remedy(tmp_path):
    with pytest.raises(RingError, match=f"layers 1 to 1 of llama need {EMBEDDING}.*put it there, or run"):
        fetch(tmp_path, TIED, works=False)
