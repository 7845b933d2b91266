"""The command line: everything is made when this module is imported."""

import argparse
import asyncio
import uuid

from exo.api.chatgpt_api import ChatGPTAPI
from exo.download.new_shard_download import new_shard_downloader
from exo.inference.inference_engine import get_inference_engine
from exo.inference.tokenizers import resolve_tokenizer
from exo.models import build_base_shard, get_repo
from exo.networking.grpc.grpc_peer_handle import GRPCPeerHandle  # noqa: F401 - peers are made of it
from exo.orchestration.node import Node

parser = argparse.ArgumentParser(prog="exo")
parser.add_argument("command", nargs="?", choices=["run", "eval", "train"])
parser.add_argument("model_name", nargs="?")
parser.add_argument("--default-model", default=None)
parser.add_argument("--max-generate-tokens", type=int, default=10000)
parser.add_argument("--inference-engine", default=None, help="Inference engine to use")
parser.add_argument("--run-model")
parser.add_argument("--prompt", default="Who are you?")
parser.add_argument("--default-temp", type=float, default=0.0)
args = parser.parse_args()

shard_downloader = new_shard_downloader()
inference_engine = get_inference_engine(args.inference_engine or "mlx", shard_downloader)
node = Node(
    "one",
    None,
    inference_engine,
    None,
    shard_downloader,
    max_generate_tokens=args.max_generate_tokens,
    default_sample_temperature=args.default_temp,
)
api = ChatGPTAPI(node, type(inference_engine).__name__, default_model=args.default_model)


async def run_model_cli(node, model_name, prompt):
    engine_class = type(node.inference_engine).__name__
    shard = build_base_shard(model_name, engine_class)
    if shard is None:
        print(f"Error: Unsupported model '{model_name}' for inference engine {engine_class}")
        return
    tokenizer = await resolve_tokenizer(get_repo(shard.model_id, engine_class))
    text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False)
    request_id, tokens, ended = str(uuid.uuid4()), [], asyncio.Event()

    def take(who, more, finished):
        tokens.extend(more)
        if finished:
            ended.set()

    node.on_token.register(request_id).on_next(take)
    await node.process_prompt(shard, text, request_id=request_id)
    await asyncio.wait_for(ended.wait(), 60)
    print(f"exo's own answer: {tokenizer.decode(tokens)}")


async def main():
    if args.command == "run" or args.run_model:
        await run_model_cli(node, args.model_name or args.run_model, args.prompt)
    else:
        print(f"serving {api.default_model}")


def run():
    asyncio.run(main())
