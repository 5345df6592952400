"""Paceline: a gRPC front server that serves chains of DNNs within an SLO at the least cost."""

__version__ = "0.1.0"
