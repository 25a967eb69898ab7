"""Scalar functions, written once and compiled for every backend.

NAME32 and NAME64 are the float32 and float64 versions of NAME; a backend's `overload_by_dtype` dispatches by dtype.
tanh32 and sigmoid32 are approximations, since calls of libm are not vectorised: in a LeNet they would cost more than
the convolutions.  They have no branches, only selects, and pass NaN and infinities through.  Largest error over all
floats, tested: 7 ulp for tanh, 3 ulp for sigmoid.  The float64 versions call libm.
"""

import math

import numpy as np

f32 = np.float32

# tanh(x) = x P(x^2) / Q(x^2) up to TANH_LIMIT, beyond which it rounds to 1; coefficients: tools/derive_scalars.py.
TANH_LIMIT = f32(9.02)
TANH_LIMIT2 = TANH_LIMIT * TANH_LIMIT  # x^2 is clamped to this, so that |x P / Q| > 1 beyond the limit
P0, P1, P2 = f32(1), f32(0.13379649817943573), f32(0.0034939520992338657)
P3, P4 = f32(2.058206155197695e-05), f32(1.3317022151682067e-08)
Q1, Q2 = f32(0.467129647731781), f32(0.025870762765407562)
Q3, Q4 = f32(0.0003282954858150333), f32(7.761196343381016e-07)
ONE, HALF, ZERO = f32(1), f32(0.5), f32(0)

# exp(-a) = 2^-n exp(-r) with a = n ln 2 + r; polynomial for r in [0, ln 2]: tools/derive_scalars.py.
LN2_HIGH, LN2_LOW = f32(0.693359375), f32(-2.12194440e-4)  # their sum is ln 2; n * LN2_HIGH is exact
EXP_LIMIT = f32(104)  # exp(-104) rounds to zero
E1, E2, E3 = f32(-0.9999998211860657), f32(0.49999547004699707), f32(-0.16662709414958954)
E4, E5, E6 = f32(0.04150088131427765), f32(-0.007971991784870625), f32(0.0009857852710410953)
N128, N64, N32, N16 = f32(128), f32(64), f32(32), f32(16)
N8, N4, N2, N1 = f32(8), f32(4), f32(2), f32(1)
A128, A64, A32, A16 = (f32(n * math.log(2)) for n in (128, 64, 32, 16))
A8, A4, A2, A1 = (f32(n * math.log(2)) for n in (8, 4, 2, 1))
H128, H64, H32, H16 = (f32(2.0**-n) for n in (128, 64, 32, 16))
H8, H4, H2, H1 = (f32(2.0**-n) for n in (8, 4, 2, 1))


def tanh32(x):
    z = x * x
    z = TANH_LIMIT2 if z > TANH_LIMIT2 else z
    y = x * (P0 + z * (P1 + z * (P2 + z * (P3 + z * P4)))) / (ONE + z * (Q1 + z * (Q2 + z * (Q3 + z * Q4))))
    y = ONE if y > ONE else y
    return -ONE if y < -ONE else y


def tanh64(x):
    return math.tanh(x)


def sigmoid32(x):
    """1 / (1 + exp(-x)); exp(x) / (1 + exp(x)) for x < 0, where it has the smaller relative error.

    2^-n in exp(-|x|) is a product with one factor per binary digit of n, so that no bits are reinterpreted.
    """
    a = abs(x)
    a = EXP_LIMIT if a > EXP_LIMIT else a
    left, n, power = a, ZERO, ONE
    take = left >= A128
    left, n, power = (
        (left - A128 if take else left),
        (n + N128 if take else n),
        (power * H128 if take else power),
    )
    take = left >= A64
    left, n, power = (
        (left - A64 if take else left),
        (n + N64 if take else n),
        (power * H64 if take else power),
    )
    take = left >= A32
    left, n, power = (
        (left - A32 if take else left),
        (n + N32 if take else n),
        (power * H32 if take else power),
    )
    take = left >= A16
    left, n, power = (
        (left - A16 if take else left),
        (n + N16 if take else n),
        (power * H16 if take else power),
    )
    take = left >= A8
    left, n, power = (left - A8 if take else left), (n + N8 if take else n), (power * H8 if take else power)
    take = left >= A4
    left, n, power = (left - A4 if take else left), (n + N4 if take else n), (power * H4 if take else power)
    take = left >= A2
    left, n, power = (left - A2 if take else left), (n + N2 if take else n), (power * H2 if take else power)
    take = left >= A1
    n, power = (n + N1 if take else n), (power * H1 if take else power)
    r = (a - n * LN2_HIGH) - n * LN2_LOW
    e = power * (ONE + r * (E1 + r * (E2 + r * (E3 + r * (E4 + r * (E5 + r * E6))))))
    return (ONE if x >= ZERO else e) / (ONE + e)


