"""`ocr_recognize` on Triton's Python backend: crops -> text and confidence (see recognize.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils
from recognize import Line, alphabet, decode_line, network_input, read, same_width

INPUTS = ("crop", "crop_size", "line_width", "upside_down")


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        cv2.setNumThreads(1)  # Paceline scales by instances, here and in the session
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        options.enable_cpu_mem_arena = False  # lines have many widths; it would keep the widest
        self._model = args["model_name"]
        file = Path(args["model_repository"], args["model_version"], "model.onnx")
        self._session = ort.InferenceSession(file, options, ["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name
        metadata = self._session.get_modelmeta().custom_metadata_map
        if "character" not in metadata:
            raise ValueError(f"{self._model}: {file} has no 'character' metadata (PP-OCR v4 has)")
        self._characters = alphabet(metadata["character"])

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        arrays = [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in INPUTS]
        try:
            lines = [
                decode_line(crop, (int(size[0]), int(size[1])), int(width), bool(turned))
                for (crop,), size, (width,), (turned,) in zip(*arrays, strict=True)
            ]
        except ValueError as error:
            message = f"{self._model}: {error}"
            failure = pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=failure)
        text = np.empty((len(lines), 1), dtype=np.object_)
        confidence = np.empty((len(lines), 1), dtype=np.float32)
        for position, (words, score) in self._recognize(lines).items():
            text[position, 0] = words.encode()
            confidence[position, 0] = score
        results = {"text": text, "confidence": confidence}
        wanted = set(request.requested_output_names())
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, rows) for name, rows in results.items() if name in wanted]
        )

    def _recognize(self, lines: list[Line]) -> dict[int, tuple[str, float]]:
        answers: dict[int, tuple[str, float]] = {}
        for positions in same_width(lines).values():
            batch = network_input([lines[position] for position in positions])
            (scores,) = self._session.run(None, {self._input: batch})
            read_lines = read(np.asarray(scores), self._characters)
            answers.update(zip(positions, read_lines, strict=True))
        return answers
