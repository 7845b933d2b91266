"""Shards of a Llama on mlx-lm's layers; the layers of other machines hand their rows on."""

import importlib


def load_model_shard(model_path, shard, lazy=False, model_config=None):
    nn, utils, base = (importlib.import_module(name) for name in ("mlx.nn", "mlx_lm.utils", "mlx_lm.models.base"))
    whole, config = utils.load_model(model_path)
    if config["model_type"] != "llama":
        raise ValueError(f"Model type {config['model_type']} not supported.")

    class IdentityBlock(nn.Module):
        def __call__(self, x, mask=None, cache=None):
            return x

    class ShardedModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.head = whole.model, None if "lm_head" not in whole else whole.lm_head
            owned = range(shard.start_layer, shard.end_layer + 1)
            self.model.layers = [each if i in owned else IdentityBlock() for i, each in enumerate(self.model.layers)]

        @property
        def layers(self):
            return self.model.layers

        def __call__(self, inputs, cache=None):
            h = self.model.embed_tokens(inputs) if shard.is_first_layer() else inputs
            mask = base.create_attention_mask(h, cache[0])
            for layer, each in zip(self.layers, cache, strict=True):
                h = layer(h, mask, cache=each)
            if not shard.is_last_layer():
                return h
            h = self.model.norm(h)
            return self.head(h) if self.head else self.model.embed_tokens.as_linear(h)

    return ShardedModel()
