"""
What a scheme means: the one definition of quantizing, packing and multiplying, and where the weights are.

`quantize` -> `Quantized` -> `dequantize`; `pack` -> `Packed` -> `unpack`; `matmul` is what backends agree with.
"""

from mxmoe.quant.activation import fake_quantize_activation, largest_act_code, quantize_activation
from mxmoe.quant.acts import ACT_PARAMS, ACTS, POINTWISE, apply_act
from mxmoe.quant.formats import FORMATS, Format
from mxmoe.quant.hadamard import hadamard, random_signs, rotate
from mxmoe.quant.hessian import hessian_error
from mxmoe.quant.matmul import matmul
from mxmoe.quant.options import WithOptions
from mxmoe.quant.packing import code_position, decode_code, encode_word, pack, pack_codes, unpack, unpack_codes
from mxmoe.quant.quantized import Packed, Quantized, n_payload_bytes, scale_dtype
from mxmoe.quant.quantizers import (
    QUANTIZERS,
    Quantizer,
    find_quantizer,
    needs_hessian,
    quantize_each,
    spell_quantizer,
)
from mxmoe.quant.rtn import checked_weight, dequantize, quantize
from mxmoe.quant.scales import LARGEST_MULTIPLIER, join_scales, split_scales
from mxmoe.quant.tolerance import block_tolerance, tolerance
from mxmoe.quant.weights import PackedWeights, Weights

__all__ = [
    "ACTS",
    "ACT_PARAMS",
    "FORMATS",
    "LARGEST_MULTIPLIER",
    "POINTWISE",
    "QUANTIZERS",
    "Format",
    "Packed",
    "PackedWeights",
    "Quantized",
    "Quantizer",
    "Weights",
    "WithOptions",
    "apply_act",
    "block_tolerance",
    "checked_weight",
    "code_position",
    "decode_code",
    "dequantize",
    "encode_word",
    "fake_quantize_activation",
    "find_quantizer",
    "hadamard",
    "hessian_error",
    "join_scales",
    "largest_act_code",
    "matmul",
    "n_payload_bytes",
    "needs_hessian",
    "pack",
    "pack_codes",
    "quantize",
    "quantize_activation",
    "quantize_each",
    "random_signs",
    "rotate",
    "scale_dtype",
    "spell_quantizer",
    "split_scales",
    "tolerance",
    "unpack",
    "unpack_codes",
]
