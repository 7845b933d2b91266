"""Speculative decoding in exo's first generation: what `exo --inference-engine speculative` runs.

hooks       what is added to exo's modules when they are imported, each addition guarded by `contract`
engine      the inference engine exo calls, on top of specfast.Engine
serving     the models exo asked for, run natively or by exo's own engine
requests    a request under way: its caches, its tokens, its end
models      models where exo keeps them
options     the `--speculative-*` flags of exo's command line
node, api, run_command    many tokens per step, request options and cancelling, `exo run` and `--time`
detection   which exo is installed, if any
"""