def sigmoid64(x):
    e = math.exp(-abs(x))
    return (1.0 if x >= 0 else e) / (1.0 + e)


def exp32(x):
    return f32(math.exp(x))  # on a GPU math.exp of a float32 gives float64


def exp64(x):
    return math.exp(x)


# erfc(z) = t G(t) exp(-z^2) with t = 1 / (1 + z/2), z >= 0; coefficients: tools/derive_scalars.py.
G0, G1, G2, G3 = f32(0.282094806432724), f32(0.28209376335144043), f32(0.2468845695257187), f32(0.1753159761428833)
G4, G5, G6 = f32(0.09346245229244232), f32(-0.05921141058206558), f32(0.13217715919017792)
G7, G8 = f32(-0.45497414469718933), f32(0.49369508028030396)
G9, G10 = f32(-0.23473365604877472), f32(0.0431954450905323)


def erfc_factor32(x):
    """erfc(x) = erfc_factor(x) * exp(-erfc_exponent(x)), x >= 0."""
    t = ONE / (ONE + HALF * x)
    g = G0 + t * (G1 + t * (G2 + t * (G3 + t * (G4 + t * (G5 + t * (G6 + t * (G7 + t * (G8 + t * (G9 + t * G10)))))))))
    return t * g


def erfc_factor64(x):
    return math.erfc(x)


def erfc_exponent32(x):
    return x * x


def erfc_exponent64(x):
    return x - x


# log(1 + x) = 2 atanh(w) with w = x / (2 + x), for x in [0, 1]: the Taylor series, w <= 1/3.
L3, L5, L7, L9, L11, L13, L15 = (f32(1 / k) for k in (3, 5, 7, 9, 11, 13, 15))
TWO = f32(2)


def log1p32(x):
    w = x / (TWO + x)
    z = w * w
    return TWO * w * (ONE + z * (L3 + z * (L5 + z * (L7 + z * (L9 + z * (L11 + z * (L13 + z * L15)))))))


def log1p64(x):
    return math.log1p(x)


# --- element-wise activations -----------------------------------------------------------------------------------------
# A tuple (code, a, b) selects one, see `activation`.  To add one: a code, a pair of functions in `activations`, and
# branches that call them in activations.py of both backends; tests/test_places.py names the other places.

TANH, SIGMOID, RELU, SCALED_TANH, LEAKY_RELU, GAUSSIAN, ELU, GELU, GELU_TANH, SILU, SOFTPLUS, HARDTANH = range(12)
RELU6 = HARDTANH

GELU_CONSTANTS = math.sqrt(0.5), 1 / math.sqrt(2 * math.pi)  # a and b
GELU_TANH_CONSTANTS = 2 * math.sqrt(2 / math.pi), 0.044715  # torch's; a is twice the factor of its tanh
# Beyond these, GELU and SiLU are 0 or x in float64 too.  Clamped there, so that infinity times zero does not occur.
GELU_LIMIT, SILU_LIMIT = f32(64), f32(800)


def activation(code: int, a: float = 0.0, b: float = 0.0) -> tuple[int, float, float]:
    """(code, a, b) for a kernel.  LEAKY_RELU: slope a.  SCALED_TANH: a * tanh(b * x).  GAUSSIAN: exp(a * x).
    ELU: alpha a.  GELU, GELU_TANH: their constants.  SOFTPLUS: beta a, threshold b.  HARDTANH: minimum a, maximum b."""
    return code, float(a), float(b)


