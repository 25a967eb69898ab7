"""The translation of PTX to C (cuda_on_cpu/ptx.py) on small kernels, against the definitions of the instructions.
Needs gcc, but neither the CUDA toolkit nor a GPU."""

import ctypes
import shutil
import subprocess
from fractions import Fraction

import numpy as np
import pytest
from cuda_on_cpu import ptx

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
FORWARD, BACKWARD, SHUFFLED = ORDERS = range(3)

# Replaces the stand-in libcuda: a list of allocations, and a jump out of a kernel after a fault.
STUB = r"""
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
unsigned long driver_epoch;
static uint64_t firsts[16], sizes[16];
static int count;
static jmp_buf launch_point;
static char message[200];
void stub_allocate(int n, const uint64_t *first, const uint64_t *size) {
  for (count = 0; count < n; ++count) firsts[count] = first[count], sizes[count] = size[count];
  ++driver_epoch;
}
int driver_allocation(uint64_t address, uint64_t *first, uint64_t *size) {
  for (int i = 0; i < count; ++i)
    if (address - firsts[i] < sizes[i]) return *first = firsts[i], *size = sizes[i], 1;
  return 0;
}
_Noreturn void driver_fault(const char *kind, const char *kernel, uint64_t address) {
  snprintf(message, sizeof message, "%s in %s", kind, kernel);
  longjmp(launch_point, 1);
}
extern void kernel_run(const void *launch);
const char *stub_launch(const void *launch) {
  if (setjmp(launch_point)) return message;
  kernel_run(launch);
  return 0;
}
"""


class Launch(ctypes.Structure):
    _fields_ = (
        ("parameters", ctypes.POINTER(ctypes.c_void_p)),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("dynamic_shared", ctypes.c_uint),
        ("order", ctypes.c_int),
    )


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """load(ptx text) -> the library with the kernel and the stub."""
    folder = tmp_path_factory.mktemp("ptx")
    stub = folder / "stub.o"
    subprocess.run(["gcc", "-O1", "-fPIC", "-x", "c", "-", "-c", "-o", stub], input=STUB, text=True, check=True)

    def load(text):
        # -Bsymbolic: the kernel uses this stub even if this process has loaded a stand-in libcuda.
        library = ctypes.CDLL(str(ptx.compile_kernel(text, folder, link=(stub, "-Wl,-Bsymbolic"))))
        library.stub_launch.restype = ctypes.c_char_p
        return library

    return load


@pytest.fixture
def run(load):
    """run(body, arrays ...): a kernel on NumPy arrays, whose addresses are in %a0, %a1 ...; %t is the thread in the
    block, %i in the grid.  Returns the fault, or None."""

    def run(body, *arrays, block=1, grid=1, order=FORWARD, outside="", dynamic_shared=0):
        library = load(module(body, len(arrays), outside))
        addresses = (ctypes.c_uint64 * len(arrays))(*[array.ctypes.data for array in arrays])
        sizes = (ctypes.c_uint64 * len(arrays))(*[array.nbytes for array in arrays])
        library.stub_allocate(len(arrays), addresses, sizes)
        pointers = [ctypes.addressof(addresses) + 8 * k for k in range(len(arrays))]
        dimensions = [(ctypes.c_uint * 3)(*(n if isinstance(n, tuple) else (n, 1, 1))) for n in (grid, block)]
        launch = Launch((ctypes.c_void_p * len(arrays))(*pointers), *dimensions, dynamic_shared, order)
        fault = library.stub_launch(ctypes.byref(launch))
        return fault and fault.decode()

    return run


def module(body, arrays=0, outside=""):
    parameters = ", ".join(f".param .u64 kernel_param_{k}" for k in range(arrays))
    loads = "\n".join(f"ld.param.u64 %a{k}, [kernel_param_{k}];" for k in range(arrays))
    return f"""
.version 8.0
.target sm_80
.address_size 64
{outside}
.visible .entry kernel({parameters})
{{
    .reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<16>; .reg .b64 %rd<16>; .reg .f32 %f<16>; .reg .f64 %fd<16>;
    .reg .b64 %a<8>; .reg .b32 %t; .reg .b32 %i; .reg .b32 %q<2>;
    {loads}
    mov.u32 %t, %tid.x; mov.u32 %q0, %ctaid.x; mov.u32 %q1, %ntid.x; mad.lo.s32 %i, %q0, %q1, %t;
    {body}
    ret;
}}"""


def ptx_type(dtype):
    return np.dtype(dtype).kind.replace("i", "s") + str(8 * np.dtype(dtype).itemsize)


@pytest.fixture
def evaluate(run):
    """evaluate(instructions, dtype of the results, columns ...) -> one row for each instruction, which writes %d from
    %x, %y, %z (one element of each column)."""

    def evaluate(instructions, dtype, *columns):
        n, size, lines = len(columns[0]), np.dtype(dtype).itemsize, []

        def register(name, dtype):
            kind, bytes_ = np.dtype(dtype).kind, np.dtype(dtype).itemsize
            lines.append(f".reg .{'f' if kind == 'f' else 'b'}{8 * max(bytes_, 2)} {name};")

        for k, column in enumerate(columns):
            register(f"%{'xyz'[k]}", column.dtype)
            lines.append(f"mad.wide.u32 %rd1, %i, {column.itemsize}, %a{k};")
            lines.append(f"ld.global.{ptx_type(column.dtype)} %{'xyz'[k]}, [%rd1];")
        for k, instruction in enumerate(instructions):
            register(f"%d_{k}", dtype)
            lines.append(instruction.replace("%d", f"%d_{k}"))
            lines.append(f"mad.wide.u32 %rd1, %i, {size}, %a{len(columns)};")
            lines.append(f"st.global.{ptx_type(dtype)} [%rd1+{k * n * size}], %d_{k};")
        results = np.zeros((len(instructions), n), dtype)
        assert run("\n".join(lines), *columns, results, block=n) is None
        return results

    return evaluate


def pairs(values, dtype, others=None):
    """All pairs of the values, as two columns."""
    left, right = np.meshgrid(np.array(values, dtype), np.array(values if others is None else others, dtype))
    return left.ravel(), right.ravel()


def wrap(number, dtype):
    """A Python integer modulo 2**bits, in the dtype."""
    bits = 8 * np.dtype(dtype).itemsize
    number &= (1 << bits) - 1
    return number - (1 << bits) if np.dtype(dtype).kind == "i" and number >> (bits - 1) else number


def same(got, want):
    """Assert equal bits up to the payload of NaN."""
    want = np.asarray(want, got.dtype)
    np.testing.assert_array_equal(got, want)
    if got.dtype.kind == "f":
        zero = want == 0
        np.testing.assert_array_equal(np.signbit(got[zero]), np.signbit(want[zero]))


