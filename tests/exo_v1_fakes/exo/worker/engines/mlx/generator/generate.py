"""A request by itself: the prompt's caches are filled or found, then tokens come from mlx-lm."""

from types import SimpleNamespace

import mlx.core as mx
from mlx_lm import stream_generate
from mlx_lm.sample_utils import make_logits_processors, make_sampler


def encode_prompt(tokenizer, prompt):
    return mx.array(tokenizer.encode(prompt))


def fix_unmatched_think_end_tokens(tokens, tokenizer):
    return tokens


def mlx_generate(
    model,
    tokenizer,
    task,
    prompt,
    kv_prefix_cache,
    group,
    on_prefill_progress=None,
    distributed_prompt_progress_callback=None,
    on_generation_token=None,
    vision_processor=None,
):
    mx.random.seed(task.seed or 42)
    tokens = fix_unmatched_think_end_tokens(encode_prompt(tokenizer, prompt), tokenizer)
    caches, rest = kv_prefix_cache.get_kv_cache(model, tokens)
    sampler = make_sampler(temp=task.temperature, top_p=task.top_p)
    if len(rest) > 2:
        for _ in stream_generate(
            model=model, tokenizer=tokenizer, prompt=rest[:-1], max_tokens=1, sampler=sampler, prompt_cache=caches
        ):
            pass
        for cache in caches:
            cache.trim(2)
        if distributed_prompt_progress_callback:
            distributed_prompt_progress_callback()
    kv_prefix_cache.add(tokens, caches)
    text = ""
    for out in stream_generate(
        model=model,
        tokenizer=tokenizer,
        prompt=rest[-2:],
        max_tokens=task.max_output_tokens,
        sampler=sampler,
        logits_processors=make_logits_processors(repetition_penalty=task.repetition_penalty),
        prompt_cache=caches,
        prefill_step_size=1,
        kv_group_size=64,
        kv_bits=None,
    ):
        text += out.text
        stopped = task.stop is not None and task.stop in text
        if on_generation_token:
            on_generation_token()
        reason = "stop" if stopped else out.finish_reason
        yield SimpleNamespace(token=out.token, text=out.text, finish_reason=reason, logprobs=out.logprobs)
        if reason is not None:
            break