def scaled_tanh_constants(a, b):
    """c and d of the gradient of SCALED_TANH.  For other activations these are a and b."""
    return a * b, b / a


def activations(compiled, overload_by_dtype):
    """code -> (value, gradient), compiled by a backend with its decorator for functions that kernels call.

    value(x, a, b) is y = f(x); gradient(dy, y, c, d) is dx = f'(x) * dy as a function of the output y, or, for
    LEAKY_RELU, GELU, GELU_TANH, SILU and SOFTPLUS, of the input x.  Constants are arguments in the type of x, or
    float32 such as ZERO and ONE above: literals are float64, and on a GPU they make the arithmetic float64.
    """
    tanh, sigmoid = overload_by_dtype(tanh32, tanh64), overload_by_dtype(sigmoid32, sigmoid64)
    exp = overload_by_dtype(exp32, exp64)

    def tanh_value(x, a, b):
        return tanh(x)

    def tanh_gradient(dy, y, c, d):
        return dy - dy * y * y

    def sigmoid_value(x, a, b):
        return sigmoid(x)

    def sigmoid_gradient(dy, y, c, d):
        return dy * (y - y * y)

    def relu_value(x, a, b):
        return ZERO if x <= ZERO else x  # NaN stays NaN

    def relu_gradient(dy, y, c, d):
        return ZERO if y <= ZERO else dy

    def scaled_tanh_value(x, a, b):
        return a * tanh(b * x)

    def scaled_tanh_gradient(dy, y, c, d):
        return dy * (c - d * y * y)

    # A factor, as LLVM stores a choice between two results with a mask, which some processors do slowly.
    def leaky_relu_value(x, a, b):
        return x * (a if x <= ZERO else ONE)

    def leaky_relu_gradient(dy, x, c, d):
        return dy * (c if x <= ZERO else ONE)

    def gaussian_value(x, a, b):
        return exp(a * x)

    def gaussian_gradient(dy, y, c, d):
        return c * y * dy

    def elu_value(x, a, b):
        t = tanh(HALF * x)  # exp(x) - 1 = 2 t / (1 - t), accurate near 0
        return x if x > ZERO else a * (TWO * t / (ONE - t))

    def elu_gradient(dy, y, c, d):
        return dy * (y + c if y <= ZERO else ONE)

    def exp_minus(u):
        """exp(-u) for u >= 0."""
        s = sigmoid(-u)
        return s / (ONE - s)

    exp_minus = compiled(exp_minus)
    erfc_factor = overload_by_dtype(erfc_factor32, erfc_factor64)
    erfc_exponent = overload_by_dtype(erfc_exponent32, erfc_exponent64)
    log1p = overload_by_dtype(log1p32, log1p64)

    def clamp(x, limit):
        x = limit if x > limit else x
        return -limit if x < -limit else x

    clamp = compiled(clamp)

    def normal_cdf(x, sqrt_half):
        z = abs(x) * sqrt_half
        q = HALF * erfc_factor(z) * exp_minus(erfc_exponent(z))
        return ONE - q if x > ZERO else q

    normal_cdf = compiled(normal_cdf)

    def gelu_value(x, a, b):
        x = -GELU_LIMIT if x < -GELU_LIMIT else x
        return x * normal_cdf(clamp(x, GELU_LIMIT), a)

    def gelu_gradient(dy, x, c, d):
        x = clamp(x, GELU_LIMIT)
        return dy * (normal_cdf(x, c) + x * d * exp_minus(HALF * x * x))

    def gelu_tanh_value(x, a, b):
        x = -GELU_LIMIT if x < -GELU_LIMIT else x
        z = clamp(x, GELU_LIMIT)
        return x * sigmoid(a * (z + b * z * z * z))  # (1 + tanh(u)) / 2 = sigmoid(2 u)

    def gelu_tanh_gradient(dy, x, c, d):
        x = clamp(x, GELU_LIMIT)
        t = sigmoid(-abs(c * (x + d * x * x * x)))
        return dy * ((ONE - t if x > ZERO else t) + x * t * (ONE - t) * c * (ONE + (TWO + ONE) * d * x * x))

    def silu_value(x, a, b):
        x = -SILU_LIMIT if x < -SILU_LIMIT else x
        return x * sigmoid(x)

    def silu_gradient(dy, x, c, d):
        x = clamp(x, SILU_LIMIT)
        t = sigmoid(-abs(x))  # the smaller of s and 1 - s: the other is 1 - t, without cancellation
        return dy * ((ONE - t if x > ZERO else t) + x * t * (ONE - t))

    def softplus_value(x, a, b):
        z = a * x
        y = ((ZERO if z < ZERO else z) + log1p(exp_minus(abs(z)))) / a
        return x if z > b else y

    def softplus_gradient(dy, x, c, d):
        z = c * x
        return dy * (ONE if z > d else sigmoid(z))

    def hardtanh_value(x, a, b):
        x = a if x < a else x
        return b if x > b else x

    def hardtanh_gradient(dy, y, c, d):
        return dy * (ZERO if y <= c or y >= d else ONE)

    pairs = {
        TANH: (tanh_value, tanh_gradient),
        SIGMOID: (sigmoid_value, sigmoid_gradient),
        RELU: (relu_value, relu_gradient),
        SCALED_TANH: (scaled_tanh_value, scaled_tanh_gradient),
        LEAKY_RELU: (leaky_relu_value, leaky_relu_gradient),
        GAUSSIAN: (gaussian_value, gaussian_gradient),
        ELU: (elu_value, elu_gradient),
        GELU: (gelu_value, gelu_gradient),
        GELU_TANH: (gelu_tanh_value, gelu_tanh_gradient),
        SILU: (silu_value, silu_gradient),
        SOFTPLUS: (softplus_value, softplus_gradient),
        HARDTANH: (hardtanh_value, hardtanh_gradient),
    }
    return {code: (compiled(value), compiled(gradient)) for code, (value, gradient) in pairs.items()}


