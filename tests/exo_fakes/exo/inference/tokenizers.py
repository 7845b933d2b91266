"""A model's tokenizer as hosts see it."""

from pathlib import Path

from specfast.chat import chat_template, render_chat
from specfast.tokenizer import Tokenizer

from exo.download.new_shard_download import ensure_downloads_dir


class HostTokenizer:
    """Text to tokens and back, the end token's id, and the chat template."""

    def __init__(self, directory):
        self._tokenizer = Tokenizer(directory)
        self._template = chat_template(directory, self._tokenizer)
        self.eos_token_id = self._tokenizer.token_id(self._tokenizer.special_text("eos_token"))

    def encode(self, text):
        return self._tokenizer.encode(text)

    def decode(self, tokens):
        return self._tokenizer.decode([int(token) for token in tokens])

    def apply_chat_template(self, messages, tokenize=True, add_generation_prompt=True):
        if self._template is None:
            raise ValueError("there is no chat template")
        text = render_chat(self._template, messages, self._tokenizer)
        return self.encode(text) if tokenize else text


async def resolve_tokenizer(repo_id):
    directory = Path(repo_id)
    if not directory.is_dir():
        directory = await ensure_downloads_dir() / str(repo_id).replace("/", "--")
    return HostTokenizer(directory)
