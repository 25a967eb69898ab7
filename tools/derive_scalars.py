"""Derive the coefficients of tinycnn/scalars.py and measure their errors.      python tools/derive_scalars.py

tanh(x) ~ x P(x^2) / Q(x^2) for |x| <= 9.02, beyond which tanh rounds to +-1 in float32.  Multiplied by Q, the equation
is linear in the coefficients: a least-squares problem.  Each round divides by the last Q and weights every point by its
error so far (Lawson's method), so that the fit approaches the minimax relative error.

exp(-r) ~ polynomial of degree 6 for 0 <= r <= ln 2, interpolated at Chebyshev points.

erfc(z) ~ t G(t) exp(-z^2) with t = 1 / (1 + z/2), for z >= 0; G is fitted to its relative error at Chebyshev points.

Prints the coefficients, and the largest errors of the functions in scalars.py in units in the last place.
"""

import math

import numpy as np

LIMIT = 9.02
DEGREE = 4  # of P and of Q


def fit_tanh(rounds=60):
    x = LIMIT * (1 - np.cos(np.linspace(1e-3, np.pi / 2, 4000)))  # denser near zero
    x = np.sort(np.concatenate([x, np.linspace(1e-3, LIMIT, 4000)])).astype(np.longdouble)
    z, target = (x / LIMIT) ** 2, np.tanh(x) / x
    weight, q = np.ones_like(x), np.ones_like(x)
    for _ in range(rounds):
        scale = np.sqrt(weight) / (q * target)
        columns = [z**k * scale for k in range(DEGREE + 1)] + [-target * z**k * scale for k in range(1, DEGREE + 1)]
        solution = np.linalg.lstsq(np.array(columns, np.float64).T, np.float64(target * scale), rcond=None)[0]
        p = sum(c * z**k for k, c in enumerate(solution[: DEGREE + 1]))
        q = 1 + sum(c * z ** (k + 1) for k, c in enumerate(solution[DEGREE + 1 :]))
        error = abs(p / q / target - 1)
        weight *= error / error.max() + 1e-3
        weight /= weight.sum()
    powers = LIMIT ** (2.0 * np.arange(DEGREE + 1))
    return (
        solution[: DEGREE + 1] / powers,
        np.append(1.0, solution[DEGREE + 1 :]) / powers,
        float(error.max()),
    )


def fit_exp(degree=6):
    chebyshev = np.polynomial.chebyshev.Chebyshev.interpolate(lambda r: np.exp(-r), degree, domain=[0, math.log(2)])
    r = np.linspace(0, math.log(2), 10001)
    return chebyshev.convert(kind=np.polynomial.Polynomial).coef, abs(chebyshev(r) / np.exp(-r) - 1).max()


def fit_erfc(degree=10, points=400):
    t = (1 + np.cos(np.pi * (np.arange(points) + 0.5) / points)) / 2
    z = 2 * (1 / t - 1)
    y = 1 / (2 * z**2)  # the asymptotic series of erfc(z) exp(z^2), for large z
    series = (1 - y + 3 * y**2 - 15 * y**3 + 105 * y**4) / (z * math.sqrt(math.pi))
    exact = np.array([math.erfc(a) * math.exp(a * a) if a < 20 else b for a, b in zip(z, series, strict=True)]) / t
    fit = np.polynomial.chebyshev.Chebyshev.fit(t, exact, degree, domain=[0, 1], w=1 / exact)
    return fit.convert(kind=np.polynomial.Polynomial).coef, abs(fit(t) / exact - 1).max()


def ulp_error(function, exact, x):
    """Largest error of `function` over the float32 values x, in ulp of the exact result."""
    want = exact(x.astype(np.float64))
    got = np.array([function(v) for v in x], np.float64)
    error = abs(got - want) / np.spacing(abs(want).astype(np.float32))
    return f"{error.max():.2f} ulp at x = {x[error.argmax()]:.5g}"


if __name__ == "__main__":
    P, Q, error = fit_tanh()
    print("P =", *(repr(float(np.float32(c))) for c in P))
    print("Q =", *(repr(float(np.float32(c))) for c in Q), f"   relative error {error:.1e}")
    G, error = fit_erfc()
    print("G =", *(repr(float(np.float32(c))) for c in G), f"   relative error {error:.1e}")
    E, error = fit_exp()
    print("E =", *(repr(float(np.float32(c))) for c in E), f"   relative error {error:.1e}")

    from tinycnn import scalars

    rng = np.random.default_rng(0)
    x = (rng.choice([-1, 1], 20000) * 10 ** rng.uniform(-6, 2, 20000)).astype(np.float32)
    print("tanh32:   ", ulp_error(scalars.tanh32, np.tanh, x))
    print("sigmoid32:", ulp_error(scalars.sigmoid32, lambda v: 1 / (1 + np.exp(-v)), x))
