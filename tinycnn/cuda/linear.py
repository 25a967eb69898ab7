"""Fully connected layer: y[n, o] = b[o] + sum_f x[n, f] * w[o, f].  GPU version of tinycnn/kernels/linear.py.

x: (N, F)   w: (O, F)   b: (O,) or (0,) for none   y: (N, O)
"""

from tinycnn.cuda._launch import ravel
from tinycnn.cuda.gemm import gemm


def linear_forward(y, x, w, b):
    (N, F), O = x.shape, len(w)
    gemm(ravel(y), ravel(x), ravel(w), (N, O, F), (1, F), (1, F), bias=b if b.size else None)


def linear_backward(dx, dw, db, dy, x, w):
    """Gradients of all three arguments of `linear_forward`; those of size 0 are not computed.  db needs dw."""
    (N, F), O = x.shape, len(w)
    if dw.size:
        gemm(ravel(dw), ravel(dy), ravel(x), (O, F, N), (O, 1), (F, 1), row_sums=db if db.size else None)
    if dx.size:
        gemm(ravel(dx), ravel(dy), ravel(w), (N, F, O), (1, O), (F, 1))
