"""PTX to C: run a CUDA kernel on the CPU.

compile_kernel(ptx, folder) translates a kernel, as nvJitLink returns it after link-time optimisation, to C and compiles
it with gcc; runtime.h documents what the shared object exports and needs.  A register becomes a C variable, an
instruction a C statement.  A thread runs until a barrier: then its live registers are saved, its function returns the
barrier's number, and the next thread runs.

Unsupported PTX raises NotImplementedError with its text.  Approximate instructions (ex2.approx, rcp.approx, tanh.approx
...) are computed with libm, so the errors of a GPU's special function unit do not appear.
"""

import functools
import hashlib
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

RUNTIME = Path(__file__).resolve().with_name("runtime.h")
FLAGS = ["-Og", "-march=native", "-ffp-contract=off", "-fwrapv", "-fno-strict-aliasing", "-fno-math-errno"]
FLAGS += ["-shared", "-fPIC", "-w"]

BITS = {kind + str(bits): bits for bits in (8, 16, 32, 64) for kind in "bsu"} | {"f32": 32, "f64": 64, "pred": 8}
C_TYPE = {name: f"{'' if name[0] == 's' else 'u'}int{bits}_t" for name, bits in BITS.items()}
C_TYPE |= {"f32": "float", "f64": "double", "s128": "__int128", "u128": "unsigned __int128"}
SPACES = {"param", "global", "const", "shared", "local"}
SPECIAL = {f"%{name}.{axis}": f"{name}[{k}]" for name in ("ntid", "ctaid", "nctaid") for k, axis in enumerate("xyz")}
SPECIAL |= {f"%tid.{axis}": f"thread->tid[{k}]" for k, axis in enumerate("xyz")}
CARRY = "%cc"  # the condition code, treated as a register


def refuse(what):
    raise NotImplementedError(what)


# --- the text -------------------------------------------------------------------------------------------------------

IGNORED = re.compile(r"//[^\n]*|/\*.*?\*/|^\s*\.(?:loc|file)\b[^\n]*", re.DOTALL | re.MULTILINE)
ENTRY = re.compile(r"\.entry\s+([\w$]+)")
FUNCTION = re.compile(r"\.(entry|func)\s*(?:\(([^)]*)\)\s*)?([\w$]+)\s*(?:\(([^)]*)\))?[^{;]*([{;])")
STATEMENT = re.compile(r"\s*(?:([\w$]+)\s*:(?!:)|([{}])|([^;]+);)")
VARIABLE = re.compile(
    r"(\.extern\s+)?\.(shared|global|const|local|param)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+"
    r"(?:\.ptr\s+(?:\.\w+\s+)*(?:\d+\s+)?)?([\w$]+)(?:\[(\d*)\])?(?:\s*=\s*([^;]*))?\s*(?=[;,]|$)"
)
INSTRUCTION = re.compile(r"(?:@(!?[%\w$]+)\s+)?([\w.:]+)\s*(.*)", re.DOTALL)
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|\([^)]*\)|[^,\s]+")
NAME = re.compile(r"%?[A-Za-z_$][\w$]*")
DECLARED = re.compile(r"([%\w$]+)(?:<(\d+)>)?")
ADDRESS = re.compile(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+)\s*)?\]")


@dataclass
class Variable:
    """A variable of any state space; offset: in shared, local or parameter memory."""

    name: str
    space: str
    type: str
    align: int
    bytes: int  # 0: dynamic shared memory
    values: str | None
    extern: bool
    offset: int = 0


def variables_in(text):
    """The variables that `text` declares."""
    found = []
    for extern, space, align, type_, name, count, values in VARIABLE.findall(text):
        size = BITS[type_] // 8 if type_ in BITS else refuse(f"variable {name} of type .{type_}")
        total = 0 if extern and space == "shared" else size * int(count or 1)
        found.append(Variable(name, space, type_, int(align or size), total, values or None, bool(extern)))
    return found