# --- random numbers, angles -------------------------------------------------------------------------------------------

# Taylor series of sine and cosine for |angle| <= pi: CUDA's versions use local memory to reduce angles up to 1e38.
S0, S1, S2, S3, S4, S5, S6, S7, S8 = (f32((-1) ** k / math.factorial(2 * k + 1)) for k in range(9))
C0, C1, C2, C3, C4, C5, C6, C7, C8, C9 = (f32((-1) ** k / math.factorial(2 * k)) for k in range(10))


def sin32(x):
    z = x * x
    return x * (S0 + z * (S1 + z * (S2 + z * (S3 + z * (S4 + z * (S5 + z * (S6 + z * (S7 + z * S8))))))))


def sin64(x):
    return math.sin(x)


def cos32(x):
    z = x * x
    return C0 + z * (C1 + z * (C2 + z * (C3 + z * (C4 + z * (C5 + z * (C6 + z * (C7 + z * (C8 + z * C9))))))))


def cos64(x):
    return math.cos(x)


# SplitMix64 (Steele, Lea and Flood 2014); its last two steps are David Stafford's "mix 13".
u64 = np.uint64
GOLDEN, M1, M2 = u64(0x9E3779B97F4A7C15), u64(0xBF58476D1CE4E5B9), u64(0x94D049BB133111EB)
S30, S27, S31 = u64(30), u64(27), u64(31)


def splitmix64(x):
    """A hash of 64 bits (uint64): hashes of x, x + 1, ... look independent."""
    x = x * GOLDEN
    x = (x ^ (x >> S30)) * M1
    x = (x ^ (x >> S27)) * M2
    return x ^ (x >> S31)


S40, S8_BITS, MASK24 = u64(40), u64(8), u64(2**24 - 1)
TOP, ULP24 = np.int32(2**24 - 1), f32(2.0**-24)


def uniform_from_high(word):
    """Uniform in (-1, 1) from the upper 24 of 64 random bits: an odd multiple of 2**-24, so the mean is 0."""
    return f32(np.int32(np.int32(word >> S40) * np.int32(2) - TOP)) * ULP24


def uniform_from_low(word):
    """`uniform_from_high` from bits 8 to 31."""
    return f32(np.int32(np.int32((word >> S8_BITS) & MASK24) * np.int32(2) - TOP)) * ULP24
