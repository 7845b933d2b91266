"""Runs in an environment with exo's second generation: its real builder and engine on a tiny model, in this process.

Usage: exo_v1_driver.py JOB, where JOB is JSON: {"model": repository, "layers": n, "requests": [[...], ...], "steps": n}.
Requests of one list are submitted together. The last line printed is JSON: tokens, steps, forward passes and so on.
"""

import json
import sys
import time


def main(job):
    from exo.shared.models.model_cards import ModelCard, ModelTask
    from exo.shared.types.common import CommandId, ModelId, NodeId
    from exo.shared.types.memory import Memory
    from exo.shared.types.tasks import TaskId, TextGeneration
    from exo.shared.types.text_generation import InputMessage, InputMessageContent, TextGenerationTaskParams
    from exo.shared.types.worker.instances import BoundInstance, InstanceId, MlxRingInstance
    from exo.shared.types.worker.runners import RunnerId, ShardAssignments
    from exo.shared.types.worker.shards import PipelineShardMetadata
    from exo.utils.channels import mp_channel
    from exo.worker.engines.mlx.builder import MlxBuilder
    from exo.worker.engines.mlx.patches import apply_mlx_patches

    apply_mlx_patches()
    model, layers = ModelId(job["model"]), job["layers"]
    card = ModelCard(
        model_id=model, storage_size=Memory.from_bytes(10**7), n_layers=layers, hidden_size=32, supports_tensor=False,
        tasks=[ModelTask.TextGeneration], backends=["MlxCpu"],
    )  # fmt: skip
    runner, node = RunnerId("r"), NodeId("n")
    shard = PipelineShardMetadata(
        model_card=card, device_rank=0, world_size=1, start_layer=0, end_layer=layers, n_layers=layers
    )
    assignments = ShardAssignments(model_id=model, runner_to_shard={runner: shard}, node_to_runner={node: runner})
    instance = MlxRingInstance(
        instance_id=InstanceId("i"), shard_assignments=assignments, hosts_by_node={}, ephemeral_port=1
    )
    events, _receiver = mp_channel()
    cancel, cancelled = mp_channel()
    builder = MlxBuilder(model_id=model, event_sender=events, cancel_receiver=cancelled)
    for _ in builder.load(BoundInstance(instance=instance, bound_runner_id=runner, bound_node_id=node)):
        pass
    engine = builder.build()
    passes = {"all": 0, "of several rows": 0}
    kind, inner = type(engine.model), type(engine.model).__call__

    def counted(self, x, *arguments, **options):
        if self is engine.model:
            passes["all"] += 1
            passes["of several rows"] += x.shape[1] > 1
        return inner(self, x, *arguments, **options)

    kind.__call__ = counted
    answers = []
    for together in job["requests"]:
        tasks = []
        before, started = dict(passes), time.perf_counter()
        for options in together:
            text = InputMessageContent(options.pop("text", "explain quantum computing"))
            task = TextGeneration(
                task_id=TaskId(),
                instance_id=instance.instance_id,
                command_id=CommandId("c"),
                task_params=TextGenerationTaskParams(
                    model=model, input=[InputMessage(role="user", content=text)], **options
                ),
            )
            engine.submit(task)
            tasks.append(task.task_id)
        found = {task: {"tokens": [], "usage": None} for task in tasks}
        most, left, steps, ended = 0, set(tasks), 0, {}
        while left and steps < 5000:
            steps += 1
            told = dict.fromkeys(tasks, 0)
            for task, chunk in engine.step():
                if task not in found:
                    continue
                if hasattr(chunk, "token_id"):
                    found[task]["tokens"].append(chunk.token_id)
                    told[task] += 1
                    if chunk.usage is not None:
                        found[task]["cached"] = chunk.usage.prompt_tokens_details.cached_tokens
                        found[task]["prompt"] = chunk.usage.prompt_tokens
                if type(chunk).__name__ in ("FinishedResponse", "CancelledResponse"):
                    ended[task] = type(chunk).__name__
                    left.discard(task)
            most = max([most, *told.values()])
            if steps == job.get("cancel_after"):
                cancel.send(tasks[0])
        answers.append(
            {
                "found": [found[task] for task in tasks],
                "ended": [ended.get(task) for task in tasks],
                "most": most,
                "steps": steps,
                "passes": {name: passes[name] - before[name] for name in passes},
                "seconds": time.perf_counter() - started,
            }
        )
    print("\n" + json.dumps({"answers": answers, "generator": type(engine._gen).__name__}), flush=True)
    import os

    os._exit(0)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