def place(variables, end=0):
    """Assign the offset of each variable; returns the first free byte."""
    for variable in variables:
        variable.offset = -(-end // variable.align) * variable.align
        end = variable.offset + variable.bytes
    return end


class Instruction:
    def __init__(self, text):
        guard, self.opcode, operands = INSTRUCTION.match(text).groups()
        self.text = " ".join(text.split())[:120]
        self.guard = guard  # a predicate, "!" and a predicate, or None
        self.base, *parts = self.opcode.split(".")
        self.types = [part for part in parts if part in BITS]
        self.modifiers = [part for part in parts if part not in BITS]
        self.type = self.types[0] if self.types else None
        self.kind = {None: "-", "f": "f", "p": "p"}.get(self.type and self.type[0], "i")
        self.operands = OPERAND.findall(operands)

    def uses_and_results(self, registers):
        """[registers read, registers written]"""
        results = 0 if self.base in WITHOUT_RESULT else 1
        names = [{n for text in part for n in NAME.findall(text) if n in registers}
                 for part in (self.operands[results:], self.operands[:results])]  # fmt: skip
        names[0] |= {self.guard.lstrip("!")} if self.guard else set()
        names[0] |= {CARRY} if self.base in ("addc", "subc", "madc") else set()
        names[1] |= {CARRY} if "cc" in self.modifiers else set()
        return names


WITHOUT_RESULT = {"st", "bra", "ret", "exit", "trap", "bar", "barrier", "membar", "fence", "call"}


class Function:
    """A kernel ("entry") or a device function ("func").  A name declared in an inner scope gets a suffix, so that names
    are unique.  A statement is an instruction, or a label as a string."""

    def __init__(self, kind, name, parameters, results):
        if ".reg" in (parameters or "") + (results or ""):
            refuse(f"function {name} with registers as parameters")
        self.kind, self.name = kind, name
        self.parameters, self.results = variables_in(parameters or ""), variables_in(results or "")
        self.registers, self.variables, self.statements = {CARRY: "pred"}, [], []

    def parse(self, text, position):
        """Parse the body, starting after its opening brace; returns the position after the closing one."""
        scopes = [{}]  # for each: declared name -> unique name
        while scopes:
            match = STATEMENT.match(text, position) or refuse(f"{self.name}: {text[position : position + 100]}")
            label, brace, statement = match.groups()
            position = match.end()
            if brace == "{":
                scopes.append(dict(scopes[-1]))
            elif brace == "}":
                scopes.pop()
            elif label:
                self.statements.append(label)
            elif statement[0] == ".":
                self.declare(" ".join(statement.split()), scopes)
            else:
                if scopes[-1]:
                    statement = NAME.sub(lambda m, new=scopes[-1]: new.get(m[0], m[0]), statement)
                self.statements.append(Instruction(statement))
        return position

    def declare(self, text, scopes):
        def scoped(name):
            if len(scopes) > 1:
                scopes[-1][name] = f"{name}${len(self.registers) + len(self.variables)}"
            return scopes[-1].get(name, name)

        directive, *rest = text.split(" ", 2)
        if directive == ".reg":
            type_ = rest[0][1:] if rest[0][1:] in BITS else refuse(text)
            for name, count in DECLARED.findall(rest[1]):
                for full in [f"{name}{k}" for k in range(int(count))] if count else [name]:
                    self.registers[scoped(full)] = type_
        elif directive in (".local", ".shared", ".param"):
            for variable in variables_in(text) or refuse(text):
                variable.name = scoped(variable.name)
                self.variables.append(variable)
        elif directive != ".pragma":
            refuse(text)

    def live_registers(self):
        """The live registers before each statement, as bit sets, with none after the last."""
        bit = {name: 1 << k for k, name in enumerate(self.registers)}
        labels = [(label, k) for k, label in enumerate(self.statements) if isinstance(label, str)]
        targets = dict(labels) if len(dict(labels)) == len(labels) else refuse(f"labels twice in {self.name}")
        flow = []  # of each statement: registers read, registers not written, successors
        for k, statement in enumerate(self.statements):
            if isinstance(statement, str):
                flow.append((0, -1, [k + 1]))
                continue
            uses, results = statement.uses_and_results(bit)
            written = 0 if statement.guard else sum(bit[name] for name in results)
            after = [k + 1] if statement.guard or statement.base not in ("bra", "ret", "exit") else []
            after += [targets[statement.operands[0]]] if statement.base == "bra" else []
            flow.append((sum(bit[name] for name in uses), ~written, after))
        live, changed = [0] * (len(flow) + 1), True
        while changed:
            changed = False
            for k in range(len(flow) - 1, -1, -1):
                uses, kept, after = flow[k]
                for j in after:
                    uses |= live[j] & kept
                changed |= uses != live[k]
                live[k] = uses
        return live, bit


class Module:
    """The declarations of a PTX text with one kernel."""

    def __init__(self, ptx):
        self.functions, outside, position = {}, [], 0
        text = IGNORED.sub("", ptx)
        while match := FUNCTION.search(text, position):
            outside.append(text[position : match.start()])
            position = match.end()
            kind, results, name, parameters, after = match.groups()
            if after == "{":
                self.functions[name] = Function(kind, name, parameters, results)
                position = self.functions[name].parse(text, position)
        self.variables = variables_in(" ".join([*outside, text[position:]]))

        entries = [function for function in self.functions.values() if function.kind == "entry"]
        self.entry = entries[0] if len(entries) == 1 else refuse(f"{len(entries)} kernels in a module")
        variables = self.variables + [v for function in self.functions.values() for v in function.variables]
        shared = [v for v in variables if v.space == "shared"]
        self.static_shared = place([v for v in shared if v.bytes])
        self.dynamic_start = None
        for variable in shared:
            if not variable.bytes:  # dynamic: all start after the static ones
                self.dynamic_start = place([variable], self.static_shared)
        self.local_bytes = place([v for v in variables if v.space == "local"])  # a frame per function: no recursion
        place(self.entry.parameters)


# --- instructions ---------------------------------------------------------------------------------------------------
# C templates: a, b, c and d are the operands after the result, of the instruction's type or that after the colon;
# t is the type, T its name in C, W that of the type with twice as many bits, n the number of bits.

FLOAT = {
    "add": "{a} + {b}", "sub": "{a} - {b}", "mul": "{a} * {b}", "div": "{a} / {b}", "neg": "-{a}",
    "fma": "__builtin_fma{f}({a}, {b}, {c})", "mad": "__builtin_fma{f}({a}, {b}, {c})", "abs": "__builtin_fabs{f}({a})",
    "min": "min_{t}({a}, {b})", "max": "max_{t}({a}, {b})", "copysign": "__builtin_copysign{f}({b}, {a})",
    "rcp": "1 / {a}", "sqrt": "__builtin_sqrt{f}({a})", "rsqrt": "1 / __builtin_sqrt{f}({a})",
    "ex2": "__builtin_exp2{f}({a})", "lg2": "__builtin_log2{f}({a})", "tanh": "__builtin_tanh{f}({a})",
    "sin": "__builtin_sin{f}({a})", "cos": "__builtin_cos{f}({a})",
}  # fmt: skip
OTHER = {
    "i": {
        "add": "{a} + {b}", "sub": "{a} - {b}", "neg": "-{a}", "abs": "{a} < 0 ? -{a} : {a}",
        "min": "{a} < {b} ? {a} : {b}", "max": "{a} > {b} ? {a} : {b}",
        "mul.lo": "{a} * {b}", "mul.hi": "({W}){a} * {b} >> {n}", "mul.wide": "({W}){a} * {b}",
        "mad.lo": "{a} * {b} + {c}", "mad.hi": "({T})(({W}){a} * {b} >> {n}) + {c}",
        "mad.wide": "({W}){a} * {b} + {c:wide}",
        # Division by zero gives all ones.  The smallest integer divided by -1 would trap on a CPU.
        "div": "{b} == 0 ? -1 : ({T})-1 < 0 && {b} == -1 ? -{a} : {a} / {b}",
        "rem": "{b} == 0 ? -1 : ({T})-1 < 0 && {b} == -1 ? 0 : {a} % {b}",
        "and": "{a} & {b}", "or": "{a} | {b}", "xor": "{a} ^ {b}", "not": "~{a}",
        "shl": "{b:u32} < {n} ? {a} << {b:u32} : 0",
        "shr": "{b:u32} < {n} ? {a} >> {b:u32} : ({T})-1 < 0 ? {a} >> ({n} - 1) : 0",
        "shf.l.wrap": "shf_l({a}, {b}, {c} & 31)", "shf.l.clamp": "shf_l({a}, {b}, {c} < 32 ? {c} : 32)",
        "shf.r.wrap": "shf_r({a}, {b}, {c} & 31)", "shf.r.clamp": "shf_r({a}, {b}, {c} < 32 ? {c} : 32)",
        "popc": "__builtin_popcountll({a})", "clz": "clz_{t}({a})", "brev": "brev_{t}({a})",
        "bfe": "bfe_{t}({a}, {b:u32}, {c:u32})", "bfi": "bfi_{t}({a}, {b}, {c:u32}, {d:u32})",
        "prmt": "prmt({a}, {b}, {c})", "lop3": "lop3({a}, {b}, {c}, {d})", "selp": "{c:pred} ? {a} : {b}",
    },
    "f": {"selp": "{c:pred} ? {a} : {b}"},
    "p": {"and": "{a} & {b}", "or": "{a} | {b}", "xor": "{a} ^ {b}", "not": "!{a}"},
}  # fmt: skip
CONTROL = {"bra": "goto {};", "bra.uni": "goto {};", "trap": 'driver_fault("trap", KERNEL, 0);'}
CONTROL |= dict.fromkeys(("membar.cta", "membar.gl", "membar.sys", "fence.acq_rel.gpu"), ";")  # one thread at a time
COMPARE = {
    "eq": "{a} == {b}", "ne": "{a} != {b}", "lt": "{a} < {b}", "le": "{a} <= {b}", "gt": "{a} > {b}", "ge": "{a} >= {b}"
}  # fmt: skip
COMPARE_FLOAT = COMPARE | {
    "ne": "({a} < {b} || {a} > {b})", "num": "({a} == {a} && {b} == {b})", "nan": "({a} != {a} || {b} != {b})",
    "equ": "!({a} < {b} || {a} > {b})", "neu": "{a} != {b}",
    "ltu": "!({a} >= {b})", "leu": "!({a} > {b})", "gtu": "!({a} <= {b})", "geu": "!({a} < {b})",
}  # fmt: skip
COMPARE |= {"lo": COMPARE["lt"], "ls": COMPARE["le"], "hi": COMPARE["gt"], "hs": COMPARE["ge"]}  # of unsigned integers
LOGIC = {"and": "&", "or": "|", "xor": "^"}
DIRECTED = {"rz": "FE_TOWARDZERO", "rm": "FE_DOWNWARD", "rp": "FE_UPWARD"}
TO_WHOLE = {"rni": "nearbyint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}

FAMILIES = {}  # (instruction, kind of its first type): function of (Body, Instruction, operands ...), allowed modifiers


def family(names, kinds, modifiers=""):
    """Register the translation of these instructions.  kinds: f (floats), i (integers), p (predicates), - (no type)"""

    def register(translate):
        for name in names.split():
            for kind in kinds:
                FAMILIES[name, kind] = translate, frozenset(modifiers.split())
        return translate

    return register


def choose(modifiers, table):
    """The entry of the table for the first modifier that it has, or None."""
    return next((table[modifier] for modifier in modifiers if modifier in table), None)


def rounded(modifiers, template, values, **others):
    """The C expression of a template, evaluated in the rounding mode of the modifiers."""
    mode = choose(modifiers, DIRECTED)
    if mode is None:
        return template.format(**dict(zip("abc", values, strict=False)), **others)
    expression = template.format(a="a", b="b", c="c", **others)
    return f"ROUNDED({mode}, {expression}, {', '.join((*values, '0', '0')[:3])})"


@family(" ".join(FLOAT), "f", "rn rz rm rp approx full ftz sat NaN")
def _float(body, i, d, *operands):
    t, modifiers, template = i.type, i.modifiers, FLOAT[i.base]
    ftz = f"ftz_{t}({{}})" if "ftz" in modifiers else "{}"
    values = [ftz.format(body.read(operand, t)) for operand in operands]
    if "NaN" in modifiers:
        template = f"({{a}} != {{a}} || {{b}} != {{b}} ? {{a}} + {{b}} : {template})"
    result = rounded(modifiers, template, values, f="f" if t == "f32" else "", t=t)
    if t == "f64" and "ftz" in modifiers:  # supported for reciprocals, which compute the upper half only
        result = f"upper_half({result})" if i.base in ("rcp", "rsqrt") else refuse(i.text)
    if "sat" in modifiers:
        result = f"sat_{t}({result})"
    return body.write(d, t, ftz.format(result))


@family("addc subc madc", "i", "lo hi cc")
def _carry(body, i, d, a, b, c=None):
    """add, sub and mad with carry in (addc ...), carry out (.cc), or both."""
    t, bits = "u" + i.type[1:], BITS[i.type]
    if bits < 32 or (i.type[0] == "s" and "hi" in i.modifiers):
        refuse(i.text)
    wide = C_TYPE[f"u{2 * bits}"]
    x, y = (f"({wide}){body.read(operand, t)}" for operand in (a, b))
    if c:
        x = f"({wide})({x} * {y} >> {bits})" if "hi" in i.modifiers else f"({wide})({C_TYPE[t]})({x} * {y})"
        y = body.read(c, t)
    sign = "-" if i.base.startswith("sub") else "+"
    carry_in = f" {sign} {body.read(CARRY, 'pred')}" if i.base.endswith("c") else ""
    carry_out = body.write(CARRY, "pred", f"sum >> {bits} & 1") if "cc" in i.modifiers else ""
    return f"{{ {wide} sum = {x} {sign} {y}{carry_in}; {body.write(d, t, 'sum')} {carry_out} }}"


@family("setp", "fi", " ".join({**COMPARE, **COMPARE_FLOAT, **LOGIC}) + " ftz")
def _compare(body, i, d, a, b, other=None):
    ftz = "ftz_f32({})" if "ftz" in i.modifiers else "{}"
    template = choose(i.modifiers, COMPARE_FLOAT if i.kind == "f" else COMPARE) or refuse(i.text)
    result = template.format(a=ftz.format(body.read(a, i.type)), b=ftz.format(body.read(b, i.type)))
    combine = f" {choose(i.modifiers, LOGIC)} {body.read(other, 'pred')}" if other else ""
    values = f"({result}){combine}", f"!({result}){combine}"  # setp p|q: q is the negation
    return " ".join(body.write(p, "pred", value) for p, value in zip(d.split("|"), values, strict=False))


@family("cvt", "fi", "rn rz rm rp rni rzi rmi rpi ftz sat")
def _convert(body, i, d, a):
    to, source = i.types
    bits, value, whole = BITS[to], body.read(a, source), choose(i.modifiers, TO_WHOLE)
    ftz = "ftz" in i.modifiers
    if ftz and source == "f32":
        value = f"ftz_f32({value})"
    if whole:
        value = f"__builtin_{whole}{'f' if source == 'f32' else ''}({value})"
    if to[0] == "f":
        value = rounded(i.modifiers, f"({C_TYPE[to]})({{a}})", [value])
        value = f"sat_{to}({value})" if "sat" in i.modifiers else value
        return body.write(d, to, f"ftz_f32({value})" if ftz and to == "f32" else value)
    limits = (-(1 << bits - 1), (1 << bits - 1) - 1) if to[0] == "s" else (0, (1 << bits) - 1)
    low, high = (integer(limit, to) for limit in limits)
    if source[0] == "f":
        nan = integer(1 << bits - 1 if source == "f64" or bits == 64 else 0, to)
        value = f"TO_INTEGER({C_TYPE[to]}, {value}, {low}, {high}, {nan})"
    elif "sat" in i.modifiers:
        value = f"(__int128){value} < {low} ? {low} : (__int128){value} > {high} ? {high} : {value}"
    return body.write(d, to, value)


@family("mov", "fip")
def _move(body, i, d, a):
    if "{" not in d + a:
        return body.write(d, i.type, body.read(a, i.type))
    whole, parts = f"u{BITS[i.type]}", elements(d if d[0] == "{" else a)
    bits = BITS[i.type] // len(parts)
    if d[0] == "{":
        value = body.read(a, whole)
        return " ".join(body.write(part, f"u{bits}", f"{value} >> {k * bits}") for k, part in enumerate(parts))
    values = (f"({C_TYPE[whole]}){body.read(part, f'u{bits}')} << {k * bits}" for k, part in enumerate(parts))
    return body.write(d, whole, " | ".join(values))


def elements(text):
    """The parts of {a, b} or (a, b)."""
    return [part.strip() for part in text.strip("{}()").split(",") if part.strip()]


@family("ld st", "fi", " ".join(SPACES) + " nc volatile weak v2 v4")
def _memory(body, i, *operands):
    store = i.base == "st"
    address, values = operands if store else operands[::-1]
    values, t = elements(values), i.type
    pointer = body.pointer(i, address, BITS[t] // 8 * len(values), store)
    if store:
        moves = [f"p[{k}] = {body.read(value, t)};" for k, value in enumerate(values)]
    else:
        moves = [body.write(value, t, f"p[{k}]") for k, value in enumerate(values)]
    return f"{{ {C_TYPE[t]} *p = {pointer}; {' '.join(moves)} }}"


@family("atom", "i", "global inc")
def _atomic(body, i, d, address, limit):
    if i.type != "u32" or "inc" not in i.modifiers:
        refuse(i.text)
    pointer, limit = body.pointer(i, address, 4, True), body.read(limit, "u32")  # one thread at a time
    return f"{{ uint32_t *p = {pointer}, old = *p; *p = old >= {limit} ? 0 : old + 1; {body.write(d, 'u32', 'old')} }}"


@family("cvta", "i", "to global const shared local")
def _generic_address(body, i, d, a):
    start = choose(i.modifiers, {"shared": "(uint64_t)shared", "local": "(uint64_t)thread->local"}) or "0"
    return body.write(d, i.type, f"{body.read(a, i.type)} {'-' if 'to' in i.modifiers else '+'} {start}")


@family("ret exit", "-", "uni")
def _end(body, i):
    if body.function.kind == "func":
        return "return;" if i.base == "ret" else refuse(f"exit in {body.function.name}")
    return "return thread->resume = ENDED;"


@family("bar barrier", "-", "sync cta aligned")
def _barrier(body, i, *operands):
    if body.function.kind == "func":
        refuse(f"barrier in the device function {body.function.name}")
    if i.guard or operands != ("0",) or "sync" not in i.modifiers:
        refuse(i.text)
    body.barriers += 1
    live = [name for name in body.function.registers if body.live_after & body.bit[name]]
    body.saved.update(live)
    save = "".join(f" thread->{c_name(name)} = {c_name(name)};" for name in live)
    restore = "".join(f" {c_name(name)} = thread->{c_name(name)};" for name in live)
    return f"{save} return thread->resume = {body.barriers}; barrier_{body.barriers}:;{restore}"


@family("call", "-", "uni")
def _call(body, i, *operands):
    results = elements(operands[0]) if operands[0][0] == "(" else []
    name, *rest = operands[1:] if results else operands
    arguments = elements(rest[0]) if rest else []
    function = body.module.functions.get(name)
    if function is None or len(rest) > 1:
        refuse(f"call of {name}, which is not a function of this module")
    sizes = [body.variables[variable].bytes for variable in results + arguments]
    if sizes != [variable.bytes for variable in function.results + function.parameters]:
        refuse(f"{i.text}: the arguments do not fit")
    body.calls.add(name)
    return f"{c_name(name)}({', '.join(['thread', *map(c_name, results + arguments)])});"


# --- a function -----------------------------------------------------------------------------------------------------


def c_name(name):
    return "v_" + name.replace("%", "")


def integer(number, t):
    """An integer as C text of type t."""
    number &= (1 << BITS[t]) - 1
    suffix = "ll" if BITS[t] == 64 else ""
    if t[0] != "s":
        return f"{number}u{suffix}"
    return f"{number}{suffix}" if number < 1 << BITS[t] - 1 else f"(({C_TYPE[t]}){number}u{suffix})"


def literal(text, t):
    """A number as C text of type t; 0f and 0d begin the bits of a float."""
    bits = {"0f": 32, "0d": 64}.get(text[:2].lower())
    number = int(text[2:], 16) if bits else int(text.rstrip("U"), 0)
    if t == "pred":
        return "01"[number != 0]
    if t[0] != "f":
        return integer(number, t)
    return f"{t}_of({integer(number, f'u{bits}')})" if bits == BITS[t] else refuse(f"number {text} as .{t}")


class Operand:
    """An operand in a template: {a} is its value in the instruction's type, {a:u32} in another."""

    def __init__(self, body, text, t):
        self.body, self.text, self.type = body, text, t

    def __format__(self, t):
        return self.body.read(self.text, f"{self.type[0]}{2 * BITS[self.type]}" if t == "wide" else t or self.type)


class Body:
    """Translates the body of one function; `sites` collects the instructions that may access global memory."""

    def __init__(self, module, function, sites):
        self.module, self.function, self.sites = module, function, sites
        self.variables = {v.name: v for v in (*module.variables, *function.variables)}
        self.barriers, self.saved, self.calls = 0, set(), set()
        self.head = "static int run_thread(struct Thread *thread)"
        if function.kind == "func":
            names = (f"unsigned char *{c_name(v.name)}" for v in function.results + function.parameters)
            self.head = f"static void {c_name(function.name)}({', '.join(['struct Thread *thread', *names])})"

    def read(self, operand, t):
        """The C expression of an operand as a value of type t."""
        negated, name = operand[0] == "!", operand.lstrip("!")
        declared = self.function.registers.get(name)
        if declared:
            if "pred" in (declared, t):
                same = declared == t
            else:
                same = BITS[declared] == BITS[t] or "f" not in (declared[0], t[0])
            if not same:
                refuse(f"{operand} of type .{declared} as .{t}")
            name = ("!" if negated else "") + c_name(name)
            if t[0] == "f":
                return name if declared[0] == "f" else f"{t}_of({name})"
            name = f"bits_of_{declared}({name})" if declared[0] == "f" else name
            return name if C_TYPE[t] == C_TYPE[declared] else f"(({C_TYPE[t]}){name})"
        if operand in SPECIAL:
            return f"(({C_TYPE[t]}){SPECIAL[operand]})"
        if operand[0].isdigit() or operand[0] == "-":
            return literal(operand, t)
        name, _, offset = operand.partition("+")
        variable = self.variables.get(name)
        if variable is None or variable.space == "param" or BITS[t] < 32:
            refuse(f"operand {operand}")
        inside = variable.space in ("shared", "local")
        address = f"{variable.offset}ull" if inside else f"(uint64_t)&{c_name(name)}"
        return f"(({C_TYPE[t]})({address} + {int(offset or '0', 0)}))"

    def write(self, register, t, value):
        """The C statement register = value, a value of type t."""
        if register == "_":
            return ""
        declared = self.function.registers[register]
        if declared[0] == "f" and t[0] != "f":
            value = f"{declared}_of({value})"
        elif t[0] == "f" and declared[0] != "f":
            value = f"bits_of_{t}({value})"
        elif BITS[declared] != BITS.get(t):
            value = f"({C_TYPE[t]})({value})"
        return f"{c_name(register)} = {value};"

    def pointer(self, i, operand, size, store):
        """The C expression of a checked pointer to `size` bytes."""
        name, offset = ADDRESS.fullmatch(operand).groups()
        offset = int(offset or "0", 0)
        space = choose(i.modifiers, {space: space for space in SPACES}) or "generic"
        if space == "param":
            return self.parameter(i, name, offset, size)
        declared = self.function.registers.get(name)
        address = f"{c_name(name) if declared else self.read(name, 'u64')} + {offset}"
        if declared and BITS[declared] == 32:
            address = f"(uint32_t)({address})"
        if space in ("global", "const", "generic"):
            self.sites.append(i)
            address = f"&ranges[{len(self.sites) - 1}], {address}"
        thread = "thread, " if space in ("local", "generic") else ""
        return f"{space.replace('const', 'global')}_at({thread}{address}, {size}, {store:d})"

    def parameter(self, i, name, offset, size):
        """A pointer into a parameter, a result, or an argument of a call."""
        numbers = {v.name: k for k, v in enumerate(self.function.parameters)}
        known = {v.name: v for v in (*self.variables.values(), *self.function.parameters, *self.function.results)}
        if name not in known or not 0 <= offset <= known[name].bytes - size:
            refuse(f"{i.text}: outside of the parameter")
        in_launch = self.function.kind == "entry" and name in numbers
        return f"(void *)({f'parameters[{numbers[name]}]' if in_launch else c_name(name)} + {offset})"

    def instruction(self, i):
        """The C statement of an instruction."""
        key, t = ".".join([i.base, *i.modifiers]), i.type
        if key in CONTROL:
            text = CONTROL[key].format(*i.operands)
        elif template := OTHER.get(i.kind, {}).get(key):
            values = {name: Operand(self, operand, t) for name, operand in zip("abcd", i.operands[1:], strict=False)}
            wide = f"{t[0]}{2 * BITS[t]}".replace("b", "u")
            text = template.format(**values, t=t, T=C_TYPE[t], W=C_TYPE.get(wide), n=BITS[t])
            text = self.write(i.operands[0], wide if "wide" in i.modifiers else t, text)
        else:
            base = i.base + "c" if "cc" in i.modifiers and i.base in ("add", "sub", "mad") else i.base
            translate, allowed = FAMILIES.get((base, i.kind), (None, ()))
            text = translate(self, i, *i.operands) if translate and allowed.issuperset(i.modifiers) else refuse(i.text)
        if not i.guard:
            return text
        name = c_name(i.guard.lstrip("!"))
        return f"if ({'!' * (i.guard[0] == '!')}{name}) {{ {text} }}"

    def translate(self):
        """The function's C text."""
        function = self.function
        live, self.bit = function.live_registers()
        lines = []
        for k, statement in enumerate(function.statements):
            self.live_after = live[k + 1]
            lines.append(f"{statement}:;" if isinstance(statement, str) else self.instruction(statement))
        used = set(NAME.findall(" ".join(lines)))
        names = {c_name(name): C_TYPE[t] for name, t in function.registers.items() if c_name(name) in used}
        start = [f"{t} {', '.join(name for name in names if names[name] == t)};" for t in sorted(set(names.values()))]
        start += [f"_Alignas({v.align}) unsigned char {c_name(v.name)}[{v.bytes}];"
                  for v in function.variables if v.space == "param"]  # fmt: skip
        # Registers that may be read before they are written hold 0xFF bytes, like memory.
        start += [f"__builtin_memset(&{c_name(name)}, 0xFF, sizeof {c_name(name)});"
                  for name, bit in self.bit.items() if live[0] & bit]  # fmt: skip
        start += [f"if (thread->resume == {k}) goto barrier_{k};" for k in range(1, self.barriers + 1)]
        start += [f"__builtin_memset(thread->local + {v.offset}, 0xFF, {v.bytes});"
                  for v in function.variables if v.space == "local"]  # fmt: skip
        end = "return thread->resume = ENDED;" if function.kind == "entry" else ""
        return "\n".join([self.head + " {", *start, *lines, end, "}"])


# --- a module -------------------------------------------------------------------------------------------------------


def translate(ptx):
    """The C text of a module with one kernel."""
    module, sites = Module(ptx), []
    bodies = [Body(module, function, sites) for function in module.functions.values()]
    texts = [body.translate() for body in bodies]
    refuse_recursion({body.function.name: body.calls for body in bodies})
    entry = next(body for body in bodies if body.function is module.entry)
    parameters, start = module.entry.parameters, module.dynamic_start
    saved = (f"{C_TYPE[module.entry.registers[name]]} {c_name(name)};" for name in sorted(entry.saved))
    variables = [v for v in module.variables if v.space in ("global", "const") and not v.extern]
    lines = [
        f'#define KERNEL "{module.entry.name}"',
        f"#define SHARED_BYTES {module.static_shared if start is None else f'({start} + dynamic_shared)'}",
        f"#define LOCAL_BYTES {module.local_bytes}",
        f"#define ACCESS_SITES {len(sites)}",
        f"#define SAVED_REGISTERS {' '.join(saved)}",
        f'#include "{RUNTIME}"',
        f"const int kernel_parameters = {len(parameters)}, kernel_static_shared = {module.static_shared};",
        f"const int kernel_parameter_offset[] = {{{', '.join(str(v.offset) for v in parameters)}}};",
        f"const int kernel_parameter_size[] = {{{', '.join(str(v.bytes) for v in parameters)}}};",
        *map(define, variables),
        "static int module_variable(uint64_t address, uint64_t *first, uint64_t *size) {",
        *(f"if (is_in({c_name(v.name)}, {v.bytes}, address, first, size)) return 1;" for v in variables),
        "return 0; }",
        *(body.head + ";" for body in bodies),
        *texts,
    ]
    return "\n".join(lines) + "\n"


def define(variable):
    """The C text of a module's variable and its initial values."""
    t = f"u{BITS[variable.type]}"
    try:
        values = [literal(value, t) for value in elements(variable.values or "0")]
    except ValueError:
        refuse(f"initial values of {variable.name}: {variable.values[:100]}")
    count = variable.bytes * 8 // BITS[t]
    return f"static _Alignas({variable.align}) {C_TYPE[t]} {c_name(variable.name)}[{count}] = {{{', '.join(values)}}};"


def refuse_recursion(calls, callers=()):
    """Recursion is not supported: local memory has one frame for each function."""
    for name in calls if not callers else calls[callers[-1]]:
        if name in callers:
            refuse(f"recursion in {name}")
        refuse_recursion(calls, (*callers, name))


def entry_name(ptx):
    """The name of the kernel in a PTX text."""
    return ENTRY.search(IGNORED.sub("", ptx))[1]


@functools.cache
def machine():
    """The inputs of a compiled kernel besides its PTX: this translator, the flags, the CPU."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    model = {line for line in lines if line.startswith(("model name", "flags", "CPU part", "Features"))}
    return "\n".join([Path(__file__).read_text(), RUNTIME.read_text(), *FLAGS, *sorted(model)]).encode()


def compile_kernel(ptx, folder, link=()):
    """The path of the shared object of a PTX text with one kernel, compiled unless it is in the folder.  link: more
    arguments for gcc, such as objects that replace the functions of the stand-in libcuda.

    NotImplementedError for unsupported PTX, RuntimeError if gcc fails."""
    key = hashlib.sha256(machine() + repr(link).encode() + ptx.encode()).hexdigest()[:32]
    target = Path(folder) / f"{key}.so"
    if target.exists():
        return target
    text = translate(ptx)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
    os.close(handle)
    command = ["gcc", *FLAGS, *map(str, link), "-x", "c", "-", "-o", temporary, "-lm"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        Path(temporary).unlink()
        raise RuntimeError(f"gcc: {done.stderr[:3000]}")
    Path(temporary).replace(target)  # atomic: other processes may compile the same
    return target
