"""Models that do nothing but take memory, and time to load and to execute: Python-backend models
for a real Triton, which the residency benchmark and the integration tests serve.
"""

from __future__ import annotations

from pathlib import Path

_CODE = """
import json
import time
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        parameters = json.loads(args["model_config"])["parameters"]
        value = lambda key: float(parameters[key]["string_value"])
        self.execute_s = value("execute_s")
        # Written to, so that every page of it is really there.
        self.ballast = bytearray(b"\\x5a") * int(value("ballast_mib") * 2**20)
        self.busy = value("busy") > 0
        self.spend(value("load_s"))

    def spend(self, seconds):
        if not self.busy:
            time.sleep(seconds)
            return
        until_s = time.thread_time() + seconds
        while time.thread_time() < until_s:
            pass

    def execute(self, requests):
        responses = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "x")
            self.spend(self.execute_s)
            y = pb_utils.Tensor("y", x.as_numpy())
            responses.append(pb_utils.InferenceResponse([y]))
        return responses
"""

_CONFIG = """\
name: "{name}"
backend: "python"
max_batch_size: {batch}
input [{{name: "x" data_type: TYPE_FP32 dims: [4]}}]
output [{{name: "y" data_type: TYPE_FP32 dims: [4]}}]
parameters [
  {{key: "ballast_mib" value: {{string_value: "{ballast_mib}"}}}},
  {{key: "busy" value: {{string_value: "{busy}"}}}},
  {{key: "load_s" value: {{string_value: "{load_s}"}}}},
  {{key: "execute_s" value: {{string_value: "{execute_s}"}}}}
]
"""


def write_ballast(
    repository: Path,
    name: str,
    ballast_mib: float,
    *,
    load_s: float = 0.0,
    execute_s: float = 0.0,
    batch: int = 8,
    busy: bool = False,
) -> Path:
    """y = x after `execute_s`; loads for `load_s` beyond what its process takes to start. `busy`:
    keeps a core busy meanwhile.
    """
    directory = repository / name
    (directory / "1").mkdir(parents=True)
    config = _CONFIG.format(
        name=name,
        batch=batch,
        ballast_mib=ballast_mib,
        busy=int(busy),
        load_s=load_s,
        execute_s=execute_s,
    )
    (directory / "config.pbtxt").write_text(config, encoding="utf-8")
    (directory / "1" / "model.py").write_text(_CODE.lstrip(), encoding="utf-8")
    return directory


def chain_file(
    name: str,
    models: list[str],
    *,
    slo_ms: float = 60_000,
    rate_rps: float = 1,
    keep_alive_s: float | None = None,
) -> str:
    """A chain of these models, one after the other."""
    lines = [f"chain: {name}", f"slo_ms: {slo_ms:g}", f"rate_rps: {rate_rps:g}"]
    lines += [f"keep_alive_s: {keep_alive_s:g}"] if keep_alive_s is not None else []
    lines += ["inputs:", "  x: {dtype: FP32, shape: [4]}", "modules:"]
    source = "inputs.x"
    for index, model in enumerate(models):
        lines += [f"  m{index}:", f"    model: {model}", f"    inputs: {{x: {source}}}"]
        source = f"m{index}.y"
    lines += ["outputs:", f"  y: {source}"]
    return "\n".join(lines) + "\n"
