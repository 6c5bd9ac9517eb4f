"""A compiled program, read from its text: its instructions, and how often each of them runs.

XLA's own cost analysis counts the body of a loop once, whatever the number of rounds; `executions` counts every one.
The text is that of `jax.stages.Compiled.as_text`, of any back end.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# Bytes of an element; what is not here (tokens) is no data. Elements of four bits are packed.
WIDTHS = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8,
    "f8e4m3fn": 1, "f8e5m2": 1, "f8e4m3": 1, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip


class Buffer(NamedTuple):
    """An array on one device. space: 0 for the device's main memory, others on the chip or on the host."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def num_bytes(self) -> int:
        """Without the padding of a tiled layout."""
        return math.ceil(WIDTHS[self.dtype] * math.prod(self.dims))

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


class Instruction(NamedTuple):
    """buffers: of its result, in order where that is a tuple. rest: what follows its operands in the text."""

    name: str
    opcode: str
    buffers: tuple[Buffer, ...]
    operands: tuple[str, ...]
    arguments: str
    rest: str
    is_root: bool

    def attribute(self, name: str) -> str:
        """The value of `name=value`: a computation's name, a number, or what stands between braces; "" for none."""
        found = re.search(rf"\b{name}=(?:%?([\w.\-]+)|\{{([^}}]*)\}})", self.rest)
        return "" if found is None else found[1] or found[2]

    @property
    def op_name(self) -> str:
        """Where in the traced function it comes from, as jax names it; "" where XLA made it."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return "" if found is None else found[1]


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in order. Names are unique inside a computation alone."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        """The instruction whose result is the computation's."""
        return next((i for i in self.instructions.values() if i.is_root), list(self.instructions.values())[-1])

    @property
    def parameters(self) -> dict[str, int]:
        """The place of each parameter, by name."""
        return {i.name: int(i.arguments) for i in self.instructions.values() if i.opcode == "parameter"}


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name, and the name of the one that runs."""

    computations: dict[str, Computation]
    entry: str


class Execution(NamedTuple):
    """An instruction that runs `times` times a run of the program.

    computation: where it stands. region: that, or, inside a fusion, the computation in which the fusion stands. rounds:
    of a `while`; None where data decide, and for all else.
    """

    instruction: Instruction
    times: int
    computation: Computation
    region: Computation
    rounds: int | None = None

    @property
    def is_fused(self) -> bool:
        """Whether it is a part of a fusion: its operands and results need not be arrays in memory."""
        return self.computation is not self.region

    def operands(self) -> list[Buffer]:
        """The arrays that it reads."""
        known = self.computation.instructions
        return [buffer for name in self.instruction.operands if name in known for buffer in known[name].buffers]


_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*->.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_BUFFER = re.compile(r"(\w+)\[([^\]]*)\](?:\{([^}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")


def parse(text: str) -> Program:
    """Reads the text of an optimised module.

    Raises:
      ValueError: no computation is marked as the entry.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if header := _HEADER.match(line):
            current = computations[header[2]] = Computation(header[2], {})
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _INSTRUCTION.match(line)):
            instruction = _instruction(found[2], found[3], bool(found[1]))
            current.instructions[instruction.name] = instruction
    if not entry:
        raise ValueError("the text is not that of a compiled program: it has no ENTRY")
    return Program(computations, entry)


