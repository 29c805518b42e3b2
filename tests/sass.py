"""Reads the machine code of a CUDA module: kernels, their resources, and the way through a loop.

The surprise: a loop in machine code holds rarely taken branches, so its length says little. What is
counted is the way through its body that takes every instruction of the wanted kinds and the fewest
others.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PACKAGES = {"cuobjdump": "nvidia-cuda-cuobjdump", "nvdisasm": "nvidia-cuda-nvdisasm"}


def find_tool(name: str) -> Path | None:
    """cuobjdump or nvdisasm: from the PATH, the CUDA toolkit's usual place, or its package."""
    found = shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}")
    if found:
        return Path(found)
    try:
        files = importlib.metadata.files(PACKAGES[name]) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(file.locate()) for file in files if file.name == name), None)


@dataclass(frozen=True)
class Kernel:
    """A kernel of the module: its symbol, and its name as the source writes it."""

    symbol: str
    name: str
    family: str  # the name without template arguments


_ARGUMENT = re.compile(r"Li(\d+)E|Lb([01])E|(f)|6(__half)|13__nv_(bfloat16)")


def kernel_of(symbol: str) -> Kernel:
    """Takes a mangled symbol apart; arguments other than integers, flags and numbers stay out."""
    found = re.search(r"_cu_[0-9a-f]{8}(\d+)", symbol)
    if found is None:
        return Kernel(symbol, symbol, symbol)
    family = symbol[found.end() : found.end() + int(found[1])]
    rest, arguments = symbol[found.end() + int(found[1]) :], []
    if rest.startswith("I"):
        rest = rest[1:]
        while match := _ARGUMENT.match(rest):
            number, flag, *types = match.groups()
            name = next((t for t in types if t), "")
            word = number or {"0": "false", "1": "true"}.get(flag or "", name)
            arguments.append({"f": "float", "__half": "half"}.get(word, word))
            rest = rest[match.end() :]
    return Kernel(symbol, f"{family}<{', '.join(arguments)}>" if arguments else family, family)


@dataclass(frozen=True)
class Resources:
    """What a kernel takes: registers a thread, bytes of stack and of local memory a thread."""

    registers: int
    stack: int
    local: int


@dataclass(frozen=True)
class Instruction:
    """One instruction: its byte address, guard ("@!P0" or ""), opcode with suffixes, operands."""

    address: int
    guard: str
    opcode: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"0x([0-9a-f]+)", self.operands) if self.kind == "BRA" else None
        return int(found[1], 16) if found else None

    @property
    def kind(self) -> str:
        """The opcode without suffixes."""
        return self.opcode.split(".")[0]

    @property
    def falls_through(self) -> bool:
        """Whether the instruction behind it may be next."""
        if self.guard or self.kind not in _LEAVING:
            return True
        return self.kind == "BRA" and "," in self.operands  # behind a condition as an operand


_LEAVING = ("BRA", "EXIT", "RET", "BRX", "JMP", "KILL")
_LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?PT?\d*)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")


class Function:
    """The instructions of a kernel, cut into blocks that are entered at the top only."""

    def __init__(self, kernel: Kernel, instructions: Sequence[Instruction]) -> None:
        self.kernel = kernel
        self.instructions = list(instructions)

    def count(self, pattern: str) -> int:
        """Instructions whose opcode matches from its start."""
        return sum(bool(re.match(pattern, i.opcode)) for i in self.instructions)

    @cached_property
    def blocks(self) -> list[list[Instruction]]:
        """The instructions between one label or branch and the next."""
        starts = {i.target for i in self.instructions if i.target is not None}
        blocks: list[list[Instruction]] = [[]]
        for instruction in self.instructions:
            if blocks[-1] and instruction.address in starts:
                blocks.append([])
            blocks[-1].append(instruction)
            if instruction.kind in _LEAVING:
                blocks.append([])
        return [block for block in blocks if block]

    @cached_property
    def successors(self) -> list[list[int]]:
        """Of each block, the blocks that may be next."""
        at = {block[0].address: i for i, block in enumerate(self.blocks)}
        result = []
        for i, block in enumerate(self.blocks):
            last = block[-1]
            following = [i + 1] if last.falls_through and i + 1 < len(self.blocks) else []
            target = at.get(last.target) if last.target is not None else None
            result.append(following + ([target] if target is not None else []))
        return result

    @cached_property
    def loops(self) -> dict[int, set[int]]:
        """Of each block that starts a loop, the blocks of the loop."""
        back: list[tuple[int, int]] = []
        state: dict[int, str] = {0: "open"}
        stack = [(0, iter(self.successors[0]))]
        while stack:
            block, rest = stack[-1]
            following = next(rest, None)
            if following is None:
                state[block] = "done"
                stack.pop()
            elif state.get(following) == "open":
                back.append((block, following))
            elif following not in state:
                state[following] = "open"
                stack.append((following, iter(self.successors[following])))
        before: dict[int, list[int]] = {}
        for i, following in enumerate(self.successors):
            for other in following:
                before.setdefault(other, []).append(i)
        loops: dict[int, set[int]] = {}
        for latch, head in back:
            body, waiting = loops.setdefault(head, {head}), [latch]
            while waiting:
                block = waiting.pop()
                if block not in body:
                    body.add(block)
                    waiting += before.get(block, [])
        return loops

    def main_way(self, *wanted: str) -> list[Instruction]:
        """The way once round the main loop; a loop within counts as one round.

        The main loop is the one with the most instructions of the first wanted kind; of nested
        loops that have all of them, the inner one.

        Args:
            wanted: patterns that opcodes match from their start. The way takes as many of these
                instructions as any way can, and the fewest others.

        Raises:
            ValueError: no loop has an instruction of the first kind.
        """

        def count(blocks: set[int], pattern: str) -> int:
            return sum(
                bool(re.match(pattern, i.opcode)) for block in blocks for i in self.blocks[block]
            )

        head, body = max(
            self.loops.items(),
            key=lambda loop: (count(loop[1], wanted[0]), -len(loop[1])),
            default=(0, set()),
        )
        if not count(body, wanted[0]):
            raise ValueError(f"{self.kernel.name} has no loop with {wanted[0]}")
        pattern = re.compile("|".join(wanted))
        best = {head: (0, 0)}  # (-wanted, length) of the best way to a block's start
        came: dict[int, int] = {}
        for block in self._order(head, body):
            mine = self.blocks[block]
            taken = sum(bool(pattern.match(i.opcode)) for i in mine)
            reached = (best[block][0] - taken, best[block][1] + len(mine))
            for following in self._onward(block, body):
                if following == head:
                    following = -1  # once round
                if following not in best or reached < best[following]:
                    best[following], came[following] = reached, block
        way = [came[-1]]
        while way[-1] != head:
            way.append(came[way[-1]])
        return [i for block in reversed(way) for i in self.blocks[block]]

    def _onward(self, block: int, body: set[int]) -> list[int]:
        """Successors in a loop, without the ways back of the loops within."""

        def ends_a_loop_within(b: int) -> bool:
            return block in self.loops.get(b, ()) and self.loops[b] < body

        return [b for b in self.successors[block] if b in body and not ends_a_loop_within(b)]

    def _order(self, head: int, body: set[int]) -> list[int]:
        """The blocks of a loop, each behind all that lead to it."""
        order: list[int] = []
        seen: set[int] = set()
        stack: list[tuple[int, bool]] = [(head, False)]
        while stack:
            block, done = stack.pop()
            if done:
                order.append(block)
            elif block not in seen:
                seen.add(block)
                stack.append((block, True))
                stack += [(b, False) for b in self._onward(block, body)]
        return order[::-1]


