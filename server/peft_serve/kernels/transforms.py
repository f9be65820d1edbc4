"""Linear maps by Fourier transforms. A name that ends in `_` changes y in place, only that.

They compute in float32, whatever y is: there are no transforms of bfloat16. Shapes: `T` tokens, `I` in and `O` out
features, `M` x `N` blocks of side `B` (O = M B, I = N B), `F` = B // 2 + 1 frequencies of a real vector of size B.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_serve.kernels.maps import Compressed, add_sparse_


def circulant_spectrum(kernel_MNB: Tensor) -> Tensor:
    """[F, N, M] What `add_circulant_` reads of the kernels of circulant blocks."""
    spectrum_MNF: Tensor = torch.fft.rfft(kernel_MNB.float()).conj()
    return spectrum_MNF.permute(2, 1, 0).resolve_conj().contiguous()


def add_circulant_(y_TO: Tensor, x_TI: Tensor, spectrum_FNM: Tensor, side: int) -> None:
    """y += W x, W of circulant blocks: a correlation with each kernel is a product at each frequency."""
    num_in = spectrum_FNM.shape[1]
    x_FTN = torch.fft.rfft(x_TI.float().view(-1, num_in, side)).permute(2, 0, 1)
    y_TMF = torch.bmm(x_FTN, spectrum_FNM).permute(1, 2, 0)
    y_TO.add_(torch.fft.irfft(y_TMF, n=side).flatten(1))


def add_spectrum_(y_TO: Tensor, x_TI: Tensor, rows: Compressed) -> None:
    """y += Re(F^-1 S F^-1 x), `rows` being S by its rows, its values in float32."""
    num_tokens = len(x_TI)
    x_TI = torch.fft.ifft(x_TI.float())
    parts = torch.cat([x_TI.real, x_TI.imag])
    sums = parts.new_zeros(2 * num_tokens, y_TO.shape[1])
    add_sparse_(sums, parts, rows)
    y_TO.add_(torch.fft.ifft(torch.complex(sums[:num_tokens], sums[num_tokens:])).real)
