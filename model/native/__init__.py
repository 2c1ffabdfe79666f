"""The native library: kernels in C++ for bfloat16 on CPU, each with a PyTorch path beside it that is its oracle.

Optional at run time. It is compiled at first use (some seconds, once per machine) by the C++ compiler that is there and
loaded with ctypes, which lets go of the interpreter's lock during calls. Its functions take plain pointers and know
nothing of torch, so one build serves every torch. Where it cannot be had, one log line says why.

To add a function: `extern "C"` in a .cpp file here, its arguments in `library._SIGNATURES`, a wrapper on tensors in a
module named like the .cpp file, and a test in tests/model/native that takes the fixture `lib`. A structure that Python
fills is declared in structs.py, and its .cpp file tells its size.
"""

from elastic_moe.model.native.library import library, unavailable

__all__ = ["library", "unavailable"]
