"""Requests together, a token of each a step."""

from exo.worker.engines.mlx.generator.generate import mlx_generate


class ExoBatchGenerator:
    """Ids of requests count up from 0."""

    def __init__(self, model, tokenizer, group, kv_prefix_cache, vision_processor=None):
        self.model, self.tokenizer, self.group = model, tokenizer, group
        self.kv_prefix_cache, self.vision_processor = kv_prefix_cache, vision_processor
        self.active, self.known, self.closed = {}, 0, False

    @property
    def has_work(self):
        return bool(self.active)

    def submit(
        self,
        task_params,
        prompt,
        on_prefill_progress=None,
        distributed_prompt_progress_callback=None,
        on_generation_token=None,
    ):
        uid, self.known = self.known, self.known + 1
        self.active[uid] = mlx_generate(
            self.model, self.tokenizer, task_params, prompt, self.kv_prefix_cache, self.group, on_prefill_progress,
            distributed_prompt_progress_callback, on_generation_token,
        )  # fmt: skip
        return uid

    def step(self):
        found = [(uid, next(responses)) for uid, responses in self.active.items()]
        for uid, response in found:
            if response.finish_reason is not None:
                del self.active[uid]
        return found

    def cancel(self, uids):
        for uid in uids:
            del self.active[uid]

    def close(self):
        self.closed = True
