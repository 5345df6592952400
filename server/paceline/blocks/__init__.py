"""Models as blocks: the compiler into a content-addressed pool, and the backend that runs them.

`backend` runs inside Triton's interpreter, is self-contained and imports nothing of ours and no
`onnx`; everything else here is for the command line. The contract is docs/blocks-format.md.
"""
