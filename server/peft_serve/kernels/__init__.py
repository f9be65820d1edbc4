"""Operations on tensors: grouped adapter terms in torch, and C++ kernels that take their place on a CPU."""
