# NVIDIA's Triton with what the example's Python models import. NOT RUN ON A GPU by its authors.
FROM nvcr.io/nvidia/tritonserver:24.10-py3
RUN pip install --no-cache-dir "numpy<2" onnxruntime opencv-python-headless pyclipper
