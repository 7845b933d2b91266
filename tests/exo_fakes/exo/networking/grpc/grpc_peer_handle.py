"""A peer that is a node of the same process, reached as if it were another machine: values are copied, state is JSON."""

import json

import numpy as mx
import numpy as np


class RpcError(Exception):
    """What gRPC makes of an exception of another process."""

    def details(self):
        return str(self)


class GRPCPeerHandle:
    """Calls on another node.

    Attributes:
        address: the node; None once it is gone.
        before_answer: called when the node has computed, before its answer is on the way.
    """

    def __init__(self, _id, address, desc, device_capabilities):
        self._id, self.address, self.desc = _id, address, desc
        self._device_capabilities = device_capabilities
        self.before_answer = lambda: None

    def id(self):
        return self._id

    def _reached(self):
        if self.address is None:
            raise ConnectionError("failed to connect to all addresses")
        return self.address

    async def _call(self, called):
        try:
            answer = await called
        except Exception as error:
            raise RpcError(f"Unexpected {type(error)}: {error}") from None
        self.before_answer()
        self._reached()
        return answer

    async def send_prompt(self, shard, prompt, inference_state=None, request_id=None):
        state = None if inference_state is None else self.serialize_inference_state(inference_state)
        await self._call(self._reached().process_prompt(shard, prompt, request_id, self._read(state)))

    async def send_tensor(self, shard, tensor, inference_state=None, request_id=None):
        state = None if inference_state is None else self.serialize_inference_state(inference_state)
        sent = np.frombuffer(tensor.tobytes(), dtype=str(tensor.dtype)).reshape(tensor.shape)
        answer = await self._call(self._reached().process_tensor(shard, sent, request_id, self._read(state)))
        return None if answer is None or not answer.size else np.frombuffer(answer.tobytes(), dtype=str(answer.dtype))

    async def send_result(self, request_id, result, is_finished):
        self._reached().on_token.trigger_all(request_id, list(result), is_finished)

    async def send_opaque_status(self, request_id, status):
        self._reached().on_opaque_status.trigger_all(request_id, status)

    def serialize_inference_state(self, inference_state):
        other = {name: value for name, value in inference_state.items() if not isinstance(value, mx.array)}
        assert len(other) == len(inference_state)
        return json.dumps(other)

    def _read(self, state):
        return None if state is None else json.loads(state)
