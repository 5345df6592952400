"""What the command line asks a running server, over gRPC."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, sleep
from typing import Any, TypeVar

import grpc
import numpy as np
from google.protobuf import json_format
from tritonclient import grpc as triton
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

from paceline.core.errors import ConfigError, PacelineError
from paceline.edge.pacing import BURST_BYTES
from paceline.v1 import control_pb2, control_pb2_grpc, edge_pb2, edge_pb2_grpc

T = TypeVar("T")

IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
_CONTROL_TIMEOUT_S = 10.0
_PART_BYTES = 16 << 10
"""Of an upload: small against the burst that a grant allows."""


class ServerError(PacelineError):
    """The server refused or could not be reached."""


@dataclass(frozen=True, slots=True)
class Inferred:
    """An answer: outputs as nested lists (BYTES as text where they are UTF-8)."""

    request_id: str
    latency_ms: float
    outputs: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        return {
            "request_id": self.request_id,
            "latency_ms": round(self.latency_ms, 3),
            "outputs": dict(self.outputs),
        }


def infer(
    server: str, chain: str, inputs: Sequence[str], *, slo_ms: float | None, timeout_s: float
) -> Inferred:
    """One request; `inputs` are NAME=FILE. Raises ConfigError or ServerError."""
    files = dict(_name_and_file(text) for text in inputs)
    with triton.InferenceServerClient(server) as client:
        metadata = _ask(server, lambda: client.get_model_metadata(chain, client_timeout=timeout_s))
        declared = {tensor.name: tensor for tensor in metadata.inputs}
        for name in files:
            if name not in declared:
                raise ConfigError(
                    f"{chain} has no input {name!r}; it has {', '.join(declared)}", key="--input"
                )
        tensors = []
        for name, path in files.items():
            array = _read_array(path, declared[name].datatype)
            tensor = triton.InferInput(name, list(array.shape), declared[name].datatype)
            tensor.set_data_from_numpy(array)
            tensors.append(tensor)
        parameters = {"slo_ms": slo_ms} if slo_ms is not None else None
        identity = f"cli-{int(perf_counter() * 1e6)}"
        started_s = perf_counter()
        answer = _ask(
            server,
            lambda: client.infer(
                chain,
                tensors,
                request_id=identity,
                parameters=parameters,
                client_timeout=timeout_s,
            ),
        )
        latency_ms = (perf_counter() - started_s) * 1e3
        names = [output.name for output in answer.get_response().outputs]
        return Inferred(
            identity, latency_ms, {name: _listed(answer.as_numpy(name)) for name in names}
        )


def statuses(server: str, *, watch: bool) -> Iterator[dict[str, Any]]:
    """The server's status, once or whenever it changes."""
    with grpc.insecure_channel(server) as channel:
        stub = control_pb2_grpc.ControlStub(channel)
        request = control_pb2.StatusRequest()
        if not watch:
            reply = _ask(server, lambda: stub.Status(request, timeout=_CONTROL_TIMEOUT_S))
            yield json.loads(reply.json)
            return
        stream = iter(stub.WatchStatus(request))
        while (item := _ask(server, lambda: next(stream, None))) is not None:
            yield json.loads(item.json)


def statistics(server: str) -> dict[str, int]:
    """Rows that each chain and model has executed since the server's start."""

    def ask() -> Any:
        with triton.InferenceServerClient(server) as client:
            return client.get_inference_statistics(client_timeout=_CONTROL_TIMEOUT_S)

    return {entry.name: int(entry.inference_count) for entry in _ask(server, ask).model_stats}


def explain(server: str, request_id: str) -> dict[str, Any]:
    """The fields of `paceline.v1.ExplainResponse`, all of them."""
    with grpc.insecure_channel(server) as channel:
        stub = control_pb2_grpc.ControlStub(channel)
        request = control_pb2.ExplainRequest(request_id=request_id)
        reply = _ask(server, lambda: stub.Explain(request, timeout=_CONTROL_TIMEOUT_S))
        fields: dict[str, Any] = json_format.MessageToDict(
            reply, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        return fields


def _ask(server: str, call: Callable[[], T]) -> T:
    """The call's result; a gRPC failure becomes one line."""
    try:
        return call()
    except InferenceServerException as error:
        code = (error.status() or "").removeprefix("StatusCode.")
        message = error.message()
    except grpc.RpcError as error:
        code, message = error.code().name, error.details()
    if code == "UNAVAILABLE" and "connect" in message:
        raise ServerError(f"no paceline answers at {server}; is `paceline serve` running?")
    raise ServerError(f"{code}: {message.splitlines()[0] if message else 'no details'}")


def upload(
    channel: grpc.Channel, grant: edge_pb2.EdgeGrant, request: Any, *, timeout_s: float
) -> Any:
    """Send a ModelInferRequest under a grant, no faster than it allows; its ModelInferResponse.

    Raises grpc.RpcError as the server ends it (see edge.proto).
    """
    payload: bytes = request.SerializeToString()

    def parts() -> Iterator[edge_pb2.UploadRequest]:
        began = perf_counter()
        for start in range(0, len(payload), _PART_BYTES):
            early_s = began + (start - BURST_BYTES) / grant.bytes_per_s - perf_counter()
            if early_s > 0:
                sleep(early_s)
            part = payload[start : start + _PART_BYTES]
            yield edge_pb2.UploadRequest(grant_id=grant.grant_id if not start else "", payload=part)

    answer = edge_pb2_grpc.EdgeStub(channel).Upload(parts(), timeout=timeout_s)
    response = service_pb2.ModelInferResponse()
    response.ParseFromString(answer.response)
    return response


def _name_and_file(text: str) -> tuple[str, Path]:
    name, equals, file = text.partition("=")
    if not (name and equals and file):
        raise ConfigError(f"{text!r} is not NAME=FILE", key="--input")
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"{file}: no such file", key="--input")
    return name, path


def _read_array(path: Path, datatype: str) -> np.ndarray[Any, Any]:
    suffix = path.suffix.lower()
    if datatype == "BYTES" and suffix not in (".npy", ".json"):
        return np.array([path.read_bytes()], dtype=np.object_)
    wanted = triton_to_np_dtype(datatype)
    try:
        if suffix == ".npy":
            array = np.load(path, allow_pickle=False)
        elif suffix == ".json":
            array = np.array(json.loads(path.read_text(encoding="utf-8")), dtype=wanted)
        elif suffix in IMAGES:
            array = _read_image(path)
        else:
            raise ConfigError(
                f"{path}: cannot make a {datatype} tensor of this; use .npy, .json or an image",
                key="--input",
            )
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path}: {error}", key="--input") from None
    return np.ascontiguousarray(array.astype(wanted, copy=False))


def _read_image(path: Path) -> np.ndarray[Any, Any]:
    try:
        from PIL import Image
    except ImportError:
        raise ConfigError(
            f"{path}: reading images needs the package pillow", key="--input"
        ) from None
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _listed(array: np.ndarray[Any, Any] | None) -> Any:
    if array is None:
        return None
    if array.dtype == np.object_:
        text = [item.decode("utf-8", "replace") for item in array.reshape(-1)]
        return np.array(text, dtype=np.object_).reshape(array.shape).tolist()
    return array.tolist()
