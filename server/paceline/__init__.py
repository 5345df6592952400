"""Paceline: a gRPC front server that serves chains of DNNs within an SLO at the least cost."""

from pathlib import Path

from paceline import compiled

__version__ = "0.1.0"

COMPILED = compiled.use(Path(__file__).parent)
"""Whether what runs for every request is machine code."""
