"""The ops on compressed weights, registered with `torch.library`: one file an op.

`torch.ops.placekern.linear` and its sisters take the packed arrays as bare tensors; the functions
here take a `QuantSparseWeight` and fill them in.
"""

from .conv2d import conv2d, conv2d_op
from .kmeans_assign import kmeans_assign
from .kmeans_optimal import kmeans_optimal
from .linear import linear, linear_op

__all__ = ["conv2d", "conv2d_op", "kmeans_assign", "kmeans_optimal", "linear", "linear_op"]
