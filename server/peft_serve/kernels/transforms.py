"""Linear maps by Fourier transforms. A name that ends in `_` changes y in place, only that.

They compute in float32, whatever y is: there are no transforms of bfloat16. On a GPU they compute a power of two of
tokens: a plan is made for each number of them, which takes longer than the transform, and the oldest plans are thrown
away in the end, while a captured step may still use their tables.

Shapes: `T` tokens, `I` in and `O` out
features, `M` x `N` blocks of side `B` (O = M B, I = N B), `F` = B // 2 + 1 frequencies of a real vector of size B.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from peft_serve.kernels.maps import Compressed, add_sparse_


def circulant_spectrum(kernel_MNB: Tensor) -> Tensor:
    """[F, N, M] What `add_circulant_` reads of the kernels of circulant blocks."""
    spectrum_MNF: Tensor = torch.fft.rfft(kernel_MNB.float()).conj()
    return spectrum_MNF.permute(2, 1, 0).resolve_conj().contiguous()


def add_circulant_(y_TO: Tensor, x_TI: Tensor, spectrum_FNM: Tensor, side: int) -> None:
    """y += W x, W of circulant blocks: a correlation with each kernel is a product at each frequency."""
    num_tokens, num_in = len(x_TI), spectrum_FNM.shape[1]
    x_FTN = torch.fft.rfft(_filled_up(x_TI.float()).view(-1, num_in, side)).permute(2, 0, 1)
    y_TMF = torch.bmm(x_FTN, spectrum_FNM).permute(1, 2, 0)
    y_TO.add_(torch.fft.irfft(y_TMF, n=side)[:num_tokens].flatten(1))


def add_spectrum_(y_TO: Tensor, x_TI: Tensor, rows: Compressed) -> None:
    """y += Re(F^-1 S F^-1 x), `rows` being S by its rows, its values in float32."""
    num_tokens = len(x_TI)
    x_TI = torch.fft.ifft(_filled_up(x_TI.float()))
    parts, num_filled = torch.cat([x_TI.real, x_TI.imag]), len(x_TI)
    sums = parts.new_zeros(2 * num_filled, y_TO.shape[1])
    add_sparse_(sums, parts, rows)
    y_TO.add_(torch.fft.ifft(torch.complex(sums[:num_filled], sums[num_filled:])).real[:num_tokens])


def _filled_up(x_TI: Tensor) -> Tensor:
    """With zeros up to a power of two of tokens, where plans are made for numbers of tokens."""
    num_idle = (1 << (len(x_TI) - 1).bit_length()) - len(x_TI)
    return pad(x_TI, (0, 0, 0, num_idle)) if num_idle and _has_plans(x_TI) else x_TI


def _has_plans(x_TI: Tensor) -> bool:
    return x_TI.is_cuda
