"""Serve the OCR example and read one image through it: what `scripts/run` ends with.

Starts `paceline serve` (which starts a local Triton), waits until the chain is served, sends an
image as any Triton client would, prints the text and where the time went, and keeps serving until
Ctrl-C. With --once it stops after the first answer and exits 0.
"""

from __future__ import annotations

import argparse
import importlib.util
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tritonclient import grpc as triton
from tritonclient.utils import InferenceServerException

from paceline import client
from paceline.core.errors import PacelineError
from paceline.report import console, timeline_report
from paceline.triton.launcher import ending_with_parent

ROOT = Path(__file__).resolve().parent.parent
CHAIN = "ocr"
READY_TIMEOUT_S = 600.0
LEAST_CONFIDENCE = 0.5
"""Lines below it are noise, by the reference pipeline's rule."""


def main() -> int:
    options, rest = _arguments()
    image = np.asarray(Image.open(options.image).convert("RGB"))
    address = f"127.0.0.1:{options.grpc_port}"
    server = subprocess.Popen(
        [
            # Even if this script is killed, the server stops, and its Triton.
            *ending_with_parent(sys.executable, "-m", "paceline", "serve"),
            *("--chains", str(ROOT / "examples" / "chains")),
            *("--model-repository", str(ROOT / "model_repository")),
            *("--grpc-port", str(options.grpc_port)),
            *rest,
        ]
    )
    # Ctrl-C reaches the server too, which drains; this process waits for it.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    try:
        if not _await_ready(server, address):
            return server.wait()
        _read(address, image, options.image.name)
        if options.once:
            server.terminate()
        else:
            print(f"still serving on {address}; Ctrl-C stops", flush=True)
    except PacelineError as error:
        print(f"paceline: {error}", file=sys.stderr)
        server.terminate()
        server.wait()
        return 1
    except InferenceServerException as error:
        print(f"paceline: {error.status()}: {error.message()}", file=sys.stderr)
        server.terminate()
        server.wait()
        return 1
    return server.wait()


def _arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="scripts/run",
        description="Set up, serve the OCR example on a local Triton, and read an image with it.",
        epilog="Other options are given to `paceline serve`; see its --help.",
    )
    parser.add_argument("--once", action="store_true", help="exit 0 after the first answer")
    parser.add_argument(
        "--image", type=Path, default=_sample_image(), help="what to read (default: a scanned page)"
    )
    parser.add_argument("--grpc-port", type=int, default=8001, help="default: 8001")
    options, rest = parser.parse_known_args()
    if not options.image.is_file():
        parser.error(f"{options.image}: no such file")
    return options, rest


def _sample_image() -> Path:
    """page.png of scikit-image; the package itself is not imported."""
    spec = importlib.util.find_spec("skimage")
    assert spec is not None and spec.origin is not None, "scikit-image is in requirements.lock"
    return Path(spec.origin).parent / "data" / "page.png"


def _await_ready(server: subprocess.Popen[bytes], address: str) -> bool:
    """Whether the chain came up; False when the server ended instead."""
    give_up_s = time.monotonic() + READY_TIMEOUT_S
    with triton.InferenceServerClient(address) as asked:
        while time.monotonic() < give_up_s:
            try:
                server.wait(0.2)
                return False
            except subprocess.TimeoutExpired:
                pass
            try:
                if asked.is_model_ready(CHAIN, client_timeout=2.0):
                    return server.poll() is None
            except InferenceServerException:
                continue
    print(f"paceline: not ready within {READY_TIMEOUT_S:g} s", file=sys.stderr)
    server.terminate()
    return False


def _read(address: str, image: np.ndarray[Any, Any], name: str) -> None:
    """Send the image, print the lines and where the time went."""
    tensor = triton.InferInput("image", list(image.shape), "UINT8")
    tensor.set_data_from_numpy(image)
    identity = f"demo-{time.time_ns()}"
    with triton.InferenceServerClient(address) as asked:
        answer = asked.infer(CHAIN, [tensor], request_id=identity, client_timeout=60.0)
    texts = [text.decode() for text in answer.as_numpy("text").reshape(-1)]
    confidences = answer.as_numpy("confidence").reshape(-1)
    print(f"\n{name} ({image.shape[1]} x {image.shape[0]}) reads:")
    for text, confidence in zip(texts, confidences, strict=True):
        if confidence >= LEAST_CONFIDENCE:
            print(f"  {confidence:.3f}  {text}")
    if not texts:
        print("  (no text)")
    print()
    told = client.explain(address, identity)
    console().print(timeline_report(told["chain"], told["latency_ms"], told["spans"]))
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