# --- integers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_integer_arithmetic(evaluate, dtype):
    t, low, high = ptx_type(dtype), int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    x, y = pairs([low, low + 1, high, high - 1, 0, 1, 2, 7, high // 3, wrap(-1, dtype), wrap(-7, dtype)], dtype)
    bits = 8 * x.itemsize
    definitions = {
        f"add.{t}": lambda a, b: a + b,
        f"sub.{t}": lambda a, b: a - b,
        f"mul.lo.{t}": lambda a, b: a * b,
        f"mul.hi.{t}": lambda a, b: a * b >> bits,
        f"min.{t}": min,
        f"max.{t}": max,
    }
    got = evaluate([f"{name} %d, %x, %y;" for name in definitions], dtype, x, y)
    for row, definition in zip(got, definitions.values(), strict=True):
        same(row, [wrap(definition(int(a), int(b)), dtype) for a, b in zip(x, y, strict=True)])
    got = evaluate([f"mad.lo.{t} %d, %x, %y, %x;", f"mad.hi.{t} %d, %x, %y, %y;"], dtype, x, y)
    same(got[0], [wrap(int(a) * int(b) + int(a), dtype) for a, b in zip(x, y, strict=True)])
    same(got[1], [wrap((int(a) * int(b) >> bits) + int(b), dtype) for a, b in zip(x, y, strict=True)])
    if bits < 64:
        wide = np.dtype(f"{x.dtype.kind}{2 * x.itemsize}")
        (got,) = evaluate([f"mul.wide.{t} %d, %x, %y;"], wide, x, y)
        same(got, [int(a) * int(b) for a, b in zip(x, y, strict=True)])
        (got,) = evaluate([f"mad.wide.{t} %d, %x, %y, %z;"], wide, x, y, np.full(x.size, 5, wide))
        same(got, [wrap(int(a) * int(b) + 5, wide) for a, b in zip(x, y, strict=True)])


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64, np.uint32, np.uint64])
def test_division_truncates_and_never_traps(evaluate, dtype):
    t, low, high = ptx_type(dtype), int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    x, y = pairs([low, high, 0, 1, 2, 7, 13, high // 3, wrap(-1, dtype), wrap(-7, dtype)], dtype)
    quotients, remainders = evaluate([f"div.{t} %d, %x, %y;", f"rem.{t} %d, %x, %y;"], dtype, x, y)
    for a, b, quotient, remainder in zip(x.tolist(), y.tolist(), quotients, remainders, strict=True):
        if b == 0:
            assert (quotient, remainder) == (wrap(-1, dtype), wrap(-1, dtype))
            continue
        sign = -1 if (a < 0) != (b < 0) else 1
        assert quotient == wrap(sign * (abs(a) // abs(b)), dtype)
        assert remainder == a - sign * (abs(a) // abs(b)) * b


def test_sign_and_logic_of_integers(evaluate):
    x = np.array([0, 1, -1, 7, -(2**31), 2**31 - 1], np.int32)
    y = np.array([5, -3, 12345, -(2**31), 0x0F0F0F0F, 1], np.int32)
    names = ["neg.s32 %d, %x", "abs.s32 %d, %x", "not.b32 %d, %x", "and.b32 %d, %x, %y", "or.b32 %d, %x, %y"]
    got = evaluate([name + ";" for name in [*names, "xor.b32 %d, %x, %y"]], np.int32, x, y)
    for row, want in zip(got, (-x, np.abs(x), ~x, x & y, x | y, x ^ y), strict=True):
        same(row, want)
    x = np.array([0, 1, 2**40 + 7, 2**64 - 1], np.uint64)
    got = evaluate(["popc.b64 %d, %x;", "clz.b64 %d, %x;"], np.uint32, x)
    same(got[0], [int(a).bit_count() for a in x])
    same(got[1], [64 - int(a).bit_length() for a in x])
    x = x.astype(np.uint32)
    got = evaluate(["popc.b32 %d, %x;", "clz.b32 %d, %x;", "brev.b32 %d, %x;"], np.uint32, x)
    same(got[0], [int(a).bit_count() for a in x])
    same(got[1], [32 - int(a).bit_length() for a in x])
    same(got[2], [int(f"{int(a):032b}"[::-1], 2) for a in x])


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_shifts_by_the_width_and_more(evaluate, bits):
    values = [1, 0x1234, (1 << bits - 1) | 5, (1 << bits) - 1]
    x, y = pairs(values, f"u{bits // 8}", [0, 1, bits - 1, bits, bits + 1])
    y = np.concatenate([y.astype(np.uint32), np.full(len(values), 2**32 - 1, np.uint32)])
    x = np.concatenate([x, np.array(values, x.dtype)])
    got = evaluate([f"shl.b{bits} %d, %x, %y;", f"shr.u{bits} %d, %x, %y;", f"shr.s{bits} %d, %x, %y;"], x.dtype, x, y)
    signed = x.view(f"i{bits // 8}")
    columns = list(zip(x.tolist(), signed.tolist(), np.minimum(y, bits).tolist(), strict=True))
    same(got[0], [wrap(a << n, x.dtype) for a, _, n in columns])
    same(got[1], [a >> n for a, _, n in columns])
    same(got[2].view(signed.dtype), [s >> n for _, s, n in columns])
    got = evaluate([f"shl.b{bits} %d, %x, {bits};", f"shr.u{bits} %d, %x, 3;"], x.dtype, x)
    same(got[0], np.zeros_like(x))
    same(got[1], [a >> 3 for a, *_ in columns])


def test_funnel_shift(evaluate):
    low, n = pairs([0x89ABCDEF, 1, 2**32 - 1], np.uint32, [0, 1, 8, 31, 32, 33, 70])
    high = np.full_like(low, 0x12345678)
    names = [f"shf.{side}.{mode}" for side in "lr" for mode in ("wrap", "clamp")]
    got = dict(
        zip(names, evaluate([f"{name}.b32 %d, %x, %y, %z;" for name in names], np.uint32, low, high, n), strict=True)
    )
    for name, row in got.items():
        for a, b, c, d in zip(low.tolist(), high.tolist(), n.tolist(), row.tolist(), strict=True):
            c = c % 32 if "wrap" in name else min(c, 32)
            pair = b << 32 | a
            assert d == ((pair << c) >> 32 if ".l." in name else pair >> c) % 2**32


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_fields(evaluate, bits):
    unsigned, signed = np.dtype(f"u{bits // 8}"), np.dtype(f"i{bits // 8}")
    position, length = pairs([0, 1, 5, bits - 2, bits - 1, bits, 200, 256], np.uint32)
    for value in (0xDEADBEEF89ABCDEF, 0x123456789ABCDEF, 0x80000000 << bits - 32):
        value %= 1 << bits
        x = np.full(position.size, value, unsigned)
        rows = evaluate([f"bfe.u{bits} %d, %x, %y, %z;", f"bfe.s{bits} %d, %x, %y, %z;",
                         f"bfi.b{bits} %d, {~value % 2**31}, %x, %y, %z;"], unsigned, x, position, length)  # fmt: skip
        inserted = ~value % 2**31
        for p, n, u, s, i in zip(position.tolist(), length.tolist(), *rows, strict=True):
            p, n = p & 255, n & 255
            sign = 0 if n == 0 else value >> min(p + n - 1, bits - 1) & 1
            inside = [k < n and p + k < bits for k in range(bits)]
            field = sum((value >> p + k & 1) << k for k in range(bits) if inside[k])
            assert u == field
            assert s.view(signed) == wrap(field | sum(sign << k for k in range(bits) if not inside[k]), signed)
            mask = sum(1 << p + k for k in range(bits) if inside[k])
            assert i == (value & ~mask) | (inserted << p & mask)


def test_permute_and_logic_tables(evaluate):
    x, y, z = (np.random.default_rng(0).integers(0, 2**32, 40, np.uint32) for _ in range(3))
    tables = [0x00, 0xFF, 0xF0, 0xCC, 0xAA, 0x80, 0x96, 0xE8, 0x1B]
    got = evaluate([f"lop3.b32 %d, %x, %y, %z, {table:#x};" for table in tables], np.uint32, x, y, z)
    for table, row in zip(tables, got, strict=True):
        for a, b, c, d in zip(x.tolist(), y.tolist(), z.tolist(), row.tolist(), strict=True):
            number = [(a >> k & 1) << 2 | (b >> k & 1) << 1 | c >> k & 1 for k in range(32)]
            assert d == sum((table >> number[k] & 1) << k for k in range(32))
    (got,) = evaluate(["prmt.b32 %d, %x, %y, %z;"], np.uint32, x, y, z)
    for a, b, c, d in zip(x.tolist(), y.tolist(), z.tolist(), got.tolist(), strict=True):
        source, want = (b << 32 | a).to_bytes(8, "little"), []
        for k in range(4):
            nibble = c >> 4 * k & 15
            byte = source[nibble & 7]
            want.append((255 if byte & 128 else 0) if nibble & 8 else byte)
        assert d == int.from_bytes(bytes(want), "little")


def test_carries(run):
    numbers = [0, 1, 2**64 - 1, 2**63, 0xFEDCBA9876543210, 2**32 - 1, 2**32]
    x, y = pairs(numbers, np.uint64)
    out = np.zeros((4, x.size), np.uint64)
    # The inline assembly of CUDA's own library, whose registers have names without %.
    body = f"""
    mad.wide.u32 %rd1, %i, 8, %a0; ld.global.u64 %rd2, [%rd1];
    mad.wide.u32 %rd1, %i, 8, %a1; ld.global.u64 %rd3, [%rd1];
    {{
    .reg .u32 r0, r1, r2, r3, alo, ahi, blo, bhi;
    mov.b64 {{alo,ahi}}, %rd2;   mov.b64 {{blo,bhi}}, %rd3;
    mul.lo.u32 r0, alo, blo;     mul.hi.u32 r1, alo, blo;
    mad.lo.cc.u32 r1, alo, bhi, r1;   madc.hi.u32 r2, alo, bhi, 0;
    mad.lo.cc.u32 r1, ahi, blo, r1;   madc.hi.cc.u32 r2, ahi, blo, r2;   madc.hi.u32 r3, ahi, bhi, 0;
    mad.lo.cc.u32 r2, ahi, bhi, r2;   addc.u32 r3, r3, 0;
    mov.b64 %rd4, {{r0,r1}};     mov.b64 %rd5, {{r2,r3}};
    }}
    {{
    .reg .u64 r0, r1;
    sub.cc.u64 r0, %rd4, %rd3;  subc.u64 r1, %rd5, %rd2;
    add.cc.u64 %rd6, r0, %rd3;  addc.u64 %rd7, r1, %rd2;
    }}
    sub.s64 %rd6, %rd6, %rd4;  sub.s64 %rd7, %rd7, %rd5;
    mad.wide.u32 %rd1, %i, 8, %a2;
    st.global.u64 [%rd1], %rd4;  st.global.u64 [%rd1+{8 * x.size}], %rd5;
    st.global.u64 [%rd1+{16 * x.size}], %rd6;  st.global.u64 [%rd1+{24 * x.size}], %rd7;"""
    assert run(body, x, y, out, block=x.size) is None
    products = [a * b for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    same(out[0], [p % 2**64 for p in products])
    same(out[1], [p >> 64 for p in products])
    assert not out[2:].any()  # differences that are added again


# --- floats -----------------------------------------------------------------------------------------------------------

SPECIAL = [0.0, -0.0, 1.0, -1.5, np.inf, -np.inf, np.nan, 3e38, 1e-38, -1e-40, 1 / 3]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_float_arithmetic_is_ieee754(evaluate, dtype):
    t, (x, y) = ptx_type(dtype), pairs([*SPECIAL, np.finfo(dtype).max, np.finfo(dtype).smallest_subnormal], dtype)
    names = ["add", "sub", "mul", "div.rn", "neg", "abs", "sqrt.rn", "rcp.rn", "copysign"]
    texts = [f"{name}.{t} %d, {'%x' if name in ('neg', 'abs', 'sqrt.rn', 'rcp.rn') else '%x, %y'};" for name in names]
    got = evaluate(texts, dtype, x, y)
    with np.errstate(all="ignore"):
        wants = x + y, x - y, x * y, x / y, -x, abs(x), np.sqrt(x), 1 / x, np.copysign(y, x)
    for row, want in zip(got, wants, strict=True):
        same(row, want)


def rounded(exact, dtype):
    """A fraction in the dtype under each rounding mode."""
    down = dtype(float(exact))
    while Fraction(float(down)) > exact:
        down = np.nextafter(down, dtype(-np.inf))
    while Fraction(float(np.nextafter(down, dtype(np.inf)))) <= exact:
        down = np.nextafter(down, dtype(np.inf))
    up = down if Fraction(float(down)) == exact else np.nextafter(down, dtype(np.inf))
    below, above = exact - Fraction(float(down)), Fraction(float(up)) - exact
    even = down if int(down.view(f"u{down.itemsize}")) % 2 == 0 else up
    return {"rn": even if below == above else down if below < above else up, "rm": down, "rp": up,
            "rz": down if exact > 0 else up}  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rounding_modes(evaluate, dtype):
    t, rng = ptx_type(dtype), np.random.default_rng(1)
    x, y, z = (
        rng.standard_normal(50).astype(dtype) * dtype(2) ** rng.integers(-3, 30, 50).astype(dtype) for _ in "xyz"
    )
    z[:10] = -x[:10] * y[:10]  # an fma leaves the rounding error of the product
    definitions = {
        "add": lambda a, b, c: a + b,
        "sub": lambda a, b, c: a - b,
        "mul": lambda a, b, c: a * b,
        "div": lambda a, b, c: a / b,
        "fma": lambda a, b, c: a * b + c,
    }
    for name, definition in definitions.items():
        modes = ["rn", "rm", "rp", "rz"]
        operands = "%x, %y, %z" if name == "fma" else "%x, %y"
        got = evaluate([f"{name}.{mode}.{t} %d, {operands};" for mode in modes], dtype, x, y, z)
        exact = [definition(*(Fraction(float(v)) for v in row)) for row in zip(x, y, z, strict=True)]
        for mode, row in zip(modes, got, strict=True):
            same(row, [rounded(e, dtype)[mode] for e in exact])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_min_and_max_with_nan_and_zeros(evaluate, dtype):
    t, (x, y) = ptx_type(dtype), pairs(SPECIAL, dtype)
    got = evaluate([f"{name}.{t} %d, %x, %y;" for name in ("min", "max")], dtype, x, y)
    for row, sign in zip(got, (1, -1), strict=True):
        for a, b, d in zip(x, y, row, strict=True):
            numbers = [v for v in (a, b) if not np.isnan(v)]
            want = sorted(numbers, key=lambda v: (sign * v, sign * np.copysign(1, v)))[0] if numbers else np.nan
            same(np.array([d]), [want])


def test_float32_flush_and_saturate(evaluate):
    x, y = pairs([*SPECIAL, 0.25, 5e-39, 2.0**-126], np.float32)

    def flush(v):
        return np.where(abs(v) < np.float32(2.0**-126), np.copysign(np.float32(0), v), v)

    texts = ["add.ftz.f32 %d, %x, %y;", "mul.ftz.f32 %d, %x, %y;", "abs.ftz.f32 %d, %x;", "add.sat.f32 %d, %x, %y;",
             "cvt.sat.f32.f32 %d, %x;", "cvt.ftz.f32.f32 %d, %x;", "min.NaN.f32 %d, %x, %y;",
             "fma.rn.ftz.sat.f32 %d, %x, %y, %x;"]  # fmt: skip
    got = evaluate(texts, np.float32, x, y)
    with np.errstate(all="ignore"):
        a, b = flush(x), flush(y)
        same(got[0], flush(a + b))
        same(got[1], flush(a * b))
        same(got[2], abs(a))
        same(got[3], np.nan_to_num(np.clip(x + y, 0, 1)) + np.float32(0))
        same(got[4], np.nan_to_num(np.clip(x, 0, 1)) + np.float32(0))
        same(got[5], a)
        np.testing.assert_array_equal(got[6], np.minimum(x, y))
        fma = (a.astype(np.float64) * b + a).astype(np.float32)
        np.testing.assert_allclose(got[7], np.nan_to_num(np.clip(flush(fma), 0, 1)), rtol=1e-7)


def test_approximations(evaluate):
    x = np.linspace(0.1, 7, 60).astype(np.float32)
    names = {"ex2": np.exp2, "lg2": np.log2, "sin": np.sin, "cos": np.cos, "tanh": np.tanh, "sqrt": np.sqrt,
             "rcp": lambda v: 1 / v, "rsqrt": lambda v: 1 / np.sqrt(v)}  # fmt: skip
    got = evaluate([f"{name}.approx.f32 %d, %x;" for name in names], np.float32, x)
    for row, definition in zip(got, names.values(), strict=True):
        np.testing.assert_allclose(row, definition(x.astype(np.float64)), rtol=3e-7, atol=1e-7)
    x = np.array([3.0, -7.1e100, 1e-310, -0.0, np.inf, np.nan, 1.7e308])
    got = evaluate(["rcp.approx.ftz.f64 %d, %x;", "rsqrt.approx.ftz.f64 %d, %x;"], np.float64, x)
    assert not (got.view(np.uint64)[:, :5] & 0xFFFFFFFF).any()
    np.testing.assert_allclose(got[0], [1 / 3, -1 / 7.1e100, np.inf, -np.inf, 0, np.nan, 0], rtol=1e-6)
    np.testing.assert_allclose(got[1][[0, 2, 4, 6]], [3**-0.5, np.inf, 0, 1.7e308**-0.5], rtol=1e-6)
    assert np.isnan(got[1][[1, 5]]).all()


ORDERED = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater}
ORDERED["ge"] = np.greater_equal


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.uint32, np.int64, np.uint16])
def test_comparisons(evaluate, dtype):
    t, names = ptx_type(dtype), dict(ORDERED)
    if t[0] == "f":
        x, y = pairs(SPECIAL, dtype)
        unordered = np.isnan(x) | np.isnan(y)
        names = {name: lambda a, b, f=f: f(a, b) & ~unordered for name, f in ORDERED.items()}
        names |= {name + "u": lambda a, b, f=f: f(a, b) | unordered for name, f in ORDERED.items()}
        names |= {"num": lambda a, b: ~unordered, "nan": lambda a, b: unordered}
    else:
        x, y = pairs([0, 1, 5, np.iinfo(dtype).max, np.iinfo(dtype).min, np.iinfo(dtype).max - 1], dtype)
    if t[0] == "u":
        names |= {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
    texts = [f"setp.{name}.{t} %p1, %x, %y; selp.s32 %d, 7, -7, %p1;" for name in names]
    for row, f in zip(evaluate(texts, np.int32, x, y), names.values(), strict=True):
        same(row, np.where(f(x, y), 7, -7))


def test_predicates(evaluate):
    x, y = pairs([-1, 0, 1], np.int32)
    bit = "selp.s32 %d, 1, 0, %p3;"
    lt, gt = x < y, x > 0
    setup = "setp.lt.s32 %p1, %x, %y; setp.gt.s32 %p2, %x, 0;"
    cases = {
        f"{setup} and.pred %p3, %p1, %p2; {bit}": lt & gt,
        f"{setup} or.pred %p3, %p1, %p2; {bit}": lt | gt,
        f"{setup} xor.pred %p3, %p1, %p2; {bit}": lt ^ gt,
        f"{setup} not.pred %p3, %p1; {bit}": ~lt,
        f"{setup} mov.pred %p3, %p2; {bit}": gt,
        f"mov.pred %p3, -1; {bit}": x == x,
        f"{setup} setp.ne.and.s32 %p3, %x, %y, !%p1; {bit}": (x != y) & ~lt,
        f"{setup} setp.eq.or.s32 %p4|%p3, %x, %y, %p2; {bit}": ~(x == y) | gt,
        f"{setup} mov.u32 %d, 0; @%p1 add.s32 %d, %d, 1; @!%p2 add.s32 %d, %d, 2;": lt + 2 * ~gt,
    }
    for row, want in zip(evaluate(cases, np.int32, x, y), cases.values(), strict=True):
        same(row, want)


# --- conversions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [np.float32, np.float64])
@pytest.mark.parametrize("to", [np.int16, np.int32, np.uint32, np.int64, np.uint64])
def test_float_to_integer_rounds_and_saturates(evaluate, source, to):
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 1e5, 2.0**31, -(2.0**31), 2.0**32, 2.0**63, 2.0**64, 1e30, -1e30,
                  np.inf, -np.inf, np.nan, -0.0, 123456.75], source)  # fmt: skip
    modes = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    got = evaluate([f"cvt.{mode}.{ptx_type(to)}.{ptx_type(source)} %d, %x;" for mode in modes], to, x)
    low, high, bits = int(np.iinfo(to).min), int(np.iinfo(to).max), 8 * np.dtype(to).itemsize
    nan = wrap(1 << bits - 1, to) if source is np.float64 or bits == 64 else 0  # PTX ISA 9.0

    def convert(value):
        if np.isnan(value):
            return nan
        return (high if value > 0 else low) if np.isinf(value) else min(max(int(value), low), high)

    for row, whole in zip(got, modes.values(), strict=True):
        same(row, [convert(value) for value in whole(x)])


@pytest.mark.parametrize("to", [np.float32, np.float64])
def test_integer_to_float_rounds_once(evaluate, to):
    for dtype in (np.int32, np.uint32, np.int64, np.uint64, np.uint16, np.int16):
        high = int(np.iinfo(dtype).max)
        values = [high, high - 1, high // 3, int(np.iinfo(dtype).min), 1, 0, 2**24 + 1, 2**53 + 1, 2**60 + 2**36 + 1]
        x = np.array([value for value in values if value <= high], dtype)
        modes = ("rn", "rz", "rm", "rp")
        got = evaluate([f"cvt.{mode}.{ptx_type(to)}.{ptx_type(dtype)} %d, %x;" for mode in modes], to, x)
        for mode, row in zip(modes, got, strict=True):
            same(row, [rounded(Fraction(int(value)), to)[mode] for value in x])


def test_between_floats(evaluate):
    modes = ("rn", "rm", "rp", "rz")
    texts = [f"cvt.{mode}.f32.f64 %d, %x;" for mode in modes]
    x = np.array([1 / 3, -1 / 3, 1e-46, -1e-46, 1 + 2.0**-24, 1 + 3 * 2.0**-24, 0.1, -1e37, 2.5])
    for mode, row in zip(modes, evaluate(texts, np.float32, x), strict=True):
        same(row, [rounded(Fraction(value), np.float32)[mode] for value in x])
    largest = np.finfo(np.float32).max
    x = np.array([1e300, -1e300, np.inf, np.nan, -0.0])
    for row, limits in zip(evaluate(texts, np.float32, x), [(np.inf, -np.inf), (largest, -np.inf), (np.inf, -largest),
                                                            (largest, -largest)], strict=True):  # fmt: skip
        same(row, [*limits, np.inf, np.nan, -0.0])
    x = np.array([0.5, 1.5, -2.5, 7.25, np.nan, -0.25, 3e10], np.float32)
    got = evaluate([f"cvt.{mode}.f32.f32 %d, %x;" for mode in ("rni", "rzi", "rmi", "rpi")], np.float32, x)
    for row, f in zip(got, (np.rint, np.trunc, np.floor, np.ceil), strict=True):
        same(row, f(x))
    same(evaluate(["cvt.f64.f32 %d, %x;"], np.float64, x)[0], x.astype(np.float64))


def test_between_integers(evaluate):
    x = np.array([0, 1, -1, 127, 128, 255, 256, -129, 40000, 2**31 - 1, -(2**31)], np.int32)
    for to in (np.int8, np.uint8, np.int16, np.uint16, np.int64, np.uint64):
        info = np.iinfo(to)
        wide = np.int32 if info.bits < 32 else to  # a narrow result is extended to 32 bits
        got = evaluate([f"cvt.{ptx_type(to)}.s32 %d, %x;", f"cvt.sat.{ptx_type(to)}.s32 %d, %x;"], wide, x)
        same(got[0], [wrap(int(value), to) for value in x])
        same(got[1], [min(max(int(value), int(info.min)), int(info.max)) for value in x])


def test_move_packs_and_unpacks(evaluate):
    x = np.array([0x0123456789ABCDEF, 2**64 - 2, 0x3FF8000000000000], np.uint64)
    texts = ["mov.b64 {%r1, %r2}, %x; mov.b64 %d, {%r2, %r1};", "mov.b64 {_, %r1}, %x; cvt.u64.u32 %d, %r1;",
             "mov.b64 %fd1, %x; add.f64 %fd1, %fd1, 0d3FE0000000000000; mov.b64 %d, %fd1;",
             "mov.b64 {%h1, %h2, %h3, %h4}, %x; mov.b64 %d, {%h4, %h3, %h2, %h1};",
             "mov.b32 %f1, 0f3FC00000; mov.b32 %r1, %f1; mov.b64 %d, {%r1, 0x7};", "mov.u64 %d, -3;"]  # fmt: skip
    got = evaluate(texts, np.uint64, x)
    same(got[0], [a >> 32 | (a << 32) % 2**64 for a in x.tolist()])
    same(got[1], [a >> 32 for a in x.tolist()])
    assert got[2].view(np.float64)[2] == 2.0
    same(got[3], x.view(np.uint16).reshape(-1, 4)[:, ::-1].copy().view(np.uint64).ravel())
    assert got[4].tolist() == [7 << 32 | 0x3FC00000] * 3
    assert got[5].tolist() == [2**64 - 3] * 3


# --- memory -----------------------------------------------------------------------------------------------------------


def test_vectors_and_narrow_loads(run):
    x, out = np.arange(16, dtype=np.float32), np.zeros(16, np.float32)
    body = """ld.global.nc.v4.f32 {%f1, %f2, %f3, %f4}, [%a0+16]; st.global.v4.f32 [%a1], {%f4, %f3, %f2, 0f40400000};
    ld.global.v2.u32 {%r1, _}, [%a0+40]; st.global.u32 [%a1+16], %r1;
    mov.u64 %a2, %a0; ld.global.v2.u64 {%a2, %rd2}, [%a2]; st.global.v2.u64 [%a1+32], {%a2, %rd2};"""
    assert run(body, x, out) is None
    assert out.tolist() == [7, 6, 5, 3, 10, 0, 0, 0, 0, 1, 2, 3, 0, 0, 0, 0]
    x, out = np.array([-2, 7], np.int8), np.zeros(3, np.int64)
    body = """ld.global.s8 %h1, [%a0]; cvt.s64.s16 %rd1, %h1; st.global.u64 [%a1], %rd1;
    ld.global.u8 %r1, [%a0]; cvt.s64.s32 %rd1, %r1; st.global.u64 [%a1+8], %rd1;
    ld.global.s8 %rd1, [%a0]; add.s64 %rd1, %rd1, 5; st.global.u8 [%a1+16], %rd1;"""
    assert run(body, x, out) is None
    assert out.tolist() == [-2, 254, 3]


def test_indices_of_blocks_and_threads(run):
    grid, block = (2, 3, 4), (5, 2, 3)
    count = int(np.prod(grid) * np.prod(block))
    names = [f"%{name}.{axis}" for name in ("ctaid", "tid", "nctaid", "ntid") for axis in "xyz"]
    index = "mov.u32 %r1, 0;"
    terms = zip(["%ctaid.z", "%ctaid.y", "%ctaid.x", "%tid.z", "%tid.y", "%tid.x"],
                ["%nctaid.z", "%nctaid.y", "%nctaid.x", "%ntid.z", "%ntid.y", "%ntid.x"], strict=True)  # fmt: skip
    index += "".join(f"mov.u32 %r2, {n}; mov.u32 %r3, {k}; mad.lo.s32 %r1, %r1, %r2, %r3;" for k, n in terms)
    stores = "".join(f"mov.u32 %r2, {name}; st.global.u32 [%rd1+{4 * k}], %r2;" for k, name in enumerate(names))
    out = np.full((count, 12), -1, np.int32)
    for order in ORDERS:
        body = f"{index} mad.wide.u32 %rd1, %r1, 48, %a0; {stores}"
        assert run(body, out, grid=grid, block=block, order=order) is None
        indices = np.ndindex(*grid[::-1], *block[::-1])
        same(out, [(c, b, a, f, e, d, *grid, *block) for a, b, c, d, e, f in indices])


def test_orders_of_threads_and_blocks(run):
    seen = []
    for order in ORDERS:
        counter, out = np.zeros(1, np.int32), np.full(35, -1, np.int32)
        body = """ld.global.u32 %r1, [%a0]; add.s32 %r2, %r1, 1; st.global.u32 [%a0], %r2;
        mad.wide.u32 %rd1, %r1, 4, %a1; st.global.u32 [%rd1], %i;"""
        assert run(body, counter, out, grid=5, block=7, order=order) is None
        assert sorted(out) == list(range(35))
        seen.append(out.tolist())
    assert seen[FORWARD] == list(range(35))
    assert seen[BACKWARD] == list(range(35))[::-1]
    assert seen[SHUFFLED] not in seen[:2]


def test_module_variables(run):
    outside = """.global .align 8 .b8 table[16] = {1, 2, 3, 4, 5, 6, 7, 8, 0xFF};
    .const .align 4 .f32 numbers[3] = {0f3F800000, 0fC0000000, 0f40400000};
    .visible .global .align 4 .u32 count = 40;
    .global .align 8 .u64 zeros[2];"""
    out = np.zeros(8, np.int64)
    body = """mov.u64 %rd1, table; ld.global.u64 %rd2, [%rd1]; st.global.u64 [%a0], %rd2;
    ld.global.u64 %rd2, [table+8]; st.global.u64 [%a0+8], %rd2;
    ld.const.f32 %f1, [numbers+4]; cvt.rzi.s64.f32 %rd2, %f1; st.global.u64 [%a0+16], %rd2;
    ld.global.u32 %r1, [count]; add.u32 %r1, %r1, 1; st.global.u32 [count], %r1; ld.global.u32 %r2, [count];
    st.global.u32 [%a0+24], %r2;
    mov.u64 %rd1, zeros+8; cvta.global.u64 %rd1, %rd1; ld.u64 %rd2, [%rd1]; st.u64 [%a0+32], %rd2;"""
    assert run(body, out, outside=outside) is None
    assert out.tolist() == [0x0807060504030201, 0xFF, -2, 41, 0, 0, 0, 0]
    beyond = body.replace("table+8", "table+16")
    assert run(beyond, out, outside=outside) == "global read outside of an allocation in kernel"


def test_local_memory_and_generic_addresses(run):
    out = np.zeros((3, 5), np.float32)
    # The first element of a thread's array is not written; %SP is its generic address.
    body = """.local .align 8 .b8 depot[16]; .reg .b64 %SP, %SPL; .shared .align 4 .b8 box[12];
    mov.u64 %SPL, depot; cvta.local.u64 %SP, %SPL; cvt.rn.f32.u32 %f1, %t;
    ld.local.f32 %f2, [%SPL];
    st.local.f32 [%SPL+4], %f1; add.f32 %f1, %f1, 0f3F800000; st.f32 [%SP+8], %f1; st.local.f32 [depot+12], %f1;
    mul.wide.u32 %rd1, %t, 4; mov.u64 %rd2, box; cvta.shared.u64 %rd3, %rd2; add.s64 %rd3, %rd3, %rd1;
    st.f32 [%rd3], %f1;
    cvta.to.shared.u64 %rd4, %rd3; ld.shared.f32 %f6, [%rd4];
    cvta.to.local.u64 %rd5, %SP; ld.local.v2.f32 {%f3, %f4}, [%rd5+8]; ld.f32 %f5, [%SP+4];
    mad.wide.u32 %rd1, %t, 20, %a0; st.global.f32 [%rd1], %f2; st.f32 [%rd1+4], %f5; st.f32 [%rd1+8], %f3;
    st.f32 [%rd1+12], %f4; st.f32 [%rd1+16], %f6;"""
    for order in ORDERS:
        out[:] = 0
        assert run(body, out, block=3, order=order) is None
        same(out, [[np.nan, t, t + 1, t + 1, t + 1] for t in range(3)])


def test_shared_addresses_of_32_bits(run):
    out = np.zeros(1, np.uint32)
    body = """.shared .align 4 .b8 s[8]; mov.u32 %r1, s; add.s32 %r1, %r1, -8; mov.u32 %r2, 77;
    st.shared.u32 [%r1+12], %r2; ld.shared.u32 %r3, [s+4]; st.global.u32 [%a0], %r3;"""
    assert run(body, out) is None
    assert out[0] == 77


def test_an_unwritten_register_is_nan(run):
    out = np.zeros(2)
    assert run("setp.eq.s32 %p1, %t, 5; @%p1 mov.f64 %fd1, 0d0000000000000000; st.global.f64 [%a0], %fd1;", out) is None
    assert np.isnan(out[0])


SHARED, LOCAL = ".shared .align 4 .b8 s[12]; ", ".local .align 4 .b8 l[8]; "
FAULTS = {
    "ld.global.f32 %f1, [%a0+16];": "global read outside of an allocation",
    "st.global.f32 [%a0+-4], %f1;": "global write outside of an allocation",
    "ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%a1];": "global read outside of an allocation",  # its last element
    "ld.global.v2.f32 {%f1, %f2}, [%a0+4];": "misaligned global access",
    "ld.global.u8 %r1, [%a0+15]; ld.global.u16 %r1, [%a0+15];": "misaligned global access",
    "mov.u64 %rd1, 0; ld.global.u8 %r1, [%rd1];": "global read outside of an allocation",
    "ld.f32 %f1, [%a0+16];": "global read outside of an allocation",
    "mov.u64 %rd1, 8; st.f32 [%rd1], %f1;": "global write outside of an allocation",
    SHARED + "ld.shared.f32 %f1, [s+12];": "shared read outside of shared memory",
    SHARED + "st.shared.v2.f32 [s+8], {%f1, %f1};": "shared write outside of shared memory",
    SHARED + "mov.u64 %rd1, s; ld.shared.f32 %f1, [%rd1+-4];": "shared read outside of shared memory",
    SHARED + "mov.u32 %r1, s; st.shared.f32 [%r1+2], %f1;": "misaligned shared access",
    SHARED + "cvta.shared.u64 %rd1, 12; ld.f32 %f1, [%rd1];": "shared read outside of shared memory",
    LOCAL + "ld.local.f32 %f1, [l+8];": "local read outside of local memory",
    LOCAL + "st.local.u64 [l+4], %rd1;": "misaligned local access",
    LOCAL + "cvta.local.u64 %rd1, 8; st.f32 [%rd1], %f1;": "local write outside of local memory",
    LOCAL + "cvta.local.u64 %rd1, -4; st.f32 [%rd1], %f1;": "local write outside of local memory",
    "trap;": "trap",
}


@pytest.mark.parametrize("body", FAULTS)
def test_faults(run, body):
    room = np.zeros(80, np.uint8)
    start = -room.ctypes.data % 16  # aligned, with unallocated bytes on both sides
    arrays = room[start + 16 : start + 32], room[start + 48 : start + 60]
    assert run(body, *arrays) == FAULTS[body] + " in kernel"
    harmless = "ld.global.f32 %f1, [%a0+12]; st.global.f32 [%a0], %f1; ld.global.v2.f32 {%f1, %f2}, [%a1];"
    assert run(harmless, *arrays) is None  # the next launch works


def test_faults_after_good_accesses_by_the_same_instruction(run):
    room = np.zeros(8, np.uint64).view(np.float32)  # aligned, and larger than the allocation
    body = "mad.wide.u32 %rd1, %t, 8, %a0; ld.global.v2.f32 {%f1, %f2}, [%rd1];"
    assert run(body, room[:4], block=2) is None
    for size in (3, 2):
        assert run(body, room[:size], block=2) == "global read outside of an allocation in kernel"
    body = "mad.wide.u32 %rd1, %t, 6, %a0; st.global.f32 [%rd1], 0f00000000;"
    assert run(body, room, block=2) == "misaligned global access in kernel"


def test_a_freed_allocation_is_not_cached(run):
    x, y = np.zeros(4), np.zeros(4)
    body = "ld.global.u64 %rd1, [%a0]; ld.global.f64 %fd1, [%rd1]; st.global.f64 [%a0+8], %fd1;"
    x.view(np.uint64)[0] = y.ctypes.data
    assert run(body + " //", x, y) is None
    assert run(body + " //", x, x) == "global read outside of an allocation in kernel"


# --- flow -------------------------------------------------------------------------------------------------------------


def test_loops(evaluate):
    x = np.array([1, 6, 7, 27, 97], np.int32)
    loop = """mov.u32 %r1, %x; mov.u32 %d, 0;
    $again: setp.eq.s32 %p1, %r1, 1; @%p1 bra $done;
    and.b32 %r2, %r1, 1; setp.eq.s32 %p2, %r2, 0; add.s32 %d, %d, 1;
    @!%p2 bra $odd; shr.u32 %r1, %r1, 1; bra.uni $again;
    $odd: mad.lo.s32 %r1, %r1, 3, 1; bra.uni $again;
    $done:"""
    same(evaluate([loop], np.int32, x)[0], [0, 8, 16, 111, 118])  # steps of Collatz's sequence


SUM = """
.shared .align 8 .f64 sums[32];
mad.wide.u32 %rd1, %i, 8, %a0; ld.global.f64 %fd1, [%rd1]; mov.f64 %fd2, %fd1;
mul.wide.u32 %rd2, %t, 8; mov.u64 %rd3, sums; add.s64 %rd3, %rd3, %rd2; st.shared.f64 [%rd3], %fd1;
bar.sync 0;
mov.u32 %r1, 16;
$halve: setp.ge.u32 %p1, %t, %r1; @%p1 bra $wait;
mul.wide.u32 %rd4, %r1, 8; add.s64 %rd4, %rd4, %rd3; ld.shared.f64 %fd1, [%rd4]; ld.shared.f64 %fd3, [%rd3];
add.f64 %fd1, %fd1, %fd3; st.shared.f64 [%rd3], %fd1;
$wait: bar.sync 0; shr.u32 %r1, %r1, 1; setp.ne.s32 %p1, %r1, 0; @%p1 bra $halve;
ld.shared.f64 %fd1, [sums]; sub.f64 %fd1, %fd1, %fd2; mad.wide.u32 %rd1, %i, 8, %a1; st.global.f64 [%rd1], %fd1;
"""


@pytest.mark.parametrize("order", ORDERS)
def test_barriers(run, order):
    x = np.arange(96.0) ** 2
    out = np.zeros(96)
    assert run(SUM, x, out, grid=3, block=32, order=order) is None
    same(out.reshape(3, 32), x.reshape(3, 32).sum(1, keepdims=True) - x.reshape(3, 32))
    # Without the first barrier, a thread adds values that are not written yet, unless the other threads run first.
    assert run(SUM.replace("bar.sync 0;", "", 1), x, out, grid=3, block=32, order=order) is None
    assert np.isnan(out).any() == (order != BACKWARD)


def test_the_condition_code_survives_a_barrier(run):
    out = np.zeros(4, np.uint32)
    body = """add.s32 %r1, %t, -2; add.cc.u32 %r1, %r1, %t; bar.sync 0; addc.u32 %r2, 0, 0;
    mad.wide.u32 %rd1, %t, 4, %a0; st.global.u32 [%rd1], %r2;"""
    assert run(body, out, block=4) is None
    assert out.tolist() == [0, 1, 0, 0]  # of 2**32 - 2 + 0, 2**32 - 1 + 1, 0 + 2, 1 + 3


REVERSE = """
.shared .align 4 .f32 row[33];
mul.wide.u32 %rd1, %t, 4; mov.u64 %rd2, row; add.s64 %rd3, %rd2, %rd1;
cvt.rn.f32.u32 %f1, %t; st.shared.f32 [%rd3], %f1;
bar.sync 0;
sub.s64 %rd4, %rd2, %rd1; ld.shared.f32 %f2, [%rd4+128]; add.s64 %rd5, %a0, %rd1; st.global.f32 [%rd5], %f2;
"""


@pytest.mark.parametrize("order", ORDERS)
def test_a_missing_barrier_shows_as_nan(run, order):
    out = np.zeros(33, np.float32)
    assert run(REVERSE, out, block=33, order=order) is None
    same(out, np.arange(33)[::-1])
    assert run(REVERSE.replace("bar.sync 0;", ""), out, block=33, order=order) is None
    assert np.isnan(out).sum() == 16


@pytest.mark.parametrize("order", ORDERS)
def test_divergent_barriers(run, order):
    half = "setp.lt.u32 %p1, %t, 3; @%p1 bra $other;"
    for body, what in (
        (f"{half} bar.sync 0; $other:", "some threads have ended, others wait"),
        (f"{half} bar.sync 0; bra $end; $other: bar.sync 0; $end:", "threads wait at different barriers"),
        ("setp.lt.u32 %p1, %t, 3; @%p1 exit; barrier.sync 0;", "some threads have ended, others wait"),
    ):
        assert run(body, block=8, order=order) == f"barrier divergence: {what} in kernel"
    assert run(f"{half} add.s32 %r1, %r1, 1; $other: bar.sync 0;", block=8, order=order) is None


def test_dynamic_shared_memory(run):
    outside = ".extern .shared .align 16 .b8 dynamic[];"
    body = """.shared .align 4 .b8 fixed[20]; cvt.rn.f32.u32 %f1, %t; mul.wide.u32 %rd1, %t, 4; mov.u64 %rd2, dynamic;
    add.s64 %rd2, %rd2, %rd1; st.shared.f32 [%rd2], %f1; st.shared.f32 [fixed+16], 0fBF800000; bar.sync 0;
    xor.b64 %rd2, %rd2, 4; ld.shared.f32 %f2, [%rd2]; add.s64 %rd1, %rd1, %a0; st.global.f32 [%rd1], %f2;"""
    out = np.zeros(8, np.float32)
    assert run(body, out, block=8, outside=outside, dynamic_shared=32) is None
    same(out, [1, 0, 3, 2, 5, 4, 7, 6])
    assert (
        run(body, out, block=8, outside=outside, dynamic_shared=28) == "shared write outside of shared memory in kernel"
    )
    assert run(body, out, outside=outside, dynamic_shared=2**20) == "too much shared memory in kernel"
    assert run(body, out, block=1025, outside=outside) == "too many threads in a block in kernel"


DEVICE = """
.global .align 4 .u32 factors[4] = {2, 3, 5, 7};
.func (.param .align 8 .b8 result[16]) scale(.param .b64 x, .param .b32 k);
.func (.param .b32 result) factor(.param .b32 k)
{
    .reg .b32 %r<4>; .reg .b64 %rd<4>; .local .align 4 .b8 copy[16];
    mov.u64 %rd1, factors; ld.param.u32 %r1, [k]; mul.wide.u32 %rd2, %r1, 4; add.s64 %rd1, %rd1, %rd2;
    ld.global.u32 %r2, [%rd1]; mov.u64 %rd3, copy; add.s64 %rd3, %rd3, %rd2; st.local.u32 [%rd3], %r2;
    ld.local.u32 %r3, [copy]; st.param.b32 [result], %r3;
    ret;
}
.func (.param .align 8 .b8 result[16]) scale(.param .b64 x, .param .b32 k)
{
    .reg .f64 %fd<3>; .reg .b32 %r<3>; .local .align 8 .b8 other[8];
    ld.param.f64 %fd1, [x]; ld.param.u32 %r1, [k]; st.local.f64 [other], %fd1;
    { .param .b32 param0; st.param.b32 [param0], %r1; .param .b32 retval0;
    call.uni (retval0), factor, (param0); ld.param.b32 %r2, [retval0]; }
    cvt.rn.f64.u32 %fd2, %r2; ld.local.f64 %fd1, [other]; mul.f64 %fd2, %fd2, %fd1;
    st.param.f64 [result], %fd2; st.param.b32 [result+8], %r2;
    ret;
}"""
CALL = """
cvt.rn.f64.u32 %fd1, %t; add.f64 %fd1, %fd1, 0d3FF0000000000000; mov.u32 %r2, 9;
{ // callseq 0, 0
.param .b64 param0; st.param.f64 [param0+0], %fd1; .param .b32 param1; st.param.b32 [param1+0], INDEX;
.param .align 8 .b8 retval0[16];
call.uni (retval0),
scale,
(
param0,
param1
);
ld.param.f64 %fd2, [retval0+0]; ld.param.b32 %r2, [retval0+8];
} // callseq 0
mad.wide.u32 %rd1, %t, 16, %a0; cvt.rn.f64.u32 %fd3, %r2; st.global.v2.f64 [%rd1], {%fd2, %fd3};
"""


def test_device_functions(run):
    out = np.zeros((4, 2))
    assert run(CALL.replace("INDEX", "0"), out, block=4, outside=DEVICE) is None
    same(out, [[2 * (t + 1), 2] for t in range(4)])
    # A local array is new in every call: unwritten elements are NaN.
    assert run(CALL.replace("INDEX", "%t"), out, block=4, outside=DEVICE) is None
    same(out, [[2, 2], *([(t + 1) * (2.0**32 - 1), 2**32 - 1] for t in range(1, 4))])
    assert run(CALL.replace("INDEX", "4"), out, outside=DEVICE) == "global read outside of an allocation in kernel"


def test_scopes(run):
    out = np.zeros(2, np.uint64)
    body = """{ .reg .b32 %temp; mov.b64 {%temp, %r1}, %a0; { .reg .f64 %temp; mov.f64 %temp, 0d3FF8000000000000;
    st.global.f64 [%a0], %temp; } cvt.u64.u32 %rd1, %temp; }
    { .reg .b32 %temp; mov.u32 %temp, 5; add.s32 %r2, %temp, 1; }
    mov.b64 %rd2, {%r1, %r2}; st.global.u32 [%a0+8], %r2;"""
    assert run(body, out) is None
    assert out.tolist() == [0x3FF8000000000000, 6]


def test_an_atomic_increment_starts_again_after_its_limit(run):
    counter, seen = np.array([0], np.uint32), np.zeros(5, np.uint32)
    body = "atom.global.inc.u32 %r1, [%a0], 2; mad.wide.u32 %rd1, %i, 4, %a1; st.global.u32 [%rd1], %r1;"
    assert run(body, counter, seen, grid=5) is None
    assert (seen.tolist(), counter.tolist()) == ([0, 1, 2, 0, 1], [2])


# --- refused PTX, and exported properties -----------------------------------------------------------------------------

REFUSED = """
shfl.sync.idx.b32 %r1, %r2, 0, 31, -1;
atom.global.add.u32 %r1, [%a0], 1;
red.global.add.u32 [%a0], 1;
vote.sync.any.pred %p1, %p2, -1;
bar.warp.sync -1;
bar.sync 1;
bar.sync 0, 32;
@%p1 bar.sync 0;
add.sat.s32 %r1, %r1, %r1;
mov.u32 %r1, %laneid;
add.f32 %f1, %f1, 1;
add.ftz.f64 %fd1, %fd1, %fd1;
add.s64 %fd1, %f1, 3;
cvt.f32.f16 %f1, %h1;
prmt.b32.f4e %r1, %r1, %r1, %r1;
ld.global.L1::evict_last.u32 %r1, [%a0];
tex.2d.v4.f32.s32 {%f1, %f2, %f3, %f4}, [t, {%r1, %r2}];
mov.u64 %rd1, nowhere;
call (%r1), printf, (%r2);
brx.idx %r1, table;
.reg .b128 %x;
"""


@pytest.mark.parametrize("body", REFUSED.strip().splitlines())
def test_unsupported_ptx_is_refused_by_name(body):
    with pytest.raises(NotImplementedError) as error:
        ptx.translate(module(body, 1))
    words = body.replace("@%p1 ", "").split()
    assert any(word.strip(";,()") in str(error.value) for word in words), str(error.value)


def test_refused_functions():
    with pytest.raises(NotImplementedError, match="barrier in the device function wait"):
        ptx.translate(module("", 0, ".func wait() { bar.sync 0; ret; }"))
    with pytest.raises(NotImplementedError, match="recursion in again"):
        ptx.translate(module("", 0, ".func again() { call.uni again, (); ret; }"))
    with pytest.raises(NotImplementedError, match="call of vprintf"):
        ptx.translate(module("call.uni vprintf, ();", 0, ".extern .func vprintf();"))
    with pytest.raises(NotImplementedError, match="initial values of pointer"):
        ptx.translate(module("", 0, ".global .u64 pointer = other;"))
    with pytest.raises(NotImplementedError, match="2 kernels"):
        ptx.translate(module("", 0, ".entry another() { ret; }"))


def test_the_properties_that_a_kernel_exports(load, tmp_path):
    text = """.entry some_$kernel(.param .u8 a, .param .align 8 .b8 b[12],
    .param .u64 .ptr .global .align 4 c, .param .u16 d)
    { .shared .align 8 .b8 x[5]; .shared .f64 y; ret; } // .entry other()"""
    assert ptx.entry_name("// .entry other()\n" + text) == "some_$kernel"
    library = load(text)
    assert ctypes.c_int.in_dll(library, "kernel_parameters").value == 4
    assert list((ctypes.c_int * 4).in_dll(library, "kernel_parameter_offset")) == [0, 8, 24, 32]
    assert list((ctypes.c_int * 4).in_dll(library, "kernel_parameter_size")) == [1, 12, 8, 2]
    assert ctypes.c_int.in_dll(library, "kernel_static_shared").value == 16

    first = ptx.compile_kernel(text, tmp_path / "new")
    made = first.stat().st_mtime_ns
    assert ptx.compile_kernel(text, tmp_path / "new") == first
    assert first.stat().st_mtime_ns == made
    assert ptx.compile_kernel(text.replace("x[5]", "x[6]"), tmp_path / "new") != first
    assert len(list((tmp_path / "new").iterdir())) == 2
