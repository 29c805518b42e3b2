"""The machine code of the CUDA kernels: what they take, what they have, and how long loops are.

nvcc and disassembler run without a GPU, so this sees on any machine what costs time on a GPU: a
spill, a load split in four, a loop that grew. One surprise: on an H100 a byte of memory traffic
pays for ten thread-instructions only, so budgets are of instructions, and are kept tight.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
from sass import Function, Instruction, Kernel, Module, kernel_of, work_behind_loads
from test_build import CUDA, ROOT

# All templates of csrc/cuda; a new kernel is entered here on purpose, and below where it is hot.
FAMILIES = {
    "add_rows_kernel",
    "assign_kernel",
    "backward_dense",
    "backward_pairs",
    "decode_dense",
    "decode_pairs",
    "direct_dense",
    "direct_pairs",
    "finish_backward",
    "finish_kernel",
    "gradient",
    "matmul_dense",
    "matmul_pairs",
    "sort_kernel",
}

WIDE_LOAD = r"LDG\.E\..*128"
LOOKUP = r"LDS$"
WIDE_LOAD_OR_COPY = rf"{WIDE_LOAD}|LDGSTS"  # Turing has no asynchronous copies

# Of each family one kernel is read on every architecture, as its types differ in conversions only.
READ = {
    "add_rows_kernel": (),
    "assign_kernel": (WIDE_LOAD,),
    "backward_dense<8, 2, 3, half>": (WIDE_LOAD, "HMMA", "MOVM"),
    "backward_pairs<8, 2, 3, half>": (WIDE_LOAD, "HMMA", "MOVM"),
    "decode_dense<8, false, half>": (WIDE_LOAD,),
    "decode_dense<8, true, half>": (WIDE_LOAD,),
    "decode_pairs<false, half>": (WIDE_LOAD, r"STG\.E\.128"),
    "decode_pairs<true, half>": (WIDE_LOAD, r"STG\.E\.128"),
    "direct_dense<8, 1, half>": (WIDE_LOAD,),
    "direct_pairs<8, 1, half, true>": (WIDE_LOAD,),
    "finish_backward<4, half>": (WIDE_LOAD,),
    "finish_kernel": (),
    "gradient<8, false, false, half>": (WIDE_LOAD, "HMMA"),
    "gradient<8, false, true, half>": (WIDE_LOAD_OR_COPY, r"LDSM\.16\.MT88", "HMMA"),
    "gradient<8, true, false, half>": (WIDE_LOAD, "HMMA"),
    "gradient<8, true, true, half>": (WIDE_LOAD_OR_COPY, r"LDSM\.16\.MT88", "HMMA"),
    "matmul_dense<8, 2, half>": (WIDE_LOAD_OR_COPY, "HMMA"),
    "matmul_pairs<8, 2, half>": (WIDE_LOAD, "LDSM", "HMMA"),
    "sort_kernel": (),
}

# Kernels with a table of 256 values, each 32 times in shared memory.
TABLES = {
    "decode_dense<8, true, half>",
    "direct_dense<8, 1, half>",
    "direct_pairs<8, 1, half, true>",
    "matmul_dense<8, 2, half>",
    "matmul_pairs<8, 2, half>",
}

# Loops of compare-and-swap are what float atomics become in shared memory; and neither is a fixed
# order of additions. Local memory is where spilled registers and run-time-indexed arrays go.
FORBIDDEN = {
    "a loop of compare-and-swap": r"(ATOM\w*|RED\w*)\.(\w+\.)*CAST?\b",
    "an atomic on floats": r"(ATOM\w*|RED\w*)\.(\w+\.)*B?F(16|32|64)",
    "local memory": r"(LDL|STL)\b",
}


@dataclass(frozen=True)
class Loop:
    """The main loop of a kernel on sm_90.

    Attributes:
        kind: of the instructions that do the work; names the loop.
        least: of them in one round.
        through: other kinds that the counted way takes, where it can.
        work: what one round does for a warp, in the unit of `budget`.
        budget: instructions for a unit of work, a tenth above what it took when last looked at.
    """

    kind: str
    least: int
    through: tuple[str, ...]
    work: float
    budget: int


# An H100 moves 13 bytes a cycle and multiprocessor (3.0 TB/s, 132 of them at 1.755 GHz), and each
# issues four instructions a cycle. So while their bytes arrive there is time for 316 instructions
# for 1,024 positions of the dense layout (5 bits: 198), 178 for 256 non-zeros of the pairs layout,
# and 49 for 32 points. Products of many columns are bound by shared memory and tensor cores.
BUDGETS = {
    # A unit of 1,024 positions; a round has as many as are on their way.
    "direct_dense<8, 1, bfloat16>": Loop("FFMA", 64, (WIDE_LOAD,), 2, 189),
    "direct_dense<5, 1, bfloat16>": Loop("FFMA", 96, (WIDE_LOAD,), 3, 186),
    "direct_dense<8, 2, bfloat16>": Loop("FFMA", 128, (WIDE_LOAD,), 2, 251),
    "direct_dense<5, 2, bfloat16>": Loop("FFMA", 192, (WIDE_LOAD,), 3, 247),
    # 256 non-zeros.
    "direct_pairs<8, 1, bfloat16, true>": Loop("FFMA", 16, (WIDE_LOAD,), 2, 105),
    # 256 non-zeros, put among zeros; a lane has two chunks in a round.
    "decode_pairs<true, bfloat16>": Loop("STS", 16, (WIDE_LOAD, "LDS"), 2, 81),
    # A unit times 16 columns; times 64, where a warp has two units at once.
    "matmul_dense<8, 2, bfloat16>": Loop("HMMA", 8, ("LDGSTS",), 1, 224),
    "matmul_dense<5, 2, bfloat16>": Loop("HMMA", 8, ("LDGSTS",), 1, 238),
    "matmul_dense<8, 8, bfloat16>": Loop("HMMA", 64, ("LDGSTS",), 2, 231),
    # A window of 16 rows and 248 columns, of which a warp has two, times 16 columns and times 64.
    # With four chunks a lane: 1,024 non-zeros; and 4 and 16 copies of X.
    "matmul_pairs<8, 2, bfloat16>": Loop("HMMA", 64, (WIDE_LOAD, "LDGSTS", LOOKUP), 2, 548),
    "matmul_pairs<8, 8, bfloat16>": Loop("HMMA", 256, (WIDE_LOAD, "LDGSTS", LOOKUP), 2, 812),
    # A unit and 32 rows of x, both gradients; pairs: with 512 non-zeros.
    "backward_dense<8, 2, 3, bfloat16>": Loop("HMMA", 32, (WIDE_LOAD,), 1, 580),
    "backward_pairs<8, 2, 3, bfloat16>": Loop("HMMA", 32, (WIDE_LOAD, "STS"), 1, 800),
    # 32 rows, 64 slots and 16 windows of an image, gathered, then copied; in float32, 8 gathered.
    "gradient<8, false, false, bfloat16>": Loop("HMMA", 16, ("LDG", "STS"), 1, 353),
    "gradient<8, false, true, bfloat16>": Loop("HMMA", 16, ("LDGSTS",), 1, 100),
    "gradient<8, false, false, float>": Loop("FFMA", 256, (), 1, 495),
    # 32 points.
    "assign_kernel": Loop("ATOMS", 16, (WIDE_LOAD, r"STG\.E$"), 16, 28),
}


# Multiply-adds, or products of tensor cores, that a warp has left to do when it asks for codes: of
# all the units or chunks that are on their way, but for what is begun before the loads are issued.
PREFETCHED = {
    "direct_dense<8, 1, bfloat16>": 2 * 32 - 8,
    "direct_dense<5, 1, bfloat16>": 3 * 32 - 8,
    "direct_dense<8, 2, bfloat16>": 2 * 64 - 16,
    "direct_dense<5, 2, bfloat16>": 3 * 64 - 16,
    "direct_pairs<8, 1, bfloat16, true>": 2 * 8,
    "direct_pairs<8, 2, bfloat16, true>": 2 * 16,
    "matmul_dense<8, 8, bfloat16>": 64,
    "matmul_dense<5, 8, bfloat16>": 64,
}
CODES = r"LDG\.E\.EF"


@pytest.fixture(scope="module")
def module() -> Module:
    if CUDA is None:
        pytest.skip("_cuda was not built")
    built = CUDA.stat().st_mtime
    newer = [p.name for p in (ROOT / "csrc").glob("**/*.*") if p.stat().st_mtime > built]
    if newer:
        pytest.skip(f"{CUDA.name} is older than {newer[0]}: build it again")
    try:
        return Module(CUDA)
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["sm_75", "sm_80", "sm_86", "sm_89", "sm_90"])
def architecture(request: pytest.FixtureRequest, module: Module) -> str:
    if request.param not in module.architectures:
        pytest.skip(f"_cuda was built for {', '.join(module.architectures)} only")
    return request.param


def read(module: Module, architecture: str, names: set[str]) -> dict[str, Function]:
    kernels = {kernel.name: kernel for kernel in module.resources(architecture)}
    missing = names - set(kernels)
    assert not missing, f"not in {module.path.name}: {missing}; is it older than its sources?"
    chosen: list[Kernel] = [kernels[name] for name in sorted(names)]
    return module.disassemble(architecture, chosen)


# ---- the reader itself ----


def function(code: str) -> Function:
    """A function of one instruction a line, 16 bytes each; branches name lines."""
    instructions = []
    for i, line in enumerate(code.split("\n")):
        guard, _, rest = line.strip().rpartition("| ")
        opcode, _, operands = rest.partition(" ")
        if opcode == "BRA":
            operands = f"{16 * int(operands):#x}"
        instructions.append(Instruction(16 * i, guard, opcode, operands))
    return Function(kernel_of("f"), instructions)


def test_the_way_through_a_loop_leaves_out_what_is_taken_rarely() -> None:
    code = """MOV R1, 0
        LDG.E.128 R4, [R2]
        @P0| BRA 5
        FADD R5, R5, R5
        FADD R5, R5, R5
        IADD3 R7, R7, 1, RZ
        @P1| BRA 5
        FFMA R6, R4, R4, R6
        @P2| BRA 1
        EXIT"""
    way = [i.opcode for i in function(code).main_way("FFMA", "LDG")]
    assert way == ["LDG.E.128", "BRA", "IADD3", "BRA", "FFMA", "BRA"]  # the inner loop once
    way = [i.opcode for i in function(code).main_way("FFMA", "FADD")]
    assert way.count("FADD") == 2
    with pytest.raises(ValueError, match="f has no loop with HMMA"):
        function(code).main_way("HMMA")


def test_a_block_behind_the_end_belongs_to_the_loop_that_it_returns_to() -> None:
    code = """FFMA R6, R4, R4, R6
        @P0| BRA 4
        @P2| BRA 0
        EXIT
        FADD R5, R5, R5
        BRA 2"""
    assert [i.opcode for i in function(code).main_way("FFMA")] == ["FFMA", "BRA", "BRA"]
    assert len(function(code).main_way("FFMA", "FADD")) == 5


def test_work_behind_a_load_ends_where_its_value_is_read() -> None:
    code = """FFMA R1, R2, R3, R1
        LDG.E.EF.128 R4, desc[UR4][R8.64]
        FFMA R1, R2, R3, R1
        LDG.E.EF R9, desc[UR4][R10.64]
        FFMA R1, R9, R3, R1
        MOV R7, R11
        FFMA R1, R2, R6, R1"""
    way = function(code).instructions
    assert work_behind_loads(way, "LDG", "FFMA") == [2, 0]
    assert work_behind_loads(way[:-1], "LDG", "FFMA") == [3, 0]


def test_symbols_are_read_as_the_source_writes_them() -> None:
    prefix = "_ZN9placekern4cuda41_GLOBAL__N__af6d0c43_9_direct_cu_ea476bac"
    name = f"{prefix}12direct_pairsILi8ELi1E13__nv_bfloat16Lb0EEEvNS0_10DirectArgsE"
    assert kernel_of(name).name == "direct_pairs<8, 1, bfloat16, false>"
    assert (
        kernel_of(f"{prefix}11decode_thatILi5EfEEvNS0_10DecodeArgsE").name
        == "decode_that<5, float>"
    )
    assert kernel_of(f"{prefix}13finish_kernelENS0_6OutputE").name == "finish_kernel"


def test_what_is_forbidden_is_recognised() -> None:
    opcodes = {
        "ATOMS.CAST.SPIN": "a loop of compare-and-swap",
        "ATOM.E.CAS.STRONG.GPU": "a loop of compare-and-swap",
        "RED.E.ADD.F32.FTZ.RN.STRONG.GPU": "an atomic on floats",
        "REDG.E.ADD.F64.RN.STRONG.GPU": "an atomic on floats",
        "STL.64": "local memory",
        "LDL": "local memory",
        "ATOMS.ADD": None,
        "ATOMS.POPC.INC.32": None,
        "LDG.E.128": None,
        "STS.64": None,
    }
    for opcode, expected in opcodes.items():
        found = [what for what, pattern in FORBIDDEN.items() if re.match(pattern, opcode)]
        assert found == ([expected] if expected else []), opcode


# ---- the kernels ----


def test_every_kernel_is_known(module: Module, architecture: str) -> None:
    assert {kernel.family for kernel in module.resources(architecture)} == FAMILIES


def test_no_kernel_spills_or_has_a_stack(module: Module, architecture: str) -> None:
    taken = module.resources(architecture)
    assert len(taken) > 80
    assert not [kernel.name for kernel, r in taken.items() if r.stack or r.local]


def test_kernels_have_what_they_were_written_for(module: Module, architecture: str) -> None:
    for name, function in read(module, architecture, set(READ)).items():
        assert len(function.instructions) > 20, name
        for pattern in READ[name]:
            assert function.count(pattern), f"{name} has no {pattern}"
        for what, pattern in FORBIDDEN.items():
            assert not function.count(pattern), f"{name} has {what}"


def fills_its_table_at_once(function: Function) -> bool:
    """Whether what comes before the first barrier stores all copies of an entry 16 bytes at a time.

    No loop there may load a value and store a word of it: each round would wait for memory.
    """
    barrier = next(i.address for i in function.instructions if i.kind == "BAR")
    before = [i for i in function.instructions if i.address < barrier]
    for body in function.loops.values():
        opcodes = {i.opcode for block in body for i in function.blocks[block] if i in before}
        if "STS" in opcodes and any(opcode.startswith("LDG") for opcode in opcodes):
            return False
    return sum(i.opcode == "STS.128" for i in before) >= 8


def test_a_fill_that_waits_for_each_value_is_recognised() -> None:
    serial = "LDG.E R5, [R2]\n STS [R6], R5\n @P0| BRA 0\n"
    at_once = "LDG.E R5, [R2]\n" + "STS.128 [R6], R8\n" * 8
    rest = "BAR.SYNC 0x0\n" + at_once + "EXIT"
    assert fills_its_table_at_once(function(at_once + rest))
    assert not fills_its_table_at_once(function(serial + rest))
    assert not fills_its_table_at_once(function(serial + at_once + rest))
    assert not fills_its_table_at_once(function(at_once[: at_once.rindex("STS")] + rest))


def test_tables_are_filled_without_waiting_for_each_value(
    module: Module, architecture: str
) -> None:
    for name, function in read(module, architecture, TABLES).items():
        assert fills_its_table_at_once(function), name


def test_sums_are_added_by_a_kernel_that_was_launched_early(
    module: Module, architecture: str
) -> None:
    products = {name for name in READ if name.startswith(("direct_", "matmul_"))}
    functions = read(module, architecture, {"finish_kernel"} | products)
    finish = [i.opcode for i in functions.pop("finish_kernel").instructions]
    hopper = architecture == "sm_90"  # the first that can launch one early
    assert ("ACQBULK" in finish) == hopper  # waits for the kernel before it
    if hopper:
        assert not any(opcode.startswith("LDG") for opcode in finish[: finish.index("ACQBULK")])
    for name, function in functions.items():
        assert function.count("PREEXIT") == hopper, name


@pytest.mark.parametrize("name", BUDGETS)
def test_main_loops_stay_within_their_budget(module: Module, name: str) -> None:
    if "sm_90" not in module.architectures:
        pytest.skip(f"_cuda was built for {', '.join(module.architectures)} only")
    loop = BUDGETS[name]
    way = read(module, "sm_90", set(BUDGETS))[name].main_way(loop.kind, *loop.through)
    for pattern in loop.through:
        assert any(re.match(pattern, i.opcode) for i in way), f"no {pattern} in the main loop"
    assert sum(i.kind == loop.kind for i in way) >= loop.least
    assert len(way) / loop.work <= loop.budget


@pytest.mark.parametrize("name", PREFETCHED)
def test_codes_are_asked_for_before_the_work_on_others(module: Module, name: str) -> None:
    if "sm_90" not in module.architectures:
        pytest.skip(f"_cuda was built for {', '.join(module.architectures)} only")
    kind = "HMMA" if name.startswith("matmul") else "FFMA"
    way = read(module, "sm_90", {name})[name].main_way(kind, WIDE_LOAD)
    work = work_behind_loads(way, CODES, kind)
    assert work
    assert min(work) >= PREFETCHED[name]