def work_behind_loads(way: Sequence[Instruction], load: str, kind: str) -> list[int]:
    """How much work each load of a loop has behind it before its value is waited for.

    Args:
        way: once round the loop; it goes on at the start.
        load: pattern that the opcodes of the loads match from their start.
        kind: of the instructions that are the work.

    Returns:
        Of each load, the instructions of that kind between it and the first that reads a register
        it writes; of a whole round where none does.
    """
    result = []
    for at, instruction in enumerate(way):
        if not re.match(load, instruction.opcode):
            continue
        first = int(_REGISTER.findall(instruction.operands)[0])
        width = 4 if "128" in instruction.opcode else 2 if "64" in instruction.opcode else 1
        written = {str(first + i) for i in range(width)}
        work = 0
        for other in [*way[at + 1 :], *way[:at]]:
            _, _, sources = other.operands.partition(",")
            if written & set(_REGISTER.findall(sources)):
                break
            work += other.kind == kind
        result.append(work)
    return result


_REGISTER = re.compile(r"\bR(\d+)")


class Module:
    """A compiled CUDA module, read with cuobjdump and nvdisasm.

    Raises:
        FileNotFoundError: a tool is missing; the message says what to install.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        tools = {name: find_tool(name) for name in PACKAGES}
        for name, found in tools.items():
            if found is None:
                raise FileNotFoundError(f"{name} is not here: pip install {PACKAGES[name]}")
        self._cuobjdump = str(tools["cuobjdump"])
        # cuobjdump runs nvdisasm, which comes in another package.
        folders = [str(tool.parent) for tool in tools.values() if tool]
        self._environment = os.environ | {"PATH": os.pathsep.join([*folders, os.environ["PATH"]])}
        self._functions: dict[tuple[str, str], Function] = {}

    def _run(self, *arguments: str) -> str:
        return subprocess.run(
            [self._cuobjdump, *arguments, str(self.path)],
            capture_output=True,
            text=True,
            check=True,
            env=self._environment,
        ).stdout

    @cached_property
    def architectures(self) -> list[str]:
        """What the module has machine code for ("sm_75"), lowest first."""
        found = set(re.findall(r"\.(sm_\d+\w*)\.cubin", self._run("-lelf")))
        return sorted(found, key=lambda name: int(re.sub(r"\D", "", name)))

    def resources(self, architecture: str) -> dict[Kernel, Resources]:
        """Of each kernel, what it takes."""
        text = self._run("-res-usage", "-arch", architecture)
        pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
        return {
            kernel_of(symbol): Resources(int(registers), int(stack), int(local))
            for symbol, registers, stack, local in re.findall(pattern, text)
        }

    def disassemble(self, architecture: str, kernels: Sequence[Kernel]) -> dict[str, Function]:
        """Kernels by name, each read once."""
        missing = [k for k in kernels if (architecture, k.name) not in self._functions]
        if missing:
            symbols = ",".join(kernel.symbol for kernel in missing)
            text = self._run("-sass", "-arch", architecture, "-fun", symbols)
            for part in text.split("Function : ")[1:]:
                symbol, _, code = part.partition("\n")
                kernel = kernel_of(symbol.strip())
                lines = (_LINE.match(line) for line in code.splitlines())
                self._functions[architecture, kernel.name] = Function(
                    kernel, [Instruction(int(m[1], 16), m[2] or "", m[3], m[4]) for m in lines if m]
                )
        return {k.name: self._functions[architecture, k.name] for k in kernels}
