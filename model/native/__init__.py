"""The native library: kernels in C++ for bfloat16 on CPU. Each has a PyTorch path that is its oracle in tests.

    library     compiles the C++ files at first use and loads them
    structs     the structures that C++ functions read
    refusals    why native code does not serve a dtype or a device
    memory      huge pages for packed matrices
    linear      packed matrices
    attention   attention over the KV cache
    block       the attention half of a decoder layer
    router      the choice of experts
    experts     the experts of a layer
    layers      several decoder layers in one call
    exchange    the MoE layers of the workers of one node
    segments    the memory that these workers share

The C++ files, which include one another by their paths from here:

    vector.h    vectors of 16 numbers, by AVX-512 or AVX2
    products/   products with packed matrices (gemm*.h), also by the CPU's matrix unit (tiles*.h); linear layers
    layer/      the rest of a decoder layer: norms, attention, the router; whole halves and layers in one call
    states/     layers with a state per sequence
    moe/        the experts of a layer, and the exchange between the workers of a node

The library is optional at run time. The machine's C++ compiler compiles it at first use (some seconds, once per
machine). ctypes loads it and releases the interpreter's lock during calls. Its functions take plain pointers and do not
use torch, so one build works with every version of torch. If the library is not available, one log line says why.

To add a function, write `extern "C"` in a .cpp file, its arguments in `library._SIGNATURES`, a wrapper on tensors
in the module of that name, and a test in tests/model/native that takes the fixture `lib`. A structure that Python fills
is declared in structs.py, and its .cpp file reports its size.

The room leaves to model/fitting/ which modules of a model use these functions.
"""

from elastic_moe.model.native.library import library, unavailable

__all__ = ["library", "unavailable"]