def _instruction(name: str, text: str, is_root: bool) -> Instruction:
    """From `type opcode(operands), rest`."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    opening = text.index("(", end)
    closing = _closing(text, opening)
    arguments = text[opening + 1 : closing]
    return Instruction(
        name=name,
        opcode=text[end:opening].strip(),
        buffers=tuple(_buffers(text[:end])),
        operands=tuple(re.findall(r"%([\w.\-]+)", arguments)),
        arguments=arguments,
        rest=text[closing + 1 :],
        is_root=is_root,
    )


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis that opens there is closed."""
    depth = 0
    for place in range(opening, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    raise ValueError(f"a parenthesis is not closed: {text[:80]}")


def _buffers(text: str) -> Iterator[Buffer]:
    for dtype, dims, layout in _BUFFER.findall(text):
        if dtype in WIDTHS:
            space = _SPACE.search(layout)
            sizes = tuple(int(size.replace("<=", "")) for size in dims.split(",")) if dims else ()
            yield Buffer(dtype, sizes, int(space[1]) if space else 0)


# --- how often -----------------------------------------------------------------------------------------------------


def executions(program: Program) -> Iterator[Execution]:
    """Every instruction that runs, those inside loops, fusions, calls and asynchronous wrappers among them.

    Of the branches of a condition all are counted, and a loop whose rounds are not in the text once (`unknown_loops`).
    The scalar functions of reductions, sorts and scatters are not entered.
    """
    entry = program.computations[program.entry]
    yield from _walk(program, entry, entry, 1, ())


def unknown_loops(program: Program) -> list[str]:
    """Where the loops come from whose number of rounds depends on data, so that `executions` counts one."""
    loops = [e for e in executions(program) if e.instruction.opcode == "while" and e.rounds is None]
    return [loop.instruction.op_name or loop.instruction.name for loop in loops]


class _Call(NamedTuple):
    """A computation, and the instruction that calls it where the caller's own calls are `outer`."""

    instruction: Instruction
    computation: Computation


def _walk(
    program: Program, computation: Computation, region: Computation, times: int, calls: tuple[_Call, ...]
) -> Iterator[Execution]:
    for instruction in computation.instructions.values():
        here = (*calls, _Call(instruction, computation))
        rounds = _rounds(program, here) if instruction.opcode == "while" else None
        yield Execution(instruction, times, computation, region, rounds)

        def enter(name: str, times: int, *, fused: bool = False, here: tuple[_Call, ...] = here) -> Iterator[Execution]:
            inner = program.computations[name]
            yield from _walk(program, inner, region if fused else inner, times, here)

        match instruction.opcode:
            case "while":
                yield from enter(instruction.attribute("body"), times * (1 if rounds is None else rounds))
            case "fusion":
                yield from enter(instruction.attribute("calls"), times, fused=True)
            case "call" | "async-start":
                yield from enter(instruction.attribute("to_apply") or instruction.attribute("calls"), times)
            case "conditional":
                names = instruction.attribute("branch_computations").split(",")
                two = (instruction.attribute("true_computation"), instruction.attribute("false_computation"))
                for name in filter(None, (*names, *two)):
                    yield from enter(name.strip().lstrip("%"), times)


def _rounds(program: Program, calls: tuple[_Call, ...]) -> int | None:
    """Of the `while` that the last of the calls is: as XLA notes them, or from its counter's start, step and bound."""
    loop = calls[-1].instruction
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(noted[1])
    reader = _Reader(program)
    body, condition = (program.computations[loop.attribute(name)] for name in ("body", "condition"))
    test, place = reader.source(condition.root.name, condition, ())
    if test.opcode != "compare":
        return None
    sides = [reader.source(name, *place) for name in test.operands]
    counters = [_element_of_parameter(side, where[0]) for side, where in sides]
    direction = test.attribute("direction")
    if counters[0] is None or (counters[1] is not None and reader.step(body, counters[0]) in (0, None)):
        sides, counters = sides[::-1], counters[::-1]
        direction = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE"}.get(direction, direction)
    counter = counters[0]
    if counter is None:
        return None
    step = reader.step(body, counter)
    start = reader.start(counter, calls)
    if counters[1] is None:
        bound = reader.number(*sides[1])
    else:  # carried through the loop unchanged
        bound = reader.start(counters[1], calls) if reader.step(body, counters[1]) == 0 else None
    if not step or start is None or bound is None:
        return None
    match direction:
        case "LT" | "NE" if step > 0:
            rounds = math.ceil((bound - start) / step)
        case "LE" if step > 0:
            rounds = (bound - start) // step + 1
        case "GT" | "NE" if step < 0:
            rounds = math.ceil((start - bound) / -step)
        case "GE" if step < 0:
            rounds = (start - bound) // -step + 1
        case _:
            return None
    return max(0, rounds)


_TRANSPARENT = ("copy", "bitcast", "convert", "reshape", "copy-done", "copy-start", "optimization-barrier")
_Place = tuple[Computation, tuple[_Call, ...]]


class _Reader(NamedTuple):
    """Follows scalars of a program back to where they come from."""

    program: Program

    def source(self, name: str, computation: Computation, calls: tuple[_Call, ...]) -> tuple[Instruction, _Place]:
        """The instruction that makes the value, through copies and the fusions and calls around it, and its place."""
        instruction = computation.instructions[name]
        if instruction.opcode in _TRANSPARENT:
            return self.source(instruction.operands[0], computation, calls)
        if instruction.opcode in ("fusion", "call"):
            inner = self.program.computations[instruction.attribute("calls") or instruction.attribute("to_apply")]
            if inner.root.opcode != "tuple":
                return self.source(inner.root.name, inner, (*calls, _Call(instruction, computation)))
        if instruction.opcode == "parameter" and calls and calls[-1].instruction.opcode in ("fusion", "call"):
            caller = calls[-1]
            operand = caller.instruction.operands[int(instruction.arguments)]
            return self.source(operand, caller.computation, calls[:-1])
        return instruction, (computation, calls)

    def number(self, instruction: Instruction, place: _Place) -> int | None:
        """The value of a scalar that does not depend on data."""
        computation, calls = place
        if instruction.opcode == "constant":
            return int(instruction.arguments) if re.fullmatch(r"-?\d+", instruction.arguments) else None
        if instruction.opcode in ("add", "subtract"):
            a, b = (self.number(*self.source(name, *place)) for name in instruction.operands)
            return None if a is None or b is None else a + b if instruction.opcode == "add" else a - b
        index = _element_of_parameter(instruction, computation)
        if index is not None and calls and calls[-1].instruction.opcode == "while":
            body = self.program.computations[calls[-1].instruction.attribute("body")]
            return self.start(index, calls) if self.step(body, index) == 0 else None
        return None

    def start(self, index: int, calls: tuple[_Call, ...]) -> int | None:
        """What an element of a loop's state is before the first round; the loop is the last of the calls."""
        loop, computation = calls[-1]
        state, place = self.source(loop.operands[0], computation, calls[:-1])
        if state.opcode != "tuple":
            return None
        return self.number(*self.source(state.operands[index], *place))

    def step(self, body: Computation, index: int) -> int | None:
        """What a round adds to an element of a loop's state."""
        if body.root.opcode != "tuple":
            return None
        after, place = self.source(body.root.operands[index], body, ())
        if _element_of_parameter(after, place[0]) == index:
            return 0
        if after.opcode not in ("add", "subtract"):
            return None
        (left, left_place), (right, right_place) = (self.source(name, *place) for name in after.operands)
        if after.opcode == "add" and _element_of_parameter(right, right_place[0]) == index:
            (left, left_place), (right, right_place) = (right, right_place), (left, left_place)
        if _element_of_parameter(left, left_place[0]) != index:
            return None
        amount = self.number(right, right_place)
        return -amount if amount is not None and after.opcode == "subtract" else amount


def _element_of_parameter(instruction: Instruction, computation: Computation) -> int | None:
    """i of `get-tuple-element(parameter), index=i`."""
    if instruction.opcode != "get-tuple-element" or instruction.operands[0] not in computation.parameters:
        return None
    return int(instruction.attribute("index"))
