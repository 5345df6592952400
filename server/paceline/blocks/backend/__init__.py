"""Triton backend `paceline_blocks`, in Python: runs models from a block pool.

Self-contained: `triton.installation` copies this directory beside Triton's own backends, where it
runs in Triton's interpreter and imports nothing of Paceline, and no `onnx`. `model.py` is what
Triton calls; everything else is plain Python on ONNX Runtime that works without Triton.
"""
